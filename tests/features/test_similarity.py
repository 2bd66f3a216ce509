import numpy as np
import pytest
import torch

from hfproj.errors import UsageError
from hfproj.features import similarity
from hfproj.features.similarity import linear_cka, mutual_knn


def cka(a, b, unbiased=False):
    """From Gram matrices: Kornblith's Eq. 3 with H, or Song's Eq. 4 with matrices without a diagonal."""
    grams = [f.double() @ f.double().T for f in (a, b)]
    n = len(a)
    centring = torch.eye(n, dtype=torch.float64) - 1 / n
    one = torch.ones(n, dtype=torch.float64)

    def hsic(k, m):
        if not unbiased:
            return torch.trace(k @ centring @ m @ centring) / (n - 1) ** 2
        k, m = (g - g.diag().diag() for g in (k, m))
        cross = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
        return (torch.trace(k @ m) + cross) / (n * (n - 3))

    return (hsic(*grams) / (hsic(grams[0], grams[0]) * hsic(grams[1], grams[1])).sqrt()).item()


def pair(rows, dim, other, shared=0.7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    a, noise, mix = (torch.randn(*s, generator=generator).double() for s in ((rows, dim), (rows, other), (dim, other)))
    return a, shared * a @ mix / dim**0.5 + noise


def rotation(dim, seed=3):
    return torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed)).double()).Q


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("shape", [(50, 4, 7), (9, 30, 20), (20, 3, 60), (4, 5, 5)])
def test_cka_from_gram_matrices(shape, unbiased, monkeypatch):
    a, b = pair(*shape)
    expected = cka(a, b, unbiased)
    assert linear_cka(a + 5, b - 3, unbiased=unbiased) == pytest.approx(expected, abs=1e-12)
    assert linear_cka(b, a, unbiased=unbiased) == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr(similarity, "_ELEMENTS", 10)
    assert linear_cka(a, b, unbiased=unbiased) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_is_invariant_to_rotations_offsets_and_scales_only(unbiased):
    a, b = pair(60, 8, 12)
    value = linear_cka(a, b, unbiased=unbiased)
    moved = linear_cka(3e4 * a @ rotation(8) - 7, 1e-5 * b @ rotation(12) + 2, unbiased=unbiased)
    assert moved == pytest.approx(value, abs=1e-12)
    assert linear_cka(a, 0.1 * a @ rotation(8) + 1, unbiased=unbiased) == pytest.approx(1, abs=1e-12)
    assert linear_cka(a * torch.arange(1, 9), b, unbiased=unbiased) != pytest.approx(value, abs=1e-3)
    order = torch.arange(60).flip(0)
    assert linear_cka(a[order], b[order], unbiased=unbiased) == pytest.approx(value, abs=1e-12)
    assert linear_cka(a[order], b, unbiased=unbiased) < value / 2


def test_cka_closed_forms():
    a = torch.linalg.qr(torch.cat([torch.ones(40, 1), torch.randn(40, 12)], 1).double()).Q[:, 1:]  # whitened
    assert linear_cka(a[:, :6], a[:, 6:]) == pytest.approx(0, abs=1e-14)
    assert linear_cka(a[:, :6], a[:, 3:9]) == pytest.approx(3 / 6)  # three of six directions in common
    assert linear_cka(a[:, :4], a) == pytest.approx((4 / 12) ** 0.5)


def test_cka_of_independent_features():
    """Biased, E‖AᵀB‖² = (n − 1)de for centred Gaussians, and E‖AᵀA‖² = (n − 1)d(n + d): far from 0 if rows are few."""
    draws = [pair(40, 30, 50, shared=0.0, seed=seed) for seed in range(200)]
    expected = ((30 / (40 + 30)) * (50 / (40 + 50))) ** 0.5
    assert np.mean([linear_cka(a, b) for a, b in draws]) == pytest.approx(expected, abs=0.01)
    unbiased = np.array([linear_cka(a, b, unbiased=True) for a, b in draws])
    assert abs(unbiased.mean()) < 4 * unbiased.std() / 200**0.5
    assert unbiased.min() < 0 < unbiased.max()
    a, b = pair(20_000, 6, 9, shared=0.0)
    assert linear_cka(a, b) < 0.01


def test_cka_of_degenerate_features():
    a = torch.randn(30, 5)
    for constant in (torch.zeros(30, 4), torch.full((30, 4), 0.1), torch.full((30, 3), 1e30)):
        for unbiased in (False, True):
            assert linear_cka(a, constant, unbiased=unbiased) == 0
            assert linear_cka(constant, constant, unbiased=unbiased) == 0
    assert linear_cka(torch.eye(8), torch.eye(8)) == pytest.approx(1)
    assert linear_cka(torch.eye(8), torch.eye(8), unbiased=True) == 0  # alike off the diagonal: nothing to compare
    for scale in (1e-30, 1e30):
        assert linear_cka(a, scale * a) == pytest.approx(1)
    nearly = 1 + 1e-4 * a
    assert linear_cka(nearly, a) == pytest.approx(1, abs=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_cka(a.double(), a.double() @ rotation(5)) == pytest.approx(1, abs=1e-12)


def overlap(a, b, k):
    """Brute force: sets of neighbours, ties by the lowest row."""
    sets = []
    for f in (a, b):
        unit = torch.nn.functional.normalize(f.double(), dim=1)
        order = np.argsort(-(unit @ unit.T).numpy().round(12), axis=1, kind="stable")
        sets.append([set(row[row != number][:k]) for number, row in enumerate(order)])
    return np.mean([len(x & y) / min(k, len(a) - 1) for x, y in zip(*sets)])


@pytest.mark.parametrize("k", [1, 10, 1000])
def test_mutual_knn_by_brute_force(k):
    a, b = pair(150, 6, 9)
    assert mutual_knn(a, b, k=k) == pytest.approx(overlap(a, b, k), abs=1e-12)
    few = torch.randint(0, 2, (150, 4)).float()
    assert mutual_knn(a, few, k=k) == pytest.approx(overlap(a, few, k), abs=1e-12)
    assert mutual_knn(b, a, k=k) == mutual_knn(a, b, k=k)


def test_mutual_knn_facts():
    a, b = pair(400, 6, 9)
    scales = 0.1 + torch.rand(400, 1)
    assert mutual_knn(a, scales * a @ rotation(6)) == 1
    assert mutual_knn(a, b, k=399) == mutual_knn(a, b, k=5000) == 1  # all others
    assert mutual_knn(torch.ones(30, 4), torch.zeros(30, 2)) == 1
    independent = [mutual_knn(*pair(300, 6, 9, shared=0.0, seed=seed), k=20) for seed in range(20)]
    assert np.mean(independent) == pytest.approx(20 / 299, abs=0.005)  # chance
    assert mutual_knn(a, b) > 3 * 10 / 399


def test_refusals():
    a = torch.randn(10, 4)
    for function in (linear_cka, mutual_knn):
        with pytest.raises(UsageError, match="10 of a and 9 of b"):
            function(a, a[:9])
        with pytest.raises(UsageError, match=r"features b .*row 2"):
            function(a, a.index_fill(0, torch.tensor(2), torch.nan))
        with pytest.raises(UsageError, match="at least 2 rows"):
            function(a[:1], a[:1])
    with pytest.raises(UsageError, match="at least 4 rows"):
        linear_cka(a[:3], a[:3], unbiased=True)
    with pytest.raises(UsageError, match="k ≥ 1"):
        mutual_knn(a, a, k=0)
