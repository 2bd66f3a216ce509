"""Whitened rows have the identity as covariance; singular covariances are refused, not divided by."""

import pytest
import torch

from hfproj.errors import UsageError
from hfproj.functional.matrices import cholesky_whiten, zca_matrix


def rows(*shape):
    return torch.randn(shape, dtype=torch.float64) @ torch.randn(shape[-1], shape[-1], dtype=torch.float64) + 2


def test_covariance_becomes_the_identity_in_each_group():
    z = cholesky_whiten(rows(2, 3, 10, 4))
    torch.testing.assert_close(z.mean(-2), torch.zeros(2, 3, 4, dtype=torch.float64), rtol=0, atol=1e-12)
    identity = torch.eye(4, dtype=torch.float64).expand(2, 3, 4, 4)
    torch.testing.assert_close(z.mT @ z / 9, identity, rtol=0, atol=1e-11)


def test_equals_the_inverse_factor_of_the_official_code():
    z, eps = rows(10, 4), 0.1
    centred = z - z.mean(0)
    covariance = (1 - eps) * centred.T @ centred / 9 + eps * torch.eye(4, dtype=torch.float64)
    inverse = torch.linalg.inv(torch.linalg.cholesky(covariance))
    torch.testing.assert_close(cholesky_whiten(z, eps=eps), (inverse @ centred.T).T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_gradcheck(eps):
    assert torch.autograd.gradcheck(lambda z: cholesky_whiten(z, eps=eps), rows(2, 6, 3).requires_grad_())


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_float32_keeps_its_digits_beside_a_long_row(eps):
    """By one factor of this covariance (condition number 10⁶) entries are off by 0.3, the gradient by 5 %."""
    z = torch.randn(128, 64)
    z[4] *= 1e3
    exact, z = z.double().requires_grad_(), z.requires_grad_()
    direction = torch.randn(128, 64)
    a, b = cholesky_whiten(z, eps=eps), cholesky_whiten(exact, eps=eps)
    torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-4)
    ((a * direction).sum() + (b * direction).sum()).backward()
    assert (z.grad - exact.grad).norm() < 1e-4 * exact.grad.norm()


@pytest.mark.parametrize(
    "z",
    [
        torch.ones(8, 3),  # collapsed
        torch.randn(8, 1) * torch.tensor([1.0, 2.0, -3.0]) + 5,  # one dimension
        torch.randn(3, 3),  # too few rows
        torch.randn(500, 4, 4),  # too few rows, where rounding leaves some of the last pivots above zero
        torch.stack([torch.randn(8, 3), torch.zeros(8, 3)]),  # one group of two
        torch.randn(8, 3).half() * torch.tensor([1, 1, 0]).half(),
    ],
    ids=["collapsed", "rank one", "few rows", "many groups of few rows", "one group", "half"],
)
def test_singular_covariances_are_refused_and_mended_by_eps(z):
    with pytest.raises(UsageError, match=r"full rank.*is singular.*w_size.*eps=1e-3"):
        cholesky_whiten(z)
    assert cholesky_whiten(z, eps=1e-3).isfinite().all()


def test_zca_is_the_symmetric_inverse_root():
    z = rows(20, 4)
    covariance = z.T @ z / 20
    matrix = zca_matrix(covariance.requires_grad_(), eps=0.0)
    assert not matrix.requires_grad
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(matrix @ covariance @ matrix, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-8)
    singular = zca_matrix(torch.zeros(2, 3, 3), eps=0.25)
    torch.testing.assert_close(singular, 2 * torch.eye(3).expand(2, 3, 3))
