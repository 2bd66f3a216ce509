"""Heads that whiten the curvature of a loss: the linear construction, a score for any head, and where it has to fail.

For H_L ⪰ 0 of rank r with eigenpairs U_r, Λ_r, and a basis B `[in_dim, r]` of orthonormal columns of any subspace,

    W = U_r Λ_r^{−1/2} Bᵀ    [out_dim, in_dim]    gives    H_eff = Wᵀ H_L W = B Bᵀ,    Bᵀ H_eff B = I_r.

The score of a head compares the eigenvalues λ_1 ≥ … ≥ λ_r of its H_eff on the top-r eigenspace:

    score = (Σ λ)² / (r Σ λ²) ∈ [1/r, 1],    condition number λ_1/λ_r.

Curvature barrier: one W whitens at one point. Where H_L varies from point to point (NT-Xent, VICReg) it does not at
others; for a quadratic loss H_L is constant, and it does everywhere.

References:
    Chaudhry 2026, The Geometry of Projection Heads, arXiv 2605.17180, Thm 3.1 and Prop. 3.3 (known to us from
    secondary sources).

Deviations:
    The score is our definition.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.errors import UsageError

_RANK_TOLERANCE = 1e-10  # of the largest eigenvalue


class Whitening(NamedTuple):
    """How isotropic H_eff is on its top eigenspace.

    Attributes:
        score: 1/rank (one direction takes all) to 1 (isotropic).
        condition_number: λ_1/λ_r; infinite where λ_r is 0 or negative.
        rank: r.
    """

    score: float
    condition_number: float
    rank: int


def subspace_whitening(
    H_L: Float[Tensor, "out_dim out_dim"], basis: Float[Tensor, "in_dim rank"]
) -> Float[Tensor, "out_dim in_dim"]:
    """Return the weight W of a linear head that makes H_eff the projector on a subspace, in float64.

    Args:
        H_L: Hessian of the loss in z, positive semidefinite, of the rank that `basis` has columns.
        basis: B, a basis of the subspace. Columns that are not orthonormal are made so.

    Raises:
        UsageError: H_L is not symmetric and positive semidefinite, its rank is not that of the basis, or the columns of
            the basis are linearly dependent.

    Example:
        >>> W = subspace_whitening(torch.diag(torch.tensor([4.0, 1.0, 0.0])), torch.eye(5)[:, :2])
        >>> (W.T @ torch.diag(torch.tensor([4.0, 1.0, 0.0])).double() @ W).diagonal().tolist()
        [1.0, 1.0, 0.0, 0.0, 0.0]
    """
    values, vectors = _eigh(H_L)
    scale = float(values.abs().max())
    kept = values > _RANK_TOLERANCE * scale
    if float(values.min()) < -_RANK_TOLERANCE * scale:
        raise UsageError(f"Expected a positive semidefinite H_L; its smallest eigenvalue is {float(values.min()):.3g}.")
    rank = int(kept.sum())
    if basis.shape[1] != rank:
        raise UsageError(
            f"H_L has rank {rank}, so that the basis must have {rank} columns, got {list(basis.shape)}: a linear head "
            "can give H_eff this rank and no other."
        )
    B, triangle = torch.linalg.qr(basis.double())
    if rank and float(triangle.diagonal().abs().min()) <= _RANK_TOLERANCE * float(triangle.abs().max()):
        raise UsageError("The columns of the basis are linearly dependent, or there are more of them than in_dim.")
    return vectors[:, kept] * values[kept].rsqrt() @ B.T


def whitening_score(H_eff: Float[Tensor, "in_dim in_dim"], *, rank: int | None = None) -> Whitening:
    """Return how isotropic H_eff is on its top eigenspace.

    Args:
        H_eff: Of any head, for example a row of :func:`hfproj.geometry.effective_hessian`.
        rank: r, how many of the largest eigenvalues to compare, such as the rank of H_L; None: all positive ones.

    Raises:
        UsageError: H_eff is not symmetric, or `rank` is not in 1…in_dim.

    Example:
        >>> whitening_score(torch.diag(torch.tensor([3.0, 1.0, 0.0])))
        Whitening(score=0.8, condition_number=3.0, rank=2)
    """
    values = _eigh(H_eff)[0].flip(0)
    if rank is None:
        rank = max(1, int((values > _RANK_TOLERANCE * values.abs().max()).sum()))
    if not 1 <= rank <= len(values):
        raise UsageError(f"rank must be from 1 to in_dim={len(values)}, got {rank}.")
    top = values[:rank]
    square = float(rank * top.square().sum())
    score = float(top.sum()) ** 2 / square if square else 0.0
    condition = float(top[0] / top[-1]) if top[-1] > 0 else float("inf")
    return Whitening(score, condition, rank)


def curvature_barrier(
    hessians: Float[Tensor, "points out_dim out_dim"], basis: Float[Tensor, "in_dim rank"]
) -> Float[Tensor, " points"]:
    """Return how far H_eff is from isotropic at each point, for the linear head that whitens at the first.

    Args:
        hessians: H_L at each point; the first positive semidefinite.
        basis: As for :func:`subspace_whitening`.

    Returns:
        ‖Bᵀ H_eff B − I_r‖_F / √r: 0 at the first point; at all others too if H_L does not vary on the range of W.

    Raises:
        UsageError: as :func:`subspace_whitening`, for the first point.

    Example:
        >>> H_L = torch.eye(2)
        >>> curvature_barrier(torch.stack([H_L, H_L, 3 * H_L]), torch.eye(4)[:, :2]).tolist()
        [0.0, 0.0, 2.0]
    """
    W = subspace_whitening(hessians[0], basis)
    B, _ = torch.linalg.qr(basis.double())
    rank = B.shape[1]
    inner = (W @ B).T @ hessians.double() @ (W @ B)
    return torch.linalg.matrix_norm(inner - torch.eye(rank, dtype=inner.dtype, device=inner.device)) / rank**0.5


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    matrix = matrix.detach().double()
    if not torch.isfinite(matrix).all() or not torch.allclose(matrix, matrix.T, atol=1e-6 * float(matrix.abs().max())):
        raise UsageError("Expected a symmetric matrix of finite numbers.")
    return torch.linalg.eigh((matrix + matrix.T) / 2)
