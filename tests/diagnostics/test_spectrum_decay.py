import numpy as np
import pytest
import torch
from diagnostics.features import decaying, normal

from hfproj.diagnostics import alpha_req
from hfproj.errors import UsageError


def power_law(alpha, dim=128, rows=None):
    """Features whose covariance has the eigenvalues i^(−alpha) up to a factor."""
    half = (torch.arange(1, dim + 1, dtype=torch.float64) ** (-alpha / 2)).diag()
    half = half @ torch.linalg.qr(normal(dim, dim)).Q
    return torch.cat([half, -half]) + 3


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("fit_range", [(6, 100), (1, 128), (3, 1000)])
def test_the_exponent_of_a_power_law(alpha, fit_range):
    found = alpha_req(power_law(alpha), fit_range=fit_range)
    assert found == pytest.approx((alpha, 1.0), rel=1e-9)


def test_a_flat_spectrum_has_exponent_zero_and_fits():
    assert alpha_req(power_law(0.0)) == pytest.approx((0.0, 1.0), abs=1e-12)


def test_the_fit_is_weighted_least_squares():
    f = decaying(200, 40, 0.7).float() * torch.linspace(1, 3, 40)
    values = np.linalg.eigvalsh(np.cov(f.double().numpy().T))[::-1]
    ranks = np.arange(6, 41)
    y, w = np.log(values[5:40]), 1 / ranks
    design = np.stack([np.log(ranks), np.ones(35)], 1)
    (slope, intercept), *_ = np.linalg.lstsq(design * np.sqrt(w)[:, None], y * np.sqrt(w), rcond=None)
    residual = (w * (y - slope * np.log(ranks) - intercept) ** 2).sum()
    r_squared = 1 - residual / (w * (y - np.average(y, weights=w)) ** 2).sum()
    assert alpha_req(f) == pytest.approx((-slope, r_squared), rel=1e-10)
    assert 0 < r_squared < 1


def test_the_range_is_clipped_and_not_changed():
    fit_range = (6, 100)
    wide = decaying(30, 200, 0.5)  # 29 eigenvalues
    assert alpha_req(wide, fit_range=fit_range) == alpha_req(wide, fit_range=(6, 29))
    assert fit_range == (6, 100)
    low = normal(50, 12) @ normal(12, 40, seed=1)  # rounding behind rank 12 stays out
    assert alpha_req(low) == alpha_req(low, fit_range=(6, 12))


def test_invariances():
    f = decaying(100, 30)
    q, _ = torch.linalg.qr(normal(30, 30, seed=1))
    for g in (f @ q, torch.cat([f, f]), 7 * f, f + 4):
        assert alpha_req(g) == pytest.approx(alpha_req(f), rel=1e-9)


def test_refusals():
    with pytest.raises(UsageError, match="only 7 above rounding"):
        alpha_req(normal(100, 7))
    with pytest.raises(UsageError, match="only 0 above rounding"):
        alpha_req(torch.ones(100, 200))
    for fit_range in ((0, 5), (5, 5), (9, 3)):
        with pytest.raises(UsageError, match="first and last rank"):
            alpha_req(normal(100, 20), fit_range=fit_range)
    f = normal(30, 20)
    f[0, 3] = torch.inf
    with pytest.raises(UsageError, match="row 0"):
        alpha_req(f)
