"""Labels that are none, scores, and what has no value: it is missing with its reason, and is no number."""

import decimal
import math

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from peft import get_peft_model
from probes.probe_cases import CASES, training_set
from torch import nn

import hfproj
from hfproj.errors import NotMeasurableError, UsageError
from hfproj.functional.labels import class_numbers
from hfproj.presets import all_presets
from hfproj.probes import GroupRobustProbe, KNNProbe, create_probe, evaluate, probe_gap
from hfproj.probes.base import as_labels
from hfproj.probes.shared_rows import share_in
from hfproj.results import Missing, Results

ON_FEATURES = [name for name in CASES if name != "fine_tune"]


def rows(count, seed=0, classes=3, unlabelled=(), first=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % classes
    x = 2 * torch.eye(classes, 8)[y] + 0.3 * torch.randn(count, 8, generator=generator)
    return [{"x": f, "label": None if i in unlabelled else first + int(c)} for i, (f, c) in enumerate(zip(x, y))]


class Collate:
    """A collator of vectors that reads labels as the library's do."""

    def __init__(self, label_column="label"):
        self.label_column = label_column

    def __call__(self, items):
        found = hfproj.data.indexing.index_and_labels(items, self.label_column)
        return {"pixel_values": torch.stack([item["x"] for item in items]), **found}


def measure(train, test, *, column="label", **options):
    torch.manual_seed(0)
    options = {"views": None, **options}
    return evaluate(
        nn.Sequential(nn.Linear(8, 16), nn.Tanh()), train=train, test=test, collator=Collate(column), **options
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1, None, 3], [1, -1, 3]),
        ([True, False, np.bool_(True)], [1, 0, 1]),
        ([np.uint8(4), torch.tensor(2), float("nan")], [4, 2, -1]),
        (np.array([7, -1], dtype=np.int16), [7, -1]),
        (np.array([5, None], dtype=object), [5, -1]),
        (np.ma.masked_array([5, 6], mask=[False, True]), [5, -1]),
        (np.full(2, np.nan), [-1, -1]),
        (torch.tensor([math.nan]), [-1]),
        (pa.array([3, None, 1]), [3, -1, 1]),
        (pd.Series([2, None, 0], dtype="Int64"), [2, -1, 0]),
        (datasets.Dataset.from_dict({"y": [1, None]})["y"], [1, -1]),
        ([decimal.Decimal("NaN"), 9], [-1, 9]),
        ([-7, -100], [-7, -100]),
    ],
)
def test_what_a_label_is(given, expected):
    assert class_numbers(given).tolist() == expected
    assert as_labels(given, len(expected)).tolist() == expected


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([0.5, 1.0], "got float 0.5. A score is no class"),
        ([3.0], "got float 3.0. A score"),
        (np.array([1.0, np.nan]), "got float64 1.0. A score"),
        (torch.tensor([2.0]), r"got Tensor 2.0. A score"),
        (pa.array([1.5]), "got float 1.5|got DoubleScalar"),
        (pd.Series([1.0, None]), "got float 1.0. A score"),
        ([decimal.Decimal("3")], "got Decimal 3"),
        (["cat", "dog"], "got str 'cat'. Encode names"),
        ([[0, 1], [1, 0]], r"got list \[0, 1\]"),
    ],
)
def test_scores_and_names_are_refused(given, match):
    with pytest.raises(UsageError, match=match):
        class_numbers(given)
    with pytest.raises(UsageError, match="Expected one integer label for each"):  # what every probe reads labels by
        as_labels(given, len(given))


@pytest.mark.parametrize("name", ON_FEATURES)
def test_unlabelled_rows_neither_teach_nor_score(name):
    probe = create_probe(name, **CASES[name])
    f, y = training_set(getattr(probe, "on", "features"))
    some, other = torch.arange(0, 120, 7), torch.arange(1, 120, 5)
    train, test = y.clone(), y.clone()
    train[some], test[other] = -1, -1
    poisoned = f.clone()
    poisoned[some] *= -50.0  # would teach something else
    mixed = create_probe(name, **CASES[name]).fit(poisoned, train)
    value = mixed.score(f, [None if c < 0 else c for c in test.tolist()])
    kept, scored = train >= 0, test >= 0
    clean = create_probe(name, **CASES[name]).fit(f[kept], y[kept])
    assert value == clean.score(f[scored], y[scored])
    counts = {"train_unlabelled": len(some), "test_unlabelled": len(other)}
    assert mixed.results_["protocol"] == {**clean.results_["protocol"], **counts}
    if hasattr(mixed, "correct_"):
        assert mixed.correct_.equal(clean.correct_)
    with pytest.raises(NotMeasurableError, match=r"none of 120 .* rows has a label"):
        probe.fit(f, torch.full_like(y, -1))
    with pytest.raises(NotMeasurableError, match="none of 120 test rows has a label"):
        mixed.score(f, [None] * 120)


