"""The loss seen from the representation: the effective Hessian of a head, and what makes a collapse unstable.

For L(g(h)) with z = g(h), ρ = ∇_z L, H_L = ∇²_z L and J = ∂z/∂h,

    H_eff = ∇²_h L(g(h)) = G_L + M,    G_L = Jᵀ H_L J,    M = Σ_i ρ_i ∇²_h z_i,    ∇_h L = Jᵀρ.

What holds, and what does not, at a collapsed h with ρ ≠ 0 and H_L positive semidefinite:

    - linear head: M = 0; ReLU and LeakyReLU: M = 0 almost everywhere. H_eff is positive semidefinite.
    - smooth activations: for two layers M = W_1ᵀ diag((W_2ᵀρ) ∘ σ''(a)) W_1, and H_eff as a rule has a negative
      eigenvalue where out_dim ≤ in_dim/2; with out_dim ≥ in_dim and J of full rank it takes a large enough ρ. Not
      always: tanh has M = 0 at a = 0.
    - It is a statement on the Hessian in h. The Hessian in the *parameters* of a two-layer head has negative
      eigenvalues for linear and ReLU heads too, from the product W_2 W_1.
    - Losses that are indefinite in z (negative cosine; NT-Xent, VICReg jointly over the batch) make collapse unstable
      for linear heads too. Look at the eigenvalues of H_L or G_L to tell.

References:
    Chaudhry 2026, The Geometry of Projection Heads, arXiv 2605.17180, section 4; statements of the theorem are known to
    us from an independent reproduction (MachineLearning-Nerd/icml26-geometry-projection-heads-conditioning-invariance-
    collapse), the scope above is what we found to hold.

Deviations:
    None.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hfproj.errors import UsageError
from hfproj.geometry._head import Map, as_input, check_rows, check_rowwise, frozen

_NEGATIVE = 1e-10  # of the largest |λ|: round-off shows as negative eigenvalues otherwise, of ReLU heads above all

Loss = Callable[[Tensor], Tensor]


class EffectiveHessian(NamedTuple):
    """H_eff and its parts, in float64.

    For a loss per row, every field has the shape ``[rows, …]`` given; for a joint loss of all rows, `h` and `z` are
    flattened, and shapes are those with ``rows = 1``, width ``rows · in_dim`` and ``rows · out_dim``.

    Attributes:
        H_eff: G_L + M.
        G_L: Jᵀ H_L J, what the loss' own curvature gives.
        M: Σ ρ_i ∇²z_i, what the head's curvature gives.
        H_L: Hessian of the loss in z.
        rho: Gradient of the loss in z.
        J: Jacobian of the head.
    """

    H_eff: Float[Tensor, "rows in_dim in_dim"]
    G_L: Float[Tensor, "rows in_dim in_dim"]
    M: Float[Tensor, "rows in_dim in_dim"]
    H_L: Float[Tensor, "rows out_dim out_dim"]
    rho: Float[Tensor, "rows out_dim"]
    J: Float[Tensor, "rows out_dim in_dim"]


class CollapseReport(NamedTuple):
    """Whether H_eff has directions of escape, and where they come from.

    Attributes:
        n_neg: Eigenvalues of H_eff below −1e-10 times the largest in magnitude.
        lambda_min: Smallest eigenvalue of H_eff.
        lambda_max: Largest eigenvalue of H_eff.
        n_neg_loss: The same count for G_L: where it is 0, negative eigenvalues of H_eff come from the head.
        norm_H_eff: ‖H_eff‖_F.
        norm_G_L: ‖G_L‖_F.
        norm_M: ‖M‖_F; 0 for linear and piecewise linear heads.
        norm_rho: ‖∇_z L‖, the residual.
        norm_gradient: ‖∇_h L‖, 0 at an equilibrium.
    """

    n_neg: Int[Tensor, " rows"]
    lambda_min: Float[Tensor, " rows"]
    lambda_max: Float[Tensor, " rows"]
    n_neg_loss: Int[Tensor, " rows"]
    norm_H_eff: Float[Tensor, " rows"]
    norm_G_L: Float[Tensor, " rows"]
    norm_M: Float[Tensor, " rows"]
    norm_rho: Float[Tensor, " rows"]
    norm_gradient: Float[Tensor, " rows"]


def effective_hessian(head: Map, loss_fn: Loss, h: Float[Tensor, "rows in_dim"]) -> EffectiveHessian:
    """Return H_eff and its parts exactly, for heads that are small enough for in_dim² numbers a row.

    It takes out_dim + in_dim backward passes. For large heads see :class:`EffectiveHessianOperator`.

    Args:
        head: Any module or function from `[rows, in_dim]` to `[rows, out_dim]` that treats rows one by one. It runs in
            eval mode and is left as it was.
        loss_fn: z `[rows, out_dim]` (float64) → the losses `[rows]`, one for each row from this row alone; or one
            number, the joint loss of all rows. Twice differentiable.
        h: Representations.

    Raises:
        UsageError: a BatchNorm or Dropout in training mode, a head that couples rows, rows of h that are not finite, a
            loss of another shape, losses per row that depend on other rows, or a loss without second derivative.

    Example:
        >>> head = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2))
        >>> target = torch.zeros(3, 2)
        >>> found = effective_hessian(head, lambda z: (z - target).square().sum(1) / 2, torch.randn(3, 4))
        >>> found.H_eff.shape, bool((found.H_L == torch.eye(2)).all())
        (torch.Size([3, 4, 4]), True)
    """
    check_rows(h)
    x = as_input(h, torch.float64).requires_grad_()
    with frozen(head, torch.float64) as run:
        check_rowwise(run, x)
        z = run(x)
        z_leaf = z.detach().requires_grad_()
        total, joint = _total_loss(loss_fn, z_leaf)
        rho = _gradient(total, z_leaf)
        if joint:
            H_L = _columns(rho.flatten(), z_leaf).flatten(1).unsqueeze(0)
            H_L = H_L.view(1, z.numel(), z.numel())
        else:
            H_L = torch.stack(_per_row(rho, z_leaf), dim=1)
        rho = rho.detach()
        J = torch.stack(_per_row(z, x), dim=1)
        M = torch.stack(_per_row(_gradient((rho * z).sum(), x), x), dim=1)
    if joint:
        J, M = _block_diagonal(J), _block_diagonal(M)
        rho = rho.flatten().unsqueeze(0)
    H_L, M = (H_L + H_L.mT) / 2, (M + M.mT) / 2
    G_L = J.mT @ H_L @ J
    G_L = (G_L + G_L.mT) / 2
    return EffectiveHessian(G_L + M, G_L, M, H_L.detach(), rho, J)


def collapse_report(head: Map, loss_fn: Loss, h: Float[Tensor, "rows in_dim"]) -> CollapseReport:
    """Return the signs and sizes of H_eff and its parts at each row of `h` (one row for a joint loss), exactly.

    For large heads take the extreme eigenvalues of :class:`EffectiveHessianOperator` instead.

    Args:
        head: As for :func:`effective_hessian`.
        loss_fn: As there. A loss per row with a detached target separates the head's part from the loss'.
        h: Representations.

    Raises:
        UsageError: as :func:`effective_hessian`.

    Example:
        >>> head = torch.nn.Linear(4, 2)
        >>> report = collapse_report(head, lambda z: z.square().sum(1) / 2, torch.randn(3, 4))
        >>> report.n_neg.tolist(), report.norm_M.tolist()
        ([0, 0, 0], [0.0, 0.0, 0.0])
    """
    found = effective_hessian(head, loss_fn, h)
    values = torch.linalg.eigvalsh(found.H_eff)
    norm = torch.linalg.matrix_norm
    gradient = (found.J.mT @ found.rho.unsqueeze(2)).squeeze(2)
    return CollapseReport(
        count_negative(values),
        values[:, 0],
        values[:, -1],
        count_negative(torch.linalg.eigvalsh(found.G_L)),
        norm(found.H_eff),
        norm(found.G_L),
        norm(found.M),
        found.rho.norm(dim=1),
        gradient.norm(dim=1),
    )


def count_negative(eigenvalues: Float[Tensor, "*rows dim"]) -> Int[Tensor, "*rows"]:
    """Return how many eigenvalues lie below −1e-10 times the largest in magnitude, which is more than rounding.

    Example:
        >>> count_negative(torch.tensor([-0.5, -1e-17, 1.0])).item()
        1
    """
    return (eigenvalues < -_NEGATIVE * eigenvalues.abs().amax(-1, keepdim=True)).sum(-1)


def _total_loss(loss_fn: Loss, z: Tensor) -> tuple[Tensor, bool]:
    """Return the loss as one number, and whether it is a joint one."""
    loss = loss_fn(z)
    if not isinstance(loss, Tensor) or loss.shape not in (torch.Size([]), torch.Size([len(z)])):
        came = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UsageError(f"Expected loss_fn(z) to be one number, or one for each of the {len(z)} rows, got {came}.")
    if not torch.isfinite(loss).all():
        raise UsageError("The loss is NaN or infinite at this z.")
    if loss.ndim == 0:
        return loss, True
    # Losses of rows are apart if a weight of a row's loss is a weight of the row's gradient.
    weights = torch.linspace(1, 2, len(z), dtype=z.dtype, device=z.device)
    total = loss.sum()
    if loss.requires_grad:
        one, weighted = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (total, (weights * loss).sum()))
        if not torch.allclose(weighted, weights.unsqueeze(1) * one, rtol=1e-8, atol=1e-8 * float(one.abs().max())):
            raise UsageError(
                "A row's loss depends on other rows. Return one number, their mean or sum, for the Hessian of the "
                "joint loss."
            )
    return total, False


def _gradient(loss: Tensor, x: Tensor) -> Tensor:
    """Return ∂loss/∂x with a graph; zeros if it does not depend on it."""
    if not loss.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True, materialize_grads=True)
    return gradient


def _per_row(y: Tensor, x: Tensor) -> list[Tensor]:
    """Return ∂y[row, i]/∂x[row] for each i, where rows do not interact."""
    return [_derivative(y[:, i].sum(), x) for i in range(y.shape[1])]


def _columns(y: Tensor, x: Tensor) -> Tensor:
    return torch.stack([_derivative(y[i], x) for i in range(len(y))])


def _derivative(y: Tensor, x: Tensor) -> Tensor:
    if not y.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(y, x, retain_graph=True, materialize_grads=True)[0]


def _block_diagonal(blocks: Tensor) -> Tensor:
    return torch.block_diag(*blocks).unsqueeze(0)
