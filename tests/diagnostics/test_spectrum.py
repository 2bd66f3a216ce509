import math

import numpy as np
import pytest
import torch
from diagnostics.features import KINDS, decaying, normal

from hfproj.diagnostics import (
    covariance_spectrum,
    effective_rank,
    nesum,
    numerical_rank,
    participation_ratio,
    rankme,
    singular_values,
    stable_rank,
)
from hfproj.errors import UsageError

RANKS = (rankme, effective_rank, stable_rank, nesum, participation_ratio, numerical_rank)
SHAPES = [(300, 40), (40, 300), (64, 64)]


def reference_sigma(f, center=False):
    f = f.double().numpy()
    return np.linalg.svd(f - f.mean(0) if center else f, compute_uv=False)


def reference_rankme(f, eps=1e-7, center=False):
    sigma = reference_sigma(f, center)
    p = sigma / sigma.sum() + eps
    return math.exp(-(p * np.log(np.where(p > 0, p, 1))).sum())


def reference_eigenvalues(f):
    return np.linalg.eigvalsh(np.cov(f.double().numpy().T))[::-1]


@pytest.mark.parametrize("r", [1, 3, 8])
@pytest.mark.parametrize("shape", [(40, 8), (9, 30)])
def test_r_equal_singular_values_give_r(r, shape):
    u, _, vh = torch.linalg.svd(normal(*shape), full_matrices=False)
    f = u[:, :r] @ vh[:r]
    assert rankme(f, eps=0.0) == pytest.approx(r, rel=1e-12)
    assert rankme(f) == pytest.approx(r, rel=1e-4)  # ε alone
    for measure in (effective_rank, stable_rank):
        assert measure(f) == pytest.approx(r, rel=1e-12)
    assert effective_rank(f, on="eigenvalues") == pytest.approx(r, rel=1e-12)
    assert participation_ratio(f, center=False) == pytest.approx(r, rel=1e-12)
    assert numerical_rank(f) == r


def test_r_equal_variances_give_r():
    axes = torch.eye(12, dtype=torch.float64)[:5]
    f = torch.cat([axes, -axes]) + 7
    for measure in (nesum, participation_ratio):
        assert measure(f) == pytest.approx(5, rel=1e-12)
    assert numerical_rank(f, center=True) == 5
    assert numerical_rank(f) == 6  # the offset is a direction of its own


@pytest.mark.parametrize("dim", [16, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_one_is_one(dim, dtype):
    f = torch.outer(torch.randn(300, dtype=dtype), torch.randn(dim, dtype=dtype))
    for measure in (stable_rank, lambda f: participation_ratio(f, center=False)):
        assert measure(f) == pytest.approx(1, abs=1e-6)
    assert rankme(f) == pytest.approx(1, abs=2e-3)  # ε itself adds dim · 1.6e-6, rounding of float32 the rest
    assert rankme(f) == pytest.approx(reference_rankme(f), rel=1e-10)


def test_small_singular_values_count_as_they_should():
    """A Gram matrix in float64 would give the two small ones 1e-8 each, here a hundred times too much."""
    f = torch.linalg.qr(normal(50, 3)).Q * torch.tensor([1.0, 1e-10, 1e-10], dtype=torch.float64)
    p = np.array([1.0, 1e-10, 1e-10]) / (1 + 2e-10)
    assert math.log(rankme(f, eps=0.0)) == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)
    assert numerical_rank(f) == 1
    assert numerical_rank(f, tol=1e-11) == 3


@pytest.mark.parametrize("power", [0.0, 1.0, 4.0])
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_ranks_are_their_definitions(rows, dim, power):
    for offset in (0.0, 5.0):
        f = decaying(rows, dim, power).float() + offset
        sigma, centred, values = reference_sigma(f), reference_sigma(f, center=True), reference_eigenvalues(f)
        assert rankme(f) == pytest.approx(reference_rankme(f), rel=1e-10)
        assert effective_rank(f) == pytest.approx(reference_rankme(f, eps=0), rel=1e-10)
        assert effective_rank(f, center=True) == pytest.approx(reference_rankme(f, eps=0, center=True), rel=1e-10)
        p = values.clip(1e-300) / values.sum()
        expected = math.exp(-(p * np.log(p)).sum())
        assert effective_rank(f, center=True, on="eigenvalues") == pytest.approx(expected, rel=1e-9)
        assert stable_rank(f) == pytest.approx(f.double().square().sum().item() / sigma[0] ** 2, rel=1e-11)
        assert nesum(f) == pytest.approx(values.sum() / values[0], rel=1e-11)
        assert participation_ratio(f) == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-11)
        assert numerical_rank(f, tol=1e-3) == (sigma > 1e-3 * sigma[0]).sum()
        assert numerical_rank(f, tol=1e-3, center=True) == (centred > 1e-3 * centred[0]).sum()


