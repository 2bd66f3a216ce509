import math

import numpy as np
import pytest
import torch

from hfproj.diagnostics import covariance_spectrum, effective_rank, rankme, singular_values
from hfproj.errors import UsageError


def reference_rankme(f, eps=1e-7):
    sigma = np.linalg.svd(f.double().numpy(), compute_uv=False)
    p = sigma / sigma.sum() + eps
    return math.exp(-(p * np.log(np.where(p > 0, p, 1))).sum())


def decaying(rows, dim, power, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=generator) * torch.arange(1, dim + 1).float() ** -power


@pytest.mark.parametrize("r", [1, 3, 8])
@pytest.mark.parametrize("shape", [(40, 8), (9, 30)])
def test_r_equal_singular_values_give_r(r, shape):
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    f = u[:, :r] @ vh[:r]
    assert rankme(f) == pytest.approx(r, rel=1e-4)
    assert effective_rank(f) == pytest.approx(r, rel=1e-4)
    assert effective_rank(f, on="eigenvalues") == pytest.approx(r, rel=1e-9)


@pytest.mark.parametrize("dim", [16, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_one_is_one(dim, dtype):
    f = torch.outer(torch.randn(600, dtype=dtype), torch.randn(dim, dtype=dtype))
    assert rankme(f) == pytest.approx(1, abs=2e-3)  # ε itself adds dim · 1.6e-6
    assert rankme(f) == pytest.approx(reference_rankme(f), rel=1e-3)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(("rows", "dim"), [(300, 40), (40, 300), (64, 64), (300, 128)])
def test_rankme_is_the_definition_within_a_thousandth(rows, dim, power):
    for offset in (0.0, 5.0):
        f = decaying(rows, dim, power) + offset
        assert rankme(f) == pytest.approx(reference_rankme(f), rel=1e-3)
        assert effective_rank(f) == pytest.approx(reference_rankme(f, eps=0), rel=1e-3)


def test_rankme_does_not_centre_and_effective_rank_can():
    f = decaying(400, 32, 0.0)
    assert rankme(f + 5) < 0.7 * rankme(f)
    assert effective_rank(f + 5, center=True) == pytest.approx(effective_rank(f, center=True), rel=1e-5)
    wide = decaying(20, 50, 0.0)
    assert effective_rank(wide + 5, center=True) == pytest.approx(effective_rank(wide, center=True), rel=1e-4)


def test_invariances():
    f = decaying(200, 24, 1.0).double()
    q, _ = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64))
    for value in (rankme(f @ q), rankme(f[torch.randperm(200)]), rankme(f * 1e100), rankme(f * 1e-100), rankme(f.T)):
        assert value == pytest.approx(rankme(f), rel=1e-9)
    assert rankme(torch.cat([f, f])) == pytest.approx(rankme(f), rel=1e-9)


def test_zero_features_have_rank_zero():
    assert rankme(torch.zeros(5, 3)) == 0.0
    assert effective_rank(torch.zeros(5, 3)) == 0.0


@pytest.mark.parametrize(("center", "normalize"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("rows", "dim"), [(50, 7), (7, 50)])
def test_spectra_against_numpy(rows, dim, center, normalize):
    f = decaying(rows, dim, 0.5) + 0.3
    g = f.double().numpy()
    g = g / np.linalg.norm(g, axis=1, keepdims=True) if normalize else g
    g = g - g.mean(0) if center else g
    sigma = np.linalg.svd(g, compute_uv=False)
    assert np.allclose(singular_values(f, center=center, normalize=normalize).numpy(), sigma, rtol=1e-12, atol=1e-13)
    spectrum = covariance_spectrum(f, center=center, normalize=normalize).numpy()
    assert spectrum.shape == (dim,)
    assert (np.diff(spectrum) <= 0).all()
    assert (spectrum >= 0).all()
    assert np.allclose(spectrum[: len(sigma)], sigma**2 / (rows - 1), atol=1e-14)


def test_a_zero_row_and_blocks(monkeypatch):
    f = decaying(100, 6, 0.0)
    f[3] = 0
    whole = rankme(f), covariance_spectrum(f)
    monkeypatch.setattr("hfproj.diagnostics._common._BLOCK_ELEMENTS", 60)
    assert rankme(f) == pytest.approx(whole[0], rel=1e-12)
    assert torch.allclose(covariance_spectrum(f), whole[1], rtol=1e-12)


@pytest.mark.parametrize("measure", [rankme, effective_rank, singular_values, covariance_spectrum])
def test_what_cannot_be_measured_is_refused(measure):
    f = torch.randn(20, 3)
    f[4, 1], f[7, 0] = float("nan"), float("inf")
    with pytest.raises(UsageError, match=r"2 of 20 .* rows 4, 7"):
        measure(f)
    with pytest.raises(UsageError, match="at least 2 rows"):
        measure(torch.randn(1, 3))
    assert measure(torch.randn(5, 3, requires_grad=True, dtype=torch.bfloat16)) is not None


def test_unknown_spectrum():
    with pytest.raises(UsageError, match="Did you mean 'eigenvalues'"):
        effective_rank(torch.eye(3), on="eigenvalue")
