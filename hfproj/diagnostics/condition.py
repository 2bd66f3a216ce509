"""How uneven the directions of the features are.

    pseudo-condition number        σ_min/σ_max of f, uncentred: in [0, 1], the inverse of the usual condition number
    covariance condition number    λ_max/λ_min of the covariance of unit rows: full, on its support, and clamped

References:
    google-research/google-research ``graph_embedding/metrics/metrics.py`` (pseudo-condition number). Chaudhry 2026,
    arXiv 2605.17180, code at 117231d (unit rows, centred covariance with 1/(rows − 1), λ_max/max(λ_min, 1e-7)).

Deviations:
    Google's adds 1e-12 to σ_max. That code has the clamped form only, which says nothing but λ_max·1e7 once the rank is
    below dim; here it comes with the rank and the condition number on the support.
"""

import torch

from hfproj.diagnostics._readouts import ConditionNumber, condition_number, smallest_over_largest
from hfproj.diagnostics._spectrum import singular_values_of
from hfproj.functional.feature_rows import check_features
from hfproj.typing import Features

__all__ = ["ConditionNumber", "covariance_condition_number", "pseudo_condition_number"]


@torch.no_grad()
def pseudo_condition_number(f: Features) -> float:
    """Return σ_min/σ_max of the min(rows, dim) singular values: 1 if all are equal, 0 at rank deficiency or all zero.

    Does not centre.

    Raises:
        UsageError: fewer than two rows, or rows that are not finite.

    Example:
        >>> round(pseudo_condition_number(torch.diag(torch.tensor([4.0, 2.0, 1.0]))), 6)
        0.25
    """
    check_features(f)
    return smallest_over_largest(singular_values_of(f, center=False))


@torch.no_grad()
def covariance_condition_number(
    f: Features, *, center: bool = True, normalize: bool = True, tol: float = 1e-8, floor: float = 1e-7
) -> ConditionNumber:
    """Return the condition numbers of the covariance: `full`, `on_support`, `rank` and `clamped`.

    Centres, after the rows are normalised. Constant features give infinity on any support, rank 0 and 0 when clamped.

    Args:
        f: Features.
        center: Subtract the mean row (after `normalize`). On by default.
        normalize: Scale every row to norm 1 first; rows of zeros stay zero. On by default.
        tol: An eigenvalue belongs to the support if its root is above tol times the largest root.
        floor: What `clamped` sets smaller eigenvalues to. 1e-7: the code of Chaudhry 2026.

    Raises:
        UsageError: fewer than two rows, rows that are not finite, or tol outside [0, 1).

    Example:
        >>> f = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5], [0.0, -0.5]])
        >>> round(covariance_condition_number(f, normalize=False).full, 6)  # variances 2/3 and 1/6
        4.0
    """
    check_features(f)
    sigma = singular_values_of(f, center=center, normalize=normalize)
    return condition_number(sigma, dim=f.shape[1], divisor=f.shape[0] - 1, tol=tol, floor=floor)
