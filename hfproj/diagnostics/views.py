"""Whether views of one input stay together, and how many directions tell inputs apart beyond that.

For LiDAR, with n objects of v views, μ_i the mean of object i and μ the mean of all,

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
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj import distributed
from hfproj.checking import checked
from hfproj.diagnostics._factors import (
    EPS,
    RESOLUTION,
    RowFactor,
    Stream,
    eps_of,
    factor_of,
    frobenius,
    global_rows,
    noise,
    reduce_rows,
)
from hfproj.diagnostics.spectrum import exp_entropy
from hfproj.errors import NotMeasurableError, UsageError, check_type
from hfproj.functional.feature_rows import check_features, check_shape, describe_bad_rows, double_rows
from hfproj.typing import Views

_SMOOTHING = 1e-8  # ε
_TENSORS = ("origin", "offset", "means", "within")


@torch.no_grad()
@checked
def positive_cosine(z: Views) -> float:
    """Return the mean cosine of two views of the same sample, over samples and pairs of views; in [−1, 1].

    Takes `[views, batch, dim]`; does not centre. At collapse it is 1. Rows of zeros have a cosine of 0 with all.

    Raises:
        UsageError: If there are fewer than two views or two samples, or rows that are not finite.

    Example:
        >>> z = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [1.0, 0.0]]])
        >>> positive_cosine(z)  # cosines 1 and 0
        0.5
    """
    check_views(z)
    pairs, cosine, _ = _pair_sums(z, alpha=2.0).tolist()
    return cosine / pairs


@torch.no_grad()
@checked
def alignment(z: Views, *, alpha: float = 2.0) -> float:
    """Return the mean of ‖ẑ_a − ẑ_b‖^α over samples and pairs of views; in [0, 2^α], 0 if views of a sample agree.

    `z` is `[views, batch, dim]`; does not centre; rows are normalised, a row of zeros stays zero. `alpha`, α > 0, is 2
    in Wang & Isola. Low is aligned; at collapse it is 0, so read it with `uniformity` or a rank.

    Raises:
        UsageError: If there are fewer than two views or samples, or non-finite rows, or alpha is not positive.

    Example:
        >>> z = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [1.0, 0.0]]])
        >>> round(alignment(z), 6)  # squared distances 0 and 2
        1.0
    """
    _check_exponent(alpha)
    check_views(z)
    pairs, _, distance = _pair_sums(z, alpha=alpha).tolist()
    return distance / pairs


@torch.no_grad()
@checked
def lidar(f: Float[Tensor, "objects views dim"], *, ridge: float = 1e-4) -> float:
    """Return LiDAR, between 1 and dim; 0 if all objects have the same mean.

    It warns of fewer objects than views, and of objects·(views − 1) < dim: the ridge then decides the value.

    Args:
        f: Features `[objects, views, dim]`: rows that belong together lie next to each other. For what trainers hold,
            `[views, batch, dim]`, there is `lidar_of_views`.
        ridge: δ, at least 0; 1e-4 in stable-pretraining.

    Raises:
        UsageError: If there are fewer than two objects or views, rows that are not finite, a negative ridge, or no
            ridge with a singular Σ_w.

    Example:
        >>> round(lidar(torch.eye(4)[:, None].expand(4, 4, 4)), 3)  # four points span three dimensions
        3.0
    """
    check_type("features", f, Tensor, "stack them: torch.stack(…)")
    if f.ndim != 3 or f.shape[0] < 2 or f.shape[1] < 2:
        needs = "at least two objects of at least two views, [objects, views, dim]"
        error = NotMeasurableError if f.ndim == 3 else UsageError
        raise error(f"Expected {needs}, got shape {list(f.shape)}.")
    check_features(f.flatten(0, 1), what="features (rows numbered object · views + view)")
    found = _scatters_of(f)
    found.warn_of_counts(ridge, stacklevel=4)
    return found.lidar(ridge)


@checked
def lidar_of_views(z: Views, *, ridge: float = 1e-4) -> float:
    """Return LiDAR of features `[views, batch, dim]`, each sample of the batch an object: `lidar(z.transpose(0, 1))`.

    Range, warnings and `ridge` (δ, at least 0) are those of `lidar`.

    Raises:
        UsageError: If `lidar` raises it.

    Example:
        >>> round(lidar_of_views(torch.eye(4).expand(4, 4, 4)), 3)
        3.0
    """
    return lidar(z.transpose(0, 1), ridge=ridge)


def _check_exponent(alpha: float) -> None:
    if not 0 < alpha < math.inf:
        raise UsageError(f"Expected alpha, the exponent of the distance, to be a positive number, got {alpha}.")


def _check_view_shape(z: Tensor) -> None:
    check_type("views", z, Tensor, "stack them: torch.stack([z_a, z_b])")
    if z.ndim != 3 or z.shape[0] < 2:
        error = NotMeasurableError if z.ndim == 3 and z.shape[0] else UsageError
        raise error(f"Expected at least two views [views, batch, dim] for positive pairs, got shape {list(z.shape)}.")


def check_views(z: Tensor) -> None:
    """Refuse anything but `[views, batch, dim]` of at least two views and two samples with finite rows."""
    _check_view_shape(z)
    for number, view in enumerate(z):
        check_features(view, what=f"features of view {number}")


def _pair_sums(z: Tensor, *, alpha: float) -> Float[Tensor, "3"]:
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


class _Scatters(NamedTuple):
    """Scatter between and within objects."""

    means: RowFactor  # the objects' means
    within: Tensor  # triangular factor `[≤ dim, dim]` of all differences from the object's mean
    views: int  # per object

    def to(self, device: torch.device) -> "_Scatters":
        return _Scatters(self.means.to(device), self.within.to(device), self.views)

    def merge(self, other: "_Scatters") -> "_Scatters":
        within = reduce_rows(torch.cat([self.within, other.within]))
        return _Scatters(self.means.merge(other.means), within, self.views)

    def lidar(self, ridge: float) -> float:
        objects, dim = self.means.size, self.within.shape[1]
        _, sigma, vh = torch.linalg.svd(self.within, full_matrices=True)
        sigma = torch.cat([sigma, sigma.new_zeros(dim - len(sigma))])
        # Differences within objects have the rounding of the features themselves.
        rounding = noise(self.means.eps, objects * (self.views - 1), dim) * self.means.norm() * math.sqrt(self.views)
        sigma = sigma.masked_fill(sigma <= max(RESOLUTION * frobenius(self.within), rounding), 0.0)
        variance = sigma.square() / (objects * (self.views - 1)) + ridge
        if not ridge >= 0 or not (variance > 0).all():
            wanted = "a positive ridge, since the scatter within objects is singular here"
            raise UsageError(f"Expected {wanted}, got {ridge}.")
        between = self.means.factor
        if self.means.constant or frobenius(between) <= RESOLUTION * self.means.norm():
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


def _uncentred(factor: Tensor) -> RowFactor:
    zero = factor.new_zeros(factor.shape[1])
    return RowFactor(len(factor), zero, zero, factor)


def _scatters_of(f: Tensor) -> _Scatters:
    """Return the scatters of features `[objects, views, dim]`, a block of objects at a time."""
    _, views, dim = f.shape
    return functools.reduce(_Scatters.merge, map(_block_scatters, f.split(max(2 * dim, 2**22 // (views * dim)))))


def _block_scatters(part: Tensor) -> _Scatters:
    block = double_rows(part.flatten(0, 1)).view(part.shape)
    # v − 1 orthonormal contrasts have the scatter of the v differences from the mean; equal views give exact zeros.
    contrasts = [
        math.sqrt(k / (k + 1)) * (block[:, k] - block[:, :k].mean(1) if k > 1 else block[:, 1] - block[:, 0])
        for k in range(1, block.shape[1])
    ]
    means = factor_of(block.mean(1), eps_of(part)).reduced()
    return _Scatters(means, reduce_rows(torch.cat(contrasts)), block.shape[1])


class ViewState(Stream):
    """Streams views and gives the measures of positive pairs, in memory of at most dim × dim.

    It takes features as trainers hold them, `[views, batch, dim]`, the same number of views each time. A method equals
    the function of the same name (`lidar`: `lidar_of_views`) on all samples at once, to 1e-10, and has its options,
    unit, range and limits. Read-outs need two samples. Processes and non-finite rows: as `SpectrumState`.

    `alpha` is the exponent of the alignment.

    Example:
        >>> z = torch.randn(2, 100, 3, generator=torch.Generator().manual_seed(0))
        >>> state = ViewState()
        >>> for part in z.split(30, dim=1):
        ...     _ = state.update(part)
        >>> abs(state.alignment() - (2 - 2 * state.positive_cosine())) < 1e-12
        True
    """

    @checked
    def __init__(self, *, alpha: float = 2.0):
        _check_exponent(alpha)
        self.alpha = alpha
        self._sums = torch.zeros(3, dtype=torch.float64)  # as `_pair_sums` returns them
        self._scatters: _Scatters | None = None

    @property
    def count(self) -> int:
        """Number of samples so far."""
        return self._scatters.means.size if self._scatters else 0

    def __repr__(self) -> str:
        return f"ViewState(count={self.count}, alpha={self.alpha})"

    @torch.no_grad()
    def update(self, z: Views) -> "ViewState":
        """Take in samples, of any number; returns itself.

        Raises:
            UsageError: If the number of views or the width is another than before, or `z` holds no floating-point
                numbers, or rows that are not finite, which are numbered over the stream. The state is then as before.
        """
        _check_view_shape(z)
        check_shape(z.flatten(0, 1), minimum=0)
        if not z.shape[1]:
            return self
        for number, view in enumerate(z):
            what = f"features of view {number}"
            if bad := describe_bad_rows(view, what=what, start=self.count, stream=" of the stream"):
                self._refuse(bad)
                return self
        self._add(_pair_sums(z, alpha=self.alpha), _scatters_of(z.detach().transpose(0, 1)))
        return self

    def merge(self, other: "ViewState") -> "ViewState":
        """Take in the samples of another state; returns itself.

        Raises:
            UsageError: If the states differ in number of views, width or exponent.
        """
        if other.alpha != self.alpha:
            raise UsageError(f"States with alpha {self.alpha} and {other.alpha} can't be merged.")
        if other._scatters is not None:
            self._add(other._sums, other._scatters)
        self._refused = self._refused or other._refused
        return self

    def reduce(self) -> "ViewState":
        """Return the state of the samples of all processes, on each of them; this one stays what it is.

        Every process calls it, also one without samples.

        Raises:
            UsageError: If one process refused rows, or widths, numbers of views or exponents differ; on every process.
        """
        self._agree(alpha=self.alpha)
        own = self._scatters
        found = distributed.gather_objects((self._sums.tolist(), own.views if own else 0))
        counts = [views for _, views in found]
        if len(set(counts) - {0}) > 1:
            raise UsageError(f"Processes hold different numbers of views: {counts}.")
        new = ViewState(alpha=self.alpha)
        means = global_rows(own.means if own else None)
        within = global_rows(_uncentred(own.within) if own else None)
        if means is not None and within is not None:
            sums = [sum(parts) for parts in zip(*(sums for sums, _ in found))]
            new._add(torch.tensor(sums, dtype=torch.float64), _Scatters(means, within.factor, max(counts)))
        return new

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as tensors.

        Raises:
            UsageError: If rows were refused.
        """
        self._check_refused()
        parts, own = [torch.empty(0, 0, dtype=torch.float64)] * 4, self._scatters
        eps = own.means.eps if own else EPS
        if own:
            parts = [own.means.origin, own.means.offset, own.means.factor, own.within]
        return {
            "count": torch.tensor(self.count),
            "views": torch.tensor(own.views if own else 0),
            "sums": torch.tensor([self.alpha, *self._sums.tolist()], dtype=torch.float64),
            "eps": torch.tensor(eps, dtype=torch.float64),
            **dict(zip(_TENSORS, parts)),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state_dict` returned.

        Raises:
            UsageError: If the entries are others, or the exponent is not that of this state.
        """
        if set(state) - {"eps"} != {"count", "views", "sums", *_TENSORS}:  # eps is not in older states
            raise UsageError(f"Expected what ViewState.state_dict returned, got the entries {sorted(state)}.")
        if (alpha := float(state["sums"][0])) != self.alpha:
            raise UsageError(f"The saved state has alpha={alpha}, this one {self.alpha}.")
        count = int(state["count"])
        origin, offset, factor, within = (state[name].clone() for name in _TENSORS)
        self._sums, self._refused = state["sums"][1:].cpu(), ""
        means = RowFactor(count, origin, offset, factor, float(state.get("eps", EPS)))
        self._scatters = _Scatters(means, within, int(state["views"])) if count else None

    def positive_cosine(self) -> float:
        """Return `positive_cosine`, in [−1, 1]."""
        self._read()
        return (self._sums[1] / self._sums[0]).item()

    def alignment(self) -> float:
        """Return `alignment`, in [0, 2^α]."""
        self._read()
        return (self._sums[2] / self._sums[0]).item()

    def lidar(self, *, ridge: float = 1e-4) -> float:
        """Return `lidar`: 1 to dim, 0 if all samples have the same mean."""
        scatters = self._read()
        scatters.warn_of_counts(ridge, stacklevel=3)
        return scatters.lidar(ridge)

    @torch.no_grad()
    def _add(self, sums: Tensor, scatters: _Scatters) -> None:
        if (own := self._scatters) is not None:
            mine, theirs = (own.views, own.within.shape[1]), (scatters.views, scatters.within.shape[1])
            if mine != theirs:
                expected = f"{mine[0]} views of {mine[1]} dimensions, as this state holds"
                raise UsageError(f"Expected {expected}, got {theirs[0]} of {theirs[1]}.")
            scatters = own.to(scatters.within.device).merge(scatters)
        self._scatters = scatters
        self._sums = self._sums + sums

    def _read(self) -> _Scatters:
        self._check_refused()
        if self._scatters is None or self.count < 2:
            raise UsageError(f"Measures of views need at least 2 samples, this state holds {self.count}.")
        return self._scatters
