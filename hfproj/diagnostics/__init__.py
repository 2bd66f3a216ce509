"""Measures of features `[rows, dim]` (h, z or p): float64 inside, no gradient; each says whether it centres."""

from hfproj.diagnostics.alignment import positive_cosine, representation_std
from hfproj.diagnostics.rank import covariance_spectrum, effective_rank, rankme, singular_values

__all__ = [
    "covariance_spectrum",
    "effective_rank",
    "positive_cosine",
    "rankme",
    "representation_std",
    "singular_values",
]
