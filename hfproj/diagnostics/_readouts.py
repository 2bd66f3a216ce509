"""Numbers from a spectrum: the same whether it comes from features at once or from a stream.

`sigma` are singular values and `values` squared ones (eigenvalues), sorted descending, rounding already 0.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hfproj.errors import UsageError, unknown

SPECTRA = ("singular_values", "eigenvalues")


def check_spectrum_name(on: str) -> None:
    """Refuse a spectrum that is none.

    Raises:
        UsageError: so it is.
    """
    if on not in SPECTRA:
        raise unknown("spectrum", on, SPECTRA)


def exp_entropy(weights: Tensor, eps: float = 0.0) -> float:
    """Return exp(−Σ p log p), p = w/Σw + ε; 0 if all weights are."""
    total = weights.sum()
    if total == 0:
        return 0.0
    return math.exp(torch.special.entr(weights / total + eps).sum().item())


def sum_over_largest(values: Tensor) -> float:
    """Return Σλ/λ_1; 0 if all are 0."""
    return (values / values[0]).sum().item() if values[0] > 0 else 0.0


def participation(values: Tensor) -> float:
    """Return (Σλ)²/Σλ²; 0 if all are 0."""
    if values[0] == 0:
        return 0.0
    values = values / values[0]
    return (values.sum().square() / values.square().sum()).item()


def count_above(sigma: Tensor, tol: float) -> int:
    """Return the number of σ above tol·σ_1.

    Raises:
        UsageError: tol lies outside [0, 1).
    """
    if not 0 <= tol < 1:
        raise UsageError(f"tol is a share of the largest singular value, from 0 to below 1, got {tol}.")
    return int((sigma > tol * sigma[0]).sum())


def smallest_over_largest(sigma: Tensor) -> float:
    """Return σ_min/σ_max; 0 if all are 0."""
    return (sigma[-1] / sigma[0]).item() if sigma[0] > 0 else 0.0


class ConditionNumber(NamedTuple):
    """How uneven the eigenvalues of a covariance matrix are.

    Attributes:
        full: λ_max/λ_min over all `dim` eigenvalues, from 1; infinite if the smallest is 0 (dim ≥ rows, for instance).
        on_support: λ_max over the smallest eigenvalue of the support, from 1; infinite if there is no support.
        rank: Size of the support: eigenvalues whose root is above tol times the largest root.
        clamped: λ_max/max(λ_min, 1e-7), as the code of Chaudhry 2026 has it: below that floor it says λ_max only.
    """

    full: float
    on_support: float
    rank: int
    clamped: float


def condition_number(sigma: Tensor, *, dim: int, divisor: int, tol: float, floor: float) -> ConditionNumber:
    """Return the condition numbers of the covariance with eigenvalues σ²/divisor, `dim` of them."""
    rank = count_above(sigma, tol)
    if sigma[0] == 0:
        return ConditionNumber(math.inf, math.inf, 0, 0.0)
    ratio = (sigma / sigma[0]).tolist()
    smallest = ratio[-1] if len(ratio) == dim else 0.0
    largest = sigma[0].item() ** 2 / divisor
    return ConditionNumber(
        full=smallest**-2 if smallest else math.inf,
        on_support=ratio[rank - 1] ** -2,
        rank=rank,
        clamped=largest / max(smallest**2 * largest, floor),
    )


def squares(sigma: Tensor) -> Tensor:
    """Return σ² up to a common factor that keeps them in range."""
    return (sigma / sigma[0]).square() if sigma[0] > 0 else sigma
