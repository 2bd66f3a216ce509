import numpy as np
import pytest
import torch

import hfproj.probes.knn as knn
from hfproj.errors import UsageError
from hfproj.probes import KNNProbe


def reference(bank, labels, queries, k, temperature, own=False):
    """Brute force in float64, one query at a time: by cosine, then lowest row; votes, then smallest label."""
    bank, queries, labels = bank.double().numpy(), queries.double().numpy(), np.asarray(labels)
    predictions = []
    for number, q in enumerate(queries):
        norms = np.sqrt((bank * bank).sum(1)) * np.sqrt((q * q).sum())
        cosine = (bank * q).sum(1) / np.where(norms > 0, norms, 1)
        cosine = np.round(cosine, 12)  # rows that are equal tie, whatever numpy's summation does
        order = np.argsort(-cosine, kind="stable")
        order = order[order != number] if own else order
        order = order[:k]
        classes = np.unique(labels)
        votes = [np.exp(cosine[order][labels[order] == c] / temperature).sum() for c in classes]
        predictions.append(classes[int(np.argmax(np.round(votes / np.max(votes), 12)))])
    return torch.tensor(np.array(predictions))


def clusters(rows, dim, classes, seed, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (rows,), generator=generator)
    return centres[labels] + noise * torch.randn(rows, dim, generator=generator), labels


CASES = {
    "random": lambda: (*clusters(500, 24, 7, 1, 2.0), clusters(120, 24, 7, 2, 2.0)[0]),
    "float64": lambda: (
        clusters(300, 8, 3, 1)[0].double(),
        clusters(300, 8, 3, 1)[1],
        clusters(50, 8, 3, 2)[0].double(),
    ),
    "offset": lambda: (*clusters(400, 16, 5, 1)[:1], clusters(400, 16, 5, 1)[1], clusters(80, 16, 5, 2)[0] + 30),
    "labels are any integers": lambda: (
        clusters(200, 8, 3, 1)[0],
        clusters(200, 8, 3, 1)[1] * 1000 - 7,
        torch.randn(40, 8),
    ),
    "duplicated": lambda: (clusters(60, 8, 5, 1, 2.0)[0].repeat(9, 1), torch.arange(540) * 7 % 5, torch.randn(80, 8)),
    "few values": lambda: (torch.randint(0, 2, (400, 3)).float(), torch.randint(0, 4, (400,)), torch.eye(3)),
    "collapsed": lambda: (torch.randn(1, 8).expand(300, 8).contiguous(), torch.arange(300) % 3, torch.randn(20, 8)),
    "nearly collapsed": lambda: (1 + 1e-3 * torch.randn(300, 8), torch.arange(300) % 3, 1 + 1e-3 * torch.randn(20, 8)),
    "unbalanced": lambda: (torch.randn(500, 8), (torch.arange(500) < 8).long(), torch.randn(60, 8)),
    "one a class": lambda: (torch.randn(9, 4), torch.arange(9) + 5, torch.randn(30, 4)),
    "one row": lambda: (torch.randn(1, 4), torch.tensor([3]), torch.randn(5, 4)),
    "zero rows": lambda: (torch.cat([torch.zeros(30, 4), torch.randn(30, 4)]), torch.arange(60) % 4, torch.zeros(3, 4)),
    "tiny and huge rows": lambda: (torch.randn(99, 4) * 1e-30, torch.arange(99) % 4, torch.randn(9, 4) * 1e30),
}


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
    monkeypatch.setattr(knn, "_SCAN_ELEMENTS", 900)
    monkeypatch.setattr(knn, "_BANK_ROWS", 64)
    monkeypatch.setattr(knn, "_RESCORE_ELEMENTS", 64)
    assert KNNProbe(k=5).fit(bank, labels).predict(queries).equal(expected)
    probe._unit = probe._unit.bfloat16().float()  # what a matrix product in bfloat16 sees
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
    for options in ({"k": 0}, {"temperature": 0.0}, {"temperature": float("nan")}, {"metric": "cosin"}):
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
    with pytest.raises(UsageError, match="at least 2 rows"):
        KNNProbe().fit(f[:1], y[:1]).score_leave_one_out()
