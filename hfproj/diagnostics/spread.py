"""Whether features spread out, and whether views of one input stay together.

    representation std   mean over dimensions of the std of the unit rows; 1/√dim when they spread evenly, 0 at collapse
    positive cosine      mean over samples and pairs of views a < b of cos(z_a, z_b)
    alignment            mean over samples and pairs of views a < b of ‖ẑ_a − ẑ_b‖^α

References:
    Representation std: Chaudhry 2026, arXiv 2605.17180, and SimSiam (Chen & He 2021, arXiv 2011.10566, Fig. 2).
    Alignment: Wang & Isola 2020, arXiv 2005.10242, Eq. 1. At α = 2 it is 2 − 2 · positive cosine.

Deviations:
    The std has 1/(rows − 1), as `torch.std`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hfproj.diagnostics._spectrum import RESOLUTION, centre_of, minus
from hfproj.errors import UsageError
from hfproj.functional.feature_rows import blocks, check_features, double_rows
from hfproj.typing import Features, Views


@torch.no_grad()
def representation_std(f: Features) -> float:
    """Return the mean over dimensions of the standard deviation of the L2-normalised rows.

    Between 0 and √(rows/((rows − 1)·dim)): 1/√dim for many rows that spread evenly, 0 if all point the same way.
    Centres (a standard deviation does), after the rows are normalised. Float64, no gradient.

    Raises:
        UsageError: fewer than two rows, or rows that are not finite.

    Example:
        >>> representation_std(torch.ones(4, 3))  # collapsed to one point
        0.0
    """
    check_features(f)
    origin, offset = centre_of(f, normalize=True)
    deviations = (minus(block, (origin, offset)) for block in blocks(f, normalize=True))
    squares = torch.stack([deviation.square().sum(0) for deviation in deviations]).sum(0)
    return mean_deviation(squares, origin + offset, len(f))


def mean_deviation(squares: Tensor, mean: Tensor, count: int) -> float:
    """Return the mean of √(squares/(count − 1)), columns whose squared deviations `squares` are rounding being 0."""
    constant = squares <= RESOLUTION**2 * (squares + count * mean.square())
    return (squares.masked_fill(constant, 0.0) / (count - 1)).sqrt().mean().item()


@torch.no_grad()
def positive_cosine(z: Views) -> float:
    """Return the mean cosine of two views of the same sample, over samples and pairs of views; in [−1, 1].

    Does not centre. Float64, no gradient. High values say little alone: at collapse it is 1. A row of zeros has a
    cosine of 0 with every other.

    Raises:
        UsageError: fewer than two views or two samples, or rows that are not finite.

    Example:
        >>> z = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [1.0, 0.0]]])
        >>> positive_cosine(z)  # cosines 1 and 0
        0.5
    """
    check_views(z)
    return pair_sums(z, alpha=2.0).mean_cosine


@torch.no_grad()
def alignment(z: Views, *, alpha: float = 2.0) -> float:
    """Return the mean of ‖ẑ_a − ẑ_b‖^α over samples and pairs of views; in [0, 2^α], 0 if views of a sample agree.

    Does not centre; rows are normalised, a row of zeros stays zero. Float64, no gradient. Low is aligned; at collapse
    it is 0, so read it with `uniformity` or a rank.

    Args:
        z: Features `[views, batch, dim]`.
        alpha: α, positive. 2: Wang & Isola.

    Raises:
        UsageError: fewer than two views or two samples, rows that are not finite, or alpha not positive.

    Example:
        >>> z = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [1.0, 0.0]]])
        >>> round(alignment(z), 6)  # squared distances 0 and 2
        1.0
    """
    check_exponent(alpha)
    check_views(z)
    return pair_sums(z, alpha=alpha).mean_distance


class PairSums(NamedTuple):
    """Sums over samples and pairs of views.

    Attributes:
        pairs: Number of pairs, times samples.
        cosine: Sum of their cosines.
        distance: Sum of their distances to the power α.
    """

    pairs: int
    cosine: float
    distance: float

    def __add__(self, other: "PairSums") -> "PairSums":  # type: ignore[override]
        return PairSums(self.pairs + other.pairs, self.cosine + other.cosine, self.distance + other.distance)

    @property
    def mean_cosine(self) -> float:
        """The mean cosine."""
        return self.cosine / self.pairs

    @property
    def mean_distance(self) -> float:
        """The mean distance to the power α."""
        return self.distance / self.pairs


def pair_sums(z: Views, *, alpha: float) -> PairSums:
    """Return the sums over samples and pairs of views, a block of samples at a time."""
    views, batch, dim = z.shape
    cosine = distance = 0.0
    for part in z.split(max(1, 2**21 // (views * dim)), dim=1):
        unit = torch.stack([double_rows(view, normalize=True) for view in part])
        for a in range(views):
            for b in range(a):
                cosine += float((unit[a] * unit[b]).sum())
                distance += float(torch.linalg.vector_norm(unit[a] - unit[b], dim=1).pow(alpha).sum())
    return PairSums(batch * views * (views - 1) // 2, cosine, distance)


def check_exponent(alpha: float) -> None:
    """Refuse an exponent that is not positive and finite.

    Raises:
        UsageError: so it is.
    """
    if not 0 < alpha < math.inf:
        raise UsageError(f"alpha, the exponent of the distance, must be a positive number, got {alpha}.")


def check_view_shape(z: Tensor) -> None:
    """Refuse what is no `[views, batch, dim]` of at least two views.

    Raises:
        UsageError: so it is.
    """
    if z.ndim != 3 or z.shape[0] < 2:
        raise UsageError(f"A positive pair needs two views, got shape {list(z.shape)}: expected [views, batch, dim].")


def check_views(z: Tensor) -> None:
    """Refuse what is no `[views, batch, dim]` of at least two views and two samples with finite rows.

    Raises:
        UsageError: so it is.
    """
    check_view_shape(z)
    for number, view in enumerate(z):
        check_features(view, what=f"features of view {number}")
