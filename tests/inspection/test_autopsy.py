"""The autopsy: where to cut is chosen and confirmed on different rows; each number is what its own function gives."""

import json
import math

import numpy as np
import pytest
import torch
from small import PIXELS, head_model, images, views

import hfproj
from hfproj import diagnostics as d
from hfproj import plots
from hfproj.errors import NotMeasurableError, UsageError
from hfproj.inspection.layers import cut_by
from hfproj.results import Interval, paired_interval
from hfproj.results.inside import Autopsy, Cut, Invariance

DEEP = {"head_options": {"hidden_dim": [12, 10], "depth": 3}}
FAST = {"draws": 200, "images": 16}
OPTIONS = {"level": 0.95, "draws": 500, "seed": 0}


@pytest.fixture(scope="module")
def case():
    model = warmed(head_model(**DEEP))
    train, test = images(60, seed=1), images(40, seed=2)
    seen = views(rotation_degrees=30, scale=(0.3, 1.0))
    return model, train, test, hfproj.autopsy(model, train=train, test=test, views=seen, collator=plain(), **FAST)


class NoRows:
    """A probe that gives one number."""

    name, unit = "mine", "accuracy"

    def fit(self, f, y):
        return self

    def score(self, f, y):
        self.results_ = {"value": 0.5, "protocol": {}}
        return 0.5


