"""Eigenvalues in float32 where LAPACK's float32 routine gives up: exact, and differentiable."""

import pytest
import torch

from hfproj.functional.matrices import eigh, eigvalsh


def collapsed_covariance(seed, rows=5, dim=256):
    """Of rows that are alike but for the rounding of their mean, standardised: entries of 1e-6 and below."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(1, dim, generator=generator).expand(rows, dim)
    z = (z - z.mean(0)) * 1e4
    return z.T @ z / rows


@pytest.fixture(scope="module")
def refused():
    """A covariance that torch.linalg.eigh refuses; any other where this machine's LAPACK refuses none."""
    for seed in range(20):
        matrix = collapsed_covariance(seed)
        try:
            torch.linalg.eigh(matrix)
        except torch.linalg.LinAlgError:
            break
    return matrix


def test_refused_by_float32(refused):
    values, vectors = eigh(refused)
    assert values.dtype == vectors.dtype == torch.float32
    exact = torch.linalg.eigvalsh(refused.double())
    scale = exact.abs().max().item()
    for found in (values, eigvalsh(refused)):
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6 * scale)
    torch.testing.assert_close((vectors * values) @ vectors.T, refused, rtol=0, atol=1e-5 * scale)
    (grad,) = torch.autograd.grad(eigvalsh(refused.requires_grad_()).sum(), refused)
    torch.testing.assert_close(grad, torch.eye(len(refused)), rtol=0, atol=1e-5)  # of the trace


def test_the_retry_is_in_float64(monkeypatch):
    real = {name: getattr(torch.linalg, name) for name in ("eigh", "eigvalsh")}

    def failing(name):
        def call(matrix):
            if matrix.dtype == torch.float32:
                raise torch.linalg.LinAlgError("did not converge")
            return real[name](matrix)

        return call

    matrix = torch.randn(4, 4)
    matrix = matrix + matrix.T
    expected = eigh(matrix)[0]
    for name in real:
        monkeypatch.setattr(torch.linalg, name, failing(name))
    for found in (eigh(matrix)[0], eigvalsh(matrix)):
        torch.testing.assert_close(found, expected)
        assert found.dtype == torch.float32
