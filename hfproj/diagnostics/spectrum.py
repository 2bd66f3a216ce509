"""How many directions the features use and how uneven these are: singular values, and the numbers made of them.

σ are the singular values of f and λ the eigenvalues of its covariance, both sorted descending; λ is σ² of centred
features over rows − 1. docs/diagnostics.md has a table of the formulas.

References:
    Garrido et al. 2023, RankMe, arXiv 2210.02885, Eq. 1. Roy & Vetterli 2007, The effective rank. Jing et al. 2021,
    arXiv 2110.09348 (spectrum: facebookresearch/directclr ``spectrum.py``). He & Ozay 2022, Exploring the gap between
    collapsed and whitened features, Def. 4.1 (NESum). google-research/google-research
    ``graph_embedding/metrics/metrics.py`` (stable rank, NESum, pseudo-condition number). Chaudhry 2026, arXiv
    2605.17180, code at 117231d (unit rows, covariance with 1/(rows − 1), λ_max/max(λ_min, 1e-7)). Agrawal et al. 2022,
    α-ReQ, NeurIPS 2022; the fit is that of Stringer et al. 2019, as arnab39/reptrix and
    SirNader/SSL_representation_assessment ``metrics.py`` have it.

Deviations:
    Ranks come from a float64 Gram matrix where its rounding moves them by less than 1e-10, else from triangular factors
    (`hfproj.diagnostics._factors`); the spectra always from the latter. Singular values up to 16·2.2e-16·‖f‖_F (f
    before centring) are rounding and count as 0, so that constant features have rank 0 when centred. Of features in
    float32 or narrower, ranks, condition numbers and the fit of α leave out what may be their rounding, too, and
    features that are constant but for it count as constant (`hfproj.diagnostics._factors`).
    Some ports of RankMe use ε = 1e-5: it reads several percent too high. Google's adds 1e-12 to every λ of NESum and to
    σ_max. Chaudhry's code has the clamped condition number only, which says nothing but λ_max·1e7 once the rank is
    below dim. R² is that of the weighted fit over the fitted ranks, in [0, 1]; the ports report it unweighted, one of
    them over other ranks. Google's ``alpha_req`` fits log σ against a linear index: another quantity.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.checking import checked
from hfproj.diagnostics._factors import (
    entropy_singular_values,
    eps_of,
    gram_spectrum,
    rounding_of,
    row_factor,
    singular_values_of,
)
from hfproj.errors import NotMeasurableError, UsageError, check_choice
from hfproj.typing import Features, OneOf

FIT_RANGE = (6, 100)
SPECTRA = ("singular_values", "eigenvalues")
Spectrum = OneOf["singular_values", "eigenvalues"]
_FEWEST = 3  # two points lie on a line whatever they are


class ConditionNumber(NamedTuple):
    """How uneven the eigenvalues of a covariance matrix are.

    Attributes:
        full: λ_max/λ_min over all `dim` eigenvalues, from 1; infinite if the smallest is 0 (dim ≥ rows, for instance).
        on_support: λ_max over the smallest eigenvalue of the support, from 1; infinite if there is no support.
        rank: Size of the support: eigenvalues whose root is above tol times the largest root.
        clamped: λ_max/max(λ_min, 1e-7), as the code of Chaudhry 2026 has it: below that floor it says λ_max only.
    """

    full: float
    on_support: float
    rank: int
    clamped: float


class Decay(NamedTuple):
    """A power law fitted to eigenvalues.

    `alpha`: Exponent α; 0 for a flat spectrum, negative only by rounding. `r_squared`: Weighted fraction of the
    variance of log λ that the law explains, in [0, 1]; 1 for a flat spectrum.
    """

    alpha: float
    r_squared: float


@torch.no_grad()
@checked
def singular_values(f: Features, *, center: bool = False, normalize: bool = False) -> Float[Tensor, " values"]:
    """Return the min(rows, dim) singular values of `f` in float64, sorted descending.

    `normalize` scales every row to norm 1 (rows of zeros stay zero); `center` subtracts the mean row after that.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite.

    Example:
        >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, 4.0]])).tolist()
        [4.0, 3.0]
    """
    return singular_values_of(f, center=center, normalize=normalize)


@torch.no_grad()
@checked
def covariance_spectrum(f: Features, *, center: bool = True, normalize: bool = True) -> Float[Tensor, " dim"]:
    """Return the `dim` eigenvalues of the covariance of `f`, with 1/(rows − 1), in float64, sorted descending.

    DirectCLR's spectrum: unit rows, centred. Its sum is at most rows/(rows − 1) with `normalize`; without `center` it
    is that of the second moment. Both options are those of `singular_values`.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite.

    Example:
        >>> f = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> [round(value, 6) for value in covariance_spectrum(f).tolist()]  # 2/(4 − 1) in each direction
        [0.666667, 0.666667]
    """
    return eigenvalues(singular_values_of(f, center=center, normalize=normalize), len(f), f.shape[1])


@torch.no_grad()
@checked
def rankme(f: Features, *, eps: float = 1e-7) -> float:
    """Return RankMe, between 1 (all rows on one line) and min(rows, dim); features that are all zero give 0.

    exp(−Σ p log p) of p = σ/Σσ + ε, uncentred: a common offset of all rows lowers it. It depends on the number of rows
    (25,600 in the paper): compare equal counts. `eps` is ε; 1e-7 is the paper's for float32.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite.

    Example:
        >>> round(rankme(torch.eye(8)), 3), round(rankme(torch.ones(8, 4)), 3)
        (8.0, 1.0)
    """
    return exp_entropy(entropy_singular_values(f, center=False), eps)


@torch.no_grad()
@checked
def effective_rank(f: Features, *, center: bool = False, on: Spectrum = "singular_values") -> float:
    """Return the effective rank of Roy and Vetterli: RankMe with ε = 0.

    Between 1 and min(rows, dim); features that are all zero (constant, with `center`) give 0. The distribution is made
    of the singular values σ or, with ``on="eigenvalues"``, of σ²: smaller for any spectrum that is not flat.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite, or `on` is neither of the two.

    Example:
        >>> f = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))
        >>> round(effective_rank(f), 6), round(effective_rank(f, on="eigenvalues"), 6)
        (3.0, 3.0)
    """
    check_choice("spectrum", on, SPECTRA)
    return exp_entropy((gram_spectrum if on == "eigenvalues" else entropy_singular_values)(f, center=center))


@torch.no_grad()
@checked
def stable_rank(f: Features) -> float:
    """Return the stable rank ‖f‖_F²/σ_1², between 1 and the rank; features that are all zero give 0.

    Does not centre. It hardly moves with small singular values; for a weight matrix it is defined alike.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite.

    Example:
        >>> round(stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))), 6)  # (4 + 1 + 1)/4
        1.5
    """
    return sum_over_largest(gram_spectrum(f, center=False))


@torch.no_grad()
@checked
def nesum(f: Features) -> float:
    """Return NESum, Σλ/λ_1 over the eigenvalues of the covariance, between 1 and dim; constant features give 0.

    Centres: it is the stable rank of centred features.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite.

    Example:
        >>> round(nesum(torch.cat([torch.eye(4), -torch.eye(4)]) + 10), 6)
        4.0
    """
    return sum_over_largest(gram_spectrum(f, center=True))


@torch.no_grad()
@checked
def participation_ratio(f: Features, *, center: bool = True) -> float:
    """Return (Σλ)²/Σλ² over the eigenvalues of the covariance, between 1 and dim; constant features give 0.

    Without `center`, the eigenvalues are those of the second moment.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite.

    Example:
        >>> round(participation_ratio(torch.cat([torch.eye(4), -torch.eye(4)])), 6)
        4.0
    """
    return participation(gram_spectrum(f, center=center))


@torch.no_grad()
@checked
def numerical_rank(f: Features, *, tol: float = 1e-8, center: bool = False) -> int:
    """Return the number of singular values above tol·σ_1, from 0 (all zero) to min(rows, dim).

    `center` subtracts the mean row; `tol` is in [0, 1). Singular values that may be the rounding of the dtype of `f` do
    not count, whatever `tol` is: of float32 those up to 16·1.2e-7·‖f‖_F.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite, or tol lies outside [0, 1).

    Example:
        >>> numerical_rank(torch.diag(torch.tensor([1.0, 1e-3, 1e-9])))
        2
    """
    return count_above(row_factor(f).resolved(center=center), tol)


@torch.no_grad()
@checked
def pseudo_condition_number(f: Features) -> float:
    """Return σ_min/σ_max of the min(rows, dim) singular values: 1 if all are equal, 0 at rank deficiency or all zero.

    Does not centre.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite.

    Example:
        >>> round(pseudo_condition_number(torch.diag(torch.tensor([4.0, 2.0, 1.0]))), 6)
        0.25
    """
    return smallest_over_largest(row_factor(f).resolved(center=False))


@torch.no_grad()
@checked
def covariance_condition_number(
    f: Features, *, center: bool = True, normalize: bool = True, tol: float = 1e-8, floor: float = 1e-7
) -> ConditionNumber:
    """Return the condition numbers of the covariance: `full`, `on_support`, `rank` and `clamped`.

    `center` and `normalize` are those of `singular_values`. An eigenvalue belongs to the support if its root is above
    `tol` times the largest root; `clamped` raises smaller eigenvalues to `floor` (1e-7: the code of Chaudhry 2026).
    Constant features give infinity on any support, rank 0 and 0 when clamped. Eigenvalues that may be the rounding of
    the dtype of `f` are 0, as in `numerical_rank`: behind a final LayerNorm `full` is infinite.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite, or tol lies outside [0, 1).

    Example:
        >>> f = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5], [0.0, -0.5]])
        >>> round(covariance_condition_number(f, normalize=False).full, 6)  # variances 2/3 and 1/6
        4.0
    """
    sigma = row_factor(f, normalize=normalize).resolved(center=center)
    return condition_number(sigma, len(f), f.shape[1], tol=tol, floor=floor)


@torch.no_grad()
@checked
def alpha_req(f: Features, *, fit_range: tuple[int, int] = FIT_RANGE) -> Decay:
    """Return the exponent α of the covariance's eigenvalues, from 0, and R², how well a power law fits.

    Fits log λ_i = const − α log i by least squares with weights 1/i. A smaller α is a flatter spectrum; α near 1 goes
    with the best downstream accuracy in the paper. Centres. `fit_range` holds the first and last rank of the fit, both
    included, counted from 1; it is clipped to the eigenvalues above rounding.

    Raises:
        UsageError: If `f` has fewer than two or non-finite rows, or fewer than three eigenvalues in the range.

    Example:
        >>> variances = torch.arange(1, 33).double() ** -1.5
        >>> f = torch.cat([torch.eye(32), -torch.eye(32)]).double() * variances.sqrt()
        >>> round(alpha_req(f).alpha, 6)
        1.5
    """
    return fit_power_law(row_factor(f).resolved(center=True), fit_range, eps_of(f))


def eigenvalues(sigma: Tensor, rows: int, dim: int) -> Tensor:
    """Return the `dim` eigenvalues of the covariance, with 1/(rows − 1)."""
    values = sigma.square()
    return torch.cat([values, values.new_zeros(dim - len(values))]) / (rows - 1)


def exp_entropy(weights: Tensor, eps: float = 0.0) -> float:
    """Return exp(−Σ p log p), p = w/Σw + ε; 0 if all weights are 0."""
    total = weights.sum()
    return 0.0 if total == 0 else math.exp(torch.special.entr(weights / total + eps).sum().item())


def sum_over_largest(values: Tensor) -> float:
    """Return Σλ/λ_1; 0 if all are 0."""
    return (values / values[0]).sum().item() if values[0] > 0 else 0.0


def participation(values: Tensor) -> float:
    """Return (Σλ)²/Σλ²; 0 if all are 0."""
    if values[0] == 0:
        return 0.0
    values = values / values[0]
    return (values.sum().square() / values.square().sum()).item()


def count_above(sigma: Tensor, tol: float) -> int:
    """Return the number of σ above tol·σ_1."""
    if not 0 <= tol < 1:
        raise UsageError(f"Expected tol to be a fraction of the largest singular value, from 0 to below 1, got {tol}.")
    return int((sigma > tol * sigma[0]).sum())


def smallest_over_largest(sigma: Tensor) -> float:
    """Return σ_min/σ_max; 0 if all are 0."""
    return (sigma[-1] / sigma[0]).item() if sigma[0] > 0 else 0.0


def condition_number(sigma: Tensor, rows: int, dim: int, *, tol: float, floor: float) -> ConditionNumber:
    """Return the condition numbers of the covariance with eigenvalues σ²/(rows − 1), `dim` of them."""
    rank = count_above(sigma, tol)
    if sigma[0] == 0:
        return ConditionNumber(math.inf, math.inf, 0, 0.0)
    ratio = (sigma / sigma[0]).tolist()
    smallest = ratio[-1] if len(ratio) == dim else 0.0
    largest = sigma[0].item() ** 2 / (rows - 1)
    full = smallest**-2 if smallest else math.inf
    return ConditionNumber(full, ratio[rank - 1] ** -2, rank, largest / max(smallest**2 * largest, floor))


def fit_power_law(sigma: Tensor, fit_range: tuple[int, int], eps: float) -> Decay:
    """Return the fit to the squares of singular values, sorted descending."""
    first, last = fit_range
    if not 1 <= first < last:
        raise UsageError(f"fit_range must hold the first and last rank of the fit, 1 ≤ first < last, got {fit_range}.")
    available = int((sigma > 0).sum())
    last_used = min(last, available)
    if last_used - first + 1 < _FEWEST:
        needs = f"at least {_FEWEST} eigenvalues of ranks {first} to {last} for the fit of α"
        found = f"got only {available} above rounding; lower fit_range or take more rows"
        raise NotMeasurableError(f"Expected {needs}, {found}.")
    ranks = torch.arange(first, last_used + 1, dtype=sigma.dtype, device=sigma.device)
    x, weights = ranks.log(), 1 / ranks
    weights = weights / weights.sum()
    y = 2 * sigma[first - 1 : first - 1 + len(ranks)].log()
    x, y = x - (weights * x).sum(), y - (weights * y).sum()
    slope = (weights * x * y).sum() / (weights * x * x).sum()
    residual, variance = (weights * (y - slope * x).square()).sum(), (weights * y.square()).sum()
    exact = residual.sqrt() < max(
        1e-12, rounding_of(eps) if eps > 1e-9 else 0.0
    )  # of a flat spectrum both are rounding
    return Decay(-slope.item(), 1.0 if exact else (1 - residual / variance).item())
