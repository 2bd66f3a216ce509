"""Verdicts on claims: the intervals against scipy and by hand, the rules, and negative controls on made-up runs."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from hfproj.errors import UsageError
from hfproj.reproduction import Agree, Cells, Claim, Column, More, Row, Same, Scale, Source, Study, Trend
from hfproj.reproduction.judging import FAILS, HOLDS, UNCLEAR, interval, judge, weights
from hfproj.results import pack_outcomes

ROWS = ("a", "b", "c")
SCALE = Scale(backbone={"name": "vit_nano"}, training={"num_train_epochs": 1.0, "learning_rate": 0.1})
COLUMNS = (
    Column(name="accuracy", measure="knn", unit="%"),
    Column(name="rank", measure="rankme", log=True),
    Column(name="other", measure="rankme"),
)


def study(*tests, data=("x",), rows=ROWS):
    return Study(
        name="made.up", title="", source="", data={name: Source("cifar10") for name in data}, columns=COLUMNS,
        rows=tuple(Row(name=name, preset="simclr_cifar") for name in rows), scales={"paper": SCALE, "mini": SCALE},
        claims=tuple(Claim(text="", tests=(test,), source="") for test in tests),
    )  # fmt: skip


def runs(values, column="accuracy", data="x", answers=None):
    """Return records: `values` is row → one number for each seed."""
    return [
        {"row": row, "data": data, "seed": seed, "values": {column: value},
         "outcomes": {} if answers is None else {column: pack_outcomes(answers[row][seed])}}
        for row, own in values.items() for seed, value in enumerate(own)
    ]  # fmt: skip


def verdict(test, records, **options):
    made = study(test, **options)
    return judge(made, made.claims[0], records)[0]


A_B = More(Cells("accuracy", ("a",)), Cells("accuracy", ("b",)))


def test_interval_of_two_rows_is_welchs():
    values = {"a": [0.61, 0.64, 0.66], "b": [0.55, 0.42, 0.56, 0.51]}
    made = study(A_B, rows=("a", "b"))
    value, low, high = interval(made, weights(made, A_B), runs(values))
    expected = stats.ttest_ind(values["a"], values["b"], equal_var=False).confidence_interval(0.95)
    assert value == pytest.approx(np.mean(values["a"]) - np.mean(values["b"]), abs=1e-15)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_rows_that_a_claim_does_not_name_have_no_part_in_it():
    values = {"a": [0.61, 0.64], "b": [0.55, 0.52]}
    made = study(A_B)
    alone = interval(made, weights(made, A_B), runs(values))
    for others in ([0.1, 0.9], [0.5, 0.5]):
        assert interval(made, weights(made, A_B), runs({**values, "c": others})) == alone


def test_test_images_add_their_variance():
    rng = np.random.default_rng(0)
    answers = {row: [rng.random(200) < p for _ in range(2)] for row, p in (("a", 0.7), ("b", 0.4))}
    values = {row: [float(own.mean()) for own in both] for row, both in answers.items()}
    made = study(A_B, rows=("a", "b"))
    _, low, high = interval(made, weights(made, A_B), runs(values, answers=answers))
    per_image = np.mean(answers["a"], 0) - np.mean(answers["b"], 0)
    parts = [(np.var(v, ddof=1) / 2, 1) for v in values.values()] + [(per_image.var(ddof=1) / 200, math.inf)]
    total = sum(v for v, _ in parts)
    freedom = total**2 / sum(v**2 / f for v, f in parts)
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(total), rel=1e-12)


def test_columns_of_one_row_are_pairs_of_its_runs_and_images():
    rng = np.random.default_rng(0)
    answers = {"h": [], "z": []}
    for _ in range(3):  # what both layers have in common is no part of their difference
        both, own = rng.random(200) < 0.5, rng.random((2, 200)) < 0.1
        for answer, name in zip(own, answers):
            answers[name].append(both ^ answer)
    columns = tuple(Column(name=name, measure="knn", unit="%") for name in answers)
    test = More(Cells("h", ("a",)), Cells("z", ("a",)))
    made = replace(study(A_B), columns=columns, claims=(Claim(text="", tests=(test,), source=""),))
    records = [
        {"row": "a", "data": "x", "seed": seed, "values": {n: float(answers[n][seed].mean()) for n in answers},
         "outcomes": {n: pack_outcomes(answers[n][seed]) for n in answers}} for seed in range(3)
    ]  # fmt: skip
    difference = np.asarray(answers["h"], float) - np.asarray(answers["z"], float)
    parts = [(difference.mean(1).var(ddof=1) / 3, 2), (difference.mean(0).var(ddof=1) / 200, math.inf)]
    total = sum(v for v, _ in parts)
    half = stats.t.ppf(0.975, total**2 / sum(v**2 / f for v, f in parts)) * math.sqrt(total)
    value, low, high = interval(made, weights(made, test), records)
    assert (value, low, high) == pytest.approx((difference.mean(), difference.mean() - half, difference.mean() + half))
    halves = [{**r, "outcomes": {"h": r["outcomes"]["h"]}} for r in records]
    assert judge(made, made.claims[0], halves)[1][0].why == "no single answers of z of a on x, which others have"


def test_answers_of_some_rows_only_are_no_answers():
    rng = np.random.default_rng(0)
    answers = {row: [rng.random(50) < p for _ in range(2)] for row, p in (("a", 0.9), ("b", 0.1), ("c", 0.1))}
    records = runs({row: [float(own.mean()) for own in both] for row, both in answers.items()}, answers=answers)
    assert verdict(A_B, records) == HOLDS
    records[2] = {**records[2], "outcomes": {}}
    made = study(A_B)
    found, (one,) = judge(made, made.claims[0], records)
    assert (found, one.why) == (UNCLEAR, "no single answers of accuracy of b on x, which others have")


@pytest.mark.parametrize(
    ("test", "values", "expected"),
    [
        (A_B, {"a": [0.6, 0.61], "b": [0.4, 0.41], "c": [0.5, 0.5]}, HOLDS),
        (A_B, {"a": [0.4, 0.41], "b": [0.6, 0.61], "c": [0.5, 0.5]}, FAILS),
        (A_B, {"a": [0.5, 0.7], "b": [0.6, 0.58], "c": [0.5, 0.6]}, UNCLEAR),
        (More(Cells("accuracy", ("a",)), 0.5), {"a": [0.6, 0.61], "b": [0, 0], "c": [0, 0]}, HOLDS),
        (More(Cells("accuracy", ("a",)), 0.5, less=True), {"a": [0.6, 0.61], "b": [0, 0], "c": [0, 0]}, FAILS),
        (More(A_B.first, A_B.second, 0.3), {"a": [0.6, 0.61], "b": [0.4, 0.41], "c": [0, 0]}, FAILS),
        (Same(A_B.first, A_B.second, 0.1), {"a": [0.6, 0.61], "b": [0.6, 0.62], "c": [0, 0]}, HOLDS),
        (Same(A_B.first, A_B.second, 0.1), {"a": [0.6, 0.61], "b": [0.4, 0.41], "c": [0, 0]}, FAILS),
        (Trend(Cells("accuracy", ROWS)), {"a": [0.1, 0.12], "b": [0.2, 0.21], "c": [0.3, 0.29]}, HOLDS),
        (Trend(Cells("accuracy", ROWS), rises=False), {"a": [0.1, 0.12], "b": [0.2, 0.21], "c": [0.3, 0.29]}, FAILS),
        (Trend(Cells("accuracy", ROWS)), {"a": [0.1, 0.3], "b": [0.4, 0.2], "c": [0.3, 0.1]}, UNCLEAR),
    ],
)  # fmt: skip
def test_rules(test, values, expected):
    records = runs(values)
    assert verdict(test, records) == expected
    turned = {HOLDS: FAILS, FAILS: HOLDS, UNCLEAR: UNCLEAR}[expected]
    margin_in_the_way = isinstance(test, More) and test.margin and expected == FAILS
    assert verdict(test.turned(), records) == (FAILS if margin_in_the_way else turned)


def test_trend_is_the_slope_over_the_order():
    values = {"a": [1.0, 1.2], "b": [2.0, 2.1], "c": [4.0, 4.1]}
    made = study(test := Trend(Cells("other", ROWS)))
    value = interval(made, weights(made, test), runs(values, "other"))[0]
    assert value == pytest.approx(np.polyfit([0, 1, 2], [np.mean(v) for v in values.values()], 1)[0], rel=1e-12)


def test_logarithmic_columns_are_compared_as_ratios():
    values = {"a": [20.0, 22.0, 21.0], "b": [10.0, 11.0, 10.5], "c": [1.0, 1.1, 1.05]}
    made = study(More(Cells("rank", ("a",)), Cells("rank", ("b",))))
    found, (one,) = judge(made, made.claims[0], runs(values, "rank"))
    assert (found, one.ratio) == (HOLDS, True)
    assert one.value == pytest.approx(2.0, rel=1e-12)
    assert 1.5 < one.low < 2 < one.high


def test_cells_without_names_are_all_rows_and_data_with_equal_weight():
    made = study(test := More(Cells("accuracy", ("a",)), Cells("accuracy")), data=("x", "y"))
    found = weights(made, test)
    assert sum(found.values()) == pytest.approx(0)
    assert found["a", "x", "accuracy"] == pytest.approx(1 / 2 - 1 / 6)
    assert found["c", "y", "accuracy"] == pytest.approx(-1 / 6)


def test_agreement_of_two_columns():
    rows = tuple("abcdefgh")
    numbers = {row: {"accuracy": i + 0.1 * (i % 2), "other": -float(i)} for i, row in enumerate(rows)}
    records = [
        {"row": row, "data": "x", "seed": seed, "values": own, "outcomes": {}}
        for row, own in numbers.items() for seed in (0, 1)
    ]  # fmt: skip
    made = study(Agree(Cells("accuracy"), "other", sign=-1), Agree(Cells("accuracy"), "other"), rows=rows)
    (found, (one,)), (turned, _) = (judge(made, claim, records) for claim in made.claims)
    assert (found, turned) == (HOLDS, FAILS)
    assert one.value == pytest.approx(-1.0)
    assert one.high < 0
    shuffled = [{**r, "values": {**r["values"], "other": float(7 * (i // 2) % 8)}} for i, r in enumerate(records)]
    assert judge(made, made.claims[0], shuffled)[0] == UNCLEAR
    assert judge(made, made.claims[0], records[::2])[0] == UNCLEAR  # one seed decides nothing


def test_one_seed_or_a_missing_cell_can_not_be_judged():
    assert verdict(A_B, runs({"a": [0.9], "b": [0.1], "c": [0.1]})) == UNCLEAR
    made = study(A_B)
    found, (one,) = judge(made, made.claims[0], runs({"a": [0.9, 0.9]}))
    assert (found, one.why) == (UNCLEAR, "no value of accuracy of b on x")


def test_a_claim_of_several_tests_holds_if_all_do_and_fails_if_one_does():
    records = runs({"a": [0.6, 0.61], "b": [0.4, 0.41], "c": [0.41, 0.4]})
    made = study(A_B)

    def of(*tests):
        return judge(made, Claim(text="", tests=tests, source=""), records)[0]

    b_c = More(Cells("accuracy", ("b",)), Cells("accuracy", ("c",)))
    assert (of(A_B, A_B), of(A_B, b_c), of(A_B, b_c, A_B.turned())) == (HOLDS, UNCLEAR, FAILS)


@pytest.mark.parametrize("spread", [1.0, 3.0, 100.0])
def test_rows_without_difference_are_decided_as_often_as_the_level_says(spread):
    """2,000 claims about nothing, rows of other spreads beside them: at most about 5 % are decided, each way alike."""
    rng = np.random.default_rng(0)
    decided = {HOLDS: 0, FAILS: 0, UNCLEAR: 0}
    made = study(A_B)
    for _ in range(2_000):
        values = {row: (size * rng.normal(size=3)).tolist() for row, size in zip(ROWS, (spread, 1.0, 1 / spread))}
        decided[judge(made, made.claims[0], runs(values))[0]] += 1
    wrong = decided[HOLDS] + decided[FAILS]
    assert 0.02 < wrong / 2_000 < 0.065
    assert 0.35 < decided[HOLDS] / wrong < 0.65


def test_a_seed_without_a_number_is_not_left_out():
    values = {"a": [0.9, 0.91, None], "b": [0.1, 0.12, 0.11], "c": [0.1, 0.1, 0.1]}
    made = study(A_B)
    found, (one,) = judge(made, made.claims[0], runs(values))
    assert (found, one.why) == (UNCLEAR, "1 of 3 seeds without a value of accuracy of a on x")
    made = study(More(Cells("rank", ("a",)), Cells("rank", ("b",))))
    zero = runs({"a": [3.0, 0.0, 3.1], "b": [1.0, 1.1, 1.2], "c": [1, 1, 1]}, "rank")
    assert judge(made, made.claims[0], zero)[0] == UNCLEAR  # no logarithm of 0


def test_comparisons_that_can_not_be_made_are_refused():
    with pytest.raises(UsageError, match="Expected two columns of a claim on one scale, got 'rank' and 'accuracy'"):
        study(More(Cells("rank", ("a",)), Cells("accuracy", ("a",))))
    with pytest.raises(UsageError, match="Expected a number above 0 for the logarithmic 'rank', got 0"):
        study(More(Cells("rank", ("a",)), 0))
    with pytest.raises(UsageError, match="Expected seeds as different whole numbers"):
        replace(SCALE, seeds=(0, 0))


def test_a_trend_without_rows_is_of_all():
    made = study(bare := Trend(Cells("accuracy")), Trend(Cells("accuracy", ROWS)))
    assert weights(made, bare) == weights(made, made.claims[1].tests[0])


def test_a_claim_on_one_data_set_has_its_cells_there_alone():
    tests = (A_B, Trend(Cells("accuracy", ROWS)), Agree(Cells("accuracy"), "other"), More(Cells("accuracy"), 0.5))
    claim = Claim(text="a", tests=tests, source="").on("y")
    assert claim.text == "a, y"
    made = study(A_B, data=("x", "y"))
    assert {data for test in claim.tests[:2] for _, data, _ in weights(made, test)} == {"y"}
    assert (claim.tests[2].x.data, claim.tests[3].first.data, claim.tests[3].second) == (("y",), ("y",), 0.5)
