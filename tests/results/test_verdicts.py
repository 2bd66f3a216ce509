"""What training did to a layer: against sums by hand, and where outcomes are missing, damaged or do not pair."""

import numpy as np
import pytest

from hfproj.results import (
    Change,
    Interval,
    Measurement,
    Results,
    findings,
    pack_outcomes,
    paired_interval,
    recorded,
)  # fmt: skip
from hfproj.results.verdict import rank_changes, verdicts

ROWS = np.arange(200)


def knn(when, right, *, layer="h", dataset="digits", seed=0, outcomes=True, **settings):
    """A 20-NN that has the first `right` of 200 rows right."""
    packed = pack_outcomes(right > ROWS) if outcomes else ""
    protocol = {"k": 20, "seed": seed, **settings}
    return Measurement("knn", layer, when, right / 200, dataset, "accuracy", protocol, packed)


@pytest.mark.parametrize(
    ("layer", "after", "sense", "headline"),
    [
        ("h", 180, "better", "The representation got better"),
        ("h", 130, "worse", "The representation got worse"),
        ("h", 161, "unclear", "No gain was measured"),
        ("h", 160, "unclear", "No gain was measured"),
        ("z", 130, "worse", "The projection got worse"),
        ("block_3", 180, "better", "The layer block_3 got better"),
    ],
)
def test_the_interval_decides(layer, after, sense, headline):
    results = Results(measurements=[knn("before", 160, layer=layer), knn("after", after, layer=layer)])
    [verdict] = verdicts(results, layer)
    assert (verdict.sense, verdict.headline, verdict.layer) == (sense, headline, layer)
    assert verdict.interval == paired_interval(after > ROWS, ROWS < 160)
    assert (verdict.before, verdict.after) == (0.8, after / 200)
    assert verdict.key == results.measurements[0].key
    assert verdicts(results, "z" if layer == "h" else "h") == []


def test_seeds_are_averaged_and_settings_kept_apart():
    seeds = [knn("after", right, seed=seed) for seed, right in enumerate((170, 180))]
    # the settings of one are a part of the other's
    other = [knn("before", 100, bank=7), knn("after", 50, bank=7)]
    found = verdicts(Results(measurements=[knn("before", 160), *other, *seeds]))
    assert [(v.before, v.after, v.sense) for v in found] == [(0.5, 0.25, "worse"), (0.8, 0.875, "better")]
    right = np.stack([ROWS < 170, ROWS < 180])
    assert found[1].interval == paired_interval(right, ROWS < 160)


@pytest.mark.parametrize(
    "damage", ["", "200:", "200:zz", "9999999999999:ff", "x:ff", "3:" + pack_outcomes([1, 0, 1]).split(":")[1]]
)
def test_without_whole_outcomes_there_is_no_interval_and_the_sign_decides(damage):
    broken = Measurement("knn", "h", "after", 0.7, "digits", "accuracy", {"k": 20, "seed": 0}, damage)
    [verdict] = verdicts(Results(measurements=[knn("before", 160), broken]))
    assert verdict.interval is None
    assert verdict.sense == "worse"


def test_what_has_no_pair_or_is_no_accuracy_gets_none():
    alone = [knn("after", 160), knn("before", 160, dataset="other"), Measurement("rankme", "h", "before", 3.0)]
    assert verdicts(Results(measurements=[*alone, Measurement("rankme", "h", "after", 2.0)])) == []


def test_changes_of_rank_are_means_over_seeds_and_a_half_is_no_collapse():
    def rank(layer, when, value, seed):
        return Measurement("rankme", layer, when, value, "digits", "", {"rows": 10, "seed": seed})

    measured = [
        rank("h", when, value, seed)
        for when, values in (("before", (10.0, 14.0)), ("after", (5.0, 7.0)))
        for seed, value in enumerate(values)
    ]
    measured += [rank("z", "before", 10.0, 0), rank("z", "after", 4.9, 0), rank("block_1", "after", 1.0, 0)]
    changes = rank_changes(Results(measurements=measured))
    assert [(c.layer, c.before, c.after, c.collapsed) for c in changes] == [
        ("h", 12.0, 6.0, False),
        ("z", 10.0, 4.9, True),
    ]


MOVES = [
    Change("alpha_req", 3.0, 2.0, Interval(-1.0, -1.2, -0.8)),
    Change("uniformity", -1.0, -2.0, Interval(-1, -2, -0.5)),
]


def test_without_labels_the_changes_of_all_measures_decide():
    [found] = findings(Results(geometry={"unlabelled": recorded(MOVES)}))
    assert (found.sense, found.unlabelled, found.warns) == ("better", True, False)
    assert found.text.startswith(
        "α-ReQ of h went from 3.0000 to 2.0000 (95 % interval of the change −1.2000 to −0.8000); unif"
    )
    assert found.text.endswith("this is a sign, and no proof.")
    against = [MOVES[0], MOVES[1]._replace(interval=Interval(1, 0.5, 2))]
    assert findings(Results(geometry={"unlabelled": recorded(against)}))[0].sense == "unclear"
    worse = [move._replace(interval=Interval(1, 0.5, 2)) for move in MOVES]
    assert findings(Results(geometry={"unlabelled": recorded(worse)}))[0].warns


def test_labels_decide_where_there_are_any():
    measured = [knn("before", 160), knn("after", 130)]
    found = findings(Results(measurements=measured, geometry={"unlabelled": recorded(MOVES)}))
    assert [finding.headline for finding in found] == ["The representation got worse"]


@pytest.mark.parametrize("kept", [
    3, [], {"alpha_req": 3}, {"rankme": {"before": 1, "after": 2, "low": 1, "high": 1}},
    {"alpha_req": {"before": float("nan"), "after": 2, "low": 1, "high": 1}},
    {"alpha_req": {"before": 10**400, "after": 2, "low": 1, "high": 1}},
    {"alpha_req": {"before": 1, "after": "<b>", "low": 1, "high": 1}}, {"alpha_req": {"before": 1}},
])  # fmt: skip
def test_what_is_no_change_is_not_told(kept):
    assert findings(Results(geometry={"unlabelled": kept})) == []


def test_what_one_probe_finds_comes_first_and_another_that_finds_nothing_gives_no_advice_against_it():
    linear = [Measurement("linear", "h", w, v, "digits", "accuracy") for w, v in (("before", 0.8), ("after", 0.9))]
    better, unclear = findings(Results(measurements=[knn("before", 160), knn("after", 161), *linear]))
    assert (better.sense, unclear.sense) == ("better", "unclear")
    assert "use the bare backbone" not in unclear.text
    [alone] = findings(Results(measurements=[knn("before", 160), knn("after", 161)]))
    assert "use the bare backbone" in alone.text


def test_a_change_within_rounding_is_none():
    assert Change("uniformity", 0.0, 0.0, Interval(-1e-7, -2e-7, -1e-8)).sense == "unclear"


def test_a_guard_of_neighbours_is_no_collapse():
    told = [
        findings(Results(geometry={"collapse": {"metric": name, "step": 4, "what": "A limit."}}))[0]
        for name in ("knn_overlap_h", "rankme_h")
    ]
    assert [finding.headline for finding in told] == [
        "A guard's limit was passed while it trained at step 4", "The collapse alarm rang while it trained at step 4",
    ]  # fmt: skip
    assert {finding.sense for finding in told} == {"alarm"}