def test_neighbours_groups_and_the_gap_leave_them_out_too():
    f, y = training_set()
    y[::4] = -1
    knn = KNNProbe(k=5).fit(f, y)
    assert knn.score_leave_one_out() == KNNProbe(k=5).fit(f[y >= 0], y[y >= 0]).score_leave_one_out()
    groups = torch.arange(120) % 2
    robust = GroupRobustProbe(l2=0.1, draws=2).fit(f, y, groups)
    value = robust.score(f, y, groups)
    kept = y >= 0
    clean = GroupRobustProbe(l2=0.1, draws=2).fit(f[kept], y[kept], groups[kept])
    assert value == clean.score(f[kept], y[kept], groups[kept])
    with pytest.raises(UsageError, match="got none for 1; leave"):
        robust.score(f, y, [None, *groups[1:].tolist()])
    features = hfproj.features.Features(f, f[:, :3], y, torch.arange(120) // 2)
    cheap = {"linear": {"name": "linear", "l2": 0.1}, "mlp": {"name": "knn", "k": 5}}
    assert set(probe_gap(features, features, probes=cheap).accuracy) == {"linear h", "linear z", "mlp h", "mlp z"}
    with pytest.raises(NotMeasurableError, match="training rows are of one class, 3"):
        probe_gap(features, features, train_labels=torch.full((120,), 3), probes=cheap)
    with pytest.raises(NotMeasurableError, match="no class of the test rows"):
        probe_gap(features, features, test_labels=y + 100, probes=cheap)


def test_fine_tuning_leaves_them_out():
    def fine_tune(train, test):
        probe = hfproj.probes.FineTuneProbe(epochs=1, batch_size=16, eval_collator=Collate(None))
        return probe.fit(nn.Linear(8, 6), train), probe.score(test)

    torch.manual_seed(0)
    probe, _ = fine_tune(rows(40, unlabelled=range(5)), rows(20, 1, unlabelled=(0, 3)))
    assert min(probe.indices_) == 5
    assert len(probe.correct_) == probe.results_["protocol"]["test_rows"] == 18
    assert probe.results_["protocol"]["test_unlabelled"] == 2
    with pytest.raises(NotMeasurableError, match="none of 20 test rows"):
        probe.score(rows(20, unlabelled=range(20)))


def test_evaluate_counts_what_it_leaves_out(tmp_path):
    train, test = rows(60), rows(30, 1)
    full = measure(train[6:], test[3:])
    with pytest.warns(UserWarning, match=r"6 of 60 training rows and 3 of 30 test rows have no label"):
        part = measure(rows(60, unlabelled=range(6)), rows(30, 1, unlabelled=range(3)))
    found = part.select("knn", "h", "after")[0]
    assert found.value == full.value("knn", "h", "after")
    assert (found.protocol["train_unlabelled"], found.protocol["test_unlabelled"]) == (6, 3)
    assert (found.protocol["bank"], found.protocol["queries"]) == (54, 27)
    assert part.value("rankme", "h", "after") != full.value("rankme", "h", "after")  # of all rows
    assert not part.missing
    assert "missing" not in (full.save(tmp_path)).read_text()


@pytest.mark.parametrize(
    ("train", "test", "why"),
    [
        ({}, {"unlabelled": range(30)}, "none of 30 test rows has a label"),
        ({"unlabelled": range(60)}, {}, "none of 60 training rows has a label"),
        ({"classes": 1}, {}, "all labelled training rows are of one class, 0"),
        ({}, {"first": 5}, "no class of the test rows (5 to 7) is among those of the training rows (0 to 2)"),
    ],
)
def test_without_a_labelled_row_the_measure_is_missing(train, test, why, tmp_path, recwarn):
    for probes in (None, ["knn", {"name": "linear", "l2": 0.1}]):
        results = measure(rows(60, **train), rows(30, 1, **test), probes=probes)
        names = ["knn"] if probes is None else ["knn", "linear"]
        assert results.missing == [Missing(name, "h", "after", why, unit="accuracy") for name in names]
        assert not {"knn", "linear"} & {m.name for m in results.measurements}
        assert any(m.name == "uniformity" for m in results.measurements)  # what needs no labels is measured
        loaded = Results.load(results.save(tmp_path))
        assert loaded.missing == results.missing
        assert f"Not measured: k-NN accuracy of h after training: {why}." in loaded.table()
        assert f"- Not measured: k-NN accuracy of h after training: {why}." in hfproj.reporting.render_card(loaded)
        assert why in hfproj.report(tmp_path).read_text(encoding="utf-8")
        assert loaded.merge(results).missing == results.missing


@pytest.mark.parametrize("column", ["fine_label", "labels", "target"])
def test_a_column_of_another_name_is_named(column):
    train, test = ([{"x": r["x"], column: r["label"]} for r in data] for data in (rows(60), rows(30, 1)))
    results = measure(train, test)
    (missing,) = results.missing
    assert missing.name == "knn"
    assert f"have no column 'label', only 'x', '{column}'; name it" in missing.reason
    with pytest.raises(UsageError, match=f"no column 'label', only 'x', '{column}'.*probes=\\[\\]"):
        measure(train, test, probes="knn")
    named = measure(train, test, column=column)
    assert named.select("knn", "h", "after")[0].protocol["labels"] == column
    assert "labels" not in measure(rows(60), rows(30, 1)).select("knn", "h", "after")[0].protocol
    assert "reads no labels" in measure(train, test, column=None).missing[0].reason


def test_scores_are_kept_by_extraction_and_refused_by_evaluate():
    data = [{**row, "label": 0.5 + row["label"]} for row in rows(30)]

    def collate(items):  # of someone else: transformers' default collator gives a float tensor
        return {
            "pixel_values": torch.stack([i["x"] for i in items]),
            "labels": torch.tensor([i["label"] for i in items]),
        }

    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
    assert hfproj.extract_features(model, data, collator=collate).labels[:3].tolist() == [0.5, 1.5, 2.5]
    with pytest.raises(UsageError, match=r"labels of `train` are no classes.*A score is no class.*labels=None"):
        evaluate(model, train=data, test=data, collator=collate)
    assert evaluate(model, train=data, test=data, collator=collate, labels=None).missing == []
    cached = hfproj.CachedFeatures(torch.randn(4, 1, 8), torch.tensor([0.5, 1.0, 2.0, 3.7]))
    with pytest.raises(UsageError, match=r"got float 0\.5"):
        hfproj.FeatureViews(1)([{**cached[i], "index": i} for i in range(4)])


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x):
        return self.value.expand(len(x), -1)


