"""Whether single rows or clusters carry the features.

    coherence     max_i ‖U_i‖² · n/D,   U the left singular vectors of f, U_i its rows             uncentred
    SelfCluster   (‖f̂f̂ᵀ‖_F² − e)/(n² − e),   e = n + n(n − 1)/D,   f̂ unit rows                    uncentred

n = rows, D = dim. e is what rows spread at random over the sphere give.

References:
    google-research/google-research ``graph_embedding/metrics/metrics.py``, after Tsitsulin et al. 2023, Unsupervised
    Embedding Quality Evaluation, arXiv 2305.16562.

Deviations:
    U has the singular vectors of the support only: those of σ up to tol·σ_1 are arbitrary. Google's divides by
    min(n, D) and adds 1e-12 to the features of SelfCluster.
"""

import torch

from hfproj.diagnostics._readouts import count_above
from hfproj.diagnostics._spectrum import RESOLUTION, RowFactor, row_factor
from hfproj.errors import UsageError
from hfproj.functional.feature_rows import blocks, check_features
from hfproj.typing import Features


@torch.no_grad()
def coherence(f: Features, *, tol: float = 1e-8) -> float:
    """Return the coherence, between rank/dim (all rows matter alike) and rows/dim (one row has a direction to itself).

    Features that are all zero give 0. Does not centre. Needs the features twice and so can't be streamed.

    Args:
        f: Features.
        tol: Singular values above tol times the largest are the support; from 0 to below 1.

    Raises:
        UsageError: fewer than two rows, rows that are not finite, or tol outside [0, 1).

    Example:
        >>> round(coherence(torch.cat([torch.eye(4), -torch.eye(4)])), 6)
        1.0
        >>> f = torch.zeros(10, 2)
        >>> f[:9, 0], f[9, 1] = 1.0, 5.0  # the last row alone has the second direction
        >>> round(coherence(f), 6)
        5.0
    """
    check_features(f)
    rows = row_factor(f)
    factor = torch.cat([rows.factor, rows.size**0.5 * rows.mean[None]])
    _, sigma, vh = torch.linalg.svd(factor, full_matrices=False)
    sigma = sigma.masked_fill(sigma <= RESOLUTION * rows.norm(), 0.0)
    rank = count_above(sigma, tol)
    if rank == 0:
        return 0.0
    basis = vh[:rank].T / sigma[:rank]
    leverage = max(float((block @ basis).square().sum(1).max()) for block in blocks(f))
    return leverage * f.shape[0] / f.shape[1]


@torch.no_grad()
def self_cluster(f: Features) -> float:
    """Return SelfCluster, in [−1/(max(rows, dim) − 1), 1]: 1 if all rows are parallel, about 0 if spread at random.

    Does not centre. Below 0 rows are spread more evenly than at random. A row of zeros has a cosine of 0 with every
    row.

    Raises:
        UsageError: fewer than two rows or dimensions, or rows that are not finite.

    Example:
        >>> round(self_cluster(torch.ones(10, 4)), 6)
        1.0
    """
    check_features(f)
    return clustering(row_factor(f, normalize=True))


def clustering(rows: RowFactor) -> float:
    """Return SelfCluster of unit rows."""
    n, dim = rows.size, len(rows.mean)
    if dim < 2:
        raise UsageError("SelfCluster compares with rows spread over a sphere and needs at least 2 dimensions, got 1.")
    expected = n + n * (n - 1) / dim
    actual = rows.singular_values(center=False).square().square().sum().item()
    return (actual - expected) / (n * n - expected)
