"""Damaged checkpoints, generated from a whole one: each is named, and the newest whole one is taken."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file, save_file

import hfproj
from hfproj.saving.folders import checkpoint_to_resume
from hfproj.saving.manifest import flaw

NOISE = tuple(f"noise {number}" for number in range(40))  # bits that are others
DAMAGES = ("missing", "cut", "empty", "{}", "null", "of another step")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, runs.weights(runs.train(folder, max_steps=4))


def damage(file, how):
    if how == "missing":
        file.unlink()
    elif how == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "of another step":
        shutil.copyfile(file.parents[1] / "checkpoint-2" / file.name, file)
    elif how.startswith("noise"):
        content = bytearray(file.read_bytes())
        places = random.Random(f"{file.name} {how}")
        for _ in range(places.choice((1, 1, 100))):
            content[places.randrange(len(content))] ^= 1 << places.randrange(8)
        file.write_bytes(content)
    elif how.startswith("foreign"):
        FOREIGN[file.name][int(how.split()[1])](file)
        (file.parent / "manifest.json").unlink(missing_ok=True)
    else:
        file.write_text("" if how == "empty" else how)


def cases(folder, damages=DAMAGES):
    for file in sorted(p.name for p in (folder / "checkpoint-4").iterdir()):
        yield from ((file, how) for how in damages)


class Stranger:
    def __reduce__(self):
        return print, ("run",)


def _saved(value):
    return lambda file: torch.save(value, file)


def _with(**change):
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | change))


def _of_whole_numbers(file):
    save_file({name: tensor.long() for name, tensor in load_file(file).items()}, file)


def _nested(file):
    file.write_text("[" * 200_000)


# Readable files of something else; a digest tells them, so that they count where there is no manifest.
FOREIGN = {
    "optimizer.pt": list(
        map(_saved, ([1], {"state": {}, "param_groups": []}, {"state": [], "param_groups": [{}]}, Stranger()))
    ),
    "scheduler.pt": list(map(_saved, ([1], Stranger()))),
    "rng_state.pth": list(map(_saved, ([1], {"python": ()}, Stranger()))),
    "trainer_state.json": [
        _nested, _with(unheard=1), _with(log_history="x"), _with(log_history=[1]), _with(epoch="x"), _with(epoch=True),
    ],
    "adapter_model.safetensors": [_of_whole_numbers],
}  # fmt: skip


def foreign_cases():
    return [(file, f"foreign {number}") for file, kinds in FOREIGN.items() for number in range(len(kinds))]


@pytest.mark.parametrize("manifest", [True, False], ids=["with manifest", "as of 0.1.0"])
def test_each_damage_is_named_and_the_one_before_is_taken(saved, tmp_path, caplog, manifest):
    taken = []
    for file, how in cases(saved[0]):
        before = saved[0] / "checkpoint-2" / file
        folder = tmp_path / f"{file} {how}"
        shutil.copytree(saved[0], folder)
        for n in (2, 4) if not manifest else ():
            (folder / f"checkpoint-{n}/manifest.json").unlink()
        if not (folder / "checkpoint-4" / file).exists():
            continue
        damage(folder / "checkpoint-4" / file, how)
        same = how == "of another step" and before.read_bytes() == (saved[0] / "checkpoint-4" / file).read_bytes()
        caplog.clear()
        found = Path(checkpoint_to_resume("auto", folder)).name
        if found == "checkpoint-2":
            said = caplog.messages[0]
            assert "checkpoint-4: " in said
            assert file in said or f"of step {2}" in said or how in ("cut", "empty", "{}", "null")
            with pytest.raises(hfproj.UsageError, match="checkpoint-4 can't be resumed from"):
                checkpoint_to_resume(folder / "checkpoint-4", folder)
        elif not same:
            taken.append((file, how))
    # Without its manifest a checkpoint is taken for one of 0.1.0. Of such, damages are seen where files are missing or
    # torn, or count another step: not in what does not matter, or has no step.
    expected = {("manifest.json", "missing"), *(("README.md", how) for how in DAMAGES[:-1])}  # a card may be edited
    if manifest:
        assert set(taken) == expected
    else:
        files = {"adapter_model.safetensors", "ema.safetensors", "history.parquet", "objective.safetensors"}
        assert {file for file, _ in taken} <= files | {"README.md", "rng_state.pth", "adapter_config.json"}
        assert {how for file, how in taken if file != "README.md"} <= {"of another step", "missing", "{}"}


def test_all_damaged_starts_from_the_beginning_or_says_so(saved, tmp_path, caplog):
    folder = tmp_path / "all"
    shutil.copytree(saved[0], folder)
    for file in folder.rglob("trainer_state.json"):
        file.write_text("{}")
    run = runs.make(folder, max_steps=4)
    with pytest.raises(
        hfproj.UsageError, match=r"holds no whole checkpoint \(checkpoint-4: trainer_state.json has 2 bytes"
    ):
        run.train(resume_from_checkpoint=True)
    again = runs.weights(runs.train(folder, max_steps=4))
    assert "starting from the beginning" in caplog.text
    assert all(torch.equal(again[n], t) for n, t in saved[1].items())
    assert flaw(folder / "checkpoint-4") is None  # written over the damaged one


def test_a_damaged_one_is_passed_over_by_a_run(saved, tmp_path):
    folder = tmp_path / "one"
    shutil.copytree(saved[0], folder)
    damage(folder / "checkpoint-4/optimizer.pt", "of another step")
    again = runs.weights(runs.train(folder, resume=True, max_steps=4))
    assert all(torch.equal(again[n], t) for n, t in saved[1].items())


def test_resumed_from_its_last_step_a_run_is_done(saved, tmp_path):
    """Where transformers would take one more step if the last one lies within an epoch."""
    folder = tmp_path / "done"
    shutil.copytree(saved[0], folder)
    run = runs.train(folder, max_steps=4)
    assert run.state.global_step == 4
    assert not hasattr(run, "seen")
    assert all(torch.equal(t, saved[1][n]) for n, t in runs.weights(run).items())


def test_without_an_optimizer_there_is_nothing_to_resume(tmp_path):
    runs.train(tmp_path, resume=None, max_steps=2, save_only_model=True)
    for wanted in (True, tmp_path / "checkpoint-2"):
        with pytest.raises(hfproj.UsageError, match=r"save_only_model=True, without optimizer.*continue_from='"):
            runs.train(tmp_path, resume=wanted, max_steps=4)
    with pytest.raises(hfproj.UsageError, match="set save_only_model=False"):
        runs.train(tmp_path, max_steps=4, save_only_model=True)


def test_the_manifest_says_what_there_is(saved):
    manifest = json.loads((saved[0] / "checkpoint-4/manifest.json").read_text())
    files = {
        p.name: p.stat().st_size
        for p in (saved[0] / "checkpoint-4").iterdir()
        if p.name not in ("manifest.json", "README.md")
    }
    assert {name: known["size"] for name, known in manifest["files"].items()} == files
    assert (manifest["step"], manifest["processes"], manifest["resumable"]) == (4, 1, True)
    course = {"length": 24, "batch": 4, "images": 4, "steps": 6, "seed": 42, "shuffle": True}
    assert len(manifest["course"].pop("data")) == 32
    assert manifest["course"] == course
    assert {"hfproj", "torch", "transformers"} <= manifest["versions"].keys()