def test_features_without_directions_rows_or_spread():
    for value, names in (
        ([0.0] * 4, {"representation_std", "uniformity", "alpha_req"}),
        ([1.0, 2.0, 3.0, 4.0], {"alpha_req"}),
    ):
        results = evaluate(Constant(value), test=rows(20), labels=None, collator=Collate(), reference=nn.Linear(8, 4))
        assert {m.name for m in results.missing} == names | {"knn_overlap", "cka"}
    results = measure(rows(60), rows(1))
    assert {m.name for m in results.missing} == {"rankme", "representation_std"}
    assert not results.spectra
    assert "at least 2 rows" in results.table()


def digits(split):
    return hfproj.load_image_dataset("digits", split=split, limit=24)


def supervised():
    return {name: preset for name, preset in all_presets().items() if (preset.views or {}).get("num_views") == 1}


@pytest.mark.parametrize("name", supervised())
def test_one_view_has_no_positive_pair(name):
    preset = supervised()[name]
    config = hfproj.ProjectionHeadConfig(head=preset.head, head_options={**preset.head_options}, trainable="head")
    model = get_peft_model(hfproj.load_backbone("vit_nano"), config)
    views = hfproj.ImageViews.for_model(model, num_views=1)
    for labels in ("auto", None):
        results = evaluate(model, train=digits("train"), test=digits("test"), views=views, labels=labels)
        pairs = {"positive_cosine"} if labels else {"positive_cosine", "alignment", "lidar"}
        assert pairs <= {m.name for m in results.missing}
        assert all("two views" in m.reason for m in results.missing if m.name in pairs)
        assert ("knn" in {m.name for m in results.measurements}) == bool(labels)
        assert not pairs & {m.name for m in results.measurements}


def test_the_same_data_to_fit_and_to_score_is_warned_of():
    data = rows(30)
    for again in (data, [*data], data[::-1]):
        with pytest.warns(UserWarning, match="`train` and `test` are the same data"):
            measure(data, again)


def test_images_in_both_are_warned_of_if_there_are_many():
    data = rows(300)
    with pytest.warns(UserWarning, match="share images: 10% of `test` is in `train`, too"):
        measure(data[:200], data[190:290])
    measure(data[:200], data[199:])  # one of 101


def test_rows_of_a_collapsed_model_are_not_taken_for_the_same_images():
    assert share_in(torch.ones(5, 3), torch.ones(4, 3)) == 0.0
    assert share_in(torch.eye(4), torch.cat([torch.eye(4)[2:], torch.ones(2, 4)])) == 0.5
