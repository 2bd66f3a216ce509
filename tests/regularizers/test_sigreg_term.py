"""SIGReg as an add-on: by LeJEPA's minimal example, closed forms, and where its directions come from."""

import pytest
import torch
from regularizers.models import features

from hfproj.errors import UsageError
from hfproj.functional.distributions import random_directions
from hfproj.objectives.base import Step
from hfproj.regularizers import create_regularizer


def official(view, directions):
    """rbalestr-lab/lejepa ``MINIMAL.md``, with the directions given."""
    t = torch.linspace(0, 3, 17, dtype=view.dtype)
    dt = 3 / 16
    weights = torch.full((17,), 2 * dt, dtype=view.dtype)
    weights[[0, -1]] = dt
    phi = torch.exp(-t.square() / 2)
    x_t = (view @ directions).unsqueeze(-1) * t
    err = (x_t.cos().mean(-3) - phi).square() + x_t.sin().mean(-3).square()
    return ((err @ (weights * phi)) * view.size(-2)).mean()


@pytest.mark.parametrize("on", ["h", "z"])
def test_equals_the_official_code(on):
    h, z = features().requires_grad_(), features(dim=4).requires_grad_()
    used = h if on == "h" else z
    value = create_regularizer("sigreg", on=on, slices=12)(None, h, z, step=Step.at(0, 3, 0.0))
    directions = random_directions(used[0], 12, generator=Step.at(0, 3, 0.0).generator)
    expected = (official(used[0], directions) + official(used[1], directions)) / 2
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(v, used)[0] for v in (value, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)


def test_directions_change_with_the_step_and_with_nothing_else():
    h = features()
    term = create_regularizer("sigreg", slices=4)
    one, again, next_one = (term(None, h, h, step=Step.at(0, s, 0.0)) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, next_one)


def test_gaussian_and_zero_rows():
    z = torch.randn(1, 4000, 4, dtype=torch.float64)
    value = create_regularizer("sigreg", slices=64)(None, z, z).item()
    assert 0.3 < value < 3  # 1.052 on average
    zero = torch.zeros(2, 50, 4, dtype=torch.float64, requires_grad=True)
    value = create_regularizer("sigreg", slices=64)(None, zero, zero)
    value.backward()
    assert value.item() == pytest.approx(0.40205 * 50, rel=1e-4)
    assert not zero.grad.any()


@pytest.mark.parametrize("options", [{"on": "p"}, {"slices": 0}, {"knots": 1}, {"t_max": 0.0}])
def test_options_that_cannot_work(options):
    with pytest.raises(UsageError):
        create_regularizer("sigreg", **options)
