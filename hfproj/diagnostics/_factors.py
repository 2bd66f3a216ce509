"""Singular values of features from triangular factors (exact), or from a Gram matrix where that is exact enough.

A Gram matrix squares the singular values: it costs a third of a QR factorisation, but rounding hides every σ below
about 2e-8 of the largest. Triangular factors lose nothing beyond 1e-16 of the largest σ, and two of them merge,

    R = qr([R₁; R₂; √(n₁n₂/(n₁+n₂)) (μ₁ − μ₂)])      centred,        qr([R; √n μ])      uncentred,

so that features can come in blocks, from a stream or from several processes (Demmel, Grigori, Hoemmen, Langou 2012,
Communication-optimal parallel and sequential QR and LU factorizations: TSQR). Functions of features validate them.

What is rounding and no feature: after a mean is subtracted, features that are constant are not 0 but about 1e-16 of
what they were. Singular values up to `RESOLUTION` times the Frobenius norm of the features before centring count as 0,
and so do columns whose spread is up to `RESOLUTION` times their norm.

Features carry the rounding of the dtype that they were given in, ε apart from 1, whatever they are decomposed in. Where
they have no direction (a final LayerNorm takes one away) it is all that is found. A cast to half precision leaves
independent errors of 0.3 ε rms(f) at most, with singular values up to 0.3 ε‖f‖_F (1/√rows + 1/√dim). A network that
computes in float32 leaves more, and the same in all columns: of a LayerNorm c·ε‖f‖_F, where c is the mean of its input
over the standard deviation, 0.01 to 0.1 in networks that were tried, but over 1 where it is far from zero; their
smallest features were at 48 ε‖f‖_F and above. So 16 ε‖f‖_F of float32, as of float64, and 4 ε‖f‖_F (1/√rows + 1/√dim)
of narrower numbers count as rounding where a measure divides by small singular values or counts them
(`RowFactor.resolved`). Measures that weigh directions by their size see nothing of it, but if the features are nothing
else: rows whose differences from their mean are up to 16 (4) ε of them are equal, and columns likewise (half as many).
"""

import copy
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from hfproj import distributed
from hfproj.errors import UsageError
from hfproj.functional.feature_rows import blocks, check_features

EPS = torch.finfo(torch.float64).eps
RESOLUTION = 16 * EPS
_PANEL = 192  # columns of a Gram matrix computed at once: its lower triangle is a copy


