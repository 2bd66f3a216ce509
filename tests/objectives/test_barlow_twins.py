"""Barlow Twins as the official code and solo-learn write it, closed forms, invariances, gradcheck on both branches."""

import math

import pytest
import torch
from inputs import extreme_projections, projections
from torch import nn

from hfproj.errors import UsageError
from hfproj.objectives import create_objective
from hfproj.objectives.barlow_twins import BarlowTwins, barlow_twins_terms

SHAPES = [(6, 4), (4, 9), (2, 3)]  # dimensions × dimensions; images × images; the fewest images
every_shape = pytest.mark.parametrize("shape", SHAPES)


def official(z_a, z_b, lambd):
    """``main.py``: BatchNorm without parameters, then the correlation over the batch."""
    n, k = z_a.shape
    bn = nn.BatchNorm1d(k, affine=False).double()
    c = (bn(z_a).T @ bn(z_b)).div(n)
    off_diagonal = c.flatten()[:-1].view(k - 1, k + 1)[:, 1:].flatten()
    return (c.diagonal() - 1).pow(2).sum() + lambd * off_diagonal.pow(2).sum()


@every_shape
def test_equals_the_official_code(shape):
    z = projections(2, *shape).requires_grad_()
    results = []
    for loss in (BarlowTwins(off_diagonal_weight=0.3)(z).loss, official(*z, 0.3)):
        results.append((loss.detach(), *torch.autograd.grad(loss, z)))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


def test_equals_solo_learn():
    z = projections(2, 7, 5)
    bn = nn.BatchNorm1d(5, affine=False).double()
    corr = torch.einsum("bi, bj -> ij", bn(z[0]), bn(z[1])) / 7
    cdif = (corr - torch.eye(5)).pow(2)
    cdif[~torch.eye(5).bool()] *= 0.0051
    torch.testing.assert_close(BarlowTwins(scale=0.1)(z).loss, 0.1 * cdif.sum(), rtol=1e-12, atol=0)


@every_shape
@pytest.mark.parametrize("value", [0.0, 1.0, -1e4])
def test_exact_collapse(shape, value):
    """METHODS fact: BatchNorm's eps makes C = 0, not NaN."""
    z = torch.full((2, *shape), value, requires_grad=True)
    loss, terms = BarlowTwins()(z)
    loss.backward()
    assert (loss.item(), terms["off_diagonal"].item()) == (shape[1], 0)
    assert not z.grad.any()


def test_equal_views_with_decorrelated_dimensions():
    signs = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    eps = 0.5  # C = I / (1 + eps)
    loss = BarlowTwins(eps=eps)(signs.expand(2, 4, 3)).loss
    torch.testing.assert_close(loss.item(), 3 * (eps / (1 + eps)) ** 2, rtol=1e-12, atol=0)


def test_equal_dimensions():
    column = torch.randn(2, 8, 1, dtype=torch.float64)[:1].expand(2, 8, 5)
    on, off = barlow_twins_terms(column, eps=1e-14)
    torch.testing.assert_close(off.item(), 20.0, rtol=1e-9, atol=0)
    assert on.item() < 1e-20


@every_shape
def test_invariances(shape):
    objective, z = BarlowTwins(eps=1e-14), projections(2, *shape)
    scale = torch.logspace(-1, 1, shape[1], dtype=z.dtype)
    for same in (z * scale + 3, -z, z.flip(0), z[:, torch.randperm(shape[0])], z[..., torch.randperm(shape[1])]):
        torch.testing.assert_close(objective(same).loss, objective(z).loss, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 3), (3, 5)])
def test_gradcheck(shape):
    z = projections(2, *shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: BarlowTwins()(z).loss, z)
    assert torch.autograd.gradgradcheck(lambda z: BarlowTwins()(z).loss, z, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_are_finite(dtype):
    z = extreme_projections(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = BarlowTwins()(z)
    loss.backward()
    assert loss.dtype == torch.float32
    assert z.grad.isfinite().all()
    torch.testing.assert_close(loss.double(), official(*z.detach().double(), 0.0051), rtol=1e-4, atol=1e-5)
    assert not any(term.requires_grad for term in terms.values())


def test_terms_make_up_the_loss():
    loss, terms = BarlowTwins(off_diagonal_weight=0.2, scale=3.0)(projections())
    torch.testing.assert_close(loss, 3 * (terms["on_diagonal"] + 0.2 * terms["off_diagonal"]), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"off_diagonal_weight": -1.0}, r"off_diagonal_weight to be at least 0, got -1\.0"),
        ({"off_diagonal_weight": math.inf}, "off_diagonal_weight"),
        ({"scale": 0.0}, "scale to be a positive number"),
        ({"eps": 0.0}, "eps to be a positive number"),
        ({"lambda_param": 0.1}, "Unknown option"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(UsageError, match=message):
        create_objective("barlow_twins", **options)


def test_batches_that_cannot_work():
    with pytest.raises(UsageError, match="needs 2 views of each image, got 3"):
        BarlowTwins()(projections(3))
    with pytest.raises(UsageError, match="at least 2 images, got 1 over all processes"):
        BarlowTwins()(projections(2, 1))
