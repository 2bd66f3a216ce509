import numpy as np
import pytest
import torch
from diagnostics.features import decaying, normal

from hfproj.diagnostics import (
    correlation_offdiag_energy,
    covariance_offdiag_energy,
    vicreg_covariance,
    whiteness,
)
from hfproj.errors import UsageError
from hfproj.functional.moments import covariance_penalty

ALL = (covariance_offdiag_energy, correlation_offdiag_energy, whiteness, vicreg_covariance)


def off(matrix):
    return matrix - np.diag(np.diag(matrix))


@pytest.mark.parametrize(("rows", "dim"), [(50, 6), (5, 9)])
def test_the_definitions(rows, dim):
    f = (decaying(rows, dim, 0.5) @ normal(dim, dim, seed=1) + 4).float()
    covariance, correlation = np.cov(f.double().numpy().T), np.corrcoef(f.double().numpy().T)
    assert covariance_offdiag_energy(f) == pytest.approx(
        (off(covariance) ** 2).sum() / (covariance**2).sum(), rel=1e-11
    )
    assert correlation_offdiag_energy(f) == pytest.approx(
        (off(correlation) ** 2).sum() / (correlation**2).sum(), rel=1e-11
    )
    assert whiteness(f) == pytest.approx(((correlation - np.eye(dim)) ** 2).sum() / (dim * (dim - 1)), rel=1e-11)
    assert vicreg_covariance(f) == pytest.approx((off(covariance) ** 2).sum() / dim, rel=1e-11)
    assert vicreg_covariance(f) == pytest.approx(covariance_penalty(f.double()).item(), rel=1e-11)


def test_zero_if_and_only_if_uncorrelated():
    axes = torch.eye(6, dtype=torch.float64) * torch.arange(1, 7)
    f = torch.cat([axes, -axes]) + 100
    for measure in ALL:
        assert measure(f) == pytest.approx(0, abs=1e-25)
        assert measure(f + 1e-3 * f[:, :1]) > 0


def test_the_other_end():
    f = normal(40, 1) * torch.tensor([[1.0, -2.0, 5.0, 0.1]])  # all dimensions the same
    assert whiteness(f) == pytest.approx(1, rel=1e-12)
    assert correlation_offdiag_energy(f) == pytest.approx(1 - 1 / 4, rel=1e-12)
    assert covariance_offdiag_energy(f.sign() * f.abs().amax(1, keepdim=True)) == pytest.approx(1 - 1 / 4, rel=1e-12)


def test_scales_and_offsets_and_duplicates():
    f = normal(40, 5) @ normal(5, 5, seed=1)
    scaled = f * torch.tensor([1e-6, 1.0, 1e6, 3.0, -2.0]) - 8
    for measure in (whiteness, correlation_offdiag_energy):
        assert measure(scaled) == pytest.approx(measure(f), rel=1e-8)
    assert covariance_offdiag_energy(1e100 * f) == pytest.approx(covariance_offdiag_energy(f), rel=1e-12)
    assert vicreg_covariance(3 * f) == pytest.approx(81 * vicreg_covariance(f), rel=1e-12)
    for measure in ALL[:3]:
        assert measure(torch.cat([f, f])) == pytest.approx(measure(f), rel=1e-12)


def test_constant_dimensions_are_correlated_with_none():
    f = normal(30, 4) @ normal(4, 4, seed=1)
    padded = torch.cat([f, normal(1, 2).expand(30, 2)], dim=1)
    assert whiteness(padded) == pytest.approx(whiteness(f) * (4 * 3) / (6 * 5), rel=1e-12)
    assert covariance_offdiag_energy(padded) == pytest.approx(covariance_offdiag_energy(f), rel=1e-12)
    for measure in ALL:
        assert measure(normal(1, 5).expand(30, 5)) == 0
        assert measure(torch.zeros(30, 5)) == 0
        assert measure(normal(30, 1)) == 0


@pytest.mark.parametrize("measure", ALL)
def test_refusals(measure):
    with pytest.raises(UsageError, match="at least 2 rows"):
        measure(torch.ones(1, 3))
    f = normal(9, 3)
    f[8, 0] = -torch.inf
    with pytest.raises(UsageError, match="row 8"):
        measure(f)
