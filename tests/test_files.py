import errno
import json
import os
import time

import pytest

from hfproj.files import command_line, measured_once, portable, write_atomic


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("facebook/dinov2-small", "facebook/dinov2-small"),
        ("https://huggingface.co/facebook/dinov2-small", "https://huggingface.co/facebook/dinov2-small"),
        ("--data /mnt/x/cifar10 --out=/tmp/run", "--data ./cifar10 --out=./run"),
        ("~/runs/a", "./a"),
        ("~someone/runs/a", "./a"),
        (r"C:\Users\someone\a", "./a"),
        ("./out/run", "./out/run"),
        ("1/2 and a / b", "1/2 and a / b"),
        ("['/data/one', '/data/two']", "['./one', './two']"),
    ],
)
def test_portable_text(text, expected):
    assert portable(text) == expected


def test_a_path_inside_the_working_directory_stays_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert portable(tmp_path / "out" / "run") == "./out/run"
    assert command_line([str(tmp_path / "recipes" / "a.py"), "--x", "a b"]) == "python ./recipes/a.py --x 'a b'"


def test_a_command_launches_what_was_launched(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command_line(["a.py"]) == "accelerate launch --multi_gpu --num_processes 2 a.py"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert command_line(["a.py"]) == "accelerate launch --multi_gpu --num_processes 2 --mixed_precision bf16 a.py"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert command_line(["a.py"]) == "accelerate launch --mixed_precision bf16 a.py"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert command_line(["a.py"]) == "python a.py"


def test_a_command_shows_no_token():
    words = ["a.py", "--hub_token", "hf_" + 34 * "a", "--hub_token=hf_" + 34 * "b", "--hf_tokenizer", "hf_short"]
    said = command_line(words)
    assert said == "python a.py --hub_token $HF_TOKEN --hub_token=$HF_TOKEN --hf_tokenizer hf_short"


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomic(path, b"old")

    def fail(*_):
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_measurement_is_made_once(tmp_path):
    calls = []

    def measure():
        calls.append(time.monotonic())
        return {"value": 2 / 3, "count": len(calls)}

    first = measured_once(tmp_path / "new" / "a.json", measure)
    assert first == measured_once(tmp_path / "new" / "a.json", measure) == {"value": 0.666667, "count": 1}
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == first


def test_a_measurement_that_fails_is_not_kept(tmp_path):
    with pytest.raises(ZeroDivisionError):
        measured_once(tmp_path / "a.json", lambda: 1 / 0)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    """The system says which file it could not open, and not which one it had no room for."""

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_atomic(tmp_path / "results.json", b"x")
    assert error.value.filename == str(tmp_path / "results.json")
    assert not list(tmp_path.iterdir())
