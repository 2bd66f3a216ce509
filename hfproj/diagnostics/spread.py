"""Whether rows spread over the sphere or crowd together: as points, by pairs, as a Gaussian, by single rows.

Uniformity is not invariant to duplicated rows and can fall (look better) under dimensional collapse: the 8 axes of a
cross-polytope in 8 dimensions give −4.07, 2 of them −4.40. W2 sees that: for r of D axes it is √(2 − 2√(r/D)).

References:
    Representation std: Chaudhry 2026, arXiv 2605.17180, and SimSiam (Chen & He 2021, arXiv 2011.10566, Fig. 2). Wang &
    Isola 2020, arXiv 2005.10242, Eq. 3. Fang et al. 2024, arXiv 2403.00642; statsle/WassersteinSSL
    ``code/BarlowTwins/metric.py``, which reports −W2 as "uniformity". Tsitsulin et al. 2023, Unsupervised
    Embedding Quality Evaluation, arXiv 2305.16562, google-research/google-research
    ``graph_embedding/metrics/metrics.py`` (SelfCluster, coherence).

Deviations:
    The std has 1/(rows − 1), as `torch.std`. W2 is the distance, with its own sign, not −W2. It is written as a sum of
    squares, equal to √(‖μ‖² + 1 + tr Σ − (2/√D) tr Σ^{1/2}) for rows without zeros, and does not cancel near 0. U has
    the singular vectors of the support only: those of σ up to tol·σ_1 are arbitrary. Google's code divides by min(n, D)
    and adds 1e-12 to the features of SelfCluster.
"""

import math

import torch
from torch import Tensor

from hfproj.checking import checked
from hfproj.diagnostics._factors import (
    RESOLUTION,
    RowFactor,
    centre_of,
    constant_columns,
    eps_of,
    minus,
    noise,
    row_factor,
)
from hfproj.diagnostics.spectrum import count_above
from hfproj.errors import UsageError
from hfproj.functional.distributions import uniformity as pairwise_uniformity
from hfproj.functional.feature_rows import blocks, check_features, double_rows
from hfproj.typing import Features

_TILE = 2**22  # distances held at once: 32 MiB in float64


@torch.no_grad()
@checked
def representation_std(f: Features) -> float:
    """Return the mean over dimensions of the standard deviation of the L2-normalised rows.

    Between 0 and √(rows/((rows − 1)·dim)): 1/√dim for many rows that spread evenly, 0 if all point the same way.
    Centres (a standard deviation does), after the rows are normalised.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite.

    Example:
        >>> representation_std(torch.ones(4, 3))  # collapsed to one point
        0.0
    """
    check_features(f)
    origin, offset = centre_of(f, normalize=True)
    deviations = (minus(block, (origin, offset)) for block in blocks(f, normalize=True))
    squares = torch.stack([deviation.square().sum(0) for deviation in deviations]).sum(0)
    return mean_deviation(squares, origin + offset, len(f), eps_of(f))


