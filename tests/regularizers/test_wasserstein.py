"""W2 by the authors' formula and by the general distance of Gaussians, closed forms, invariances, gradcheck."""

import math

import pytest
import torch
from regularizers.models import features
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.functional.distributions import wasserstein_to_uniform
from hfproj.regularizers import create_regularizer


def official(z):
    """statsle/WassersteinSSL ``metric.py`` with eigh in place of eig."""
    z = F.normalize(z, dim=1)
    n, d = z.shape
    center = z.mean(0)
    covariance = z.T @ z / n - torch.outer(center, center)
    s, q = torch.linalg.eigh(covariance)
    root = q @ torch.diag(s.clamp_min(0).sqrt()) @ q.T
    return (center @ center + torch.trace(covariance + torch.eye(d).to(z) / d - 2 / math.sqrt(d) * root)).sqrt()


@pytest.mark.parametrize("shape", [(20, 5), (6, 6), (4, 9)])
def test_equals_the_official_formula(shape):
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for floor in (0.0, 1e-12):
        torch.testing.assert_close(
            wasserstein_to_uniform(z, floor=floor), official(z), rtol=0, atol=1e-5 if floor else 1e-7
        )
    if shape[0] > shape[1]:  # of full rank, where the official formula has a gradient
        grads = [torch.autograd.grad(f(z), z)[0] for f in (wasserstein_to_uniform, official)]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(wasserstein_to_uniform(z), official(z), rtol=1e-12, atol=0)


def test_by_singular_values():
    """tr Σ^{1/2} = Σ σ(ẑ − mean)/√n."""
    z = torch.randn(12, 5, dtype=torch.float64)
    u = F.normalize(z, dim=1)
    trace = torch.linalg.svdvals(u - u.mean(0)).sum() / math.sqrt(12)
    expected = (2 - 2 / math.sqrt(5) * trace).sqrt()
    torch.testing.assert_close(wasserstein_to_uniform(z, floor=0.0), expected, rtol=1e-12, atol=0)


def cross_polytope(r, dim):
    eye = torch.eye(dim, dtype=torch.float64)[:r]
    return torch.cat([eye, -eye])


@pytest.mark.parametrize("r", [1, 3, 8])
def test_isotropic_in_some_dimensions(r):
    value = wasserstein_to_uniform(cross_polytope(r, 8), floor=0.0).item()
    assert value == pytest.approx(math.sqrt(2 - 2 * math.sqrt(r / 8)), abs=1e-7)


@pytest.mark.parametrize("shape", [(40, 16), (6, 16)])
def test_collapse_to_a_point(shape):
    z = torch.randn(1, 16, dtype=torch.float64).expand(shape).clone().requires_grad_()
    assert wasserstein_to_uniform(z, floor=0.0).item() == pytest.approx(math.sqrt(2), abs=1e-7)
    value = wasserstein_to_uniform(z)
    assert value.item() == pytest.approx(math.sqrt(2), abs=1e-4)
    value.backward()
    assert z.grad.isfinite().all()


def test_gradient_at_the_minimum_is_finite():
    z = cross_polytope(4, 4).requires_grad_()
    wasserstein_to_uniform(z).backward()
    assert z.grad.isfinite().all()


def test_invariances():
    z = torch.randn(12, 5, dtype=torch.float64)
    value = wasserstein_to_uniform(z)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    scale = torch.logspace(-3, 3, 12, dtype=torch.float64)[:, None]
    for same in (z @ rotation, z * scale, z[torch.randperm(12)], torch.cat([z, z])):
        torch.testing.assert_close(wasserstein_to_uniform(same), value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(9, 4), (4, 7)])
def test_gradcheck(shape):
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    # Fewer rows than dimensions: centred rows have a zero eigenvalue, whose floor has no gradient.
    assert torch.autograd.gradcheck(wasserstein_to_uniform, z)


def test_descent_spreads_rows():
    z = torch.randn(16, 4, dtype=torch.float64) * torch.tensor([1, 1, 0.1, 0.1])
    z.requires_grad_()
    start = wasserstein_to_uniform(z).item()
    for _ in range(40):
        (grad,) = torch.autograd.grad(wasserstein_to_uniform(z).square(), z)
        z = (z - grad).detach().requires_grad_()
    assert wasserstein_to_uniform(z).item() < start / 4


@pytest.mark.parametrize("on", ["h", "z"])
def test_regularizer_concatenates_views(on):
    h, z = features(3), features(3, dim=4)
    value = create_regularizer("wasserstein", on=on)(None, h, z)
    expected = official((h if on == "h" else z).reshape(18, -1))
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)


def test_options_that_cannot_work():
    with pytest.raises(UsageError, match=r"Unknown features \(option on\) 'p'"):
        create_regularizer("wasserstein", on="p")
