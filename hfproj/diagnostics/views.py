"""Whether views of one input stay together, and how many directions tell inputs apart beyond that.

    positive cosine   mean over samples and pairs of views a < b of cos(z_a, z_b)
    alignment         mean over samples and pairs of views a < b of ‖ẑ_a − ẑ_b‖^α,   ẑ unit rows

LiDAR: with n objects of v views, μ_i the mean of object i and μ the mean of all,

    Σ_b = Σ_i (μ_i − μ)(μ_i − μ)ᵀ/(n − 1),    Σ_w = Σ_ij (f_ij − μ_i)(f_ij − μ_i)ᵀ/(n(v − 1)) + δI,
    λ = eigenvalues of Σ_w^{−1/2} Σ_b Σ_w^{−1/2},    p = (λ + ε)/Σ(λ + ε),    LiDAR = exp(−Σ p log p).

It centres: between objects by μ, within an object by μ_i. With δ = 0 it is invariant to invertible linear maps; the
ridge δ gives it a scale: of features much smaller than √δ it sees only how objects differ.

References:
    Wang & Isola 2020, arXiv 2005.10242, Eq. 1 (alignment; at α = 2 it is 2 − 2 · positive cosine).
    Thilak et al. 2023, LiDAR: Sensing Linear Probing Performance in Joint Embedding SSL Architectures, arXiv 2312.04000
    (1,000 objects, 50 views). rbalestr-lab/stable-pretraining ``callbacks/lidar.py`` (δ and ε).

Deviations:
    Objects that all have the same mean up to rounding give a LiDAR of 0; the formula's ε would give dim there. Both
    scatters stay triangular factors, so that δ may be small or 0.
"""

import functools
import math
import warnings
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.diagnostics._factors import RESOLUTION, RowFactor, factor_of, frobenius, reduce_rows
from hfproj.diagnostics.spectrum import exp_entropy
from hfproj.errors import UsageError
from hfproj.functional.feature_rows import check_features, double_rows
from hfproj.typing import Views

_SMOOTHING = 1e-8  # ε


@torch.no_grad()
def positive_cosine(z: Views) -> float:
    """Return the mean cosine of two views of the same sample, over samples and pairs of views; in [−1, 1].

    Takes `[views, batch, dim]`; does not centre. High values say little alone: at collapse it is 1. A row of zeros has
    a cosine of 0 with every other.

    Raises:
        UsageError: If there are fewer than two views or two samples, or rows that are not finite.

    Example:
        >>> z = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [1.0, 0.0]]])
        >>> positive_cosine(z)  # cosines 1 and 0
        0.5
    """
    check_views(z)
    pairs, cosine, _ = pair_sums(z, alpha=2.0).tolist()
    return cosine / pairs


@torch.no_grad()
def alignment(z: Views, *, alpha: float = 2.0) -> float:
    """Return the mean of ‖ẑ_a − ẑ_b‖^α over samples and pairs of views; in [0, 2^α], 0 if views of a sample agree.

    Takes `[views, batch, dim]`; does not centre; rows are normalised, a row of zeros stays zero. α is 2 in Wang &
    Isola. Low is aligned; at collapse it is 0, so read it with `uniformity` or a rank.

    Raises:
        UsageError: If there are fewer than two views or two samples, rows that are not finite, or alpha is not
            positive.

    Example:
        >>> z = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [1.0, 0.0]]])
        >>> round(alignment(z), 6)  # squared distances 0 and 2
        1.0
    """
    check_exponent(alpha)
    check_views(z)
    pairs, _, distance = pair_sums(z, alpha=alpha).tolist()
    return distance / pairs


@torch.no_grad()
def lidar(f: Float[Tensor, "objects views dim"], *, ridge: float = 1e-4) -> float:
    """Return LiDAR, between 1 and dim; 0 if all objects have the same mean.

    The first axis counts objects: rows that belong together lie next to each other. For what trainers hold,
    `[views, batch, dim]`, there is `lidar_of_views`. `ridge` is δ, 1e-4 in stable-pretraining. A warning is given for
    fewer objects than views, and for objects·(views − 1) < dim: Σ_w is then singular without its ridge, which decides
    the value.

    Raises:
        UsageError: If there are fewer than two objects or views, or rows that are not finite, or the ridge is negative,
            or 0 with a singular Σ_w.

    Example:
        >>> objects = torch.randn(200, 1, 6, generator=torch.Generator().manual_seed(0))
        >>> noise = torch.randn(200, 8, 6, generator=torch.Generator().manual_seed(1))
        >>> objects[:, :, 3:] = 0  # three dimensions tell objects apart
        >>> 2.9 < lidar(10 * objects + noise) < 3
        True
    """
    if f.ndim != 3 or f.shape[0] < 2 or f.shape[1] < 2:
        needs = "at least two objects of at least two views, [objects, views, dim]"
        raise UsageError(f"Expected {needs}, got shape {list(f.shape)}.")
    check_features(f.flatten(0, 1), what="features (rows numbered object · views + view)")
    found = scatters_of(f)
    found.warn_of_counts(ridge, stacklevel=4)
    return found.lidar(ridge)


