"""LiDAR: how many directions tell objects apart beyond what their views differ by.

With n objects of v views, μ_i the mean of object i and μ the mean of all,

    Σ_b = Σ_i (μ_i − μ)(μ_i − μ)ᵀ/(n − 1),    Σ_w = Σ_ij (f_ij − μ_i)(f_ij − μ_i)ᵀ/(n(v − 1)) + δI,
    λ = eigenvalues of Σ_w^{−1/2} Σ_b Σ_w^{−1/2},    p = (λ + ε)/Σ(λ + ε),    LiDAR = exp(−Σ p log p).

Centres: between objects by μ, within an object by μ_i. With δ = 0 it is invariant to invertible linear maps; the ridge
δ gives it a scale: of features much smaller than √δ it sees only how objects differ.

References:
    Thilak et al. 2023, LiDAR: Sensing Linear Probing Performance in Joint Embedding SSL Architectures, arXiv 2312.04000
    (1,000 objects, 50 views). rbalestr-lab/stable-pretraining ``callbacks/lidar.py`` (δ and ε).

Deviations:
    Objects that all have the same mean up to rounding give 0; the formula's ε would give dim there. Both scatters stay
    triangular factors, so that δ may be small or 0.
"""

import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.diagnostics._readouts import exp_entropy
from hfproj.diagnostics._spectrum import RESOLUTION, RowFactor, factor_of, frobenius, reduce_rows
from hfproj.errors import UsageError
from hfproj.functional.feature_rows import check_features, double_rows
from hfproj.typing import Views

SMOOTHING = 1e-8  # ε


@torch.no_grad()
def lidar(f: Float[Tensor, "objects views dim"], *, ridge: float = 1e-4) -> float:
    """Return LiDAR, between 1 and dim; 0 if all objects have the same mean.

    The first axis counts objects: rows that belong together lie next to each other. For what trainers hold,
    `[views, batch, dim]`, there is `lidar_of_views`. A warning says so if there are fewer objects than views, and if
    objects·(views − 1) < dim: Σ_w is then singular without its ridge, which decides the value.

    Args:
        f: Features `[objects, views, dim]`.
        ridge: δ. 1e-4: stable-pretraining.

    Raises:
        UsageError: fewer than two objects or views, rows that are not finite, a negative ridge, or none with a singular
            Σ_w.

    Example:
        >>> objects = torch.randn(200, 1, 6, generator=torch.Generator().manual_seed(0))
        >>> noise = torch.randn(200, 8, 6, generator=torch.Generator().manual_seed(1))
        >>> objects[:, :, 3:] = 0  # three dimensions tell objects apart
        >>> 2.9 < lidar(10 * objects + noise) < 3
        True
    """
    if f.ndim != 3 or f.shape[0] < 2 or f.shape[1] < 2:
        raise UsageError(
            "LiDAR needs at least two objects of at least two views: expected [objects, views, dim], got shape "
            f"{list(f.shape)}."
        )
    check_features(f.flatten(0, 1), what="features (rows numbered object · views + view)")
    objects, views, dim = f.shape
    warn_of_counts(objects, views, dim, ridge, stacklevel=3)
    return scatters_of(f).lidar(ridge)


def lidar_of_views(z: Views, *, ridge: float = 1e-4) -> float:
    """Return LiDAR of features `[views, batch, dim]`, each sample of the batch an object.

    The same as `lidar(z.transpose(0, 1))`, which see.

    Raises:
        UsageError: as `lidar`.

    Example:
        >>> z = torch.randn(4, 50, 3, generator=torch.Generator().manual_seed(0))
        >>> lidar_of_views(z) == lidar(z.transpose(0, 1))
        True
    """
    return lidar(z.transpose(0, 1), ridge=ridge)


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
        """Return LiDAR of at least two objects.

        Raises:
            UsageError: a negative ridge, or none with a singular Σ_w.
        """
        objects, dim = self.means.size, self.within.shape[1]
        _, sigma, vh = torch.linalg.svd(self.within, full_matrices=True)
        sigma = torch.cat([sigma, sigma.new_zeros(dim - len(sigma))])
        sigma = sigma.masked_fill(sigma <= RESOLUTION * frobenius(self.within), 0.0)
        variance = sigma.square() / (objects * (self.views - 1)) + ridge
        if not ridge >= 0 or not (variance > 0).all():
            raise UsageError(
                "LiDAR divides by the scatter within objects, which is singular here; give a positive ridge (got "
                f"{ridge})."
            )
        between = self.means.factor
        if frobenius(between) <= RESOLUTION * self.means.norm():
            return 0.0
        values = torch.linalg.svdvals(between @ vh.T / variance.sqrt())[: min(objects, dim)].square() / (objects - 1)
        values = torch.cat([values, values.new_zeros(dim - len(values))])
        return exp_entropy(values + SMOOTHING)


def scatters_of(f: Float[Tensor, "objects views dim"]) -> Scatters:
    """Return the scatters of features, a block of objects at a time."""
    merged = None
    for block in _object_blocks(f):
        views = block.shape[1]
        # v − 1 orthonormal contrasts have the scatter of the v differences from the mean; equal views give exact zeros.
        contrasts = [
            math.sqrt(k / (k + 1)) * (block[:, k] - block[:, :k].mean(1) if k > 1 else block[:, 1] - block[:, 0])
            for k in range(1, views)
        ]
        part = Scatters(factor_of(block.mean(1)).reduced(), reduce_rows(torch.cat(contrasts)), views)
        merged = part if merged is None else merged.merge(part)
    assert merged is not None
    return merged


def _object_blocks(f: Tensor) -> Iterator[Tensor]:
    _, views, dim = f.shape
    for part in f.split(max(2 * dim, 2**22 // (views * dim))):
        yield double_rows(part.reshape(-1, dim)).reshape(part.shape)


def warn_of_counts(objects: int, views: int, dim: int, ridge: float, *, stacklevel: int) -> None:
    """Warn of fewer objects than views, and of a scatter within objects that is singular without the ridge."""
    if objects < views:
        warnings.warn(
            f"LiDAR sees {objects} objects of {views} views each. If these axes are swapped: lidar takes "
            "[objects, views, dim], lidar_of_views takes [views, batch, dim].",
            stacklevel=stacklevel + 1,
        )
    elif objects * (views - 1) < dim:
        warnings.warn(
            f"LiDAR of {objects} objects of {views} views in {dim} dimensions: objects · (views − 1) < dim, so that "
            f"the ridge {ridge} decides the value. Take more objects or views.",
            stacklevel=stacklevel + 1,
        )
