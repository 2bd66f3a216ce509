"""Whether dimensions of the features are correlated with each other.

With C the covariance and P the correlation matrix of f (both centre), D = dim,

    off-diagonal energy             Σ_{i≠j} C_ij² / Σ_ij C_ij²       in [0, 1 − 1/D]
    correlation off-diagonal energy Σ_{i≠j} P_ij² / Σ_ij P_ij²       in [0, 1 − 1/D]
    whiteness                       ‖P − I‖_F² / (D(D − 1))          in [0, 1]
    VICReg's covariance term        Σ_{i≠j} C_ij² / D                in [0, ∞), in the fourth power of the unit of f

0 iff the dimensions are uncorrelated. None of them is invariant to rotations, unlike the ranks.

References:
    Bardes et al. 2022, VICReg, arXiv 2105.04906, Eq. 3 (its covariance term). The energies and the whiteness are
    definitions of this library: OpenReview PD532fs8b1, Fig. 2, shows correlation matrices only as pictures.

Deviations:
    A dimension that is constant up to rounding is uncorrelated with all others, and its P_ii is 1; constant features
    give 0 in all four. So 0 says nothing about collapse: look at a rank as well.
"""

import torch
from torch import Tensor

from hfproj.diagnostics._factors import scatter_of
from hfproj.functional.feature_rows import check_features
from hfproj.typing import Features


@torch.no_grad()
def covariance_offdiag_energy(f: Features) -> float:
    """Return the fraction of the covariance's squared entries off its diagonal: 0 (uncorrelated) to 1 − 1/dim.

    Centres. Not invariant to the scales of dimensions: large ones decide.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite.

    Example:
        >>> covariance_offdiag_energy(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))  # both dimensions the same
        0.5
    """
    check_features(f)
    return offdiagonal_fraction(scatter_of(f))


@torch.no_grad()
def correlation_offdiag_energy(f: Features) -> float:
    """Return the fraction of the correlation matrix's squared entries off its diagonal: 0 to 1 − 1/dim.

    Centres, and divides every dimension by its standard deviation.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite.

    Example:
        >>> correlation_offdiag_energy(torch.tensor([[1.0, 9.0], [-1.0, -9.0]]))
        0.5
    """
    check_features(f)
    return offdiagonal_fraction(correlation(scatter_of(f)))


@torch.no_grad()
def whiteness(f: Features) -> float:
    """Return the mean squared correlation of two different dimensions: 0 (uncorrelated) to 1 (all the same).

    Centres, and divides every dimension by its standard deviation. One dimension alone gives 0.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite.

    Example:
        >>> whiteness(torch.tensor([[1.0, 9.0], [-1.0, -9.0]]))
        1.0
    """
    check_features(f)
    return mean_offdiagonal(correlation(scatter_of(f)))


@torch.no_grad()
def vicreg_covariance(f: Features) -> float:
    """Return VICReg's covariance term, Σ_{i≠j} C_ij²/dim with 1/(rows − 1) in C; from 0 without a limit.

    Centres. It grows with the fourth power of the features' scale.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite.

    Example:
        >>> vicreg_covariance(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))  # both covariances are 2
        4.0
    """
    check_features(f)
    return mean_covariance_energy(scatter_of(f) / (f.shape[0] - 1))


def correlation(scatter: Tensor) -> Tensor:
    """Return the correlation matrix of a scatter matrix; constant dimensions are uncorrelated with all others."""
    deviation = scatter.diagonal().sqrt()
    deviation = deviation.masked_fill(deviation == 0, 1.0)
    matrix = scatter / deviation / deviation[:, None]
    matrix.fill_diagonal_(1.0)
    return matrix


def offdiagonal_fraction(matrix: Tensor) -> float:
    """Return Σ_{i≠j} m²/Σ m²; 0 if all are 0."""
    matrix = matrix / (matrix.abs().max() or 1.0)
    whole = matrix.square().sum()
    return (_offdiagonal(matrix) / whole).item() if whole > 0 else 0.0


def mean_offdiagonal(matrix: Tensor) -> float:
    """Return the mean of m² off the diagonal; 0 if there is only one entry."""
    return _offdiagonal(matrix).item() / max(1, len(matrix) * (len(matrix) - 1))


def mean_covariance_energy(covariance: Tensor) -> float:
    """Return Σ_{i≠j} C²/dim."""
    return _offdiagonal(covariance).item() / len(covariance)


def _offdiagonal(matrix: Tensor) -> Tensor:
    return matrix.masked_fill(torch.eye(len(matrix), dtype=torch.bool, device=matrix.device), 0.0).square().sum()
