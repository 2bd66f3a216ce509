"""`evaluate`: what it hands to which probe, what it keeps of the answers, and what it says without labels."""

import pytest
import torch
from peft import get_peft_model
from probes.probe_cases import CASES

import hfproj
from hfproj.diagnostics import alpha_req, uniformity
from hfproj.errors import UsageError
from hfproj.features.extraction import extract_features
from hfproj.features.similarity import linear_cka, mutual_knn
from hfproj.probes.evaluation import evaluate
from hfproj.probes.knn import KNNProbe

SMALL = {"few_shot": {"n": 1}}  # of 40 images


class Fake:
    """A probe that keeps what it was given and answers with set numbers."""

    name, unit = "fake", "accuracy"
    given: list = []

    def __init__(self, on="features", **results):
        self.on, self.results = on, results

    def fit(self, *train):
        self.given.append(train)
        return self

    def score(self, *test):
        self.given.append(test)
        self.results_ = {"value": 0.5, "protocol": {"k": 3}, **self.results}
        return 0.5


@pytest.fixture(scope="module")
def data():
    return {split: hfproj.load_image_dataset("digits", split=split, limit=40) for split in ("train", "test")}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = hfproj.ProjectionHeadConfig(head="mlp", out_dim=16, trainable="full")
    model = get_peft_model(hfproj.load_backbone("vit_nano"), config)
    with torch.no_grad():  # as though it had been trained
        for name, parameter in model.named_parameters():
            if (parameter.requires_grad and "blocks" in name) or "layer" in name:
                parameter += 0.05 * torch.randn_like(parameter) * parameter.std(correction=0)
    return model


@pytest.fixture(autouse=True)
def _nothing_given():
    Fake.given = []


def measured(results):
    return {(m.name, m.layer): m for m in results.measurements}


def test_a_probe_gets_each_layer_and_may_ask_for_tokens_or_the_model(model, data):
    results = evaluate(model, probes=[Fake(), Fake("tokens"), Fake("model")], **data, layers=[0, 3])
    layers = [m.layer for m in results.measurements if m.name == "fake"]
    first, second = (layer for layer in layers if layer not in ("h", "z", "tokens"))
    assert layers == [first, second, "h", "z", "tokens", "h"]
    *features, (tokens, _), (test_tokens, _), fitted, scored = Fake.given
    h, y = features[4]
    found = extract_features(model, data["train"], layers=[0, 3], tokens=True)
    torch.testing.assert_close(h, found.h, rtol=0, atol=0)
    torch.testing.assert_close(features[0][0], found.layers[first], rtol=0, atol=0)
    torch.testing.assert_close(tokens, found.tokens, rtol=0, atol=0)
    assert y.tolist() == data["train"]["label"]
    assert len(test_tokens) == 40
    assert (fitted, scored) == ((model, data["train"]), (data["test"],))
    assert results.layers == [first, second, "tokens", "h", "z"]
    assert set(results.spectra) == {"h after", "z after"}


def test_every_registered_probe_is_scored(model, data, tmp_path):
    probes = [{"name": name, **options, **SMALL.get(name, {})} for name, options in CASES.items()]
    results = evaluate(model, probes=probes, **data)
    found = measured(results)
    layers = {"attentive": ["tokens"], "fine_tune": ["h"]}
    for name in CASES:
        for layer in layers.get(name, ["h", "z"]):
            assert 0 <= found[name, layer].value <= 1
            assert found[name, layer].protocol["seed"] == 0
    assert found["fine_tune", "h"].protocol["probe_seed"] == 0
    assert ("fine_tune", "z") not in found
    assert {m.unit for (name, _), m in found.items() if name in CASES} == {"accuracy", "mAP"}
    assert hfproj.Results.load(results.save(tmp_path)).table() == results.table()


