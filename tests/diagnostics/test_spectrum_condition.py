import math

import numpy as np
import pytest
import torch
from diagnostics.features import decaying, normal

from hfproj.diagnostics import covariance_condition_number, pseudo_condition_number
from hfproj.errors import UsageError


def with_spectrum(sigma, rows=40, dim=None):
    """Centred features whose singular values are `sigma`."""
    sigma = torch.tensor(sigma, dtype=torch.float64)
    left = normal(rows, len(sigma))
    left = torch.linalg.qr(left - left.mean(0)).Q
    right = torch.linalg.qr(normal(dim or len(sigma), len(sigma), seed=1)).Q
    return left * sigma @ right.T


def test_a_known_spectrum():
    f = with_spectrum([8.0, 4.0, 2.0])
    assert pseudo_condition_number(f) == pytest.approx(0.25, rel=1e-12)
    found = covariance_condition_number(f, normalize=False)
    assert found == pytest.approx((16.0, 16.0, 3, 16.0), rel=1e-12)
    assert covariance_condition_number(f + 50, normalize=False).full == pytest.approx(16.0, rel=1e-11)
    assert pseudo_condition_number(f + 50) < 0.02  # uncentred


def test_below_full_rank():
    found = covariance_condition_number(with_spectrum([8.0, 2.0], dim=5), normalize=False)
    largest = 64 / 39
    assert (found.full, found.rank) == (math.inf, 2)
    assert found.on_support == pytest.approx(16.0, rel=1e-12)
    assert found.clamped == pytest.approx(largest / 1e-7, rel=1e-12)  # says nothing but the largest
    assert pseudo_condition_number(with_spectrum([8.0, 2.0], dim=5)) == 0


def test_the_support_is_of_roots_above_tol():
    f = with_spectrum([1.0, 1e-3, 1e-9])
    assert covariance_condition_number(f, normalize=False).rank == 2
    assert covariance_condition_number(f, normalize=False, tol=1e-2).rank == 1
    found = covariance_condition_number(f, normalize=False, tol=1e-10)
    assert (found.rank, found.on_support) == (3, pytest.approx(1e18, rel=1e-5))


def test_the_formula_of_unit_rows():
    f = (decaying(300, 10, 0.5) + 0.2).float()
    g = f.double().numpy()
    values = np.linalg.eigvalsh(np.cov((g / np.linalg.norm(g, axis=1, keepdims=True)).T))
    found = covariance_condition_number(f)
    assert found.full == pytest.approx(values[-1] / values[0], rel=1e-10)
    assert found.clamped == pytest.approx(values[-1] / max(values[0], 1e-7), rel=1e-10)
    assert covariance_condition_number(f, floor=10.0).clamped == pytest.approx(values[-1] / 10, rel=1e-10)
    sigma = np.linalg.svd(f.double().numpy(), compute_uv=False)
    assert pseudo_condition_number(f) == pytest.approx(sigma[-1] / sigma[0], rel=1e-10)


def test_collapse_is_never_well_conditioned():
    for f in (torch.zeros(5, 3), normal(1, 3).expand(5, 3)):
        assert covariance_condition_number(f) == (math.inf, math.inf, 0, 0.0)
    assert pseudo_condition_number(torch.zeros(5, 3)) == 0
    assert pseudo_condition_number(normal(1, 3).expand(5, 3)) == 0


def test_invariances():
    f = decaying(60, 8)
    q, _ = torch.linalg.qr(normal(8, 8, seed=1))
    for g in (f @ q, torch.cat([f, f]), f * 1e100):
        assert pseudo_condition_number(g) == pytest.approx(pseudo_condition_number(f), rel=1e-10)
        assert covariance_condition_number(g)[:3] == pytest.approx(covariance_condition_number(f)[:3], rel=1e-10)


def test_refusals():
    with pytest.raises(UsageError, match="row 1"):
        covariance_condition_number(torch.tensor([[0.0], [math.nan]]))
    with pytest.raises(UsageError, match="at least 2 rows"):
        pseudo_condition_number(torch.ones(1, 3))
    with pytest.raises(UsageError, match="fraction of the largest"):
        covariance_condition_number(torch.eye(3), tol=-1.0)