def lidar_of_views(z: Views, *, ridge: float = 1e-4) -> float:
    """Return LiDAR of features `[views, batch, dim]`, each sample of the batch an object: `lidar(z.transpose(0, 1))`.

    Range, ridge, warnings and errors are those of `lidar`.

    Example:
        >>> z = torch.randn(4, 50, 3, generator=torch.Generator().manual_seed(0))
        >>> lidar_of_views(z) == lidar(z.transpose(0, 1))
        True
    """
    return lidar(z.transpose(0, 1), ridge=ridge)


def check_exponent(alpha: float) -> None:
    """Refuse an exponent that is not positive and finite."""
    if not 0 < alpha < math.inf:
        raise UsageError(f"alpha, the exponent of the distance, must be a positive number, got {alpha}.")


def check_view_shape(z: Tensor) -> None:
    """Refuse anything but `[views, batch, dim]` of at least two views."""
    if z.ndim != 3 or z.shape[0] < 2:
        raise UsageError(f"A positive pair needs two views: expected [views, batch, dim], got shape {list(z.shape)}.")


def check_views(z: Tensor) -> None:
    """Refuse anything but `[views, batch, dim]` of at least two views and two samples with finite rows."""
    check_view_shape(z)
    for number, view in enumerate(z):
        check_features(view, what=f"features of view {number}")


def pair_sums(z: Tensor, *, alpha: float) -> Float[Tensor, "3"]:
    """Return over samples and pairs of views their number and the sums of cosines and of distances to the power α."""
    views, batch, dim = z.shape
    cosine = distance = 0.0
    for part in z.split(max(1, 2**21 // (views * dim)), dim=1):
        unit = torch.stack([double_rows(view, normalize=True) for view in part])
        for a in range(views):
            for b in range(a):
                cosine += float((unit[a] * unit[b]).sum())
                distance += float(torch.linalg.vector_norm(unit[a] - unit[b], dim=1).pow(alpha).sum())
    return torch.tensor([batch * views * (views - 1) // 2, cosine, distance], dtype=torch.float64)


class Scatters(NamedTuple):
    """Scatter between and within objects.

    Attributes:
        means: Of the objects' means.
        within: Triangular factor `[≤ dim, dim]` of all differences from the object's mean.
        views: Views per object.
    """

    means: RowFactor
    within: Tensor
    views: int

    def to(self, device: torch.device) -> "Scatters":
        """Return the same on a device."""
        return Scatters(self.means.to(device), self.within.to(device), self.views)

    def merge(self, other: "Scatters") -> "Scatters":
        """Return those of the objects of both."""
        within = reduce_rows(torch.cat([self.within, other.within]))
        return Scatters(self.means.merge(other.means), within, self.views)

    def lidar(self, ridge: float) -> float:
        """Return LiDAR of at least two objects."""
        objects, dim = self.means.size, self.within.shape[1]
        _, sigma, vh = torch.linalg.svd(self.within, full_matrices=True)
        sigma = torch.cat([sigma, sigma.new_zeros(dim - len(sigma))])
        sigma = sigma.masked_fill(sigma <= RESOLUTION * frobenius(self.within), 0.0)
        variance = sigma.square() / (objects * (self.views - 1)) + ridge
        if not ridge >= 0 or not (variance > 0).all():
            raise UsageError(f"The scatter within objects is singular here: expected a positive ridge, got {ridge}.")
        between = self.means.factor
        if frobenius(between) <= RESOLUTION * self.means.norm():
            return 0.0
        values = torch.linalg.svdvals(between @ vh.T / variance.sqrt())[: min(objects, dim)].square() / (objects - 1)
        values = torch.cat([values, values.new_zeros(dim - len(values))])
        return exp_entropy(values + _SMOOTHING)

    def warn_of_counts(self, ridge: float, *, stacklevel: int) -> None:
        """Warn of fewer objects than views, and of a scatter within objects that is singular without the ridge."""
        objects, views, dim = self.means.size, self.views, self.within.shape[1]
        seen = f"LiDAR sees {objects} objects of {views} views in {dim} dimensions"
        swapped = "If these axes are swapped: lidar takes [objects, views, dim], lidar_of_views [views, batch, dim]."
        if objects < views:
            warnings.warn(f"{seen}. {swapped}", stacklevel=stacklevel)
        elif objects * (views - 1) < dim:
            hint = f"objects · (views − 1) < dim, so the ridge {ridge} decides the value. Take more objects or views."
            warnings.warn(f"{seen}: {hint}", stacklevel=stacklevel)


def scatters_of(f: Tensor) -> Scatters:
    """Return the scatters of features `[objects, views, dim]`, a block of objects at a time."""
    _, views, dim = f.shape
    return functools.reduce(Scatters.merge, map(_scatters_of, f.split(max(2 * dim, 2**22 // (views * dim)))))


def _scatters_of(part: Tensor) -> Scatters:
    block = double_rows(part.flatten(0, 1)).view(part.shape)
    # v − 1 orthonormal contrasts have the scatter of the v differences from the mean; equal views give exact zeros.
    contrasts = [
        math.sqrt(k / (k + 1)) * (block[:, k] - block[:, :k].mean(1) if k > 1 else block[:, 1] - block[:, 0])
        for k in range(1, block.shape[1])
    ]
    return Scatters(factor_of(block.mean(1)).reduced(), reduce_rows(torch.cat(contrasts)), block.shape[1])
