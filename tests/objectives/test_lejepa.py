"""LeJEPA as its minimal example and lightly write it, closed forms, an invariance and gradcheck."""

import math

import pytest
import torch
from inputs import extreme_projections, projections

from hfproj.errors import UsageError
from hfproj.functional.distributions import random_directions
from hfproj.objectives import create_objective
from hfproj.objectives.base import Step
from hfproj.objectives.lejepa import LeJEPA, distance_to_centre


def published(z, centre, directions, weight):
    """The minimal example, with the centre of lightly: all views at once, one set of directions."""
    t = torch.linspace(0, 3, 17, dtype=z.dtype)
    window = torch.exp(-t.square() / 2)
    weights = torch.full_like(t, 2 * 3 / 16)
    weights[[0, -1]] = 3 / 16
    x_t = (z @ directions).unsqueeze(-1) * t
    error = (x_t.cos().mean(-3) - window).square() + x_t.sin().mean(-3).square()
    statistic = (error @ (weights * window)) * z.shape[-2]
    return (1 - weight) * (centre - z).square().mean() + weight * statistic.mean()


@pytest.mark.parametrize(("views", "global_views"), [(2, None), (4, None), (4, 2)])
@pytest.mark.parametrize("weight", [0.02, 1.0, 0.0])
def test_equals_published_code(views, global_views, weight):
    z = projections(views)
    directions = random_directions(z[0], 8, generator=Step.at(3, 5, 0.0).generator)
    objective = LeJEPA(sigreg_weight=weight, slices=8, global_views=global_views)
    loss, terms = objective(z, step=Step.at(3, 5, 0.9))
    centre = z[:global_views].mean(0)
    torch.testing.assert_close(loss, published(z, centre, directions, weight), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, (1 - weight) * terms["invariance"] + weight * terms["sigreg"], rtol=1e-14, atol=0)


def test_collapse_at_zero():
    z = torch.zeros(2, 7, 4, dtype=torch.float64, requires_grad=True)
    loss = LeJEPA(slices=16)(z).loss
    loss.backward()
    torch.testing.assert_close(loss.item(), 0.05 * 0.40205 * 7, rtol=1e-4, atol=0)
    assert not z.grad.any()


def test_distance_of_two_views():
    z = projections()
    torch.testing.assert_close(distance_to_centre(z), (z[0] - z[1]).square().mean() / 4, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        distance_to_centre(z, global_views=1), (z[0] - z[1]).square().mean() / 2, rtol=1e-12, atol=0
    )


def test_order_of_images_and_views_does_not_matter():
    z, objective = projections(3, 8), LeJEPA(slices=16)
    expected = objective(z, step=Step.at(0, 0, 0.0)).loss
    for same in (z[:, torch.randperm(8)], z.flip(0), -z):
        torch.testing.assert_close(objective(same, step=Step.at(0, 0, 0.0)).loss, expected, rtol=1e-12, atol=0)


def test_directions_change_from_step_to_step():
    z, objective = projections(), LeJEPA(slices=4)
    first, again, later = (objective(z, step=Step.at(0, s, 0.0)).terms["sigreg"].item() for s in (0, 0, 1))
    assert first == again != later


def test_gradcheck():
    objective = LeJEPA(slices=4, global_views=1)
    assert torch.autograd.gradcheck(
        lambda z: objective(z, step=Step.at(0, 0, 0.0)).loss, projections(2, 3, 2).requires_grad_()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_are_finite(dtype):
    z = extreme_projections(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = LeJEPA(slices=16)(z, step=Step.at(0, 0, 0.0))
    loss.backward()
    assert loss.dtype == torch.float32
    assert z.grad.isfinite().all()
    expected = LeJEPA(slices=16)(z.detach().double(), step=Step.at(0, 0, 0.0)).loss
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    assert not any(term.requires_grad for term in terms.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigreg_weight": 1.5}, "sigreg_weight to be from 0 to 1"),
        ({"sigreg_weight": math.nan}, "sigreg_weight"),
        ({"slices": 0}, "slices to be at least 1"),
        ({"knots": 1}, "at least 2 knots"),
        ({"t_max": -1.0}, "positive t_max"),
        ({"global_views": 0}, "global_views to be at least 1"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(UsageError, match=message):
        create_objective("lejepa", **options)


def test_too_few_views_are_refused():
    with pytest.raises(UsageError, match="at least 2 views"):
        LeJEPA()(projections(1))
    with pytest.raises(UsageError, match="global_views=3 views, and z has 2"):
        LeJEPA(global_views=3)(projections())
