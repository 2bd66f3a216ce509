"""A sample of the faults at every request of pushes and pulls, and of the hostile adapters that a Hub serves."""

import hub_stages
import pytest
from hub_place import Fault, Place, Stage, faults_of


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with Place(tmp_path_factory.mktemp("place")) as made:
        yield made


def test_pushes(place):
    found = hub_stages.pushes(place, 6, kinds=["new"])
    assert not found["failures"]
    assert (found["tried"], found["stages"], found["of"]) == (6, 6, 9)


def test_pulls(place):
    found = hub_stages.pulls(place, 5, kinds=["with a backbone without images"])
    assert not found["failures"]
    assert (found["tried"], found["stages"]) == (5, 5)


def test_hostile_adapters(place):
    found = hub_stages.served(place, 60, kinds=["bytes_of_files"])
    assert not found["failures"]
    assert found["tried"] == 5
    assert found["refused"] >= 2


def test_what_is_wrong_is_told(place, monkeypatch):
    """A stage that nothing reaches, a message that does not say what there is, a half-written repository."""
    pushed = hub_stages.Pushed(place, "new")
    never, last = Stage("GET", "^/never", 0, 0, 0), pushed.stages[-1]
    assert hub_stages.try_push(pushed, never, Fault(500, "once")) == "nothing ran into it"
    assert hub_stages.try_push(pushed, last, Fault(403, "on")) is None
    pushed.start()
    place.hub.create(hub_stages.REPO)
    assert "changed, but said" in pushed.left("Nothing was sent.")
    place.hub.put(hub_stages.REPO, {"adapter_config.json": b"{}"})
    assert "half-written" in pushed.left("me/heads is as it was.")


def test_every_kind_of_fault_is_tried():
    kinds = {(fault.what, fault.lasts) for fault in faults_of(Stage("POST", "/commit/", 0, 0, 9))}
    each = {401, 403, 404, 409, 412, 413, 429, 500, 502, 503, "slow", "cut", "lost"}
    assert {what for what, _ in kinds} == each
    assert kinds >= {(what, lasts) for what in each for lasts in ("once", "on")}
