"""How evenly unit rows cover the sphere: by pairs (Wang and Isola) and as a Gaussian (Wasserstein).

    uniformity              log mean_{i<j} exp(−t ‖f̂_i − f̂_j‖²),  t = 2            in [−4t, 0], lower is more uniform
    Wasserstein uniformity  W2 = √(‖μ‖² + Σ_i (√λ_i − 1/√D)²)                        in [0, √2], lower is more uniform

with f̂ unit rows, μ their mean, λ the D = dim eigenvalues of their covariance (1/rows). The first is not invariant to
duplicated rows and can fall (look better) under dimensional collapse: the 8 axes of a cross-polytope in 8 dimensions
give −4.07, 2 of them −4.40. The second sees that: rows isotropic in r of D dimensions give √(2 − 2√(r/D)).

References:
    Wang & Isola 2020, arXiv 2005.10242, Eq. 3. Fang et al. 2024, arXiv 2403.00642; statsle/WassersteinSSL
    ``code/BarlowTwins/metric.py``, which reports −W2 as "uniformity".

Deviations:
    W2 is the distance, with its own sign, not −W2. It is written as a sum of squares, equal to
    √(‖μ‖² + 1 + tr Σ − (2/√D) tr Σ^{1/2}) for rows without zeros, and does not cancel near 0.
"""

import math

import torch

from hfproj.diagnostics._spectrum import RowFactor, row_factor
from hfproj.errors import UsageError
from hfproj.functional.distributions import uniformity as pairwise_uniformity
from hfproj.functional.feature_rows import check_features, double_rows
from hfproj.typing import Features

_TILE = 2**22  # distances held at once: 32 MiB in float64


@torch.no_grad()
def uniformity(f: Features, *, kernel_scale: float = 2.0) -> float:
    """Return the logarithm of the mean Gaussian potential of pairs of unit rows, in [−4t, 0]; 0 if all are parallel.

    Does not centre. A row of zeros stays zero. The cost is rows² · dim: take some thousand rows. It compares all pairs
    and so can't be streamed. It may improve while dimensions collapse; read it with `wasserstein_uniformity` or a rank.

    Args:
        f: Features.
        kernel_scale: t, positive. 2: Wang & Isola.

    Raises:
        UsageError: fewer than two rows, rows that are not finite, or kernel_scale not positive.

    Example:
        >>> round(uniformity(torch.eye(8)), 6)  # all pairs at a squared distance of 2
        -4.0
    """
    if not 0 < kernel_scale < math.inf:
        raise UsageError(f"kernel_scale must be a positive number, got {kernel_scale}.")
    check_features(f)
    unit = double_rows(f, normalize=True)
    return pairwise_uniformity(unit, kernel_scale=kernel_scale, block_rows=max(1, _TILE // len(f))).item()


@torch.no_grad()
def wasserstein_uniformity(f: Features) -> float:
    """Return the Wasserstein distance W2 of unit rows from uniform, in [0, √2]: 0 uniform, √2 collapsed to a point.

    It is a distance: lower is more uniform (Fang et al. report its negative). Centres, after the rows are normalised; a
    row of zeros stays zero. Duplicated rows change nothing.

    Raises:
        UsageError: fewer than two rows, or rows that are not finite.

    Example:
        >>> round(wasserstein_uniformity(torch.ones(8, 4)) ** 2, 6)
        2.0
        >>> wasserstein_uniformity(torch.cat([torch.eye(4), -torch.eye(4)])) < 1e-12
        True
    """
    check_features(f)
    return wasserstein(row_factor(f, normalize=True))


def wasserstein(rows: RowFactor) -> float:
    """Return W2 of unit rows."""
    dim = len(rows.mean)
    roots = rows.singular_values(center=True) / math.sqrt(rows.size)
    square = rows.mean.square().sum() + (roots - 1 / math.sqrt(dim)).square().sum() + (dim - len(roots)) / dim
    return square.sqrt().item()
