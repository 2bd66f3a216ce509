"""Points and heads constructed to test a theory: an equilibrium in spite of a residual, a head that whitens curvature.

Where z has a direction that h cannot reach (out_dim > rank J), take a unit ρ_0 ∈ ker Jᵀ at h* and the
target t = g(h*) − α ρ_0 of L = ½‖z − t‖². Then

    ∇_z L = α ρ_0 ≠ 0,    but    ∇_h L = Jᵀ α ρ_0 = 0,    H_L = I,    G_L = JᵀJ.

Linear and ReLU heads have M = 0: with J of full column rank H_eff = JᵀJ is positive definite, and the gradient flow in
h goes back to h* at the rate λ_min, whatever α is. For a smooth activation M grows with α and changes its sign with
ρ_0: beyond some α, for at least one sign, λ_min(H_eff) < 0 and the flow leaves h* at the rate −λ_min.

References:
    Chaudhry 2026, The Geometry of Projection Heads, arXiv 2605.17180, Thm 3.1, Prop. 3.3 (from secondary sources).

Deviations:
    The equilibrium is our construction: it makes the claim of the paper's abstract checkable. So is the score.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.checking import checked
from hfproj.errors import UsageError
from hfproj.geometry._head import Map, as_input, frozen
from hfproj.geometry.pullback import jacobian
from hfproj.typing import Features

_RANK_TOLERANCE = 1e-10  # of the largest eigenvalue


class Equilibrium(NamedTuple):
    """An equilibrium of the gradient flow in h with a residual in z, in float64.

    Attributes:
        h: Where it is.
        target: t.
        rho: ∇_z L = α ρ_0 at h.
        J: Jacobian of the head at h.
    """

    h: Float[Tensor, "rows in_dim"]
    target: Float[Tensor, "rows out_dim"]
    rho: Float[Tensor, "rows out_dim"]
    J: Float[Tensor, "rows out_dim in_dim"]

    def loss(self, z: Float[Tensor, "rows out_dim"]) -> Float[Tensor, " rows"]:
        """Return ½‖z − t‖² of each row."""
        return (z - self.target).square().sum(1) / 2


class Whitening(NamedTuple):
    """How isotropic H_eff is on its top eigenspace.

    Attributes:
        score: 1/rank (one direction) to 1 (isotropic).
        condition_number: λ_1/λ_r; infinite for λ_r ≤ 0.
        rank: r.
    """

    score: float
    condition_number: float
    rank: int


@checked
def constructed_equilibrium(
    head: Map, h: Features, *, alpha: float = 1.0, generator: torch.Generator | None = None
) -> Equilibrium:
    """Return a target with which every row of `h` is an equilibrium that has a residual of length abs(α).

    It needs ker Jᵀ, hence out_dim > in_dim as a rule. `head` is that of `jacobian`; a negative `alpha`, α, turns ρ_0
    round. `generator` draws ρ_0 on the CPU; None means seed 0, so that calls with another α have the same ρ_0.

    Raises:
        UsageError: If :func:`hfproj.geometry.jacobian` raises it, or α is 0, or ker Jᵀ is empty at a row.

    Example:
        >>> head = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 6))
        >>> found = constructed_equilibrium(head, torch.randn(1, 3), alpha=2.0)
        >>> round(found.rho.norm().item(), 6), bool((found.J.mT @ found.rho.unsqueeze(2)).norm() < 1e-12)
        (2.0, True)
    """
    if not alpha or not abs(alpha) < float("inf"):
        wanted = "alpha, the length of the residual, to be a finite number other than 0"
        raise UsageError(f"Expected {wanted}, got {alpha}.")
    J = jacobian(head, h)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    left, sigma, _ = torch.linalg.svd(J, full_matrices=True)
    tolerance = max(J.shape[1:]) * torch.finfo(J.dtype).eps * sigma[:, :1]
    rho = torch.empty_like(J[:, :, 0])
    for row, rank in enumerate((sigma > tolerance).sum(1).tolist()):
        if rank == J.shape[1]:
            shape = list(J.shape[1:])
            raise UsageError(f"At row {row} the Jacobian {shape} reaches every direction of z; take out_dim > in_dim.")
        drawn = torch.randn(J.shape[1] - rank, generator=generator, dtype=torch.float64).to(J.device)
        rho[row] = left[row, :, rank:] @ (drawn / drawn.norm())
    x = as_input(h, torch.float64)
    with frozen(head, torch.float64) as run:
        z = run(x).detach()
    return Equilibrium(x, z - alpha * rho, alpha * rho, J)


@checked
def subspace_whitening(
    H_L: Float[Tensor, "out_dim out_dim"], basis: Float[Tensor, "in_dim rank"]
) -> Float[Tensor, "out_dim in_dim"]:
    """Return the weight W of a linear head that makes H_eff the projector on a subspace, in float64.

    `H_L` is the Hessian of the loss in z, positive semidefinite with eigenpairs U_r, Λ_r of the rank r that `basis`, B,
    has columns; W = U_r Λ_r^{−1/2} Bᵀ gives H_eff = Wᵀ H_L W = B Bᵀ. Columns that are not orthonormal are made so.

    Raises:
        UsageError: If H_L is not symmetric positive semidefinite of the basis' rank, or its columns are dependent.

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
        raise UsageError(f"H_L has rank {rank}: the basis must have {rank} columns, got shape {list(basis.shape)}.")
    B, triangle = torch.linalg.qr(basis.double())
    if rank and float(triangle.diagonal().abs().min()) <= _RANK_TOLERANCE * float(triangle.abs().max()):
        raise UsageError("The columns of the basis are linearly dependent, or there are more of them than in_dim.")
    return vectors[:, kept] * values[kept].rsqrt() @ B.T


