"""VICReg as the official code, solo-learn and VICRegL write it, closed forms, invariances and gradcheck."""

import math

import pytest
import torch
from inputs import extreme_projections, projections
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.objectives import create_objective
from hfproj.objectives.vicreg import VICReg, invariance

SHAPES = [(6, 4), (4, 9), (2, 3)]  # dimensions × dimensions; images × images; the fewest images
every_shape = pytest.mark.parametrize("shape", SHAPES)


def variance(z):
    return torch.relu(1 - torch.sqrt(z.var(dim=0) + 0.0001)).mean()


def covariance(z):
    z = z - z.mean(0)
    squares = (z.T @ z / (len(z) - 1)).pow(2)
    return squares.fill_diagonal_(0).sum() / z.shape[1]


def official(a, b):
    return (
        25 * F.mse_loss(a, b)
        + 25 * (variance(a) / 2 + variance(b) / 2)
        + (covariance(a.clone()) + covariance(b.clone()))
    )


def solo_learn(a, b):
    return 25 * F.mse_loss(a, b) + 25 * (variance(a) + variance(b)) + covariance(a.clone()) + covariance(b.clone())


@every_shape
@pytest.mark.parametrize(("reduction", "formula"), [("mean", official), ("sum", solo_learn)])
def test_equals_published_code(shape, reduction, formula):
    z = (projections(2, *shape) / 2).requires_grad_()
    results = []
    for loss in (VICReg(variance_reduction=reduction)(z).loss, formula(*z)):
        results.append((loss.detach(), *torch.autograd.grad(loss, z)))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("views", [3, 5])
def test_more_views_as_in_vicregl(views):
    """``global_loss``; its covariance term is a mean over views, ours twice that, as for two views."""
    z = projections(views)
    pairs = [F.mse_loss(z[i], z[j]) for i in range(2) for j in range(views) if j != i]
    terms = VICReg()(z).terms
    expected = {
        "invariance": sum(pairs) / len(pairs),
        "variance": sum(map(variance, z)) / views,
        "covariance": 2 * sum(covariance(v.clone()) for v in z) / views,
    }
    torch.testing.assert_close(terms, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_collapse(reduction):
    z = torch.full((2, 5, 3), 0.3, dtype=torch.float64, requires_grad=True)
    loss = VICReg(variance_reduction=reduction)(z).loss
    loss.backward()
    torch.testing.assert_close(loss.item(), 24.75 * (2 if reduction == "sum" else 1), rtol=1e-12, atol=0)
    assert not z.grad.any()


def test_equal_views_that_vary_and_do_not_covary():
    signs = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    assert VICReg()(signs.expand(2, 4, 3)).loss.item() < 1e-13


@every_shape
def test_invariances(shape):
    objective, z = VICReg(), projections(2, *shape) / 2
    for same in (z + 3, -z, z.flip(0), z[:, torch.randperm(shape[0])], z[..., torch.randperm(shape[1])]):
        torch.testing.assert_close(objective(same).loss, objective(z).loss, rtol=1e-11, atol=0)


@pytest.mark.parametrize("shape", [(4, 2), (2, 3)])
def test_gradcheck(shape):
    z = (projections(2, *shape) / 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: VICReg()(z).loss, z)
    assert torch.autograd.gradgradcheck(lambda z: VICReg()(z).loss, z, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_are_finite(dtype):
    # The gradient grows with the cube of z: its longest rows would leave float16's range.
    z = (extreme_projections(dtype).detach() / 1000).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = VICReg()(z)
    loss.backward()
    assert loss.dtype == torch.float32
    assert z.grad.isfinite().all()
    torch.testing.assert_close(loss.double(), official(*z.detach().double()), rtol=1e-4, atol=0)
    assert not any(term.requires_grad for term in terms.values())


def test_weights():
    z = projections() / 2
    terms = VICReg()(z).terms
    for name in ("invariance", "variance", "covariance"):
        weights = {f"{n}_weight": 3.0 if n == name else 0.0 for n in terms}
        torch.testing.assert_close(VICReg(**weights)(z).loss, 3 * terms[name], rtol=1e-14, atol=0)


def test_invariance_of_two_views_is_the_mean_squared_error():
    z = projections()
    torch.testing.assert_close(invariance(z), F.mse_loss(*z), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance_reduction": "men"}, "Did you mean 'mean'"),
        ({"invariance_weight": -1.0}, "invariance_weight to be at least 0"),
        ({"variance_weight": math.nan}, "variance_weight"),
        ({"covariance_weight": math.inf}, "covariance_weight"),
        ({"eps": 0.0}, "eps to be a positive number"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(UsageError, match=message):
        create_objective("vicreg", **options)


def test_batches_that_cannot_work():
    with pytest.raises(UsageError, match="at least 2 views"):
        VICReg()(projections(1))
    with pytest.raises(UsageError, match="at least 2 images, got 1 over all processes"):
        VICReg()(projections(2, 1))
