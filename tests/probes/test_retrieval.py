import copy

import numpy as np
import pytest
import torch
from probes.knn_cases import CASES, clusters
from sklearn.metrics import average_precision_score

from hfproj.errors import UsageError
from hfproj.probes import retrieval
from hfproj.probes.retrieval import RetrievalProbe


def reference(gallery, labels, queries, truth, ks, own=False):
    """One query at a time: AP from the places of the positives, recall from the first of them."""
    unit, directions = (torch.nn.functional.normalize(f.double(), dim=1).numpy() for f in (gallery, queries))
    precisions, first = [], []
    for number, (q, label) in enumerate(zip(directions, truth.tolist())):
        order = np.argsort(-(unit * q).sum(1).round(12), kind="stable")
        order = order[order != number] if own else order
        places = 1 + np.flatnonzero(labels.numpy()[order] == label)
        if len(places):
            precisions.append(np.mean(np.arange(1, len(places) + 1) / places))
            first.append(places[0])
    return {"mAP": np.mean(precisions), **{f"recall@{k}": np.mean(np.array(first) <= k) for k in ks}}, len(first)


KINDS = ("random", "float64", "offset", "duplicated", "few values", "collapsed", "unbalanced", "one a class")


@pytest.mark.parametrize("case", KINDS)
def test_against_the_definition(case):
    gallery, labels, queries = CASES[case]()
    truth = labels[torch.arange(len(queries)) % len(labels)]
    probe = RetrievalProbe(k=(1, 3, 1000)).fit(gallery, labels)
    value = probe.score(queries, truth)
    expected, counted = reference(gallery, labels, queries, truth, (1, 3, 1000))
    assert probe.results_["values"] == pytest.approx(expected, abs=1e-12)
    assert value == probe.results_["value"] == probe.results_["values"]["mAP"]
    assert probe.results_["protocol"]["left_out"] == len(queries) - counted == 0
    assert probe.correct_.equal(probe.predict(queries) == truth)


@pytest.mark.parametrize("case", ["random", "duplicated", "few values", "collapsed", "unbalanced"])
def test_within_one_set(case):
    gallery, labels, _ = CASES[case]()
    labels = labels.clone()
    labels[5] = -40  # the only one of its class
    probe = RetrievalProbe(k=5).fit(gallery, labels)
    probe.score_leave_one_out()
    expected, counted = reference(gallery, labels, gallery, labels, (5,), own=True)
    assert probe.results_["values"] == pytest.approx(expected, abs=1e-12)
    protocol = probe.results_["protocol"]
    assert (protocol["left_out"], protocol["leave_one_out"]) == (1, True)
    assert counted == len(labels) - 1
    assert probe.average_precision_.isnan().nonzero().flatten().tolist() == [5]
    assert not probe.correct_[5]


def test_agrees_with_scikit_learn():
    (gallery, labels), (queries, truth) = clusters(300, 16, 5, 1, 3.0), clusters(60, 16, 5, 2, 3.0)
    probe = RetrievalProbe().fit(gallery, labels)
    probe.score(queries, truth)
    cosines = torch.nn.functional.cosine_similarity(queries.double()[:, None], gallery.double()[None], dim=2)
    expected = [average_precision_score((labels == t).numpy(), row.numpy()) for row, t in zip(cosines, truth)]
    np.testing.assert_allclose(probe.average_precision_.numpy(), expected, rtol=1e-12)


def test_closed_forms():
    gallery = torch.tensor([[1.0, 0.0], [4.0, 3.0], [3.0, 4.0], [0.0, 1.0]])
    probe = RetrievalProbe(k=(1, 2, 3, 4)).fit(gallery, [0, 0, 1, 1])
    assert probe.score(gallery[:1], [0]) == 1
    assert probe.score(gallery[:1], [1]) == pytest.approx((1 / 3 + 2 / 4) / 2)  # the positives come last
    assert [probe.results_["values"][f"recall@{k}"] for k in (1, 2, 3, 4)] == [0, 0, 1, 1]
    generator = torch.Generator().manual_seed(0)
    noise, labels = torch.randn(1500, 32, generator=generator), torch.arange(1500) % 5
    assert RetrievalProbe().fit(noise, labels).score_leave_one_out() == pytest.approx(1 / 5, abs=0.01)  # chance


def test_queries_without_a_positive_are_left_out_and_counted():
    gallery, labels, queries = CASES["random"]()
    truth = labels[:120].clone()
    probe = RetrievalProbe().fit(gallery, labels)
    alone = probe.score(queries[60:], truth[60:])
    truth[:60] = 1000
    assert probe.score(queries, truth) == pytest.approx(alone, abs=1e-15)
    assert probe.results_["protocol"]["left_out"] == 60
    assert len(probe.correct_) == 120
    with pytest.raises(UsageError, match="None of 120 queries"):
        probe.score(queries, torch.full((120,), 1000))
    with pytest.raises(UsageError, match="None of 9 queries"):
        RetrievalProbe().fit(*CASES["one a class"]()[:2]).score_leave_one_out()


def test_chunks_scales_and_precision(monkeypatch):
    gallery, labels, queries = CASES["duplicated"]()
    probe = RetrievalProbe().fit(gallery, labels)
    probe.score(queries, labels[:80])
    expected = probe.results_
    monkeypatch.setattr(retrieval, "_ELEMENTS", 3000)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        scaled = RetrievalProbe().fit(gallery * 4, labels)
        scaled.score(queries * 0.5, labels[:80])
    assert scaled.results_ == expected
    copied = copy.deepcopy(scaled)
    copied.score(queries, labels[:80])
    assert copied.results_ == expected


def test_refusals():
    f, y = torch.randn(10, 4), torch.arange(10) % 2
    for k in (0, (), (1, 1), (1, -1)):
        with pytest.raises(UsageError):
            RetrievalProbe(k=k)
    with pytest.raises(UsageError, match="fit"):
        RetrievalProbe().score(f, y)
    with pytest.raises(UsageError, match="at least 2 rows"):
        RetrievalProbe().fit(f[:1], y[:1]).score_leave_one_out()
    with pytest.raises(UsageError, match="4 columns, the queries have 5"):
        RetrievalProbe().fit(f, y).score(torch.randn(10, 5), y)
    f[7] = torch.nan
    with pytest.raises(UsageError, match="row 7"):
        RetrievalProbe().fit(f, y)
    assert repr(RetrievalProbe(k=[1, 5])) == "RetrievalProbe(k=(1, 5))"
