"""A weight that a target finds, a bound or a set point: formulas, limits, models of how a value answers, refusals."""

import json
import math

import pytest
import torch
from torch import nn

from hfproj.errors import UsageError
from hfproj.regularizers import Weighted, create_regularizer, weighted


class Value(nn.Module):
    """A regularizer whose value is what was put there."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value = value

    def forward(self, model, h, z, *, step=None):
        return torch.tensor(self.value, dtype=torch.float64, requires_grad=True)


def step(made, *values):
    for value in values:
        made.module.value = float(value)
        made(nn.Identity(), None, None)
    made.after_step(nn.Identity(), 0.1, 0.0, 0.1)
    return made.at(0.5)


def test_first_step_is_the_formula_and_five_percent_at_most():
    for value, expected in ((2.2, math.exp(0.1 * 0.1)), (1.8, math.exp(-0.1 * 0.1)), (50, 1.05), (-50, 1 / 1.05)):
        made = Weighted(Value(), 3.0, at_most=2.0)
        assert made.at(0.0) == made.at(1.0) == pytest.approx(3.0)
        assert step(made, value) == pytest.approx(3 * expected)


def test_value_is_the_mean_over_a_step_and_not_of_evaluation():
    made = Weighted(Value(), 1.0, at_most=2.0)
    with torch.no_grad():
        made.module.value = 100.0
        made(nn.Identity(), None, None)
    assert step(made, 2.0, 2.2, 2.4) == pytest.approx(math.exp(0.1 * 0.1))
    before = made.at(0.0)
    made.after_step(nn.Identity(), 0.1, 0.0, 0.1)  # nothing was measured
    assert made.at(0.0) == before


@pytest.mark.parametrize("target", [2.0, -2.0])
@pytest.mark.parametrize("start", [0.01, 1.0, 100.0])
def test_value_that_answers_slowly_comes_to_its_target(start, target):
    """A value goes a fifth of the way to `target` − log(λ / 0.7) in a step: it meets the target at λ = 0.7."""
    made, value = Weighted(Value(), start, at_most=target), target + 3
    for _ in range(300):
        weight = step(made, value)
        value += 0.2 * (target - math.log(weight / 0.7) - value)
    assert value == pytest.approx(target, rel=0.01)
    assert weight == pytest.approx(0.7, rel=0.02)


def test_weight_stays_within_a_million_of_its_start():
    made = Weighted(Value(), 2.0, at_most=1.0)
    while made.at(0.0) < 1.95e6:
        step(made, 5.0)
    with pytest.warns(UserWarning, match=r"Value stays away from its target of 1.0.*it started from, 2,"):
        step(made, 5.0)
    assert step(made, 5.0) == pytest.approx(2e6)  # and no second warning, which would be an error
    for _ in range(700):
        step(made, 0.0)
    assert made.at(0.0) == pytest.approx(2e-6)


def test_set_point_is_the_formula():
    """λ + ρ ē step by step: the first ē is the first e, ρ grows with |ē| beyond 0.05, and is halved when it turns."""
    made = Weighted(Value(), 0.5, keep_at=2.0)
    assert made.at(0.0) == 0.5
    excess, multiplier, penalty, side = None, 0.0, 0.5, 0
    for value in (3.0, 2.6, 2.2, 2.0, 1.9, 1.0, 0.5, 1.0, 2.3, 3.9, 9.0, 9.0):
        new = min(max((value - 2.0) / 2.0, -1), 1)
        excess = new if excess is None else 0.7 * excess + 0.3 * new
        if abs(excess) > 0.05:
            penalty *= 0.5 if side * excess < 0 else 1
            side = 1 if excess > 0 else -1
        multiplier += 0.02 * penalty * excess
        penalty *= 1.05 ** min((abs(excess) - 0.05) / 0.2, 1) if abs(excess) > 0.05 else math.exp(-0.01)
        assert step(made, value) == pytest.approx(multiplier + penalty * excess, rel=1e-12)
    assert side == 1  # it went to the other side, and back


@pytest.mark.parametrize("needed", [0.7, -0.7])
@pytest.mark.parametrize("target", [2.0, -2.0])
@pytest.mark.parametrize("start", [0.01, 1.0, 100.0])
def test_set_point_pulls_a_value_down_and_up(start, target, needed):
    """A value goes a fifth of the way to `target` − (λ − needed) in a step: it meets the target at λ = needed."""
    made, value = Weighted(Value(), start, keep_at=target), target + 3
    values = []
    for _ in range(400):
        value += 0.2 * (target - math.tanh(step(made, value) - needed) - value)
        values.append(value)
    assert sum(values[-100:]) / 100 == pytest.approx(target, rel=0.05)
    bound, low = Weighted(Value(), 1.0, at_most=target), target - 1
    for _ in range(300):
        low += 0.2 * (target - 0.5 - step(bound, low) - low)
    assert low == pytest.approx(target - 0.5, rel=0.01)  # a bound does not pull it up


@pytest.mark.parametrize("kind", ["at_most", "keep_at"])
def test_state_goes_through_json_and_on(kind):
    made, again = Weighted(Value(), **{kind: 2.0}), Weighted(Value(), **{kind: 2.0})
    for value in (3.0, 2.5, 2.1, 0.5):
        step(made, value)
    again.take_up(json.loads(json.dumps(made.state())))
    assert step(again, 2.2) == step(made, 2.2)
    made.take_up(None)
    assert made.at(0.0) == pytest.approx(0.001)
    assert Weighted(Value(), 2.0).state() is None
    other = Weighted(Value(), **{({"at_most", "keep_at"} - {kind}).pop(): 2.0})
    with pytest.raises(UsageError, match="of another kind of target; resume with the target"):
        other.take_up(made.state())


@pytest.mark.parametrize("kind", ["at_most", "keep_at"])
def test_a_value_that_is_not_finite_moves_nothing(kind):
    made = Weighted(Value(), **{kind: 2.0})
    before = step(made, 3.0)
    assert step(made, math.nan) == step(made, math.inf) == before
    assert all(part is None or math.isfinite(part) for part in made.state())


def test_description_makes_it_again():
    made = weighted("bottleneck", {"at_most": 2, "weight": 0.5, "alpha": 1.0})
    assert made.describe() == {"weight": 0.5, "at_most": 2.0, "weight_rate": 0.1, "alpha": 1.0}
    assert weighted("bottleneck", made.describe()).describe() == made.describe()
    assert made.report(nn.Identity()) == {"weight": pytest.approx(0.5)}
    kept = weighted("bottleneck", {"keep_at": 2, "weight": 0.5})
    assert kept.describe() == {"weight": 0.5, "keep_at": 2.0, "weight_rate": 0.02}
    assert made.largest() == math.inf
    assert Weighted(Value(), 2.0, schedule="linear", end_weight=-3.0).largest() == 3.0
    assert Weighted(Value(), -2.0).largest() == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at_most": True}, "to be a number, got True"),
        ({"at_most": 0.0}, "at_most to be a finite number other than 0, got 0.0"),
        ({"keep_at": 0.0}, "keep_at to be a finite number other than 0, got 0.0"),
        ({"at_most": 2.0, "keep_at": 2.0}, "a bound, or keep_at, a set point, got both"),
        ({"keep_at": 2.0, "schedule": "linear"}, "no schedule"),
        ({"keep_at": 2.0, "weight_rate": math.inf}, "finite|infinite"),
        ({"weight": 1.0, "end_weight": 0.5}, "end_weight=0.5 has no effect on a constant weight"),
        ({"at_most": math.inf}, "finite number|infinite|not finite"),
        ({"at_most": 2.0, "schedule": "linear"}, "no schedule"),
        ({"at_most": 2.0, "weight": 0.0}, r"a weight above 0 to start from \(got 0.0\)"),
        ({"at_most": 2.0, "weight_rate": 0.0}, r"weight_rate above 0 \(got 0.0\)"),
        ({"at_most": "2"}, "at_most of the regularizer 'bottleneck' to be a number"),
    ],
)
def test_targets_that_cannot_work(options, message):
    with pytest.raises(UsageError, match=message):
        weighted("bottleneck", options)


def test_a_rate_alone_has_no_effect():
    with pytest.raises(UsageError, match="weight_rate has no effect without a target"):
        weighted("bottleneck", {"weight_rate": 0.2})
    with pytest.raises(UsageError, match="has a target of its own"):
        Weighted(create_regularizer("sparse_head", sparsity=0.5), at_most=2.0)
