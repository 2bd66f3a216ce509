"""What every registered probe has to do, and what an added one must not forget: each test names the place."""

import copy
import json
from pathlib import Path

import pytest
import torch
from probes.probe_cases import CASES, training_set

import hfproj
from hfproj.errors import UsageError
from hfproj.files import portable
from hfproj.probes import PROBES, create_probe, list_probes
from hfproj.probes.registry import make_probes
from hfproj.results import Measurement

TESTS = Path(__file__).parent


def test_every_probe_has_its_rows():
    """`CASES`, and a test file named after its module; tests/test_docs.py asks for a row in docs/probes.md."""
    assert set(CASES) == set(list_probes()), "add its options to CASES in tests/probes/probe_cases.py"
    for name in list_probes():
        module = PROBES.get(name).__module__.rpartition(".")[2]
        assert (TESTS / f"test_{module}.py").is_file(), f"tests/probes/test_{module}.py is missing"


@pytest.mark.parametrize("name", CASES)
def test_a_probe_calls_itself_as_the_registry_does_and_has_a_label(name):
    cls = PROBES.get(name)
    assert cls.name == name, "its attribute `name` is the registered name: results.json has it"
    assert cls.unit, "its attribute `unit` says what score returns"
    assert getattr(cls, "on", "features") in ("features", "tokens", "model")
    label = Measurement(name, "h", "after", 0.5, unit=cls.unit).label
    assert label.endswith(f" {cls.unit}"), "tables call it by its name and unit"
    assert "_" not in label


@pytest.mark.parametrize("name", [name for name in CASES if getattr(PROBES.get(name), "on", "features") != "model"])
def test_a_probe_is_fitted_scored_and_shown(name):
    probe = create_probe(name, **CASES[name])
    assert repr(copy.deepcopy(probe)) == repr(probe)
    f, y = training_set(getattr(probe, "on", "features"))
    before = torch.get_rng_state()
    fitted = copy.deepcopy(probe).fit(f, y)
    value = fitted.score(f, y)
    assert torch.get_rng_state().equal(before)
    assert 0.5 < value <= 1
    results = fitted.results_
    assert results["value"] == value
    assert json.loads(json.dumps(results)) == portable(results)
    if hasattr(fitted, "correct_") and probe.unit == "accuracy":
        assert fitted.correct_.double().mean().item() == value
    double = copy.deepcopy(probe).fit(f.double(), y.tolist())
    assert double.score(f.double(), y.tolist()) == pytest.approx(value, abs=0.05)
    if hasattr(fitted, "predict"):
        assert fitted.predict(f).device.type == "cpu"


def test_probes_by_name_by_mapping_and_as_objects():
    knn = hfproj.KNNProbe(k=3)
    made = make_probes(["linear", {"name": "knn", "k": 10}, knn])
    assert list(map(repr, made)) == [repr(hfproj.LinearProbe()), repr(hfproj.KNNProbe(k=10)), repr(knn)]
    assert made[2] is knn
    for single in ("knn", {"name": "knn"}, hfproj.KNNProbe()):
        assert list(map(repr, make_probes(single))) == [repr(hfproj.KNNProbe())]
    assert make_probes([]) == []
    unknown = ("kn", "Did you mean 'knn'"), ({"name": "knn", "n": 3}, "option"), ({"k": 3}, "'name': 'knn'")
    for wrong, match in unknown:
        with pytest.raises(UsageError, match=match):
            make_probes([wrong])


def test_a_probe_of_ones_own(monkeypatch):
    monkeypatch.setattr(PROBES, "_entries", dict(PROBES._entries))

    class Bar:
        """Rows whose label is 0."""

        name, unit = "bar", "accuracy"

        def fit(self, f, y):
            return self

        def score(self, f, y):
            self.results_ = {"value": (torch.as_tensor(y) == 0).double().mean().item(), "protocol": {"rows": len(f)}}
            return self.results_["value"]

    hfproj.register_probe("bar", Bar)
    assert list_probes()["bar"] == "Rows whose label is 0."
    data = {split: hfproj.load_image_dataset("digits", split=split, limit=10) for split in ("train", "test")}
    results = hfproj.evaluate(hfproj.load_backbone("vit_nano"), probes="bar", **data)
    assert results.value("bar", "h", "after") == sum(y == 0 for y in data["test"]["label"]) / 10
    assert "bar accuracy" in results.table()
