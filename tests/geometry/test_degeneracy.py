"""Degeneracy along directions, the bottom eigenspace, and the variation of the metric, against their definitions."""

import math

import pytest
import torch
from geometry_cases import double, two_layers
from torch import nn

from hfproj.errors import UsageError
from hfproj.geometry import (
    augmentation_tangents,
    bottom_overlap,
    jacobian,
    metric_degeneracy,
    metric_variation,
    nullity,
    pullback_metric,
)


def invariant_head(in_dim=6, kept=4):
    """Return a head that sees the projection on a subspace only, and a basis of what it does not see."""
    q, _ = torch.linalg.qr(double(in_dim, in_dim))
    head = two_layers("silu", in_dim, 16, in_dim)
    projector = q[:, :kept] @ q[:, :kept].T
    return (lambda h: head(h @ projector)), q[:, kept:].T


def test_degeneracy_is_its_definition():
    head, h, v = two_layers("gelu", 6, 12, 4), double(5, 6), 3 * double(5, 2, 6, seed=1)
    G = pullback_metric(head, h).G
    expected = torch.einsum("nti,nij,ntj->nt", v, G, v) / v.square().sum(2)
    expected /= G.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    torch.testing.assert_close(metric_degeneracy(head, h, v), expected)
    torch.testing.assert_close(metric_degeneracy(head, h, v[:, 1]), expected[:, 1])
    basis = torch.eye(6, dtype=torch.float64).expand(5, 6, 6)
    torch.testing.assert_close(metric_degeneracy(head, h, basis).mean(1), torch.ones(5, dtype=torch.float64))


def test_an_invariant_head_has_degeneracy_zero_and_full_overlap():
    head, unseen = invariant_head()
    h = double(5, 6)
    assert metric_degeneracy(head, h, unseen.expand(5, 2, 6)).max() < 1e-28
    found = bottom_overlap(head, h, unseen.expand(5, 2, 6))
    torch.testing.assert_close(found.overlap, torch.ones(5, dtype=torch.float64))
    assert found.dim.tolist() == [2] * 5
    torch.testing.assert_close(found.chance, torch.full((5,), 1 / 3))
    seen = torch.linalg.svd(unseen).Vh[2:]
    assert bottom_overlap(head, h, seen.expand(5, 4, 6), dim=2).overlap.max() < 1e-20


def test_overlap_of_random_tangents_is_chance_on_average():
    head, h = two_layers("silu", 12, 24, 12), double(300, 12)
    found = bottom_overlap(head, h, double(300, 12, seed=5), dim=3)
    assert found.overlap.mean().item() == pytest.approx(3 / 12, abs=0.04)
    assert found.chance[0].item() == pytest.approx(0.25)


def test_cosines_are_those_of_the_principal_angles():
    head = nn.Linear(4, 4, bias=False).double()
    head.weight.data = torch.diag(torch.tensor([4.0, 3, 2, 1], dtype=torch.float64))
    angles = torch.tensor([0.3, 1.1], dtype=torch.float64)
    v = torch.zeros(1, 2, 4, dtype=torch.float64)
    v[0, 0, 3], v[0, 0, 0] = angles[0].cos(), angles[0].sin()
    v[0, 1, 2], v[0, 1, 1] = angles[1].cos(), angles[1].sin()
    found = bottom_overlap(head, double(1, 4), 7 * v)
    torch.testing.assert_close(found.cosines[0], angles.cos())
    assert found.overlap.item() == pytest.approx(angles.cos().square().mean().item())
    twice = bottom_overlap(head, double(1, 4), torch.cat([v, v], dim=1))  # the same span
    assert twice.overlap.item() == pytest.approx(found.overlap.item())
    assert bottom_overlap(head, double(1, 4), 0 * v).overlap.isnan().all()


