"""Whether dimensions of the features are correlated with each other.

C is the covariance and P the correlation matrix of f. All are 0 iff dimensions are uncorrelated; rotations change them.

References:
    Bardes et al. 2022, VICReg, arXiv 2105.04906, Eq. 3 (its covariance term). The energies and the whiteness are
    definitions of this library: OpenReview PD532fs8b1, Fig. 2, shows correlation matrices only as pictures.

Deviations:
    A dimension that is constant up to rounding is uncorrelated with all others, and its P_ii is 1; constant features
    give 0 in all four. So 0 says nothing about collapse: look at a rank as well.
"""

import torch
from torch import Tensor

from hfproj.checking import checked
from hfproj.diagnostics._factors import scatter_of
from hfproj.typing import Features


@torch.no_grad()
@checked
def covariance_offdiag_energy(f: Features) -> float:
    """Return the fraction of the covariance's squared entries off its diagonal: 0 (uncorrelated) to 1 − 1/dim.

    Σ_{i≠j} C_ij² / Σ_ij C_ij². Centres. Not invariant to the scales of dimensions: large ones decide.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite.

    Example:
        >>> covariance_offdiag_energy(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))  # both dimensions the same
        0.5
    """
    return offdiagonal_fraction(scatter_of(f))


@torch.no_grad()
@checked
def correlation_offdiag_energy(f: Features) -> float:
    """Return the fraction of the correlation matrix's squared entries off its diagonal: 0 to 1 − 1/dim.

    Σ_{i≠j} P_ij² / Σ_ij P_ij². Centres, and divides every dimension by its standard deviation.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite.

    Example:
        >>> round(correlation_offdiag_energy(torch.tensor([[1.0, 9.0], [-1.0, -9.0]])), 12)
        0.5
    """
    return offdiagonal_fraction(correlation(scatter_of(f)))


@torch.no_grad()
@checked
def whiteness(f: Features) -> float:
    """Return the mean squared correlation of two different dimensions: 0 (uncorrelated) to 1 (all the same).

    ‖P − I‖_F²/(dim(dim − 1)). Centres, and divides every dimension by its standard deviation. One dimension gives 0.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite.

    Example:
        >>> round(whiteness(torch.tensor([[1.0, 9.0], [-1.0, -9.0]])), 12)
        1.0
    """
    return mean_offdiagonal(correlation(scatter_of(f)))


@torch.no_grad()
@checked
def vicreg_covariance(f: Features) -> float:
    """Return VICReg's covariance term, Σ_{i≠j} C_ij²/dim with 1/(rows − 1) in C; from 0 without a limit.

    Centres. It grows with the fourth power of the features' scale.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite.

    Example:
        >>> vicreg_covariance(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))  # both covariances are 2
        4.0
    """
    return offdiagonal(scatter_of(f) / (f.shape[0] - 1)).item() / f.shape[1]


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
    return (offdiagonal(matrix) / whole).item() if whole > 0 else 0.0


def mean_offdiagonal(matrix: Tensor) -> float:
    """Return the mean of m² off the diagonal; 0 if there is only one entry."""
    return offdiagonal(matrix).item() / max(1, len(matrix) * (len(matrix) - 1))


def offdiagonal(matrix: Tensor) -> Tensor:
    """Return Σ_{i≠j} m²."""
    return matrix.masked_fill(torch.eye(len(matrix), dtype=torch.bool, device=matrix.device), 0.0).square().sum()