@torch.no_grad()
@checked
def uniformity(f: Features, *, kernel_scale: float = 2.0) -> float:
    """Return the logarithm of the mean Gaussian potential of pairs of unit rows, in [−4t, 0]; 0 if all are parallel.

    It is log mean_{i<j} exp(−t ‖f̂_i − f̂_j‖²) of unit rows f̂; lower is more uniform. `kernel_scale` is t (2: Wang &
    Isola). Does not centre. A row of zeros stays zero. The cost is rows² · dim: take some thousand rows. It compares
    all pairs and so can't be streamed. It may improve while dimensions collapse: see also `wasserstein_uniformity`.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite, or kernel_scale is not positive.

    Example:
        >>> round(uniformity(torch.eye(8)), 6)  # all pairs at a squared distance of 2
        -4.0
    """
    if not 0 < kernel_scale < math.inf:
        raise UsageError(f"Expected kernel_scale to be a positive number, got {kernel_scale}.")
    check_features(f)
    unit = double_rows(f, normalize=True)
    return pairwise_uniformity(unit, kernel_scale=kernel_scale, block_rows=max(1, _TILE // len(f))).item()


@torch.no_grad()
@checked
def wasserstein_uniformity(f: Features) -> float:
    """Return the Wasserstein distance W2 of unit rows from uniform, in [0, √2]: 0 uniform, √2 collapsed to a point.

    √(‖μ‖² + Σ_i (√λ_i − 1/√dim)²) with μ the mean of the unit rows and λ the eigenvalues of their covariance (1/rows).
    Lower is more uniform (Fang et al. report its negative). Centres, after the rows are normalised; a
    row of zeros stays zero. Duplicated rows change nothing.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite.

    Example:
        >>> round(wasserstein_uniformity(torch.ones(8, 4)) ** 2, 6)
        2.0
        >>> wasserstein_uniformity(torch.cat([torch.eye(4), -torch.eye(4)])) < 1e-12  # isotropic rows
        True
    """
    return wasserstein(row_factor(f, normalize=True))


@torch.no_grad()
@checked
def self_cluster(f: Features) -> float:
    """Return SelfCluster, in [−1/(max(rows, dim) − 1), 1]: 1 if all rows are parallel, about 0 if spread at random.

    (‖f̂f̂ᵀ‖_F² − e)/(n² − e) of n unit rows f̂, with e = n + n(n − 1)/dim that of rows spread at random. Does not
    centre. Below 0 rows are spread more evenly than at random. A row of zeros has a cosine of 0 with every row.

    Raises:
        UsageError: If `f` has fewer than two rows or two dimensions, or rows that are not finite.

    Example:
        >>> round(self_cluster(torch.ones(10, 4)), 6)
        1.0
    """
    return clustering(row_factor(f, normalize=True))


@torch.no_grad()
@checked
def coherence(f: Features, *, tol: float = 1e-8) -> float:
    """Return the coherence, between rank/dim (all rows matter alike) and rows/dim (one row has a direction to itself).

    max_i ‖U_i‖² · rows/dim, U_i the rows of f's left singular vectors. Features that are all zero give 0. Does not
    centre. Singular values above `tol` times the largest are the support. It can't be streamed.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite, or tol lies outside [0, 1).

    Example:
        >>> f = torch.zeros(10, 2)
        >>> f[:9, 0], f[9, 1] = 1.0, 5.0  # the last row alone has the second direction
        >>> round(coherence(f), 6)
        5.0
    """
    rows = row_factor(f)
    _, sigma, vh = torch.linalg.svd(rows.rows(center=False), full_matrices=False)
    sigma = sigma.masked_fill(sigma <= max(RESOLUTION, noise(rows.eps, *f.shape)) * rows.norm(), 0.0)
    rank = count_above(sigma, tol)
    if rank == 0:
        return 0.0
    basis = vh[:rank].T / sigma[:rank]
    leverage = max(float((block @ basis).square().sum(1).max()) for block in blocks(f))
    return leverage * f.shape[0] / f.shape[1]


def mean_deviation(squares: Tensor, mean: Tensor, count: int, eps: float) -> float:
    """Return the mean of √(squares/(count − 1)), columns whose squared deviations `squares` are rounding being 0."""
    constant = constant_columns(squares, mean, count, eps)
    return (squares.masked_fill(constant, 0.0) / (count - 1)).sqrt().mean().item()


def wasserstein(rows: RowFactor) -> float:
    """Return W2 of unit rows."""
    dim = len(rows.mean)
    roots = rows.singular_values(center=True) / math.sqrt(rows.size)
    square = rows.mean.square().sum() + (roots - 1 / math.sqrt(dim)).square().sum() + (dim - len(roots)) / dim
    return square.sqrt().item()


def clustering(rows: RowFactor) -> float:
    """Return SelfCluster of unit rows."""
    n, dim = rows.size, len(rows.mean)
    if dim < 2:
        raise UsageError("SelfCluster compares with rows spread over a sphere and needs at least 2 dimensions, got 1.")
    expected = n + n * (n - 1) / dim
    actual = rows.singular_values(center=False).square().square().sum().item()
    return (actual - expected) / (n * n - expected)
