"""Entropy and mutual information of order α from the similarities of rows.

With unit rows f̂ ``[n, dim]`` and K = f̂ f̂ᵀ (so that K/n has trace 1),

    S_α(K) = log tr[(K/n)^α] / (1 − α),    S_1(K) = −tr[(K/n) log(K/n)],    S_2(K) = −log ‖K/n‖_F²,
    I_α(h; z) = S_α(K_h) + S_α(K_z) − S_α(K_h ∘ K_z),    ∘ the product entry by entry.

S lies in [0, log n] and exp(S) counts the directions that rows take up. I_α ≤ min(S_α(K_h), S_α(K_z)); I_1 ≥ 0, but for
other α, 2 included, I_α can be negative.

References:
    Ouyang et al. 2025, arXiv 2503.00507, and its code PKU-ML/Projector_Theory (5c2e7d1) ``methods/simclr.py``.
    Sanchez Giraldo, Rao, Principe 2015, arXiv 1211.2459 (the definitions).

Deviations:
    Eigenvalues are clamped, so that 0·log 0 = 0; the official code takes the logarithm of zero singular values (NaN) at
    α = 1. Rows without a direction (zeros) count as one direction of their own: all rows zero is a collapsed batch.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.errors import UsageError
from hfproj.functional.matrices import eigvalsh
from hfproj.functional.rows import full_precision, unit_rows
from hfproj.typing import Features, Scalar


def matrix_entropy(f: Features, *, alpha: float = 2.0) -> Scalar:
    """Return S_α of the rows' similarities, in nats, between 0 (all rows parallel) and log(rows) (orthogonal).

    Does not centre. Differentiable; the cost is that of the smaller of ``rows`` and ``dim``.

    Args:
        f: Features of the global batch (h, z or p).
        alpha: α, positive. 2 needs no eigenvalues. Below 1, the rounding of zero eigenvalues shows.

    Raises:
        UsageError: If `alpha` is not a positive finite number.

    Example:
        >>> round(matrix_entropy(torch.eye(8)).exp().item(), 4)
        8.0
    """
    check_alpha(alpha)
    with full_precision(f):
        u = _directions(f)
        gram = u @ u.mT if u.shape[0] <= u.shape[1] else u.mT @ u  # the same eigenvalues but for zeros
        return _entropy(gram / u.shape[0], alpha)


def matrix_mutual_information(
    h: Float[Tensor, "rows in_dim"], z: Float[Tensor, "_ out_dim"], *, alpha: float = 2.0
) -> Scalar:
    """Return I_α(h; z) in nats; differentiable in both.

    Features are of the same rows of the global batch, not centred; widths may differ. Memory is O(rows²). Not bounded
    below by 0 unless α = 1; α = 2 needs no eigenvalues.

    Raises:
        UsageError: If h and z have different numbers of rows or `alpha` is not a positive finite number.

    Example:
        >>> h = torch.eye(4)
        >>> round(matrix_mutual_information(h, h).exp().item(), 4)
        4.0
    """
    check_alpha(alpha)
    if len(h) != len(z):
        raise UsageError(f"Mutual information needs the same rows of both, got {len(h)} rows of h and {len(z)} of z.")
    with full_precision(h):
        a, b = _directions(h), _directions(z)
        k_h, k_z = a @ a.mT / len(a), b @ b.mT / len(b)
        return _entropy(k_h, alpha) + _entropy(k_z, alpha) - _entropy(len(a) * k_h * k_z, alpha)


def check_alpha(alpha: float) -> None:
    """Refuse an order of the entropy that cannot be computed.

    Raises:
        UsageError: If `alpha` is not a positive finite number.
    """
    if not 0 < alpha < math.inf:
        raise UsageError(f"alpha, the order of the entropy, must be a positive number (1 or 2 is usual), got {alpha}.")


def _directions(f: Tensor) -> Tensor:
    """Return unit rows with a column more, which is the direction of rows that have none."""
    u = unit_rows(f)
    return torch.cat([u, (u == 0).all(1, keepdim=True).to(u.dtype)], dim=1)


def _entropy(density: Tensor, alpha: float) -> Tensor:
    """S_α of a positive semidefinite matrix of trace 1."""
    if alpha == 2:
        return -density.square().sum().log()
    # Clamped to where the derivatives of λ log λ and λ^α are finite still; below, the gradient is 0.
    eigenvalues = eigvalsh(density).clamp_min(torch.finfo(density.dtype).tiny)
    if alpha == 1:
        return torch.special.entr(eigenvalues).sum()
    return eigenvalues.pow(alpha).sum().log() / (1 - alpha)