def test_the_bottom_holds_the_whole_null_space():
    head = nn.Linear(6, 2, bias=False).double()
    found = bottom_overlap(head, double(3, 6), double(3, 6, seed=1))
    assert found.dim.tolist() == [4] * 3
    expected = 1 - _share_of_rows(head.weight.detach(), double(3, 6, seed=1))
    torch.testing.assert_close(found.overlap, expected)


def _share_of_rows(W, v):
    q, _ = torch.linalg.qr(W.T)
    return (v @ q).square().sum(1) / v.square().sum(1)


def test_tangents_of_a_transform_are_its_derivative():
    x = double(4, 3)
    enc = lambda x: x.sin() @ double(3, 5, seed=2)  # noqa: E731
    moved = torch.stack([enc(x + 1e-6 * e) for e in torch.eye(3, dtype=torch.float64)], dim=1)
    tangents = augmentation_tangents(enc(x), moved, 1e-6)
    torch.testing.assert_close(tangents, jacobian(enc, x).mT, rtol=0, atol=1e-5)
    torch.testing.assert_close(augmentation_tangents(enc(x), moved[:, 1], 1e-6), tangents[:, 1])


@pytest.mark.parametrize("stored", [2**26, 0])
@pytest.mark.parametrize("out_dim", [3, 11])
def test_variation_is_its_definition(monkeypatch, out_dim, stored):
    monkeypatch.setattr("hfproj.geometry.degeneracy._STORED_ELEMENTS", stored)
    head, h = two_layers("tanh", 6, 12, out_dim), double(7, 6)
    G = pullback_metric(head, h).G
    pairs = [(G[i] - G[j]).norm() for i in range(7) for j in range(i)]
    expected = torch.stack(pairs).mean() / G.flatten(1).norm(dim=1).mean()
    assert metric_variation(head, h) == pytest.approx(expected.item(), rel=1e-12)
    assert metric_variation(nn.Linear(6, out_dim), h) == 0
    assert metric_variation(lambda h: 1e3 * head(h), h) == pytest.approx(expected.item(), rel=1e-10)
    assert math.isnan(metric_variation(lambda h: 0 * h, h))


def test_nullity_counts_zero_eigenvalues():
    q, _ = torch.linalg.qr(double(5, 5))
    G = q * torch.tensor([2.0, 1, 1e-3, 0, 0], dtype=torch.float64) @ q.T
    assert nullity(torch.stack([G, torch.eye(5).double(), 0 * G])).tolist() == [2, 0, 5]
    assert nullity(G, rtol=1e-2).item() == 3


@pytest.mark.parametrize(("kernel", "expected"), [(0, 4), (1, 3), (2, 2)])
def test_rank_lost_by_a_linear_head(kernel, expected):
    """rank(WA) = rank A − dim(ker W ∩ range A)."""
    A = double(8, 4)
    q, _ = torch.linalg.qr(A)
    W = double(8, 8, seed=1) @ (torch.eye(8) - q[:, :kernel] @ q[:, :kernel].T)
    assert torch.linalg.matrix_rank(W @ A).item() == expected
    assert 8 - nullity(A.T @ W.T @ W @ A).item() - 4 == expected


def test_refusals():
    h = double(3, 4)
    with pytest.raises(UsageError, match="directions v at each of the rows"):
        metric_degeneracy(nn.Linear(4, 2), h, double(2, 4))
    with pytest.raises(UsageError, match="rows of the directions v are NaN"):
        metric_degeneracy(nn.Linear(4, 2), h, h / 0)
    with pytest.raises(UsageError, match="dim, of the bottom eigenspace"):
        bottom_overlap(nn.Linear(4, 2), h, h, dim=5)
    with pytest.raises(UsageError, match="at least 2 rows"):
        metric_variation(nn.Linear(4, 2), h[:1])
    with pytest.raises(UsageError, match="other than 0"):
        augmentation_tangents(h, h, 0.0)
    with pytest.raises(UsageError, match="same rows and width"):
        augmentation_tangents(h, double(3, 5), 1.0)