def test_further_values_are_measurements_too(model, data):
    values = {"k=3": 0.5, "k=7": 0.25, "accuracy": 0.5, "NMI": 0.125}
    protocol = {"k": 3, "seed": 7, "chosen": {"l2": 0.1}}
    results = evaluate(model, probes=[Fake(values=values, protocol=protocol)], **data, seed=1)
    found = [m for m in results.measurements if m.layer == "h" and "fake" in m.name]
    assert [(m.name, m.value, m.protocol["k"], m.unit) for m in found] == [
        ("fake", 0.5, 3, "accuracy"),
        ("fake", 0.25, 7, "accuracy"),
        ("fake_NMI", 0.125, 3, ""),
    ]
    assert found[0].protocol == {"k": 3, "chosen": {"l2": 0.1}, "probe_seed": 7, "seed": 1}


def test_a_list_of_neighbours_gives_what_single_ones_give(model, data):
    several = evaluate(model, probes={"name": "knn", "k": (5, 10)}, **data)
    for k in (5, 10):
        alone = evaluate(model, probes=[KNNProbe(k=k)], **data)
        assert several.value("knn", "h", "after", k=k) == alone.value("knn", "h", "after", k=k)


def test_without_labels_it_compares_with_the_backbone_before_training(model, data):
    views = hfproj.ImageViews.for_model(model, seed=0)
    results = evaluate(model, test=data["test"], labels=None, views=views)
    found = measured(results)
    names = {"rankme", "representation_std", "positive_cosine", "alpha_req", "alignment", "lidar", "uniformity"}
    for layer in ("h", "z"):
        assert {name for name, of in found if of == layer} == names | {"knn_overlap", "cka"}
    f = extract_features(model, data["test"])
    with model.disable_adapter():
        before = extract_features(model, data["test"])
    assert before.z is None
    assert not torch.equal(before.h, f.h)
    assert found["alpha_req", "h"].value == alpha_req(f.h).alpha
    assert found["uniformity", "z"].value == uniformity(f.z)
    assert found["cka", "z"].value == linear_cka(f.z, before.h) < 1
    assert found["knn_overlap", "h"].value == mutual_knn(f.h, before.h, k=20) < 1
    assert found["knn_overlap", "h"].protocol == {"rows": 40, "k": 20, "seed": 0}
    assert any("ridge" in note for note in results.notes)  # 40 images of 2 views in more dimensions


def test_labels_none_ignores_them(model, data):
    results = evaluate(model, test=data["test"], labels=None)
    assert {"knn", "alpha_req"} & {m.name for m in results.measurements} == {"alpha_req"}
    with pytest.raises(UsageError, match="Probes need labels"):
        evaluate(model, probes=[KNNProbe()], **data, labels=None)
    with pytest.raises(UsageError, match="Probes need labels"):
        evaluate(model, probes=[KNNProbe()], test=data["test"])
    with pytest.raises(UsageError, match="labels='auto'"):
        evaluate(model, test=data["test"], labels="none")


def test_a_bare_backbone_has_no_z(data):
    backbone = hfproj.load_backbone("vit_nano")
    results = evaluate(backbone, **data)
    assert results.layers == ["h"]
    assert results.config == {}
    same = evaluate(backbone, test=data["test"], labels=None, reference=backbone)
    assert measured(same)["cka", "h"].value == pytest.approx(1.0)
    assert measured(same)["knn_overlap", "h"].value == 1.0


def test_features_are_computed_once_where_they_are_kept(model, data, tmp_path, monkeypatch):
    first = evaluate(model, **data, cache_dir=tmp_path)
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("ran again"))
    assert evaluate(model, **data, cache_dir=tmp_path) == first


@pytest.mark.parametrize(
    ("probe", "message"),
    [(Fake(protocol=None), "'fake' as a dict with 'protocol'"), (KNNProbe, r"the class KNNProbe; write KNNProbe\(\)")],
)
def test_probes_that_can_not_be_reported(model, data, probe, message):
    with pytest.raises(UsageError, match=message):
        evaluate(model, probes=probe, **data)


def test_bars_are_shown_where_they_are_asked_for_and_end_whole(model, data, capsys):
    options = {"probes": ["knn"], **data}
    evaluate(model, **options)
    assert "features" not in capsys.readouterr().err
    evaluate(model, **options, progress=True)
    shown = capsys.readouterr().err
    ends = [line for line in shown.replace("\r", "\n").splitlines() if "100%" in line]
    assert {line.split(":")[0] for line in ends} == {"features", "probes"}