@dataclass(frozen=True, eq=False)
class RowFactor:
    """Rows `[size, dim]`, as far as their mean and their scatter go.

    R = `factor` `[≤ dim, dim]` has more rows until `reduced`; RᵀR is the scatter of the rows about their mean.
    """

    size: int
    origin: Tensor  # a row near them `[dim]`: differences from it lose no digits to a common offset
    offset: Tensor  # their mean minus `origin` `[dim]`
    factor: Tensor
    eps: float = EPS  # of the numbers that the rows were given in
    _sigma: dict[bool, Tensor] = field(default_factory=dict, init=False, repr=False)  # by whether they are centred
    _entropy_sigma: dict[bool, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def mean(self) -> Tensor:
        return self.origin + self.offset

    def reduced(self) -> "RowFactor":
        return replace(self, factor=reduce_rows(self.factor))

    def to(self, device: torch.device) -> "RowFactor":
        return RowFactor(self.size, self.origin.to(device), self.offset.to(device), self.factor.to(device), self.eps)

    def merge(self, other: "RowFactor") -> "RowFactor":
        count = self.size + other.size
        between = (self.origin - other.origin) + (self.offset - other.offset)
        shift = math.sqrt(self.size * other.size / count) * between
        rows = torch.cat([self.factor, other.factor, shift[None]])
        offset, eps = self.offset - other.size / count * between, max(self.eps, other.eps)
        return RowFactor(count, self.origin, offset, reduce_rows(rows), eps)

    def norm(self) -> float:
        return math.hypot(frobenius(self.factor), math.sqrt(self.size) * frobenius(self.mean))

    def rows(self, *, center: bool) -> Tensor:
        """Return rows with the singular values of these."""
        return self.factor if center else torch.cat([self.factor, math.sqrt(self.size) * self.mean[None]])

    def singular_values(self, *, center: bool) -> Tensor:
        """Return the min(size, dim) singular values, sorted descending; those that are rounding are 0."""
        if center not in self._sigma:
            sigma = torch.linalg.svdvals(self.rows(center=center))[: min(self.size, len(self.mean))]
            rounding = sigma <= RESOLUTION * self.norm()
            self._sigma[center] = sigma.masked_fill(rounding | (center and self.constant), 0.0)
        return self._sigma[center]

    @property
    def constant(self) -> bool:
        """Whether all rows are equal but for the rounding of the numbers that they were given in."""
        return self.eps > EPS and frobenius(self.factor) <= rounding_of(self.eps) * self.norm()

    def resolved(self, *, center: bool) -> Tensor:
        """Return the singular values, those that may be the rounding of the numbers that rows were given in being 0."""
        sigma = self.singular_values(center=center)
        return sigma.masked_fill(sigma <= noise(self.eps, self.size, len(self.mean)) * self.norm(), 0.0)

    def entropy_singular_values(self, *, center: bool) -> Tensor:
        """Return singular values up to a common factor, exact enough for the entropy of σ/Σσ (to 1e-10)."""
        rows = self.rows(center=center)
        if center in self._sigma or len(rows) < rows.shape[1] or (center and self.constant):
            return self.singular_values(center=center)
        if center not in self._entropy_sigma:
            matrix = _gram([rows / (largest_entry(rows) or 1.0)], rows.shape[1])
            values = torch.linalg.eigvalsh(matrix).flip(0) if _looks_well_conditioned(matrix) else None
            if values is None or not _entropy_is_exact(values, rows.shape[1]):
                return self.singular_values(center=center)
            self._entropy_sigma[center] = values.sqrt()
        return self._entropy_sigma[center]

    def gram_spectrum(self, *, center: bool) -> Tensor:
        """Return the squares of these."""
        sigma = self.entropy_singular_values(center=center)
        return (sigma / sigma[0]).square() if sigma[0] > 0 else sigma

    def scatter(self) -> Tensor:
        """Return RᵀR `[dim, dim]`; columns that are constant up to rounding are 0."""
        return _without_constants(self.factor.T @ self.factor, self.mean, self.size, self.eps)


def eps_of(f: Tensor) -> float:
    """Return the spacing of numbers of the dtype next to 1, at least float64's.

    Example:
        >>> eps_of(torch.zeros(1)) / 2**-23
        1.0
    """
    return max(EPS, torch.finfo(f.dtype).eps)


def rounding_of(eps: float) -> float:
    """Return which fraction of a number counts as the rounding of numbers with this spacing."""
    return (16 if eps <= torch.finfo(torch.float32).eps else 4) * eps


def noise(eps: float, rows: int, dim: int) -> float:
    """Return up to which fraction of the features' norm singular values may be rounding; 0 for float64."""
    spread = 1.0 if eps <= torch.finfo(torch.float32).eps else rows**-0.5 + dim**-0.5
    return rounding_of(eps) * spread if eps > EPS else 0.0


def constant_columns(squares: Tensor, mean: Tensor, count: int, eps: float) -> Tensor:
    """Return which columns, of so large squared deviations from their mean, are constant up to rounding."""
    fraction = RESOLUTION if eps <= EPS else rounding_of(eps) / 2
    return squares <= fraction**2 * (squares + count * mean.square())


def factor_of(rows: Tensor, eps: float = EPS) -> RowFactor:
    """Return the description of one block of at least one row, in float64; not `reduced`."""
    origin = rows.mean(0)
    centred = rows - origin
    offset = centred.mean(0)
    return RowFactor(len(rows), origin, offset, centred - offset, eps)


def row_factor(f: Tensor, *, normalize: bool = False) -> RowFactor:
    """Return the description of features `[rows, dim]`, a block of rows at a time."""
    check_features(f)
    parts = (factor_of(block, eps_of(f)) for block in blocks(f, normalize=normalize, rows=4 * f.shape[1]))
    return functools.reduce(RowFactor.merge, parts, next(parts).reduced())


def reduce_rows(rows: Tensor) -> Tensor:
    """Return at most `dim` rows with the same Gram matrix."""
    return rows if rows.shape[0] <= rows.shape[1] else torch.linalg.qr(rows, mode="r").R


def singular_values_of(f: Tensor, *, center: bool, normalize: bool = False) -> Tensor:
    """Return the min(rows, dim) singular values of features, sorted descending; those that are rounding are 0."""
    if center:
        return row_factor(f, normalize=normalize).singular_values(center=True)
    check_features(f)
    parts = blocks(f, normalize=normalize, rows=4 * f.shape[1])
    factor = reduce_rows(next(parts))
    for block in parts:
        factor = reduce_rows(torch.cat([factor, block]))
    sigma = torch.linalg.svdvals(factor)
    return sigma.masked_fill(sigma <= RESOLUTION * frobenius(factor), 0.0)


def largest_entry(f: Tensor) -> float:
    low, high = torch.aminmax(f)
    return max(-float(low), float(high))


def frobenius(x: Tensor) -> float:
    """Return the norm of all entries, whose squares may be out of range."""
    scale = largest_entry(x) if x.numel() else 0.0
    return scale * float(torch.linalg.vector_norm(x / scale)) if scale else 0.0


def centre_of(f: Tensor, *, normalize: bool = False) -> tuple[Tensor, Tensor]:
    """Return a row near the features, and their mean minus it: two small roundings for one large."""
    parts = blocks(f, normalize=normalize)
    first = next(parts)
    origin = first.mean(0)
    total = (first - origin).sum(0)
    for block in parts:
        total = total + (block - origin).sum(0)
    return origin, total / len(f)


def minus(rows: Tensor, shifts: Iterable[Tensor]) -> Tensor:
    for shift in shifts:
        rows = rows - shift
    return rows


def scatter_of(f: Tensor) -> Tensor:
    """Return Σ (f − μ)(f − μ)ᵀ `[dim, dim]`; columns that are constant up to rounding are 0."""
    check_features(f)
    origin, offset = centre_of(f)
    centred = (minus(block, (origin, offset)) for block in blocks(f))
    return _without_constants(_gram(centred, f.shape[1]), origin + offset, len(f), eps_of(f))


def _without_constants(scatter: Tensor, mean: Tensor, count: int, eps: float) -> Tensor:
    constant = constant_columns(scatter.diagonal(), mean, count, eps)
    return scatter.masked_fill(constant[:, None] | constant, 0.0)


def gram_spectrum(f: Tensor, *, center: bool) -> Tensor:
    """Return the min(rows, dim) squared singular values up to a common factor, sorted descending; rounding is 0.

    Each is exact to about 1e-15 of the largest: enough for their sum, the sum of their squares and the largest.
    """
    check_features(f)
    matrix, square = _gram_of(f, center=center)
    values, eps = torch.linalg.eigvalsh(matrix).flip(0), eps_of(f)
    constant = center and eps > EPS and float(matrix.trace()) <= rounding_of(eps) ** 2 * square
    return values.masked_fill((values <= RESOLUTION**2 * square) | constant, 0.0)


def entropy_singular_values(f: Tensor, *, center: bool) -> Tensor:
    """Return singular values up to a common factor that are exact enough for the entropy of σ/Σσ, to 1e-10.

    They are roots of the Gram matrix's eigenvalues. If its rounding could move the entropy by more than that, which is
    so when many singular values are small, they come from triangular factors. A few rows tell in advance, mostly.
    """
    check_features(f)
    rows, dim = f.shape
    if rows < 8 * dim or _looks_well_conditioned(_gram_of(f[: dim + dim // 4], center=center)[0]):
        values = gram_spectrum(f, center=center)
        if _entropy_is_exact(values, dim):
            return values.sqrt()
    return singular_values_of(f, center=center)


def _gram_of(f: Tensor, *, center: bool) -> tuple[Tensor, float]:
    """Return the Gram matrix of the shorter side up to a factor, and ‖f‖_F² before centring up to the same."""
    scale = largest_entry(f)
    scale = 1.0 if scale == 0 or 1e-100 < scale < 1e100 else scale  # keeps squares in range
    shift: tuple[Tensor, ...] = centre_of(f) if center else ()
    rows = (minus(block, shift) for block in blocks(f))
    rows = rows if scale == 1 else (block / scale for block in rows)
    if len(f) < f.shape[1]:
        whole = torch.cat(list(rows))
        matrix = whole @ whole.T
    else:
        matrix = _gram(rows, f.shape[1])
    mean_square = len(f) * frobenius(torch.stack(shift).sum(0) / scale) ** 2 if center else 0.0
    return matrix, float(matrix.trace()) + mean_square


def _looks_well_conditioned(gram: Tensor) -> bool:
    """Return whether a Gram matrix may do, guessed from the pivots of its Cholesky factor."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal()
    return not failed and bool(pivots.min() > 1e-5 * pivots.max())


def _entropy_is_exact(values: Tensor, dim: int) -> bool:
    """Return whether the entropy of the roots of a Gram matrix's eigenvalues is exact to 1e-10.

    `rounding` overstates the error of an eigenvalue by far, and errors of different ones do not add up in sign: in all
    spectra that were tried, the entropy was off by less than a fiftieth of `moved`.
    """
    if values[0] == 0:
        return True
    sigma, rounding = values.sqrt(), 4 * math.sqrt(dim) * EPS * values[0]
    moved = rounding / (2 * sigma) * (1 - (sigma / sigma.sum()).log()) / sigma.sum()
    return bool(values[-1] > 100 * rounding and torch.linalg.vector_norm(moved) <= 2e-9)


def _gram(parts: Iterable[Tensor], dim: int) -> Tensor:
    """Return the sum of the Gram matrices of blocks of rows, the upper triangle of which is computed."""
    total = torch.empty(0)
    for part in parts:
        total = total if total.numel() else part.new_zeros(dim, dim)
        for start in range(0, dim, _PANEL):
            panel = slice(start, start + _PANEL)
            total[panel, start:].addmm_(part[:, panel].T, part[:, start:])
    return total.triu() + total.triu(1).T


State = TypeVar("State", bound="Stream")


class Stream:
    """Rows in parts: one process refuses bad ones at once, several do at a later read-out, so that none waits."""

    _refused = ""

    def __add__(self: State, other: State) -> State:
        return copy.copy(self).merge(other) if isinstance(other, type(self)) else NotImplemented

    def merge(self: State, other: State) -> State:
        raise NotImplementedError

    def _refuse(self, message: str) -> None:
        if distributed.world_size() == 1:
            raise UsageError(message)
        self._refused = self._refused or f"Process {distributed.rank()}: {message}"

    def _check_refused(self) -> None:
        if self._refused:
            raise UsageError(self._refused)

    def _agree(self, **settings: object) -> None:
        """Raise on every process if one of them refused rows or if their settings differ."""
        found = distributed.gather_objects((self._refused, settings))
        if messages := [message for message, _ in found if message]:
            raise UsageError(" ".join(messages))
        if different := [other for _, other in found if other != found[0][1]]:
            raise UsageError(f"Processes measure with different settings: {found[0][1]} and {different[0]}.")


def global_rows(rows: RowFactor | None) -> RowFactor | None:
    """Return the description of the rows of all processes, on each of them; None stands for no rows.

    Factors are gathered a slice at a time: memory stays a few times dim × dim, whatever the number of processes.
    """
    own = None if rows is None else (rows.size, *rows.factor.shape, rows.factor.device.type, rows.eps)
    found = distributed.gather_objects(own)
    if len(found) == 1 or not any(found):
        return rows
    dims = {shape[2] for shape in found if shape}
    if len(dims) > 1:
        raise UsageError(f"Processes hold features of different widths: {sorted(dims)}.")
    dim = dims.pop()
    if rows is None:  # on the kind of device where the others' tensors are
        factor = torch.empty(0, dim, dtype=torch.float64, device=next(shape[3] for shape in found if shape))
        places = factor.new_empty(0, 2, dim)
    else:
        factor, places = rows.factor, torch.stack([rows.origin, rows.offset])[None]
    places = distributed.gather_rows(places, counts=[int(shape is not None) for shape in found])
    counts = places.new_tensor([shape[0] for shape in found if shape])
    origin = places[0, 0]
    means = (places[:, 0] - origin) + places[:, 1]
    offset = counts @ means / counts.sum()
    whole = counts.sqrt()[:, None] * (means - offset)
    heights = [shape[1] if shape else 0 for shape in found]
    step = math.ceil(dim / len(found))
    for start in range(0, max(heights), step):
        present = [min(max(height - start, 0), step) for height in heights]
        part = distributed.gather_rows(factor[start : start + step], counts=present)
        whole = reduce_rows(torch.cat([whole, part]))
    return RowFactor(int(counts.sum()), origin, offset, whole, max(shape[4] for shape in found if shape))
