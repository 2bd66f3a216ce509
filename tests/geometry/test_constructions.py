"""The whitening construction, the score, and the barrier for losses whose curvature varies."""

import math

import pytest
import torch
from geometry_cases import double
from torch import nn

from hfproj.errors import UsageError
from hfproj.geometry import curvature_barrier, effective_hessian, subspace_whitening, whitening_score
from hfproj.objectives.nt_xent import nt_xent_loss


def psd(k, rank, seed=0):
    factor = double(k, rank, seed=seed)
    return factor @ factor.T


@pytest.mark.parametrize(("k", "d", "rank"), [(5, 9, 5), (8, 6, 3), (4, 4, 1)])
def test_the_construction_whitens_the_subspace(k, d, rank):
    H_L, basis = psd(k, rank), double(d, rank, seed=1)
    B, _ = torch.linalg.qr(basis)
    W = subspace_whitening(H_L, basis)
    head = nn.Linear(d, k, bias=False).double()
    head.weight.data = W
    H_eff = effective_hessian(head, lambda z: torch.einsum("ni,ij,nj->n", z, H_L, z) / 2, double(1, d)).H_eff[0]
    torch.testing.assert_close(B.T @ H_eff @ B, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(H_eff, B @ B.T, rtol=0, atol=1e-10)
    found = whitening_score(H_eff)
    assert found.rank == rank
    assert found.score == pytest.approx(1)
    assert found.condition_number == pytest.approx(1)


def test_score_between_one_direction_and_all():
    values = torch.tensor([4.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    q, _ = torch.linalg.qr(double(4, 4))
    H = q * values @ q.T
    found = whitening_score(H)
    assert found.rank == 3
    assert found.score == pytest.approx(36 / (3 * 18))
    assert found.condition_number == pytest.approx(4)
    assert whitening_score(H, rank=1).score == pytest.approx(1)
    assert whitening_score(H, rank=4).condition_number > 1e10
    assert whitening_score(torch.diag(torch.tensor([1.0, 0, 0, 0])), rank=4).score == pytest.approx(1 / 4)
    assert whitening_score(torch.zeros(3, 3)).condition_number == math.inf


def hessians(loss_fn, points):
    return torch.stack([effective_hessian(lambda h: h, loss_fn, z).H_L[0] for z in points])


def test_the_barrier_stands_for_contrastive_losses_and_not_for_quadratic_ones():
    points = double(4, 4, 2)  # batches of 4 rows in 2 dimensions: a joint Hessian of width 8
    basis = double(10, 8, seed=1)
    A = psd(8, 8, seed=2)
    quadratic = curvature_barrier(hessians(lambda z: z.flatten() @ A @ z.flatten(), points), basis)
    assert quadratic.max() < 1e-8
    # NT-Xent's own curvature is indefinite; made definite by a constant it still varies
    contrastive = lambda z: nt_xent_loss(z.view(2, 2, 2), temperature=0.5) + 4 * z.square().sum()  # noqa: E731
    found = curvature_barrier(hessians(contrastive, points), basis)
    assert found[0] < 1e-12
    assert (found[1:] > 1e-2).all()


def test_refusals():
    with pytest.raises(UsageError, match=r"positive semidefinite.*-1"):
        subspace_whitening(torch.diag(torch.tensor([1.0, -1.0])), torch.eye(3)[:, :2])
    with pytest.raises(UsageError, match=r"H_L has rank 1.*must have 1 columns"):
        subspace_whitening(torch.diag(torch.tensor([1.0, 0.0])), torch.eye(3)[:, :2])
    with pytest.raises(UsageError, match="linearly dependent"):
        subspace_whitening(torch.eye(2), torch.ones(3, 2))
    with pytest.raises(UsageError, match="symmetric"):
        whitening_score(double(3, 3))
    with pytest.raises(UsageError, match="in_dim=3, got 4"):
        whitening_score(torch.eye(3), rank=4)
