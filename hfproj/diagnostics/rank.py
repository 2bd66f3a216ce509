"""How many directions the features use: singular values, covariance spectrum, RankMe, effective rank.

All functions take features `f` `[rows, dim]` (h, z or p), compute in float64 without gradient, and say whether they
centre.

    RankMe          p = σ/‖σ‖₁ + ε,  exp(−Σ p log p)      uncentred, σ the singular values of f, not squared
    effective rank  the same with ε = 0; on="eigenvalues" takes σ² for σ

References:
    Garrido et al. 2023, RankMe, arXiv 2210.02885, Eq. 1. Roy & Vetterli 2007, The effective rank. Jing et al. 2021,
    arXiv 2110.09348 (spectrum: facebookresearch/directclr ``spectrum.py``).

Deviations:
    RankMe and the effective rank take σ from the float64 Gram matrix of the shorter side (σ = √λ, λ < 0 set to 0) and
    not from an SVD. That loses singular values below about 2e-8 of the largest; each of them has p < 2e-8, so that the
    result differs from the SVD's by less than 0.1 % up to 2048 dimensions, rank one included. `singular_values` is an
    SVD.
    Some ports use ε = 1e-5: it reads several percent too high.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.diagnostics._common import blocks, check_features, gram, mean_row
from hfproj.errors import unknown
from hfproj.typing import Features


@torch.no_grad()
def singular_values(f: Features, *, center: bool = False, normalize: bool = False) -> Float[Tensor, " values"]:
    """Return the min(rows, dim) singular values of `f` in float64, sorted descending, by SVD.

    Args:
        f: Features.
        center: Subtract the mean row (after `normalize`). Off by default.
        normalize: Scale every row to norm 1 first; rows of zeros stay zero.

    Raises:
        UsageError: fewer than two rows, or rows that are not finite.

    Example:
        >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, 4.0]])).tolist()
        [4.0, 3.0]
    """
    check_features(f)
    rows = torch.cat(list(blocks(f, normalize=normalize)))
    return torch.linalg.svdvals(rows - rows.mean(0) if center else rows)


@torch.no_grad()
def covariance_spectrum(f: Features, *, center: bool = True, normalize: bool = True) -> Float[Tensor, " dim"]:
    """Return the eigenvalues of the covariance of `f`, with 1/(rows − 1), in float64, sorted descending.

    DirectCLR's spectrum: unit rows, centred. Eigenvalues that rounding makes negative are set to 0.

    Args:
        f: Features.
        center: Subtract the mean row (after `normalize`). On by default; off gives the second moment.
        normalize: Scale every row to norm 1 first; rows of zeros stay zero. On by default.

    Raises:
        UsageError: fewer than two rows, or rows that are not finite.

    Example:
        >>> f = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> [round(value, 6) for value in covariance_spectrum(f).tolist()]  # 2/(4 − 1) in each direction
        [0.666667, 0.666667]
    """
    check_features(f)
    shift = mean_row(f, normalize=normalize) if center else None
    rows, dim = f.shape
    if rows < dim:
        g = torch.cat(list(blocks(f, normalize=normalize)))
        g = g if shift is None else g - shift
        values = torch.linalg.eigvalsh(g @ g.T)
        values = torch.cat([values.new_zeros(dim - rows), values])
    else:
        values = torch.linalg.eigvalsh(gram(f, shift=shift, normalize=normalize))
    return values.clamp_min(0).flip(0) / (rows - 1)


def rankme(f: Features, *, eps: float = 1e-7) -> float:
    """Return RankMe, between 1 (all rows on one line) and min(rows, dim); features that are all zero give 0.

    Uncentred: a common offset of all rows lowers it. It also depends on the number of rows: compare equal counts.

    Args:
        f: Features; the paper uses 25,600 rows.
        eps: ε, added to every probability. 1e-7 is the paper's for float32.

    Raises:
        UsageError: fewer than two rows, or rows that are not finite.

    Example:
        >>> round(rankme(torch.eye(8)), 3)
        8.0
        >>> round(rankme(torch.ones(8, 4)), 3)
        1.0
    """
    check_features(f)
    return _exp_entropy(_gram_singular_values(f), eps)


def effective_rank(f: Features, *, center: bool = False, on: str = "singular_values") -> float:
    """Return the effective rank of Roy and Vetterli: RankMe with ε = 0; features that are all zero give 0.

    Args:
        f: Features.
        center: Subtract the mean row. Off by default.
        on: What the distribution is made of: the singular values σ, or the eigenvalues σ² (smaller for any spectrum
            that is not flat).

    Raises:
        UsageError: fewer than two rows, rows that are not finite, or an unknown `on`.

    Example:
        >>> f = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))
        >>> round(effective_rank(f), 6), round(effective_rank(f, on="eigenvalues"), 6)
        (3.0, 3.0)
    """
    if on not in ("singular_values", "eigenvalues"):
        raise unknown("spectrum", on, ["singular_values", "eigenvalues"])
    check_features(f)
    sigma = _gram_singular_values(f, center=center)
    return _exp_entropy(sigma if on == "singular_values" else sigma**2, 0.0)


@torch.no_grad()
def _gram_singular_values(f: Tensor, *, center: bool = False) -> Tensor:
    """Singular values up to a common factor, which the ranks do not feel and which keeps squares in range."""
    scale = float(f.abs().max()) or 1.0
    shift = mean_row(f) if center else None
    if f.shape[0] >= f.shape[1]:
        matrix = gram(f, shift=shift, scale=scale)
    else:
        g = torch.cat(list(blocks(f))) / scale
        g = g if shift is None else g - shift / scale
        matrix = g @ g.T
    return torch.linalg.eigvalsh(matrix).clamp_min(0).sqrt()


def _exp_entropy(weights: Tensor, eps: float) -> float:
    total = weights.sum()
    if total == 0:
        return 0.0
    return math.exp(torch.special.entr(weights / total + eps).sum().item())
