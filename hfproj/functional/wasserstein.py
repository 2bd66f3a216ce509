"""Wasserstein distance of unit rows from a uniform distribution on the sphere, both taken as Gaussians.

With unit rows ẑ ``[n, D]``, their mean μ and covariance Σ (with 1/n), against the Gaussian N(0, I/D),

    W2 = √( ‖μ‖² + 1 + tr Σ − (2/√D) tr Σ^{1/2} )  ∈  [0, √2].

Since ‖μ‖² + tr Σ = 1, it is √(2 − (2/√D) tr Σ^{1/2}): √2 at collapse to a point, 0 for isotropic rows, √(2 − 2√(r/D))
for rows that are isotropic in r of D dimensions; duplicated rows change nothing.

References:
    Fang et al. 2024, arXiv 2403.00642; statsle/WassersteinSSL ``code/BarlowTwins/metric.py``.

Deviations:
    Eigenvalues by ``eigvalsh``, of the Gram matrix of centred rows where there are fewer rows than dimensions (the same
    but for zeros). The official code takes ``eig``.
"""

import torch

from hfproj.functional.eigen import eigvalsh
from hfproj.functional.rows import full_precision, unit_rows
from hfproj.typing import Features, Scalar


def wasserstein_to_uniform(z: Features, *, floor: float = 1e-12) -> Scalar:
    """Return W2, between 0 (uniform) and √2 (collapsed to a point); differentiable.

    Centres (a covariance does), after the rows are normalised. A row of zeros stays zero.

    Args:
        z: Rows of the joint batch, any floating-point type; computed in float32 or better.
        floor: Eigenvalues of Σ below it count as `floor`: 1e-12 as a loss, whose gradient would be infinite at a rank
            deficiency (shifts the value at collapse by about √D·1e-6/√2); 0 as a metric, without a gradient.

    Example:
        >>> round(wasserstein_to_uniform(torch.ones(8, 4)).item() ** 2, 3)
        2.0
        >>> cross_polytope = torch.cat([torch.eye(4), -torch.eye(4)]).double()
        >>> wasserstein_to_uniform(cross_polytope).item() < 1e-7
        True
    """
    with full_precision(z):
        u = unit_rows(z)
        rows, dim = u.shape
        mean = u.mean(0)
        centred = u - mean
        covariance = (centred.mT @ centred if dim <= rows else centred @ centred.mT) / rows
        root_trace = eigvalsh(covariance).clamp_min(floor).sqrt().sum()
        square = mean.square().sum() + 1 + centred.square().sum() / rows - 2 / dim**0.5 * root_trace
        # Rounding can bring 0 below 0; the clamp also keeps the root's gradient finite there.
        return square.clamp_min(torch.finfo(u.dtype).eps ** 2).sqrt()
