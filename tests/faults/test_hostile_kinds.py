"""The kinds of what a stranger's file can ask for, one small case each."""

import zipfile

import pytest
import torch
from cases import assert_refused
from torch import nn

import hfproj
from hfproj import limits
from hfproj.backbones.allowance import allowance, bytes_of
from hfproj.converters.pickles import check_pickles
from hfproj.hub.staging import check_pushable
from hfproj.hub.untrusted import is_folder_name, shape_of
from hfproj.strict_json import parse_json


def test_what_is_made_is_counted_before_it_is_there():
    def made():
        return nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(5)))

    assert bytes_of(made, 1 << 30, "x", "y") == 5 * 4 * (1000 * 1000 + 1000)
    assert_refused(
        lambda: bytes_of(made, 1 << 23, "It", "make it smaller"), "It would take", "8,388,608 are allowed; make it",
        error=hfproj.AdapterFileError,
    )  # fmt: skip
    with allowance(1 << 23, "It", "y"):
        nn.Linear(1000, 1000)
    nn.Linear(3000, 3000)  # nothing is counted outside


def test_many_modules_are_refused(monkeypatch):
    monkeypatch.setattr(limits, "BACKBONE_MODULES", 50)
    with pytest.raises(hfproj.AdapterFileError, match="51 modules or more, and 50 are allowed"):
        bytes_of(lambda: nn.Sequential(*(nn.Identity() for _ in range(60))), 1, "It", "y")


@pytest.mark.parametrize("value", ["22", [2.0], [True], [-1], [1] * 9, [1 << 48], None, [[1]]])
def test_no_shape(value):
    with pytest.raises(ValueError, match="is no shape"):
        shape_of(value)


@pytest.mark.parametrize("name", ["NUL", "con", "aux.safetensors", "COM1", "lpt9.x", "CONIN$", "com¹", "nul .x"])
def test_names_of_devices(name):
    assert not is_folder_name(name)


@pytest.mark.parametrize("name", ["console", "com", "com10", "nulls", "student", "Kopf-2", "größe"])
def test_names_of_no_device(name):
    assert is_folder_name(name)


def test_adapters_whose_names_differ_in_case(tmp_path):
    from peft import get_peft_model

    config = hfproj.ProjectionHeadConfig(out_dim=4)
    model = get_peft_model(hfproj.load_backbone("vit_nano"), config, adapter_name="Head")
    model.add_adapter("head", hfproj.ProjectionHeadConfig(out_dim=4))
    assert_refused(lambda: check_pushable(model), "'Head' and 'head' are one folder", "rename one")
    model.save_pretrained(tmp_path)
    if len(list(tmp_path.iterdir())) > 2:  # of a folder where case counts
        with pytest.warns(UserWarning, match="one folder with 'Head'"):
            assert list(hfproj.list_adapters(tmp_path)) == ["Head"]


def test_values_are_counted_before_they_are_made(monkeypatch):
    monkeypatch.setattr(limits, "JSON_VALUES", 10)
    assert parse_json(b'{"a": [1, 2, 3]}') == {"a": [1, 2, 3]}
    with pytest.raises(ValueError, match="up to 13 values, more than 10"):
        parse_json(b'{"a": [' + b"[]," * 5 + b"[]]}")


def test_a_sound_checkpoint_is_read_as_before(tmp_path):
    tied = torch.randn(8, 8)
    content = {"a": tied, "b": tied, "t": tied.t(), "p": nn.Parameter(tied), "half": tied.half(), "n": torch.tensor(3)}
    for zipped in (True, False):
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        check_pickles(tmp_path / "a.pth")


def test_archives_that_end_elsewhere(tmp_path):
    torch.save({"a": torch.zeros(4)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth", "a") as archive:
        archive.comment = b"more"
    with pytest.raises(ValueError, match="does not end where the file does"):
        check_pickles(tmp_path / "a.pth")
