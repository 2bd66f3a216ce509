"""A disk that is full, read-only or gone while a run saves: one line says it, and the last good checkpoint stays."""

import errno
import json
import re
import resource
import shutil

import pytest
import runs
from layer import Layer
from thinned import thinned
from transformers import TrainerCallback

import hfproj
from hfproj.saving.folders import checkpoints
from hfproj.saving.manifest import flaw

IN_PLACE = r"\.saving-[^/]+/checkpoint-\d+"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with Layer(folder, keep=False) as layer:
        run = runs.train(folder, max_steps=4, save_total_limit=1)
    return folder, runs.weights(run), layer.events


def fails(folder, number, k):
    """Let every event from number `k` on fail; return the error."""
    folder.mkdir()
    with Layer(folder, fail_at=k, error=number, keep=False), pytest.raises(hfproj.SaveError) as caught:
        runs.train(folder, resume=None, max_steps=4, save_total_limit=1)
    return str(caught.value)


def check(saved, tmp_path, k, number=errno.ENOSPC):
    folder = tmp_path / f"{k}"
    said = fails(folder, number, k)
    assert "\n" not in said
    assert re.search(
        r"(The checkpoint of step|A run|checkpoint) .*can't be written to .* \([^)]*\); nothing half-written", said
    )
    left = {path.name: flaw(path) for path in checkpoints(folder).values()}
    assert set(left.values()) <= {None}
    if left:
        assert f"the last good checkpoint is {folder}/{max(left)}" in said
    else:
        assert f"no checkpoint lies in {folder}" in said
    assert not [p for p in folder.rglob("*") if ".part-" in p.name or (p.is_file() and ".saving-" in str(p))]
    return left


def places(saved):
    """Return the numbers of the events that move the two checkpoints into their places."""
    found = [k for k, (kind, path) in enumerate(saved[2]) if kind == "rename" and re.fullmatch(IN_PLACE, path)]
    assert len(found) == 2
    return found


def test_a_full_disk_within_a_save(saved, tmp_path):
    first, second = places(saved)
    expected = {
        0: [],
        first // 2: [],
        first: [],
        first + 5: [2],
        (first + second) // 2: [2],
        second: [2],
        second + 1: [2, 4],
    }
    for k, left in expected.items():
        assert sorted(int(name[11:]) for name in check(saved, tmp_path, k)) == left


@pytest.mark.long
@pytest.mark.parametrize("number", thinned([errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT]))
def test_a_full_disk_at_every_event(saved, tmp_path, number):
    for k in range(places(saved)[1] + 2):  # what comes then only deletes what there is no room for
        check(saved, tmp_path, k, number)


def test_over_a_checkpoint_that_is_there_it_stays(saved, tmp_path):
    """A rename that fails when the old one is out of its place."""
    runs.train(tmp_path, resume=None, max_steps=2)
    before = json.loads((tmp_path / "checkpoint-2/manifest.json").read_text())
    with Layer(tmp_path, keep=False) as layer:
        runs.train(tmp_path, resume=None, max_steps=2)
    k = next(k for k, (kind, path) in enumerate(layer.events) if kind == "rename" and re.fullmatch(IN_PLACE, path))
    assert layer.events[k - 1] == ("rename", "checkpoint-2")
    now = json.loads((tmp_path / "checkpoint-2/manifest.json").read_text())
    assert now != before  # written anew
    with (
        Layer(tmp_path, fail_at=k, keep=False, once=True),
        pytest.raises(hfproj.SaveError, match=r"good checkpoint is .*-2"),
    ):
        runs.train(tmp_path, resume=None, max_steps=2)
    assert json.loads((tmp_path / "checkpoint-2/manifest.json").read_text()) == now


def test_a_limit_on_files_as_torch_and_safetensors_meet_it(tmp_path):
    """Without the layer: what C++ and Rust say themselves."""
    runs.train(tmp_path, resume=None, max_steps=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "checkpoint-2").iterdir()}
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[name] - 1, limits[1]))
        try:
            with pytest.raises(
                hfproj.SaveError, match=r"The checkpoint of step 4 can't be written.*checkpoint-2\."
            ) as caught:
                runs.train(tmp_path, max_steps=4)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "\n" not in str(caught.value)
    assert sorted(checkpoints(tmp_path)) == [2]


class Gone(TrainerCallback):
    def __init__(self, folder):
        self.folder = folder

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            shutil.move(self.folder, f"{self.folder} elsewhere")


def test_a_folder_that_vanished(tmp_path):
    run = runs.make(tmp_path / "run", max_steps=4)
    run.add_callback(Gone(tmp_path / "run"))
    with pytest.raises(hfproj.SaveError, match=r"step 4 can't be written to .*run \(The folder has vanished\)"):
        run.train()
    assert [p.name for p in tmp_path.iterdir()] == ["run elsewhere"]


def test_the_final_save(saved, tmp_path):
    run = runs.make(tmp_path / "run", max_steps=2)
    run.save_model(str(tmp_path / "final"))
    before = {p.name: p.read_bytes() for p in (tmp_path / "final").iterdir()}
    run.train()
    with Layer(tmp_path / "final", keep=False) as layer:
        run.save_model(str(tmp_path / "final"))
    shutil.rmtree(tmp_path / "final")
    count = next(k for k, (kind, _) in enumerate(layer.events) if kind == "rename")
    for k in (0, count // 2, count - 1):
        (tmp_path / "final").mkdir(exist_ok=True)
        for name, content in before.items():
            (tmp_path / "final" / name).write_bytes(content)
        with Layer(tmp_path / "final", fail_at=k, keep=False), pytest.raises(hfproj.SaveError) as caught:
            run.save_model(str(tmp_path / "final"))
        assert str(caught.value).startswith(
            f"The adapter can't be written to {tmp_path}/final (No space left on device)"
        )
        assert f"the last good checkpoint is {tmp_path}/run/checkpoint-2" in str(caught.value)
        assert {p.name: p.read_bytes() for p in (tmp_path / "final").iterdir()} == before
