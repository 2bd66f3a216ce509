import copy

import numpy as np
import pytest
import torch
from probes.knn_cases import CASES, clusters, reference

from hfproj.errors import UsageError
from hfproj.features import neighbours
from hfproj.features.neighbours import NeighbourBank
from hfproj.probes import knn
from hfproj.probes.base import as_labels
from hfproj.probes.knn import KNNProbe


@pytest.mark.parametrize("k", [1, 5, 20, 1000])
@pytest.mark.parametrize("case", CASES)
def test_against_brute_force(case, k):
    bank, labels, queries = CASES[case]()
    for temperature in (0.07, 1.0):
        predicted = KNNProbe(k=k, temperature=temperature).fit(bank, labels).predict(queries)
        assert predicted.equal(reference(bank, labels, queries, k, temperature))


@pytest.mark.parametrize("case", ["random", "duplicated", "few values", "collapsed", "nearly collapsed", "unbalanced"])
def test_leave_one_out(case):
    bank, labels, _ = CASES[case]()
    probe = KNNProbe(k=7).fit(bank, labels)
    accuracy = probe.score_leave_one_out()
    expected = reference(bank, labels, bank, 7, 0.07, own=True) == labels
    assert probe.correct_.equal(expected)
    assert accuracy == expected.double().mean().item()
    assert probe.results_["protocol"]["leave_one_out"]


