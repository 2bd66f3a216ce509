"""One line for errors, and all cores for a single CPU process that `accelerate launch` started."""

import errno
from pathlib import Path

import pytest

from hfproj import cli


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, "all"),
        ({"OMP_NUM_THREADS": "1"}, "as they are"),  # no launcher: the user's own choice
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "2"}, "as they are"),
    ],
)
def test_cores(monkeypatch, variables, expected):
    import os

    for name in ("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    threads = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    cli.run(lambda: None)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert threads == ([cores] if expected == "all" else [])


def test_what_is_an_adapter(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not cli.is_adapter(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert cli.is_adapter(str(tmp_path))
    for name in ("vit_nano", "timm/resnet18.a1_in1k", "no/such", "https://somewhere/else/x"):
        assert not cli.is_adapter(name)


def test_a_full_disk_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)

    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "out/results.json")

    with pytest.raises(SystemExit) as caught:
        cli.run(full)
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "error: out/results.json can't be written (No space left on device); what was written before it is whole and "
        "stays.\n"
    )

    def missing():
        Path("/nowhere/at all").read_text()

    with pytest.raises(FileNotFoundError):  # may be an error of ours: its traceback tells
        cli.run(missing)
