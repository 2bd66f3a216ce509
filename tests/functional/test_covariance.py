"""VICReg's terms and off-diagonal energy: dense formulas, closed forms, invariances, gradcheck, on both branches."""

import math

import pytest
import torch

from hfproj.errors import UsageError
from hfproj.functional.moments import covariance_penalty, off_diagonal_energy, variance_hinge

SHAPES = [(9, 4), (4, 9), (5, 6), (2, 3)]  # more rows than dimensions; fewer; between the two thresholds; the fewest
either_branch = pytest.mark.parametrize("shape", [(4, 2), (2, 4)])
every_shape = pytest.mark.parametrize("shape", SHAPES)


def rows(shape):
    return torch.randn(shape, dtype=torch.float64) + 3


def covariance_as_published(z):
    """The official code's covariance matrix and ``off_diagonal``."""
    z = z - z.mean(0)
    covariance = (z.T @ z) / (len(z) - 1)
    k = len(covariance)
    off_diagonal = covariance.flatten()[:-1].view(k - 1, k + 1)[:, 1:].flatten()
    return off_diagonal.pow(2).sum() / k


@every_shape
def test_terms_equal_the_official_formulas(shape):
    z = rows(shape)
    torch.testing.assert_close(covariance_penalty(z), covariance_as_published(z), rtol=1e-12, atol=0)
    hinge = torch.relu(2 - torch.sqrt(z.var(dim=0) + 1e-3)).mean()
    torch.testing.assert_close(variance_hinge(z, eps=1e-3, target=2.0), hinge, rtol=1e-12, atol=0)


@every_shape
@pytest.mark.parametrize("two", [False, True])
def test_energy_is_that_of_the_product(shape, two):
    a = rows(shape)
    others = (rows(shape),) if two else ()
    product = a.T @ (others[0] if two else a)
    expected = product.square().sum() - product.diagonal().square().sum()
    torch.testing.assert_close(off_diagonal_energy(a, *others), expected, rtol=1e-12, atol=0)


@either_branch
@pytest.mark.parametrize("function", [covariance_penalty, variance_hinge, off_diagonal_energy])
def test_first_and_second_derivatives(shape, function):
    z = (rows(shape) / 4).requires_grad_()
    assert torch.autograd.gradcheck(function, z)
    assert torch.autograd.gradgradcheck(function, z, fast_mode=True)


@either_branch
def test_derivatives_of_two_matrices(shape):
    pair = [rows(shape).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(off_diagonal_energy, pair)
    assert torch.autograd.gradgradcheck(off_diagonal_energy, pair, fast_mode=True)


@either_branch
def test_function_transforms(shape):
    z = rows(shape)
    expected = torch.autograd.functional.hessian(covariance_as_published, z)
    hessian = torch.func.jacrev(torch.func.jacrev(covariance_penalty))(z)
    torch.testing.assert_close(hessian, expected, rtol=1e-10, atol=1e-10)


@every_shape
def test_no_square_matrix_waits_for_the_backward(shape):
    kept = []
    a, b = (rows(shape).requires_grad_() for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        off_diagonal_energy(a, b)
    assert set(kept) == {shape}


def test_collapse():
    """The hinge alone pushes collapsed rows apart, and only at second order."""
    n, k, eps = 5, 3, 1e-4
    z = torch.full((n, k), 0.7, dtype=torch.float64, requires_grad=True)
    value = variance_hinge(z, eps=eps)
    (grad,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(value.item(), 1 - math.sqrt(eps), rtol=1e-12, atol=0)
    assert not grad.any()
    assert covariance_penalty(z).item() == 0
    hessian = torch.autograd.functional.hessian(lambda z: variance_hinge(z, eps=eps), z).view(n * k, n * k)
    lowest = torch.linalg.eigvalsh(hessian)[0].item()
    torch.testing.assert_close(lowest, -1 / (k * (n - 1) * math.sqrt(eps)), rtol=1e-9, atol=0)


def test_spread_and_decorrelated_rows_cost_nothing():
    signs = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    assert variance_hinge(signs).item() == 0
    assert abs(covariance_penalty(signs).item()) < 1e-6


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_invariances(shape):
    z = rows(shape)
    shift, order, columns = torch.randn(shape[1]), torch.randperm(shape[0]), torch.randperm(shape[1])
    for term in (variance_hinge, covariance_penalty):
        for same in (z + shift, z[order], z[:, columns], -z):
            torch.testing.assert_close(term(same), term(z), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("shape", [(64, 8), (8, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_and_autocast(shape, dtype):
    z = rows(shape).to(dtype)
    z[0] = 0
    z[1] = z[2]
    for term in (variance_hinge, covariance_penalty):
        with torch.autocast("cpu", torch.bfloat16):
            value = term(z)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), term(z.double()), rtol=1e-4, atol=1e-6)


def test_float32_sums_keep_their_digits():
    """A plain norm over the entries of a large product is off by 1e-3."""
    a = torch.randn(800, 700)
    torch.testing.assert_close(off_diagonal_energy(a).double(), off_diagonal_energy(a.double()), rtol=1e-6, atol=0)


def test_a_large_column_leaves_the_others_their_digits():
    """The difference of the sums of all and of diagonal entries would be rounding alone."""
    z = torch.randn(33, 4)
    z[:, 0] *= 1e6
    for f in (z, z[:, :1]):
        torch.testing.assert_close(covariance_penalty(f).double(), covariance_penalty(f.double()), rtol=1e-5, atol=0)
    assert covariance_penalty(1e12 * z[:, :1]).item() == 0


def test_one_row_is_refused():
    with pytest.raises(UsageError, match="covariance of dimensions needs at least 2 images, got 1 over all processes"):
        variance_hinge(torch.zeros(1, 4))
    with pytest.raises(UsageError, match="at least 2 images"):
        covariance_penalty(torch.zeros(1, 4))
