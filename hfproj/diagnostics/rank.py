"""How many directions the features use: singular values, covariance spectrum and the ranks made of them.

All functions take features `f` `[rows, dim]` (h, z or p), compute in float64 without gradient, and say whether they
centre. With σ the singular values of f and λ the eigenvalues of its centred covariance,

    RankMe               p = σ/Σσ + ε,  exp(−Σ p log p)      uncentred, σ not squared
    effective rank       the same with ε = 0; on="eigenvalues" takes σ² for σ
    stable rank          ‖f‖_F²/σ_1²                         uncentred
    NESum                Σλ/λ_1                              centred: the stable rank of centred features
    participation ratio  (Σλ)²/Σλ²                           centred
    numerical rank       #{σ_i > tol·σ_1}                    uncentred

References:
    Garrido et al. 2023, RankMe, arXiv 2210.02885, Eq. 1. Roy & Vetterli 2007, The effective rank. Jing et al. 2021,
    arXiv 2110.09348 (spectrum: facebookresearch/directclr ``spectrum.py``). He & Ozay 2022, Exploring the gap between
    collapsed and whitened features, Def. 4.1 (NESum). google-research/google-research
    ``graph_embedding/metrics/metrics.py`` (stable rank, NESum).

Deviations:
    Ranks come from a float64 Gram matrix where its rounding moves them by less than 1e-10, else from triangular factors
    (`hfproj.diagnostics._spectrum`); the spectra always from the latter. Singular values up to 16·2.2e-16·‖f‖_F (f
    before centring) are rounding and count as 0, so that constant features have rank 0 when centred.
    Some ports of RankMe use ε = 1e-5: it reads several percent too high. Google's adds 1e-12 to every λ of NESum.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.diagnostics._readouts import check_spectrum_name, count_above, exp_entropy, participation, sum_over_largest
from hfproj.diagnostics._spectrum import entropy_singular_values, gram_spectrum, singular_values_of
from hfproj.functional.feature_rows import check_features
from hfproj.typing import Features


@torch.no_grad()
def singular_values(f: Features, *, center: bool = False, normalize: bool = False) -> Float[Tensor, " values"]:
    """Return the min(rows, dim) singular values of `f` in float64, sorted descending.

    Args:
        f: Features.
        center: Subtract the mean row (after `normalize`). Off by default.
        normalize: Scale every row to norm 1 first; rows of zeros stay zero.

    Raises:
        UsageError: fewer than two rows, or rows that are not finite.

    Example:
        >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, 4.0]])).tolist()
        [4.0, 3.0]
        >>> singular_values(torch.full((5, 2), 0.1), center=True).tolist()  # no rounding noise
        [0.0, 0.0]
    """
    check_features(f)
    return singular_values_of(f, center=center, normalize=normalize)


@torch.no_grad()
def covariance_spectrum(f: Features, *, center: bool = True, normalize: bool = True) -> Float[Tensor, " dim"]:
    """Return the `dim` eigenvalues of the covariance of `f`, with 1/(rows − 1), in float64, sorted descending.

    DirectCLR's spectrum: unit rows, centred. Its sum is at most rows/(rows − 1) with `normalize`.

    Args:
        f: Features.
        center: Subtract the mean row (after `normalize`). On by default; off gives the second moment.
        normalize: Scale every row to norm 1 first; rows of zeros stay zero. On by default.

    Raises:
        UsageError: fewer than two rows, or rows that are not finite.

    Example:
        >>> f = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> [round(value, 6) for value in covariance_spectrum(f).tolist()]  # 2/(4 − 1) in each direction
        [0.666667, 0.666667]
    """
    check_features(f)
    values = singular_values_of(f, center=center, normalize=normalize).square()
    return torch.cat([values, values.new_zeros(f.shape[1] - len(values))]) / (f.shape[0] - 1)


@torch.no_grad()
def rankme(f: Features, *, eps: float = 1e-7) -> float:
    """Return RankMe, between 1 (all rows on one line) and min(rows, dim); features that are all zero give 0.

    Uncentred: a common offset of all rows lowers it. It also depends on the number of rows: compare equal counts.

    Args:
        f: Features; the paper uses 25,600 rows.
        eps: ε, added to every probability. 1e-7 is the paper's for float32.

    Raises:
        UsageError: fewer than two rows, or rows that are not finite.

    Example:
        >>> round(rankme(torch.eye(8)), 3)
        8.0
        >>> round(rankme(torch.ones(8, 4)), 3)
        1.0
    """
    check_features(f)
    return exp_entropy(entropy_singular_values(f, center=False), eps)


@torch.no_grad()
def effective_rank(f: Features, *, center: bool = False, on: str = "singular_values") -> float:
    """Return the effective rank of Roy and Vetterli: RankMe with ε = 0.

    Between 1 and min(rows, dim); features that are all zero (constant, with `center`) give 0.

    Args:
        f: Features.
        center: Subtract the mean row. Off by default.
        on: What the distribution is made of: the singular values σ, or the eigenvalues σ² (smaller for any spectrum
            that is not flat).

    Raises:
        UsageError: fewer than two rows, rows that are not finite, or an unknown `on`.

    Example:
        >>> f = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))
        >>> round(effective_rank(f), 6), round(effective_rank(f, on="eigenvalues"), 6)
        (3.0, 3.0)
    """
    check_spectrum_name(on)
    check_features(f)
    if on == "eigenvalues":
        return exp_entropy(gram_spectrum(f, center=center))
    return exp_entropy(entropy_singular_values(f, center=center))


@torch.no_grad()
def stable_rank(f: Features) -> float:
    """Return the stable rank ‖f‖_F²/σ_1², between 1 and the rank; features that are all zero give 0.

    Does not centre. It hardly moves with small singular values; for a weight matrix it is defined alike.

    Raises:
        UsageError: fewer than two rows, or rows that are not finite.

    Example:
        >>> round(stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))), 6)  # (4 + 1 + 1)/4
        1.5
    """
    check_features(f)
    return sum_over_largest(gram_spectrum(f, center=False))


@torch.no_grad()
def nesum(f: Features) -> float:
    """Return NESum, Σλ/λ_1 over the eigenvalues of the covariance, between 1 and dim; constant features give 0.

    Centres: it is the stable rank of centred features.

    Raises:
        UsageError: fewer than two rows, or rows that are not finite.

    Example:
        >>> round(nesum(torch.cat([torch.eye(4), -torch.eye(4)]) + 10), 6)
        4.0
    """
    check_features(f)
    return sum_over_largest(gram_spectrum(f, center=True))


@torch.no_grad()
def participation_ratio(f: Features, *, center: bool = True) -> float:
    """Return (Σλ)²/Σλ² over the eigenvalues of the covariance, between 1 and dim; constant features give 0.

    Args:
        f: Features.
        center: Subtract the mean row. On by default.

    Raises:
        UsageError: fewer than two rows, or rows that are not finite.

    Example:
        >>> round(participation_ratio(torch.cat([torch.eye(4), -torch.eye(4)])), 6)
        4.0
    """
    check_features(f)
    return participation(gram_spectrum(f, center=center))


@torch.no_grad()
def numerical_rank(f: Features, *, tol: float = 1e-8, center: bool = False) -> int:
    """Return the number of singular values above tol·σ_1, from 0 (all zero) to min(rows, dim).

    Does not centre by default. The numbers inside are float64; features that a model computed in float32 carry rounding
    of about 1e-7 of their size in every direction, so that a rank of theirs wants tol = 1e-6 or more.

    Args:
        f: Features.
        tol: Share of the largest singular value, from 0 to below 1.
        center: Subtract the mean row.

    Raises:
        UsageError: fewer than two rows, rows that are not finite, or tol outside [0, 1).

    Example:
        >>> numerical_rank(torch.diag(torch.tensor([1.0, 1e-3, 1e-9])))
        2
    """
    check_features(f)
    return count_above(singular_values_of(f, center=center), tol)