@checked
def whitening_score(H_eff: Float[Tensor, "in_dim in_dim"], *, rank: int | None = None) -> Whitening:
    """Return how isotropic H_eff, of any head, is on its top eigenspace: score = (Σ λ)² / (r Σ λ²) ∈ [1/r, 1].

    `rank` is r, how many of the largest eigenvalues to compare, such as the rank of H_L; None: all positive ones.

    Raises:
        UsageError: If H_eff is not symmetric, or `rank` is not in 1…in_dim.

    Example:
        >>> whitening_score(torch.diag(torch.tensor([3.0, 1.0, 0.0])))
        Whitening(score=0.8, condition_number=3.0, rank=2)
    """
    values = _eigh(H_eff)[0].flip(0)
    if rank is None:
        rank = max(1, int((values > _RANK_TOLERANCE * values.abs().max()).sum()))
    if not 1 <= rank <= len(values):
        raise UsageError(f"Expected rank to be from 1 to in_dim={len(values)}, got {rank}.")
    top = values[:rank]
    square = float(rank * top.square().sum())
    score = float(top.sum()) ** 2 / square if square else 0.0
    return Whitening(score, float(top[0] / top[-1]) if top[-1] > 0 else float("inf"), rank)


@checked
def curvature_barrier(
    hessians: Float[Tensor, "points out_dim out_dim"], basis: Float[Tensor, "in_dim rank"]
) -> Float[Tensor, " points"]:
    """Return how far H_eff is from isotropic at each point, for the linear head that whitens H_L at the first.

    For a quadratic loss H_L never varies, for NT-Xent and VICReg it does.

    Args:
        hessians: H_L `[points, out_dim, out_dim]`; the first is positive semidefinite.
        basis: B `[in_dim, rank]`, as for :func:`subspace_whitening`.

    Returns:
        ‖Bᵀ H_eff B − I_r‖_F / √r: 0 at the first point; at all others too if H_L does not vary on the range of W.

    Raises:
        UsageError: If :func:`subspace_whitening` raises it for the first point.

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
