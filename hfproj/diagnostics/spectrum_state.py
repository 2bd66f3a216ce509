"""Spectra of features that come in blocks, from a stream or over processes.

The state is the number of rows, their mean and the triangular factor R [≤ dim, dim] of the rows about their mean, and
up to `dim` rows that wait for the next factorisation. Every singular value, centred or not, is in it to 1e-16 of the
largest. :mod:`hfproj.diagnostics._factors` has the mathematics and its source.
"""

import copy
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.checking import checked
from hfproj.diagnostics import spectrum as read
from hfproj.diagnostics._factors import EPS, RowFactor, Stream, eps_of, factor_of, global_rows
from hfproj.diagnostics.covariance import correlation, mean_offdiagonal, offdiagonal, offdiagonal_fraction
from hfproj.diagnostics.information import entropy
from hfproj.diagnostics.spectrum import FIT_RANGE, ConditionNumber, Decay
from hfproj.diagnostics.spread import clustering, mean_deviation, wasserstein
from hfproj.errors import UsageError, check_choice
from hfproj.functional.distributions import check_alpha
from hfproj.functional.feature_rows import blocks, check_shape, describe_bad_rows
from hfproj.typing import Features

_TENSORS = ("origin", "offset", "factor")


class SpectrumState(Stream):
    """Streams features and gives the measures that their mean and singular values hold.

    A method equals the function of the same name on all rows at once, to a relative 1e-10 (what tests ask on blocks,
    shuffles and processes), and has its options, unit, range, limits and source, but for `normalize`, which is the
    state's. Read-outs need two rows and decompose a dim × dim matrix, once. Two states merge by
    R = qr([R₁; R₂; √(n₁n₂/(n₁+n₂)) (μ₁ − μ₂)]).R (Demmel, Grigori, Hoemmen, Langou 2012, TSQR).

    On several processes each feeds its own rows, any number of them or none, and `reduce` gives every process the state
    of all. Rows with NaN or infinity are refused: on one process at once, on several at the first read-out or, on every
    process, at `reduce`, so that none waits for another.

    `normalize` scales every row to norm 1 first (rows of zeros stay zero), as the measures of direction need:
    representation_std, wasserstein_uniformity, matrix_entropy, self_cluster.

    Raises:
        UsageError: If a read-out has fewer than two rows or was fed rows that are not finite, needs `normalize` and the
            state has it not, or an option is one that the function of its name refuses.

    Example:
        >>> state = SpectrumState()
        >>> for rows in torch.eye(8).split(3):
        ...     _ = state.update(rows)
        >>> round(state.rankme(), 3), state.numerical_rank(center=True)
        (8.0, 7)
    """

    @checked
    def __init__(self, *, normalize: bool = False):
        self.normalize = normalize
        self._rows: RowFactor | None = None
        self._pending: list[Tensor] = []
        self._eps = EPS  # of the widest rounding among the rows that are pending

    @property
    def count(self) -> int:
        """Number of rows so far."""
        return (self._rows.size if self._rows else 0) + sum(map(len, self._pending))

    @property
    def dim(self) -> int | None:
        """Width of the features; None before the first."""
        if self._pending:
            return self._pending[0].shape[1]
        return self._rows.factor.shape[1] if self._rows else None

    def __repr__(self) -> str:
        return f"SpectrumState(count={self.count}, dim={self.dim}, normalize={self.normalize})"

    @torch.no_grad()
    def update(self, f: Features) -> "SpectrumState":
        """Take in rows, of any number; returns itself.

        Raises:
            UsageError: If the width is another than before, or `f` holds no floating-point numbers, or rows that are
                not finite, which are numbered over the stream. The state is then as before.
        """
        check_shape(f, minimum=0)
        dim = f.shape[1]
        if self.dim not in (None, dim):
            raise UsageError(f"Expected features of {self.dim} dimensions, as this state holds, got {dim}.")
        if bad := describe_bad_rows(f, start=self.count, stream=" of the stream"):
            self._refuse(bad)
            return self
        self._eps = max(self._eps, eps_of(f))
        for block in blocks(f.detach(), normalize=self.normalize, rows=2 * dim):
            if len(block):
                self._pending.append(block)
            if sum(map(len, self._pending)) >= dim:
                self._flush()
        if self._pending and f.dtype == torch.float64:  # the caller may write into its tensor before the next flush
            self._pending[-1] = self._pending[-1].clone()
        return self

    @torch.no_grad()
    def merge(self, other: "SpectrumState") -> "SpectrumState":
        """Take in the rows of another state; returns itself.

        Raises:
            UsageError: If the states differ in width or in `normalize`.
        """
        if other.normalize != self.normalize:
            raise UsageError("One of these states normalises rows and the other does not; they can't be merged.")
        if None not in (self.dim, other.dim) and self.dim != other.dim:
            raise UsageError(f"States of {self.dim} and {other.dim} dimensions can't be merged.")
        mine, theirs = self._flush(), other._flush()
        if theirs is not None:
            self._rows = theirs if mine is None else mine.merge(theirs.to(mine.factor.device))
        self._refused = self._refused or other._refused
        return self

    def __copy__(self) -> "SpectrumState":
        new = SpectrumState(normalize=self.normalize)
        new._rows, new._refused = self._flush(), self._refused
        return new

    def reduce(self) -> "SpectrumState":
        """Return the state of the rows of all processes, on each of them; this one stays what it is.

        Every process calls it, also one without rows.

        Raises:
            UsageError: If one process refused rows, or widths or `normalize` differ; on every process.
        """
        self._agree(normalize=self.normalize)
        new = copy.copy(self)
        new._rows = global_rows(new._rows)
        return new

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as tensors: count, normalize, eps, origin, offset and factor (mean = origin + offset).

        Raises:
            UsageError: If rows were refused.
        """
        self._check_refused()
        rows = self._flush()
        empty = torch.empty(0, 0, dtype=torch.float64)
        tensors = {name: getattr(rows, name) if rows else empty for name in _TENSORS}
        tensors["eps"] = torch.tensor(rows.eps if rows else EPS, dtype=torch.float64)
        return {"count": torch.tensor(self.count), "normalize": torch.tensor(self.normalize), **tensors}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state_dict` returned.

        Raises:
            UsageError: If the entries are others, or `normalize` is not that of this state.
        """
        if set(state) - {"eps"} != {"count", "normalize", *_TENSORS}:  # eps is not in older states
            raise UsageError(f"Expected what SpectrumState.state_dict returned, got the entries {sorted(state)}.")
        if bool(state["normalize"]) != self.normalize:
            raise UsageError(f"The saved state has normalize={bool(state['normalize'])}, this one {self.normalize}.")
        count = int(state["count"])
        eps = float(state.get("eps", EPS))
        origin, offset, factor = (state[name].clone() for name in _TENSORS)
        self._rows = RowFactor(count, origin, offset, factor, eps) if count else None
        self._pending, self._refused = [], ""

    def mean(self) -> Float[Tensor, " dim"]:
        """Return the mean row."""
        return self._read().mean

    def covariance(self) -> Float[Tensor, "dim dim"]:
        """Return the covariance with 1/(rows − 1); dimensions that are constant up to rounding have 0."""
        rows = self._read()
        return rows.scatter() / (rows.size - 1)

    def singular_values(self, *, center: bool = False) -> Float[Tensor, " values"]:
        """Return the min(rows, dim) singular values, sorted descending."""
        return self._read().singular_values(center=center).clone()

    def covariance_spectrum(self, *, center: bool = True) -> Float[Tensor, " dim"]:
        """Return the dim eigenvalues of the covariance with 1/(rows − 1), sorted descending."""
        rows = self._read()
        return read.eigenvalues(rows.singular_values(center=center), rows.size, len(rows.mean))

    def rankme(self, *, eps: float = 1e-7) -> float:
        """Return `rankme`: 1 to min(rows, dim), 0 if all rows are 0."""
        return read.exp_entropy(self._read().entropy_singular_values(center=False), eps)

    def effective_rank(self, *, center: bool = False, on: read.Spectrum = "singular_values") -> float:
        """Return `effective_rank`: 1 to min(rows, dim), 0 if all rows are 0."""
        check_choice("spectrum", on, read.SPECTRA)
        rows = self._read()
        sigma = rows.gram_spectrum if on == "eigenvalues" else rows.entropy_singular_values
        return read.exp_entropy(sigma(center=center))

    def stable_rank(self) -> float:
        """Return `stable_rank`: 1 to the rank, 0 if all rows are 0."""
        return read.sum_over_largest(self._read().gram_spectrum(center=False))

    def nesum(self) -> float:
        """Return `nesum`: 1 to dim, 0 if all rows are equal."""
        return read.sum_over_largest(self._read().gram_spectrum(center=True))

    def participation_ratio(self, *, center: bool = True) -> float:
        """Return `participation_ratio`: 1 to dim, 0 if all rows are equal."""
        return read.participation(self._read().gram_spectrum(center=center))

    def numerical_rank(self, *, tol: float = 1e-8, center: bool = False) -> int:
        """Return `numerical_rank`: 0 to min(rows, dim)."""
        return read.count_above(self._read().resolved(center=center), tol)

    def alpha_req(self, *, fit_range: tuple[int, int] = FIT_RANGE) -> Decay:
        """Return `alpha_req`: the exponent α, from 0, and R², in [0, 1]."""
        rows = self._read()
        return read.fit_power_law(rows.resolved(center=True), fit_range, rows.eps)

    def pseudo_condition_number(self) -> float:
        """Return `pseudo_condition_number`: 0 (rank deficient) to 1 (all singular values equal)."""
        return read.smallest_over_largest(self._read().resolved(center=False))

    def covariance_condition_number(
        self, *, center: bool = True, tol: float = 1e-8, floor: float = 1e-7
    ) -> ConditionNumber:
        """Return `covariance_condition_number`: ratios of eigenvalues, from 1, and the rank of the support."""
        rows = self._read()
        sigma = rows.resolved(center=center)
        return read.condition_number(sigma, rows.size, len(rows.mean), tol=tol, floor=floor)

    def covariance_offdiag_energy(self) -> float:
        """Return `covariance_offdiag_energy`: 0 (uncorrelated) to 1 − 1/dim."""
        return offdiagonal_fraction(self.covariance())

    def correlation_offdiag_energy(self) -> float:
        """Return `correlation_offdiag_energy`: 0 (uncorrelated) to 1 − 1/dim."""
        return offdiagonal_fraction(correlation(self.covariance()))

    def whiteness(self) -> float:
        """Return `whiteness`: 0 (uncorrelated) to 1 (all dimensions the same)."""
        return mean_offdiagonal(correlation(self.covariance()))

    def vicreg_covariance(self) -> float:
        """Return `vicreg_covariance`: from 0, in the fourth power of the features' unit."""
        covariance = self.covariance()
        return offdiagonal(covariance).item() / len(covariance)

    def representation_std(self) -> float:
        """Return `representation_std`: 0 (collapsed) to about 1/√dim; needs `normalize`."""
        rows = self._unit("representation_std")
        return mean_deviation(rows.factor.square().sum(0), rows.mean, rows.size, rows.eps)

    def wasserstein_uniformity(self) -> float:
        """Return `wasserstein_uniformity`: 0 (uniform) to √2 (a point); needs `normalize`."""
        return wasserstein(self._unit("wasserstein_uniformity"))

    def matrix_entropy(self, *, alpha: float = 2.0) -> float:
        """Return `matrix_entropy` in nats: 0 to log(min(rows, dim)); needs `normalize`."""
        check_alpha(alpha)
        return entropy(self._unit("matrix_entropy"), alpha)

    def self_cluster(self) -> float:
        """Return `self_cluster`: about 0 (spread at random) to 1 (all rows parallel); needs `normalize`."""
        return clustering(self._unit("self_cluster"))

    @torch.no_grad()
    def _flush(self) -> RowFactor | None:
        if self._pending:
            block = torch.cat(self._pending) if len(self._pending) > 1 else self._pending[0]
            part = factor_of(block, self._eps)
            # A state that was loaded goes to where the features are.
            rows = self._rows.to(part.factor.device).merge(part) if self._rows else part.reduced()
            self._rows, self._pending, self._eps = rows, [], EPS
        return self._rows

    def _read(self) -> RowFactor:
        self._check_refused()
        rows = self._flush()
        if rows is None or rows.size < 2:
            raise UsageError(f"A spectrum needs at least 2 rows, this state holds {self.count}.")
        return rows

    def _unit(self, name: str) -> RowFactor:
        if not self.normalize:
            raise UsageError(f"{name} is of unit rows; make the state with SpectrumState(normalize=True).")
        return self._read()
