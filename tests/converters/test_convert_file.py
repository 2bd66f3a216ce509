"""Reading checkpoint files: data alone, whatever the file wants."""

import argparse
import os
import pathlib
import pickle

import numpy as np
import pytest
import torch
from cases import assert_refused

import hfproj
from hfproj.converters.checkpoint import read_file


class Command:
    """A pickle of it runs a command when it is loaded."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def refused(file, *said, error=hfproj.AdapterFileError):
    message = assert_refused(lambda: hfproj.convert(file, "moco_v2"), *said, error=error)
    assert str(file.parent) not in message or error is hfproj.UsageError


@pytest.mark.parametrize("zipped", [True, False])
def test_what_official_training_saves_beside_tensors(tmp_path, zipped):
    scalars = [np.float64(0.1), np.float32(0.5), np.int64(3), np.int32(-1), np.bool_(True), np.float16(2)]
    content = {
        "args": argparse.Namespace(arch="vit_small", lr=1e-3, crops=(0.4, 1.0), fp16=True, nested=None),
        "optimizer": {"param_groups": [{"lr": scalars}], "state": {0: {"step": 3, "exp_avg": torch.ones(2)}}},
        "teacher": {"x": torch.arange(3.0)},
        "epoch": 100,
    }
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = read_file(tmp_path / "a.pth")
    assert found["optimizer"]["param_groups"][0]["lr"] == scalars
    assert found["args"] == content["args"]
    assert torch.equal(found["teacher"]["x"], torch.arange(3.0))


def test_scalars_as_numpy_1_named_their_function(tmp_path):
    torch.save({"lr": np.float64(0.25)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a.pth").read_bytes()
    for old, new in ((b"numpy._core.multiarray", b"numpy.core.multiarray"), (b"numpy.core.multiarray",) * 2):
        data = data.replace(old, new)
    assert b"numpy.core.multiarray" in data
    (tmp_path / "a.pth").write_bytes(data)
    assert read_file(tmp_path / "a.pth") == {"lr": 0.25}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["state_dict", "args"])
def test_code_is_not_run(tmp_path, zipped, place):
    run, file = tmp_path / "run", tmp_path / "a.pth"
    content = {"state_dict": {"x": torch.ones(2)}, place: Command(f"touch {run}")}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    refused(file, "a.pth holds more than data: ", "system", "may run code", "was not", "save the tensors alone")
    file.write_bytes(pickle.dumps(Command(f"touch {run}")))
    refused(file)
    assert not run.exists()
    pickle.loads(file.read_bytes())  # the danger is real
    assert run.exists()


def test_objects_that_are_no_data(tmp_path):
    for value in (torch.nn.Linear(2, 2), pathlib.PurePosixPath("a"), np.zeros(3), Command):
        torch.save({"state_dict": {}, "x": value}, tmp_path / "a.pth")
        refused(tmp_path / "a.pth", "holds more than data")


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), 3, None])
def test_no_dictionary(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "expected a dictionary with the state dict of a network")


@pytest.mark.parametrize("size", [0, 1, 10, 300, -1, -200, -2000])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_was_cut(tmp_path, size, zipped):
    torch.save({"state_dict": {"x": torch.randn(2000)}}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "b.pth").write_bytes(data[:size])
    refused(tmp_path / "b.pth", "b.pth")


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"<html>404</html>", b"PK\x03\x04" + b"x" * 50, b"\x80\x02}q\x00."])
def test_a_file_of_something_else(tmp_path, data):
    for name in ("a.pth", "a.pth.tar", "a.safetensors"):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, name)


def test_no_file(tmp_path):
    refused(tmp_path / "none.pth", "There is no checkpoint", error=hfproj.UsageError)
    refused(tmp_path, "There is no checkpoint", error=hfproj.UsageError)


def test_the_list_of_what_is_allowed_is_torchs_again_afterwards(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    torch.save({"args": argparse.Namespace()}, tmp_path / "a.pth")
    read_file(tmp_path / "a.pth")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pth", weights_only=True)