@pytest.mark.parametrize("case", ["random", "duplicated", "collapsed", "nearly collapsed"])
def test_chunks_and_reduced_precision_change_nothing(case, monkeypatch):
    bank, labels, queries = CASES[case]()
    probe = KNNProbe(k=5).fit(bank, labels)
    expected = probe.predict(queries)
    for name, value in {"_SCAN_ELEMENTS": 900, "_BANK_ROWS": 64, "_FEW_ROWS": 7, "_RESCORE_ELEMENTS": 64}.items():
        monkeypatch.setattr(neighbours, name, value)
    monkeypatch.setattr(knn, "_VOTES", 20)
    assert KNNProbe(k=5).fit(bank, labels).predict(queries).equal(expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert KNNProbe(k=5).fit(bank, labels).predict(queries).equal(expected)
    probe._bank._unit = probe._bank._unit.bfloat16().float()  # what a matrix product in bfloat16 sees
    assert probe.predict(queries).equal(expected)


def test_a_low_temperature_does_not_overflow_and_gives_the_nearest():
    bank, labels, queries = CASES["random"]()
    nearest = KNNProbe(k=1).fit(bank, labels).predict(queries)
    assert KNNProbe(k=20, temperature=1e-6).fit(bank, labels).predict(queries).equal(nearest)


def test_scaling_rows_changes_nothing():
    bank, labels, queries = CASES["random"]()
    expected = KNNProbe().fit(bank, labels).predict(queries)
    assert KNNProbe().fit(bank * torch.rand(500, 1).add(0.1), labels).predict(queries * 7).equal(expected)


def test_ties():
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert KNNProbe(k=1).fit(bank, [9, 4, 4]).predict(bank[:1]).item() == 9  # lowest row
    assert KNNProbe(k=2).fit(bank, [9, 4, 4]).predict(bank[:1]).item() == 4  # equal votes: smallest label
    assert KNNProbe(k=3).fit(bank, [9, 4, 4]).predict(bank[:1]).item() == 4


def test_results_carry_the_protocol():
    bank, labels, queries = CASES["random"]()
    probe = KNNProbe(k=1000)
    value = probe.fit(bank, labels).score(queries, torch.zeros(120, dtype=torch.long))
    assert probe.results_["value"] == value == probe.correct_.double().mean().item()
    expected = {"k": 500, "temperature": 0.07, "metric": "cosine", "bank": 500, "queries": 120, "classes": 7}
    assert probe.results_["protocol"] == expected
    assert KNNProbe(k=3).fit(bank, labels.numpy()).score(bank, labels.tolist()) > 0.5


def test_several_k_share_one_search():
    bank, labels = clusters(500, 24, 7, 1, 3.0)
    queries, truth = clusters(120, 24, 7, 2, 3.0)
    probe = KNNProbe(k=[20, 1, 7, 1000])
    value = probe.fit(bank, labels).score(queries, truth)
    single = {k: KNNProbe(k=k).fit(bank, labels) for k in (20, 1, 7, 1000)}
    assert probe.results_["values"] == {f"k={k}": one.score(queries, truth) for k, one in single.items()}
    assert len(set(probe.results_["values"].values())) > 1
    assert value == probe.results_["value"] == single[20].results_["value"]
    assert probe.correct_.equal(single[20].correct_)
    assert probe.predict(queries).equal(single[20].predict(queries))
    assert probe.results_["protocol"] == {**single[20].results_["protocol"], "k_list": [20, 1, 7, 500]}
    probe.score_leave_one_out()
    expected = {f"k={k}": one.score_leave_one_out() for k, one in single.items()}
    assert probe.results_["values"] == expected
    assert probe.results_["protocol"]["k_list"][-1] == 499
    assert repr(probe) == "KNNProbe(k=(20, 1, 7, 1000), temperature=0.07)"
    assert "values" not in single[20].results_


@pytest.mark.parametrize("k", [1, 4, 1000])
@pytest.mark.parametrize("case", ["random", "few values", "collapsed", "zero rows", "duplicated"])
def test_neighbours(case, k):
    bank, labels, queries = CASES[case]()
    found = KNNProbe().fit(bank, labels).neighbours(queries, k)
    unit, directions = (torch.nn.functional.normalize(f.double(), dim=1) for f in (bank, queries))
    cosine = (directions @ unit.T).numpy().round(12)
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    assert found.rows.equal(torch.from_numpy(order.copy()))
    np.testing.assert_allclose(found.cosines.numpy(), np.take_along_axis(cosine, order, 1), atol=1e-11)
    within = NeighbourBank(bank).search_within(k)
    order = np.argsort(-(unit @ unit.T).numpy().round(12), axis=1, kind="stable")
    others = np.stack([row[row != number] for number, row in enumerate(order)])[:, :k]
    assert within.rows.equal(torch.from_numpy(others.copy()))


def test_classes_of_one_side_only():
    bank, labels, queries = CASES["random"]()
    probe = KNNProbe(k=5).fit(bank[labels != 3], labels[labels != 3])
    assert probe.score(queries, torch.full((120,), 3)) == 0  # missing in the bank
    assert set(probe.predict(queries).tolist()) <= {0, 1, 2, 4, 5, 6}


def test_one_process_is_a_sharded_bank_of_one():
    bank, labels, queries = CASES["random"]()
    one, probe = KNNProbe().fit(bank, labels), KNNProbe().fit(bank, labels, sharded=True)
    assert probe.score(queries, labels[:120], sharded=True) == one.score(queries, labels[:120])
    assert probe.results_ == one.results_


def test_neither_options_nor_state_leak():
    bank, labels, queries = CASES["random"]()
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        probe = KNNProbe(k=(3, 5)).fit(bank.clone(), labels)
    copied = copy.deepcopy(probe)
    assert copied.predict(queries.half()).equal(probe.predict(queries.half()))
    assert torch.random.get_rng_state().equal(state)


def test_agrees_with_scikit_learn():
    from sklearn.neighbors import KNeighborsClassifier

    (bank, labels), (queries, truth) = clusters(600, 32, 10, 1, 3.0), clusters(200, 32, 10, 2, 3.0)
    peer = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = peer.fit(bank.double().numpy(), labels.numpy()).score(queries.double().numpy(), truth.numpy())
    assert KNNProbe().fit(bank, labels).score(queries, truth) == expected


def test_memory_does_not_grow_with_the_queries():
    import resource

    bank = torch.randn(20_000, 16)
    probe = KNNProbe(k=10).fit(bank, torch.arange(20_000) % 10)
    probe.predict(torch.randn(1000, 16))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    probe.predict(torch.randn(8000, 16))  # all similarities at once would be 640 MB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 250 * 1024


def test_refusals():
    f, y = torch.randn(10, 4), torch.arange(10)
    bad_options = ({"k": 0}, {"k": (5, 0)}, {"k": ()}, {"k": (5, 5)})
    for options in (*bad_options, {"temperature": 0.0}, {"temperature": float("nan")}):
        with pytest.raises(UsageError):
            KNNProbe(**options)
    with pytest.raises(UsageError, match="fit"):
        KNNProbe().predict(f)
    with pytest.raises(UsageError, match="fit"):
        KNNProbe().score_leave_one_out()
    with pytest.raises(UsageError, match="at least 1 row"):
        KNNProbe().fit(f[:0], y[:0])
    with pytest.raises(UsageError, match="integer label for each of 10 rows"):
        KNNProbe().fit(f, list(range(9)))
    bad = f.clone()
    bad[3] = float("nan")
    with pytest.raises(UsageError, match=r"bank .*row 3"):
        KNNProbe().fit(bad, y)
    probe = KNNProbe().fit(f, y)
    with pytest.raises(UsageError, match=r"queries .*row 3"):
        probe.predict(bad)
    with pytest.raises(UsageError, match="4 columns, the queries have 5"):
        probe.predict(torch.randn(2, 5))
    with pytest.raises(UsageError, match="at least 1 row"):
        probe.score(f[:0], y[:0])
    with pytest.raises(UsageError, match="k ≥ 1"):
        probe.neighbours(f, 0)
    for labels in ([0.5] * 10, torch.rand(10), None):  # what is no type of labels, jaxtyping refuses in tests
        with pytest.raises(UsageError, match="integer label"):
            as_labels(labels, 10)
    with pytest.raises(UsageError, match="at least 2 rows"):
        KNNProbe().fit(f[:1], y[:1]).score_leave_one_out()