def test_who_centres():
    f = normal(400, 32)
    assert rankme(f + 5) < 0.7 * rankme(f)
    assert stable_rank(f + 5) < 0.1 * stable_rank(f)
    for measure in (nesum, participation_ratio, lambda f: effective_rank(f, center=True)):
        assert measure(f + 5) == pytest.approx(measure(f), rel=1e-12)


@pytest.mark.parametrize("measure", RANKS)
def test_invariances(measure):
    f = decaying(200, 24)
    q, _ = torch.linalg.qr(normal(24, 24))
    for g in (f @ q, f[torch.randperm(200)], f * 1e100, f * 1e-100, torch.cat([f, f])):
        assert measure(g) == pytest.approx(measure(f), rel=1e-10)
    if measure not in (nesum, participation_ratio):
        assert measure(f.T) == pytest.approx(measure(f), rel=1e-10)


@pytest.mark.parametrize("measure", RANKS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e5])
def test_constant_features_have_no_spread_but_a_direction(measure, size):
    f = (size * normal(1, 30)).expand(90, 30)
    centred = measure in (nesum, participation_ratio)
    assert measure(f) == (0 if centred else pytest.approx(1, rel=1e-4))
    assert measure(torch.zeros(5, 3)) == 0
    for rank in (effective_rank, numerical_rank):
        assert rank(f, center=True) == 0
    assert not singular_values(f, center=True).any()
    assert not covariance_spectrum(f, normalize=False).any()


@pytest.mark.parametrize("value", [0.0, 1 / 7, 1e4])
def test_entries_that_are_constant_add_nothing_to_the_centred_rank(value):
    f = torch.cat([normal(60, 5), torch.full((60, 15), value, dtype=torch.float64)], 1)
    assert numerical_rank(f, center=True) == 5
    assert effective_rank(f, center=True) == pytest.approx(effective_rank(f[:, :5], center=True), rel=1e-12)
    assert numerical_rank(f) == 5 + (value != 0)


@pytest.mark.parametrize("first", ["flat", "zero", "small", "collapsed"])
def test_the_first_rows_do_not_decide(first):
    """A look at them chooses how singular values are computed; the others may be quite different."""
    f = normal(200, 8)
    start = {"flat": 1.0, "zero": 0.0, "small": 1e-12}.get(first, torch.tensor([1.0, *[1e-12] * 7]))
    f[:20] *= start
    for g in (f, f * torch.tensor([1e7, *[1.0] * 7]), f[:, :3] @ normal(3, 8)):
        assert rankme(g) == pytest.approx(reference_rankme(g), rel=1e-10)
        assert effective_rank(g, center=True) == pytest.approx(reference_rankme(g, eps=0, center=True), rel=1e-10)


@pytest.mark.parametrize(("center", "normalize"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("rows", "dim"), [(50, 7), (7, 50)])
def test_spectra_against_numpy(rows, dim, center, normalize):
    f = decaying(rows, dim, 0.5) + 0.3
    g = f.numpy()
    g = g / np.linalg.norm(g, axis=1, keepdims=True) if normalize else g
    g = g - g.mean(0) if center else g
    sigma = np.linalg.svd(g, compute_uv=False)
    assert np.allclose(singular_values(f, center=center, normalize=normalize).numpy(), sigma, rtol=1e-12, atol=1e-13)
    spectrum = covariance_spectrum(f, center=center, normalize=normalize).numpy()
    assert spectrum.shape == (dim,)
    assert (np.diff(spectrum) <= 0).all()
    assert np.allclose(spectrum[: len(sigma)], sigma**2 / (rows - 1), rtol=1e-12, atol=1e-15)
    assert not spectrum[len(sigma) :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_rows_change_nothing(kind, monkeypatch):
    f = KINDS[kind](100, 6)
    whole = [measure(f) for measure in RANKS], covariance_spectrum(f)
    monkeypatch.setattr("hfproj.functional.feature_rows._BLOCK_ELEMENTS", 60)
    monkeypatch.setattr("hfproj.diagnostics._factors._PANEL", 4)
    assert [measure(f) for measure in RANKS] == pytest.approx(whole[0], rel=1e-11)
    assert torch.allclose(covariance_spectrum(f), whole[1], rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("measure", [*RANKS, singular_values, covariance_spectrum])
def test_what_cannot_be_measured_is_refused(measure):
    f = torch.randn(20, 3)
    f[4, 1], f[7, 0] = float("nan"), float("inf")
    with pytest.raises(UsageError, match=r"2 of 20 .* rows 4, 7"):
        measure(f)
    with pytest.raises(UsageError, match="at least 2 rows"):
        measure(torch.randn(1, 3))
    value = measure(torch.randn(5, 3, requires_grad=True, dtype=torch.bfloat16))
    assert not (isinstance(value, torch.Tensor) and value.requires_grad)


def test_options_are_checked():
    with pytest.raises(UsageError, match="Did you mean 'eigenvalues'"):
        effective_rank(torch.eye(3), on="eigenvalue")
    with pytest.raises(UsageError, match="fraction of the largest"):
        numerical_rank(torch.eye(3), tol=1.0)