def warmed(model):
    """Return the model in eval mode, with statistics of its BatchNorms."""
    with torch.no_grad():
        model.train()(torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    return model.eval()


def plain():
    return hfproj.EvalImages(**PIXELS)


def test_neighbours_are_called_by_their_number(case):
    model, train, test, _ = case
    knn = [{"name": "knn", "k": k} for k in (20, (3, 1))]
    found = hfproj.autopsy(model, train=train, test=test, probes=knn, collator=plain(), **FAST)
    assert set(found.layers[-1].scores) == {"knn", "3-NN"}
    assert [cut.probe for cut in found.cuts] == ["knn", "3-NN"]
    assert found.protocol["probes"]["3-NN"]["k"] == 3
    assert "3-NN" in found.table()
    assert Autopsy.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    with pytest.raises(UsageError, match="names of their own, got 'knn' twice"):
        hfproj.autopsy(model, train=train, test=test, probes=["knn", "knn"], collator=plain(), **FAST)


def test_layers_are_those_of_the_network_in_order(case):
    *_, found = case
    names = [layer.name for layer in found.layers]
    assert names[1:] == ["h", "head.0", "head.1", "z"]
    assert names[0].endswith("0")  # the first of two blocks
    assert [layer.dim for layer in found.layers] == [16, 16, 12, 10, 6]


def test_numbers_are_those_of_their_functions(case):
    model, train, test, found = case
    bank, held = (hfproj.extract_features(model, part, layers="head", collator=plain()) for part in (train, test))
    for layer in found.layers[1:]:
        f, b = held.by_name()[layer.name], bank.by_name()[layer.name]
        assert layer.rankme == pytest.approx(d.rankme(f))
        assert layer.numerical_rank == d.numerical_rank(f)
        assert layer.condition == pytest.approx(d.covariance_condition_number(f, normalize=False).on_support)
        np.testing.assert_allclose(layer.spectrum, d.covariance_spectrum(f), rtol=1e-5, atol=1e-12)
        probe = hfproj.LinearProbe().fit(b, bank.labels)
        assert layer.scores["linear"].accuracy == probe.score(f, held.labels)
        reference = hfproj.LinearProbe().fit(bank.h, bank.labels)
        reference.score(held.h, held.labels)
        expected = paired_interval(probe.correct_, reference.correct_, draws=200)
        assert layer.scores["linear"].over_h == expected
    of_h = next(layer for layer in found.layers if layer.name == "h")
    assert of_h.scores["knn"].over_h == Interval(0.0, 0.0, 0.0)


def outcomes(rows, *accuracies, seed=0):
    generator = torch.Generator().manual_seed(seed)
    names = ["h", *(f"head.{i}" for i in range(len(accuracies) - 1))]
    return {n: (torch.rand(rows, generator=generator) < a).double() for n, a in zip(names, accuracies)}


def test_a_better_layer_is_kept_with_the_interval_of_the_other_half():
    right = outcomes(2000, 0.5, 0.6, 0.9)
    cut = cut_by("linear", right, OPTIONS)
    assert (cut.layer, cut.keep, cut.rows) == ("head.1", "head.1", (1000, 1000))
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    first, second = order[:1000], order[1000:]
    assert cut.lead == pytest.approx(float(right["head.1"][first].mean() - right["h"][first].mean()))
    assert cut.confirmed == paired_interval(right["head.1"][second], right["h"][second], draws=500)
    assert "keep up to head.1: +" in cut.sentence
    assert "of 1000 held-out rows that chose nothing" in cut.sentence


def test_layers_that_are_no_better_are_kept_in_one_of_forty_at_most():
    """Eight layers as good as h: the best of them leads on the rows that choose, and not on the others."""
    cuts = [cut_by("linear", outcomes(400, *[0.7] * 9, seed=seed), {**OPTIONS, "seed": seed}) for seed in range(200)]
    leads = np.array([cut.lead for cut in cuts])
    assert leads.mean() > 0.03  # what would be claimed of the rows that chose
    assert abs(np.mean([cut.confirmed.difference for cut in cuts])) < 0.01
    kept = np.mean([cut.keep != "h" for cut in cuts])
    assert kept < 0.06  # 2.5 % and four standard errors


def test_worse_layers_and_equal_ones_leave_h():
    assert cut_by("knn", outcomes(500, 0.9, 0.5, 0.5), OPTIONS).sentence.startswith(
        "By 20-NN: keep h. No layer was above"
    )
    same = torch.ones(50)
    assert cut_by("linear", {"layers.0": same, "h": same, "z": same}, OPTIONS).layer == "h"
    with pytest.raises(NotMeasurableError, match="at least 4"):
        cut_by("linear", {"h": torch.ones(3)}, OPTIONS)


def test_sentences():
    lost = Cut("knn", "head.0", 0.02, Interval(-0.03, -0.05, -0.01), (10, 10))
    assert lost.keep == "h"
    assert "is worse on others: −3.0 points [−5.0, −1.0] over h" in lost.sentence
    unclear = Cut("linear", "z", 0.02, Interval(0.01, -0.01, 0.03), (10, 10))
    assert unclear.sentence.startswith("By linear probe: keep h. z led it by +2.0 on the rows that chose; +1.0 points")


def test_json_picture_and_table(case, tmp_path):
    *_, found = case
    path = found.save(tmp_path)
    again = Autopsy.from_dict(json.loads(path.read_text()))
    assert path.name == "autopsy.json"
    assert again.to_dict() == found.to_dict()
    assert again.cuts == found.cuts
    for drawn in (found, again.to_dict()):
        assert len(plots.plot_autopsy(drawn).axes) == 4
    assert [axes.get_title(loc="left") for axes in plots.plot_autopsy(found).axes][1] == "Directions in use"
    text = found.table()
    assert all(name in text for name in ("head.1", "rotation", "keep"))
    assert plots.plot_invariance(found.invariance, tmp_path / "i.png").axes[0].get_yticklabels()[0].get_text() == "crop"


def test_damaged_content_is_refused(case):
    *_, found = case
    good = found.to_dict()
    for change in (
        {"layers": 3}, {"layers": [{}]}, {"cuts": [{"probe": 1}]}, {"protocol": 4}, {"invariance": {"moved": [1]}},
        {"layers": [{**good["layers"][0], "rankme": "much"}]}, {"layers": [{**good["layers"][0], "name": "x" * 300}]},
    ):  # fmt: skip
        with pytest.raises(UsageError, match="Expected what"):
            Autopsy.from_dict({**good, **change})
    with pytest.raises(UsageError, match="Expected what Invariance"):
        Invariance.from_dict([])
    infinite = {**good, "layers": [{**good["layers"][0], "condition": None}, good["layers"][1]]}
    assert math.isinf(Autopsy.from_dict(infinite).layers[0].condition)
    assert "∞" in Autopsy.from_dict(infinite).table()


def test_a_folder_and_heads_of_other_kinds(tmp_path):
    data = {"train": images(30, seed=1), "test": images(20, seed=2), "collator": plain(), **FAST}
    identity = head_model(head="identity", head_options={}, out_dim=None)
    assert [layer.name for layer in hfproj.autopsy(identity, **data).layers][1:] == ["h", "z"]
    normal = head_model(head_options={"hidden_dim": 8, "l2_normalise": True})
    assert [layer.name for layer in hfproj.autopsy(normal, layers=(), **data).layers] == ["h", "head.0", "head.1", "z"]
    bare = hfproj.autopsy(normal, probes="knn", layers=[0, 1], **data)
    assert [len(bare.layers), [*bare.layers[0].scores], bare.invariance] == [6, ["knn"], None]
    assert len(plots.plot_autopsy(bare, width=5.0).axes) == 3


def test_the_same_images_to_fit_and_to_score_are_warned_of():
    with pytest.warns(UserWarning, match="`train` and `test` are the same data"):
        hfproj.autopsy(head_model(), train=images(30), test=images(30), probes="knn", collator=plain(), **FAST)


def test_rows_without_labels_are_left_out_and_none_at_all_refused():
    model, test = head_model(), images(20, seed=2)
    some = [{**item, "label": -1} if i % 2 else item for i, item in enumerate(test)]
    found = hfproj.autopsy(model, train=images(30), test=some, probes="knn", collator=plain(), **FAST)
    assert found.cuts[0].rows == (5, 5)
    with pytest.raises(UsageError, match="labels in `test`"):
        hfproj.autopsy(model, train=images(30), test=images(20, seed=2, labels=False), collator=plain(), **FAST)
    with pytest.raises(UsageError, match="active projection head"):
        hfproj.autopsy(model.get_base_model(), train=test, test=test)
    with pytest.raises(UsageError, match="row by row"):
        hfproj.autopsy(model, train=images(30), test=test, probes=NoRows(), collator=plain(), **FAST)
