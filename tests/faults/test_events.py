"""Killed at any file event of a save, or without power there: a run goes on from a whole checkpoint, to its weights."""

import hashlib
import json

import pytest
import runs
import torch
from layer import LOSSES, Layer, put

from hfproj.saving.folders import checkpoint_to_resume, recover

SHORT = {"max_steps": 4, "save_total_limit": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of the uninterrupted run, the states of the disk at each event, and its manifests' digests."""
    folder = tmp_path_factory.mktemp("whole")
    with Layer(folder) as layer:
        expected = runs.weights(runs.train(folder, **SHORT))
    return expected, layer


def chosen(folder):
    """Return what 'auto' takes after the next run has cleared up, and the digest of its manifest."""
    recover(folder)
    found = checkpoint_to_resume("auto", folder)
    return None if found is None else (found[-1], json.loads((folder / found / "manifest.json").read_text())["sha256"])


def assert_goes_on(folder, expected):
    again = runs.weights(runs.train(folder, **SHORT))
    assert again.keys() == expected.keys()
    assert [n for n in expected if not torch.equal(again[n], expected[n])] == []


def test_events_are_of_every_kind(whole):
    _, layer = whole
    assert {kind for kind, _ in layer.events} == {"open", "write", "fsync", "rename", "unlink", "mkdir", "rmdir"}
    files = {path.rpartition("/")[2] for _, path in layer.events}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= files


@pytest.mark.parametrize("loss", LOSSES)
def test_at_every_event_a_whole_checkpoint_or_none(whole, tmp_path, loss):
    expected, layer = whole
    seen, steps = {}, []
    for k, states in enumerate(layer.states):
        state = states[loss]
        key = hashlib.sha256(repr(sorted(state.items())).encode()).digest()
        if key not in seen:
            put(state, tmp_path / str(k))
            seen[key] = (chosen(tmp_path / str(k)), tmp_path / str(k))
        found = seen[key][0]
        steps.append(int(found[0]) if found else 0)
    assert steps == sorted(steps)  # none that was there is lost again
    assert set(steps) == {0, 2, 4}
    assert len({found for found, _ in seen.values()}) == 3  # each step has one content
    for step in (0, 2, 4):
        assert_goes_on(next(f for found, f in seen.values() if int((found or "0")[0]) == step), expected)


def test_a_checkpoint_that_is_written_over_is_one_or_the_other(tmp_path):
    """Another run in the same folder: at no event a mixture of both, and at none nothing."""
    folder = tmp_path / "run"
    options = {"max_steps": 4, "save_steps": 4}
    runs.train(folder, resume=None, **options)
    first = chosen(folder)
    with Layer(folder) as layer:
        runs.make(folder, seed=1, **options).train()
    second = chosen(folder)
    assert first != second
    for loss in LOSSES:
        found = []
        for k, states in enumerate(layer.states):
            put(states[loss], tmp_path / loss / str(k))
            found.append(chosen(tmp_path / loss / str(k)))
        assert found.index(second) == found.count(first) > 0
        assert set(found) == {first, second}


@pytest.mark.long
@pytest.mark.parametrize("loss", LOSSES)
def test_from_every_event_the_same_weights(whole, tmp_path, loss):
    expected, layer = whole
    for k, states in enumerate(layer.states):
        put(states[loss], tmp_path / str(k))
        assert_goes_on(tmp_path / str(k), expected)
