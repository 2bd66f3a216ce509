"""Cases of probes: a bank sharded over processes, against brute force and against one process, bit for bit."""

import torch
from probes.knn_cases import CASES as DATA
from probes.knn_cases import clusters, reference

from distributed.run import Processes
from hfproj.errors import UsageError
from hfproj.features.neighbours import NeighbourBank
from hfproj.probes.knn import KNNProbe

KINDS = ("random", "duplicated", "few values", "collapsed", "one a class")
KS = (7, 1, 1000)


def uneven(rows: int) -> dict[int, tuple[int, ...]]:
    """Rows per process; one process of three has none."""
    return {2: (rows // 4, rows - rows // 4), 3: (rows // 3, 0, rows - rows // 3)}


def none_first(rows: int) -> dict[int, tuple[int, ...]]:
    return {2: (0, rows), 3: (0, rows - 1, 1)}


def knn(kind: str, shards=uneven, unlabelled: slice = slice(0)):
    """Labels, accuracies and neighbours of queries that each process has alone, that all have, and of the bank."""

    def case(processes: Processes):
        bank, labels, queries = DATA[kind]()
        labels[unlabelled] = -1
        truth, known = labels[-1 - torch.arange(len(queries)) % len(labels)], labels >= 0
        one = KNNProbe(k=KS).fit(bank, labels)
        own_bank, own_labels = (processes.rows(part, shards=shards(len(bank))) for part in (bank, labels))
        own, own_truth = (processes.rows(part, shards=none_first(len(queries))) for part in (queries, truth))
        probe = KNNProbe(k=KS).fit(own_bank, own_labels, sharded=True)
        assert len(probe._bank._unit) == (own_labels >= 0).sum()  # nothing of another process's features is kept

        predicted = probe.predict(queries)
        assert predicted.equal(reference(bank[known], labels[known], queries, KS[0], 0.07))
        assert probe.predict(own, sharded=True).equal(
            processes.rows(one.predict(queries), shards=none_first(len(queries)))
        )
        for k in (5, 1000):
            found, expected = probe.neighbours(queries, k), one.neighbours(queries, k)
            assert found.rows.equal(expected.rows)
            assert found.cosines.equal(expected.cosines)

        numbers = {}
        for scored in ("all", "own", "bank"):
            if scored == "bank":
                probe.score_leave_one_out(), one.score_leave_one_out()
            else:
                one.score(queries, truth)
                probe.score(*((own, own_truth) if scored == "own" else (queries, truth)), sharded=scored == "own")
            assert probe.results_ == one.results_
            assert probe.correct_.equal(one.correct_)
            values = list(probe.results_["values"].values())
            numbers[f"{scored}, accuracies"] = torch.tensor(values, dtype=torch.float64)
        return {"labels": predicted, **numbers}

    return case


def many_rounds(processes: Processes):
    """More queries than one round takes, fewer on some processes: all of them go on until the last has none left."""
    bank, labels = clusters(3000, 6, 4, 1, 2.0)
    queries = clusters(2500, 6, 4, 2, 2.0)[0]
    shards = {2: (2400, 100), 3: (1200, 1300, 0)}
    own = processes.rows(queries, shards=shards)
    own_bank, own_labels = (processes.rows(part, shards=uneven(3000)) for part in (bank, labels))
    probe = KNNProbe(k=10).fit(own_bank, own_labels, sharded=True)
    expected = KNNProbe(k=10).fit(bank, labels).predict(queries)
    assert probe.predict(own, sharded=True).equal(processes.rows(expected, shards=shards))
    within = NeighbourBank(bank).search_within(3).rows
    own_within = NeighbourBank(own_bank, sharded=True).search_within(3).rows
    assert own_within.equal(processes.rows(within, shards=uneven(3000)))
    return {"labels": expected, "within": within}


def refused(what: str):
    """1 where what only the last process does wrong is refused, with the reason."""

    def case(processes: Processes):
        f, y = torch.randn(40, 4), torch.arange(40)
        own, labels = (processes.rows(part, shards=uneven(40)) for part in (f, y))
        last = processes.rank == len(processes.shards) - 1
        reason = ""
        try:
            if what == "bank":
                own = own.masked_fill(torch.arange(len(own))[:, None] == 2, torch.nan) if last else own
            elif what == "width" and last:
                own = torch.randn(len(own), 5)
            elif what == "labels" and last:
                labels = labels[1:].tolist()
            elif what == "rows":
                own, labels = own[:0], labels[:0]
            probe = KNNProbe().fit(own, labels, sharded=True)
            if what == "queries":
                probe.predict(f.index_fill(0, torch.tensor(5), torch.inf if last else 0.0), sharded=True)
            elif what == "no queries":
                probe.predict(f[:0], sharded=True)
            else:
                probe.predict(f + last)  # not sharded, yet different
        except UsageError as error:
            reason = str(error)
        expected = {
            "bank": ["bank", "row 2"],
            "width": ["width", "5"],
            "labels": ["label"],
            "rows": ["at least 1 row"],
            "queries": ["queries", "row 5"],
            "no queries": ["at least 1 row"],
            "differ": ["different queries"],
        }[what]
        if what in ("bank", "queries", "labels"):
            expected.append(f"Process {len(processes.shards) - 1}: ")
        assert all(part in reason for part in expected), reason
        return {"refused": torch.tensor(1)}

    return case


PROBES = {
    **{f"k-NN, {kind} features": knn(kind) for kind in KINDS},
    "k-NN, nothing on the first process": knn("random", none_first),
    "k-NN, rows without a label": knn("random", unlabelled=slice(None, None, 3)),
    "k-NN, no label on the first process": knn("random", unlabelled=slice(170)),
    "k-NN, many rounds": many_rounds,
    **{
        f"refused in all, k-NN, {what}": refused(what)
        for what in ("bank", "width", "labels", "rows", "queries", "no queries", "differ")
    },
}
