"""Odd things in the folder of a run: names and links that are no checkpoints, files that do not belong to one."""

import json
import os
import shutil
from pathlib import Path

import pytest
import runs
import torch
from small import adapter, images

import hfproj
from hfproj.saving import folders, locks
from hfproj.saving.folders import checkpoint_to_resume, checkpoints, rotate
from hfproj.saving.manifest import flaw
from hfproj.saving.position import counted


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, runs.weights(runs.train(folder, max_steps=4))


@pytest.fixture
def copied(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved[0], folder)
    return folder


@pytest.mark.parametrize(
    "name", ["checkpoint-best-2", "checkpoint-0002", "checkpoint-of-bert-1", "checkpoint-", "checkpoint-²"]
)
def test_what_is_only_called_like_a_checkpoint_stays(copied, name):
    shutil.copytree(copied / "checkpoint-2", copied / name)
    assert sorted(checkpoints(copied)) == [2, 4]
    rotate(copied, 1, set())
    assert sorted(path.name for path in copied.glob("checkpoint*")) == sorted(["checkpoint-4", name])


def test_what_no_trainer_wrote_stays(copied):
    (copied / "checkpoint-1").mkdir()
    (copied / "checkpoint-1/precious.bin").write_text("mine")
    rotate(copied, 1, set())
    assert sorted(checkpoints(copied)) == [1, 4]


def test_broken_ones_do_not_use_up_the_limit(copied):
    for step, kind in ((1, 2), (3, 2), (9, 4)):
        shutil.copytree(copied / f"checkpoint-{kind}", copied / f"checkpoint-{step}")  # of another step: not whole
    rotate(copied, 2, set())
    assert sorted(checkpoints(copied)) == [2, 3, 4, 9]
    rotate(copied, 1, set())
    assert sorted(checkpoints(copied)) == [4, 9]


def test_links_are_taken_away_and_what_they_lead_to_stays(copied, tmp_path):
    shutil.move(copied / "checkpoint-2", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", copied / "checkpoint-2")
    os.symlink(tmp_path / "nowhere", copied / "checkpoint-6")  # where the next one is to lie
    runs.train(copied, max_steps=6, save_total_limit=1)
    assert sorted(path.name for path in copied.glob("*") if path.is_dir()) == ["checkpoint-6"]
    assert not list(copied.glob(f"{folders.STAGING}*"))
    assert flaw(copied / "checkpoint-6") is None
    assert (tmp_path / "elsewhere/optimizer.pt").exists()


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_lock_that_is_no_file_is_refused(tmp_path, kind):
    victim = tmp_path / "victim"
    victim.write_text("keep me")
    run = tmp_path / "run"
    run.mkdir()
    if kind == "link":
        os.symlink(victim, run / locks.LOCK)
    else:
        (run / locks.LOCK).mkdir()
    with pytest.raises(hfproj.UsageError, match=r"Expected \S+run.lock to be a file .*remove it"), locks.locked(run):
        pass
    assert victim.read_text() == "keep me"


ADDED = ["default", "pytorch_model.bin", "scaler.pt", "model.safetensors", "adapter_model.bin", "rng_state_0.pth"]


@pytest.mark.parametrize("name", ADDED)
def test_files_that_a_resume_would_read_have_to_belong_to_it(copied, saved, name, caplog):
    if name == "default":
        shutil.copytree(copied / "checkpoint-2", copied / "checkpoint-4/default")
    else:
        (copied / "checkpoint-4" / name).write_bytes(b"junk")
    assert Path(checkpoint_to_resume("auto", copied)).name == "checkpoint-2"
    assert f"checkpoint-4: {name}" in caplog.text
    assert "does not belong to it" in caplog.text


def test_notes_and_cards_beside_it_do_not_matter(copied):
    for name in ("notes.txt", "metrics.json", "README.md"):
        (copied / "checkpoint-4" / name).write_text("mine")
    assert Path(checkpoint_to_resume("auto", copied)).name == "checkpoint-4"


def test_without_manifest_each_adapter_needs_its_tensors(copied):
    for name in ("manifest.json", "adapter_model.safetensors"):
        (copied / "checkpoint-4" / name).unlink()
    assert flaw(copied / "checkpoint-4") == "adapter_model.safetensors is missing"
    assert Path(checkpoint_to_resume("auto", copied)).name == "checkpoint-2"


def test_other_images_in_the_middle_of_an_epoch_are_refused(copied):
    course = json.loads((copied / "checkpoint-4/manifest.json").read_text())["course"]
    assert len(course["data"]) == 32
    run = runs.make(copied, max_steps=8)
    run.train_dataset.dataset = images(24, seed=5)
    with pytest.raises(hfproj.UsageError, match=r"16 images into an epoch of other data.*Give the same data set"):
        run.train(resume_from_checkpoint="auto")


def test_the_best_of_another_batch_stays_where_it_is(copied, tmp_path):
    file = copied / "checkpoint-4/trainer_state.json"
    state = json.loads(file.read_text())
    state |= {"best_global_step": 4, "best_model_checkpoint": str(copied / "checkpoint-4")}
    file.write_text(json.dumps(state))
    run = runs.make(tmp_path / "other", per_device_train_batch_size=8)
    there = counted(copied / "checkpoint-4", run._own_course(), 1, tmp_path / "hidden")
    found = json.loads((there / "trainer_state.json").read_text())
    assert (found["global_step"], found["best_global_step"]) == (2, None)
    assert found["best_model_checkpoint"] == str(copied / "checkpoint-4")


def test_a_best_checkpoint_that_is_gone_leaves_the_last_weights(tmp_path, caplog):
    run = runs.make(
        tmp_path, load_best_model_at_end=True, metric_for_best_model="std_h", eval_strategy="steps", eval_steps=2,
        eval_dataset=images(8),
    )  # fmt: skip
    run.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    before = adapter(run.model)
    run._load_best_model()
    assert "there is no such folder. The model keeps the weights of the last step" in caplog.text
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter(run.model).items())


@pytest.mark.parametrize("words", [
    "[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0", "PytorchStreamWriter failed writing file",
])  # fmt: skip
def test_torchs_words_for_a_full_disk(words):
    inner = RuntimeError(words)
    outer = hfproj.SaveError("The adapter can't be written to x (…); nothing half-written was left, …")
    outer.__cause__ = inner
    assert (
        folders.why_unwritten(inner)
        == folders.why_unwritten(outer)
        == f"it was cut short, as where a disk is full: {words}"
    )
    assert folders.why_unwritten(ValueError("nothing of a disk")) is None
