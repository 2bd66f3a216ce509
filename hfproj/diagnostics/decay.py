"""How fast the eigenvalues of the covariance fall: α-ReQ.

    log λ_i = const − α log i,   least squares with weights 1/i over the ranks i = 6..100

λ are the eigenvalues of the centred covariance, sorted descending. A smaller α is a flatter spectrum; α near 1 goes
with the best downstream accuracy in the paper.

References:
    Agrawal et al. 2022, α-ReQ, NeurIPS 2022; the fit is that of Stringer et al. 2019, as arnab39/reptrix and
    SirNader/SSL_representation_assessment ``metrics.py`` have it.

Deviations:
    R² is that of the weighted fit over the fitted ranks, in [0, 1]; the ports report it unweighted, one of them over
    other ranks. Eigenvalues that are rounding are left out. Google's ``alpha_req`` fits log σ against a linear index:
    another quantity.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hfproj.diagnostics._spectrum import singular_values_of
from hfproj.errors import UsageError
from hfproj.functional.feature_rows import check_features
from hfproj.typing import Features

FIT_RANGE = (6, 100)
_FEWEST = 3  # two points lie on a line whatever they are


class Decay(NamedTuple):
    """A power law fitted to eigenvalues.

    Attributes:
        alpha: Exponent α; 0 for a flat spectrum, negative never but for rounding.
        r_squared: Weighted share of the variance of log λ that the law explains, in [0, 1]; 1 for a flat spectrum.
    """

    alpha: float
    r_squared: float


@torch.no_grad()
def alpha_req(f: Features, *, fit_range: tuple[int, int] = FIT_RANGE) -> Decay:
    """Return the exponent α of the covariance's eigenvalues and how well a power law fits.

    Centres.

    Args:
        f: Features.
        fit_range: First and last rank of the fit, both included, counted from 1. Clipped to the eigenvalues above
            rounding.

    Raises:
        UsageError: fewer than two rows, rows that are not finite, or fewer than three eigenvalues in the range.

    Example:
        >>> variances = torch.arange(1, 33).double() ** -1.5
        >>> f = torch.cat([torch.eye(32), -torch.eye(32)]).double() * variances.sqrt()
        >>> round(alpha_req(f).alpha, 6)
        1.5
    """
    check_features(f)
    return fit_power_law(singular_values_of(f, center=True), fit_range)


def fit_power_law(sigma: Tensor, fit_range: tuple[int, int]) -> Decay:
    """Return the fit to the squares of singular values, sorted descending.

    Raises:
        UsageError: fewer than three of them in the range.
    """
    first, last = fit_range
    if not 1 <= first < last:
        raise UsageError(f"fit_range holds the first and last rank of the fit, 1 ≤ first < last, got {fit_range}.")
    available = int((sigma > 0).sum())
    last_used = min(last, available)
    if last_used - first + 1 < _FEWEST:
        raise UsageError(
            f"The fit of α takes the eigenvalues of ranks {first} to {last} and needs {_FEWEST} of them, but the "
            f"features have only {available} above rounding. Lower fit_range, or measure more rows or wider features."
        )
    ranks = torch.arange(first, last_used + 1, dtype=sigma.dtype, device=sigma.device)
    x, weights = ranks.log(), 1 / ranks
    weights = weights / weights.sum()
    y = 2 * sigma[first - 1 : first - 1 + len(ranks)].log()
    x, y = x - (weights * x).sum(), y - (weights * y).sum()
    slope = (weights * x * y).sum() / (weights * x * x).sum()
    residual, variance = (weights * (y - slope * x).square()).sum(), (weights * y.square()).sum()
    exact = residual.sqrt() < 1e-12  # of a flat spectrum both are rounding
    return Decay(-slope.item(), 1.0 if exact else (1 - residual / variance).item())
