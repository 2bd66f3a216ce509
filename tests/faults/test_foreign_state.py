"""Checkpoints that are readable and hold something else: of another version, optimizer or model, nested without end."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import runs
import torch
from test_damage import damage, foreign_cases

import hfproj
from hfproj.saving import folders, manifest
from hfproj.saving.folders import checkpoint_to_resume


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    runs.train(folder, max_steps=4)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def rewritten(folder, **changes):
    """Change entries of a manifest, None for none, and give it the digest that belongs to it."""
    file = folder / "manifest.json"
    content = json.loads(file.read_text()) | changes
    content = {name: value for name, value in content.items() if value is not None}
    file.write_text(json.dumps(content | {"sha256": manifest._own_digest(content)}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "has format 2, of a later hfproj"),
        ({"format": "1"}, "is damaged"),
        ({"step": None}, "is damaged"),
        ({"files": None}, "is damaged"),
        ({"files": []}, "is damaged"),
        ({"processes": None}, "is damaged"),
        ({"course": 3}, "is damaged"),
    ],
    ids=str,
)
def test_a_manifest_of_another_form(copy, caplog, changes, said):
    rewritten(copy / "checkpoint-4", **changes)
    assert checkpoint_to_resume("auto", copy) == str(copy / "checkpoint-2")
    assert said in caplog.text


def test_a_course_of_another_version(copy):
    content = json.loads((copy / "checkpoint-4/manifest.json").read_text())
    rewritten(copy / "checkpoint-4", course={**content["course"], "new": 1})
    with pytest.raises(hfproj.UsageError, match=r"than this version of hfproj reads .*ignore_data_skip=True"):
        runs.train(copy, resume=True, max_steps=4)


def test_a_manifest_nested_without_end(copy, caplog):
    (copy / "checkpoint-4/manifest.json").write_text("[" * 200_000)
    assert checkpoint_to_resume("auto", copy) == str(copy / "checkpoint-2")
    assert "manifest.json is damaged" in caplog.text


@pytest.mark.parametrize(("file", "how"), foreign_cases(), ids=" ".join)
def test_files_of_another_kind_without_a_manifest(copy, caplog, capsys, file, how):
    damage(copy / "checkpoint-4" / file, how)
    assert checkpoint_to_resume("auto", copy) == str(copy / "checkpoint-2")
    assert f"checkpoint-4: {file} " in caplog.text
    assert "\n" not in caplog.messages[0]
    assert "run" not in capsys.readouterr().out


def test_an_optimizer_of_another_model(copy):
    """torch's fused AdamW would read beyond the tensors, and the process die."""
    folder = copy / "checkpoint-4"
    (folder / "manifest.json").unlink()
    content = torch.load(folder / "optimizer.pt", weights_only=True)
    for state in content["state"].values():
        state["exp_avg"] = torch.zeros(3)
    torch.save(content, folder / "optimizer.pt")
    with pytest.raises(hfproj.UsageError, match=r"is of another model: exp_avg has shape \[3\].*continue_from="):
        runs.train(copy, resume=True)


@pytest.mark.parametrize(
    "options", [{"optim": "sgd"}, {"optim": "adafactor"}, {"optim": "rmsprop"}, {"optim": "adagrad"}, {"lars": True}],
    ids=str,
)  # fmt: skip
def test_another_optimizer(copy, options):
    with pytest.raises(hfproj.UsageError, match=r"optimizer.pt of .* was written by another optimizer: it has no"):
        runs.train(copy, resume=True, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learning_rate": 5.0}, "learning_rate 0.01 instead of 5.0"),
        ({"weight_decay": 0.3}, "weight_decay 0.05 instead of 0.3"),
        ({"adam_beta1": 0.1}, "betas (0.9, 0.999) instead of (0.1, 0.999)"),
        ({"head_learning_rate": 0.2}, "learning_rate 0.01 instead of 0.2"),
    ],
    ids=str,
)
def test_settings_that_a_resumed_optimizer_would_not_take(copy, options, said):
    with pytest.raises(hfproj.UsageError, match=re.escape(f"goes on as it was, with {said}. Resume with these")):
        runs.train(copy, resume=True, **options)


def test_a_save_that_the_system_refuses_midway_takes_nothing(tmp_path):
    """Of several files that take the place of others, all do or none."""
    for name in ("a", "c"):
        (tmp_path / name).write_text("old")
    (tmp_path / "b").mkdir()  # no file can take its place

    def save():
        with folders.replacing(tmp_path) as part:
            for name in ("a", "b", "new", "c"):
                (part / name).write_text("new")

    with pytest.raises(OSError):  # noqa: PT011
        save()
    assert {p.name: p.read_text() for p in tmp_path.iterdir() if p.is_file()} == {"a": "old", "c": "old"}
    assert not [p for p in os.listdir(tmp_path) if p.startswith(".part")]


@pytest.mark.parametrize("name", ["x" * 300, "no\0name"], ids=["long", "NUL"])
def test_a_name_that_no_folder_can_have(copy, name):
    with pytest.raises(hfproj.UsageError, match="can't be resumed from: there is no such folder"):
        checkpoint_to_resume(name, copy)
