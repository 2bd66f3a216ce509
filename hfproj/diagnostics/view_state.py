"""What views of the same samples say, from a stream or over processes: positive cosine, alignment, LiDAR.

The state is two sums over samples and pairs of views, and for LiDAR the triangular factors of the scatter between and
within samples (:mod:`hfproj.diagnostics.views`), each at most dim × dim. Every read-out equals the function of the same
name on all samples at once, to 1e-10.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from hfproj import distributed
from hfproj.diagnostics._factors import RowFactor
from hfproj.diagnostics._stream import Stream, global_rows, uncentred
from hfproj.diagnostics.views import Scatters, check_exponent, check_view_shape, pair_sums, scatters_of
from hfproj.errors import UsageError
from hfproj.functional.feature_rows import check_shape, describe_bad_rows
from hfproj.typing import Views

_TENSORS = ("origin", "offset", "means", "within")


class ViewState(Stream):
    """Streams views and gives the measures of positive pairs.

    It takes features as trainers hold them, `[views, batch, dim]`, the same number of views each time. A method has the
    options, range and limits of the function of the same name (`lidar` those of `lidar_of_views`). Read-outs need two
    samples. Over processes, and for rows that are not finite, it does what `SpectrumState` does.

    Args:
        alpha: Exponent of the alignment.

    Example:
        >>> z = torch.randn(2, 100, 3, generator=torch.Generator().manual_seed(0))
        >>> state = ViewState()
        >>> for part in z.split(30, dim=1):
        ...     _ = state.update(part)
        >>> abs(state.alignment() - (2 - 2 * state.positive_cosine())) < 1e-12
        True
    """

    def __init__(self, *, alpha: float = 2.0):
        check_exponent(alpha)
        self.alpha = alpha
        self._sums = torch.zeros(3, dtype=torch.float64)  # as `pair_sums` returns them
        self._scatters: Scatters | None = None

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
        check_view_shape(z)
        check_shape(z.flatten(0, 1), minimum=0)
        if not z.shape[1]:
            return self
        for number, view in enumerate(z):
            what = f"features of view {number}"
            if bad := describe_bad_rows(view, what=what, start=self.count, stream=" of the stream"):
                self._refuse(bad)
                return self
        self._add(pair_sums(z, alpha=self.alpha), scatters_of(z.detach().transpose(0, 1)))
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

    def __add__(self, other: "ViewState") -> "ViewState":
        return copy.copy(self).merge(other) if isinstance(other, ViewState) else NotImplemented

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
        within = global_rows(uncentred(own.within) if own else None)
        if means is not None and within is not None:
            sums = [sum(parts) for parts in zip(*(sums for sums, _ in found))]
            new._add(torch.tensor(sums, dtype=torch.float64), Scatters(means, within.factor, max(counts)))
        return new

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as tensors.

        Raises:
            UsageError: If rows were refused.
        """
        self._check_refused()
        parts, own = [torch.empty(0, 0, dtype=torch.float64)] * 4, self._scatters
        if own:
            parts = [own.means.origin, own.means.offset, own.means.factor, own.within]
        return {
            "count": torch.tensor(self.count),
            "views": torch.tensor(own.views if own else 0),
            "sums": torch.tensor([self.alpha, *self._sums.tolist()], dtype=torch.float64),
            **dict(zip(_TENSORS, parts)),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state_dict` returned.

        Raises:
            UsageError: If the entries are others, or the exponent is not that of this state.
        """
        if set(state) != {"count", "views", "sums", *_TENSORS}:
            raise UsageError(f"Expected what ViewState.state_dict returned, got the entries {sorted(state)}.")
        if (alpha := float(state["sums"][0])) != self.alpha:
            raise UsageError(f"The saved state has alpha={alpha}, this one {self.alpha}.")
        count = int(state["count"])
        origin, offset, factor, within = (state[name].clone() for name in _TENSORS)
        self._sums, self._refused = state["sums"][1:].cpu(), ""
        means = RowFactor(count, origin, offset, factor)
        self._scatters = Scatters(means, within, int(state["views"])) if count else None

    def positive_cosine(self) -> float:
        """Return the positive cosine."""
        self._read()
        return (self._sums[1] / self._sums[0]).item()

    def alignment(self) -> float:
        """Return the alignment."""
        self._read()
        return (self._sums[2] / self._sums[0]).item()

    def lidar(self, *, ridge: float = 1e-4) -> float:
        """Return LiDAR."""
        scatters = self._read()
        scatters.warn_of_counts(ridge, stacklevel=3)
        return scatters.lidar(ridge)

    @torch.no_grad()
    def _add(self, sums: Tensor, scatters: Scatters) -> None:
        if (own := self._scatters) is not None:
            mine, theirs = (own.views, own.within.shape[1]), (scatters.views, scatters.within.shape[1])
            if mine != theirs:
                expected = f"{mine[0]} views of {mine[1]} dimensions, as this state holds"
                raise UsageError(f"Expected {expected}, got {theirs[0]} of {theirs[1]}.")
            scatters = own.to(scatters.within.device).merge(scatters)
        self._scatters = scatters
        self._sums = self._sums + sums

    def _read(self) -> Scatters:
        self._check_refused()
        if self._scatters is None or self.count < 2:
            raise UsageError(f"Measures of views need at least 2 samples, this state holds {self.count}.")
        return self._scatters
