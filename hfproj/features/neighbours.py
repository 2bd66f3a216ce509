"""Exact nearest neighbours by cosine, for every probe that needs them, with the bank on one process or on many.

    N_k(q) = the k rows j of the bank with the largest ⟨q̂, b̂_j⟩, of equal ones the lowest j

A float32 scan proposes candidates, float64 ranks them, and a query whose candidates cannot be proven complete is
searched again in float64. Rows of the bank that are bitwise equal have bitwise equal cosines.

On several processes the bank may be sharded: each process holds rows of its own, in rank order the rows of the global
bank. A query is searched in every shard, and only cosines and row numbers are exchanged. Neighbours are those of one
process with the global bank, bit for bit.

It is not faiss because its flat index is not exact: of 50,000 × 384 float32 rows and k = 200, 2 to 9 % of the lists
differ from those of float64, here none, at 1.7 times its CPU time (``recipes/benchmarks/results/probes.json``); nor
does it search shards of several processes.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from hfproj import distributed
from hfproj.checking import checked
from hfproj.errors import NotMeasurableError, UsageError
from hfproj.functional.feature_rows import check_features, exact_unit_rows
from hfproj.functional.rows import full_precision
from hfproj.typing import Features

_SCAN_ELEMENTS = 2**24  # float32 similarities held at a time: 64 MiB
_BANK_ROWS = 2**16
_FEW_ROWS = 2**12  # of the bank in float64 at a time: 12 MiB at 384 dimensions
_RESCORE_ELEMENTS = 2**17  # float64 products held at a time, on a CPU: 1 MiB, which stays in cache
_QUERIES = 1024
_GROUP = 8  # columns of similarities that `_largest` takes together

Value = TypeVar("Value")


class Neighbours(NamedTuple):
    """Neighbours of each query, nearest first, on the CPU.

    Attributes:
        cosines: In [−1, 1] up to rounding; 0 with a row of zeros.
        rows: Their rows in the (global) bank.
    """

    cosines: Float64[Tensor, "queries k"]
    rows: Int64[Tensor, "queries k"]


class NeighbourBank:
    """Rows to search in; with `sharded`, this process's part of them.

    Memory beside the bank (held as given and once as float32 unit rows) grows neither with the number of queries nor
    with the number of processes.

    Args:
        f: The bank, any floating-point type.
        sharded: `f` are this process's rows of a global bank, from none to all; all processes make their bank together.

    Attributes:
        rows: Number of rows of the global bank.
        start: Number of this process's first row in it.

    Raises:
        UsageError: If there are no rows, if rows are not finite (on every process, naming the one that has them), or if
            shards have different widths.

    Example:
        >>> bank = NeighbourBank(torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 1.0]]))
        >>> bank.search(torch.tensor([[0.1, 5.0]]), 2).rows.tolist()
        [[0, 2]]
    """

    @torch.no_grad()
    @checked
    def __init__(self, f: Features, *, sharded: bool = False):
        self.sharded = sharded and distributed.world_size() > 1
        together(lambda: check_features(f, minimum=0 if self.sharded else 1, what="bank"), sharded)
        f = f.detach().cpu() if f.device.type == "mps" else f.detach()  # Apple's GPUs have no float64
        self.counts, widths = [len(f)], [f.shape[1]]
        if self.sharded:
            self.counts, widths = map(list, zip(*distributed.gather_objects((len(f), f.shape[1]))))
        self.rows, self.dim = sum(self.counts), f.shape[1]
        self.start = sum(self.counts[: distributed.rank()]) if self.sharded else 0
        if not self.rows:
            raise UsageError(f"Expected at least 1 row of bank on one of {len(self.counts)} processes, got none.")
        if len(set(widths)) > 1:
            raise UsageError(f"Processes hold parts of the bank of different widths: {widths}.")

        self._bank = f if f.dtype in (torch.float32, torch.float64) else f.float()
        self._scale = torch.empty(len(f), dtype=torch.float64, device=f.device)
        self._unit = torch.empty(f.shape, dtype=torch.float32, device=f.device)
        for start in range(0, len(f), _FEW_ROWS):
            part = slice(start, start + _FEW_ROWS)
            rows = self._bank[part].double()
            norm = torch.linalg.vector_norm(rows, dim=1)
            self._scale[part] = torch.where(norm > 0, 1 / norm, 0.0)
            self._unit[part] = exact_unit_rows(rows)
        self._distinct: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where the bank lies."""
        return self._bank.device

    def check(self, f: Tensor, *, sharded: bool = False) -> None:
        """Refuse queries that cannot be searched; on processes that search together, on all of them.

        Args:
            f: Queries `[rows, dim]`, as wide as the bank.
            sharded: Whether each process has its own queries, from none to any number.

        Raises:
            UsageError: If queries are no finite floating-point rows, have another width than the bank, or are none (on
                any process); or if the bank is sharded and, without `sharded`, processes have different queries.
        """

        def own() -> None:
            check_features(f, minimum=0 if sharded and distributed.world_size() > 1 else 1, what="queries")
            if f.shape[1] != self.dim:
                raise UsageError(f"The bank has {self.dim} columns, the queries have {f.shape[1]}.")

        together(own, sharded or self.sharded)
        if sharded and not sum(distributed.row_counts(len(f), self.device)):
            raise UsageError("Expected at least 1 row of queries on one of the processes, got none.")
        if self.sharded and not sharded and len(set(distributed.gather_objects(_digest(f)))) > 1:
            hint = "give all the same, or pass sharded=True"
            raise UsageError(f"The bank is sharded, and processes have different queries: {hint}.")

    def search(self, f: Features, k: int, *, sharded: bool = False) -> Neighbours:
        """Return the `k` nearest rows of the bank for every query, or all rows if it has fewer.

        With a sharded bank all processes call it together, with the same queries, or, with `sharded`, each with its
        own, from none to any number.

        Raises:
            UsageError: If k < 1, or as `check`.
        """
        self.check(f, sharded=sharded)
        return _joined([found for _, found in self.chunks(f, k, sharded=sharded)], min(k, self.rows))

    def search_within(self, k: int) -> Neighbours:
        """Return the `k` nearest other rows for every row of the bank that this process holds.

        Raises:
            UsageError: If k < 1, or the bank has one row.
        """
        return _joined([found for _, found in self.chunks_within(k)], min(k, self.rows - 1))

    def chunks(self, f: Tensor, k: int, *, sharded: bool = False) -> Iterator[tuple[int, Neighbours]]:
        """Yield the number of the first of a few queries and their neighbours; `check` the queries before."""
        return self._rounds(f, check_k(k), sharded=sharded and self.sharded)

    def chunks_within(self, k: int) -> Iterator[tuple[int, Neighbours]]:
        """Yield the same of each row that this process holds and its nearest others; raises as `search_within`."""
        check_k(k)
        if self.rows < 2:
            raise NotMeasurableError("Leaving one out needs a bank of at least 2 rows, got 1.")
        rounds = self._rounds(self._bank, k + 1, sharded=self.sharded)
        return ((start, _others(found, self.start + start)) for start, found in rounds)

    def _rounds(self, f: Tensor, k: int, *, sharded: bool) -> Iterator[tuple[int, Neighbours]]:
        """Search a few queries at a time; `sharded`: those of all processes, until the last has none left."""
        counts = distributed.row_counts(len(f), self.device) if sharded else [len(f)]
        largest = max(self.counts)  # the same chunks on all processes
        step = max(1, min(_QUERIES, _SCAN_ELEMENTS // min(largest, _BANK_ROWS)) // len(counts))
        for start in range(0, max(counts), step):
            found = self._one_round(f[start : start + step], k, [min(max(c - start, 0), step) for c in counts])
            if start < len(f):
                yield start, found

    @torch.no_grad()
    def _one_round(self, f: Tensor, k: int, counts: list[int]) -> Neighbours:
        queries = exact_unit_rows(f.detach().to(self.device).double())
        if len(counts) > 1:
            queries = distributed.gather_rows(queries, counts=counts)
        with full_precision(queries):
            found = self._merged(*self._nearest(queries, min(k, len(self._bank))), min(k, self.rows))
        first = sum(counts[: distributed.rank()]) if len(counts) > 1 else 0
        return Neighbours(*(part[first : first + len(f)].cpu() for part in found))

    def _merged(self, cosine: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the nearest over all shards; in rank order their rows are in the order of the global bank."""
        if not self.sharded:
            return cosine, index
        width = min(k, max(self.counts))
        padded = cosine.new_full((1, len(cosine), width), -math.inf)
        numbers = index.new_zeros(1, len(cosine), width)
        padded[0, :, : cosine.shape[1]], numbers[0, :, : index.shape[1]] = cosine, index + self.start
        ones = [1] * len(self.counts)
        parts = (padded, numbers)
        cosine, index = (distributed.gather_rows(part, counts=ones).transpose(0, 1).flatten(1) for part in parts)
        order = cosine.argsort(dim=1, descending=True, stable=True)[:, :k]
        return cosine.gather(1, order), index.gather(1, order)

    def _nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return float64 cosines and own rows `[queries, k]` of the nearest: by cosine, then by the lowest row."""
        if not k or not len(queries):
            return _nothing(len(queries), k, self.device)
        wanted = min(k + 8 + k // 8, len(self._bank))
        scanned, index = self._scan(queries.float(), wanted)
        index, order = index.sort(1)
        scanned = scanned.gather(1, order)
        cosine = self._rescore(queries, index)
        # Rounding of unit rows to float32 and of a float32 dot product, at worst. More than that means that the user
        # allows TF32 or bfloat16 in matrix products: then the bound is bfloat16's.
        bound = (self.dim + 4) * 2.0**-24
        if (cosine - scanned).abs().max() > bound:
            bound = 2.0**-7
        floor = scanned.min(1).values
        order = cosine.argsort(dim=1, descending=True, stable=True)[:, :k]
        cosine, index = cosine.gather(1, order), index.gather(1, order)
        if wanted < len(self._bank):
            unsure = (cosine[:, -1] <= floor + bound).nonzero().flatten()
            for part in unsure.split(max(1, _SCAN_ELEMENTS // 2 // len(self._bank))) if len(unsure) else ():
                cosine[part], index[part] = self._nearest_exact(queries[part], k)
        return cosine, index

    def _scan(self, queries: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        values, index = _nothing(len(queries), 0, self.device)
        values = values.float()
        for start in range(0, len(self._unit), _BANK_ROWS):
            similarity = queries @ self._unit[start : start + _BANK_ROWS].T
            best, where = _largest(similarity, wanted)
            values, index = torch.cat([values, best], 1), torch.cat([index, where + start], 1)
            if values.shape[1] > wanted:
                values, order = values.topk(wanted, sorted=False)
                index = index.gather(1, order)
        return values, index

    def _rescore(self, queries: Tensor, index: Tensor) -> Tensor:
        """Return `[queries, candidates]` float64 cosines; a sum per row, so that equal bank rows give equal bits."""
        out = torch.empty(index.shape, dtype=torch.float64, device=index.device)
        elements = _RESCORE_ELEMENTS if index.device.type == "cpu" else 2**6 * _RESCORE_ELEMENTS
        step = max(1, elements // (index.shape[1] * self.dim))
        rows = self._bank.new_empty(min(step, len(index)) * index.shape[1], self.dim)  # memory once, not for each step
        products = rows.new_empty(rows.shape, dtype=torch.float64)
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            chosen = index[part].flatten()
            torch.index_select(self._bank, 0, chosen, out=rows[: len(chosen)])
            product = products[: len(chosen)].copy_(rows[: len(chosen)]).view(-1, index.shape[1], self.dim)
            out[part] = product.mul_(queries[part, None]).sum(-1) * self._scale[index[part]]
        return out

    def _nearest_exact(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search all own rows in float64: for the ties and near-ties of collapsed or repeated features."""
        if self._distinct is None:
            self._distinct = _equal_rows(self._bank).unique(return_inverse=True)
        first, group = self._distinct  # each distinct row once; for each row of the bank, which of them it is
        parts = first.split(_FEW_ROWS)
        rough = torch.cat([queries @ self._bank[part].double().T * self._scale[part] for part in parts], 1)
        # A float64 product orders rows up to its own rounding; what lies within it of the k-th is summed row by row.
        bound = 2 * (self.dim + 4) * 2.0**-53
        floor = rough.topk(min(k, len(first))).values[:, -1:] - bound
        cosine = rough.new_empty(len(queries), k)
        index = first.new_empty(len(queries), k)
        for number, (query, near) in enumerate(zip(queries, rough >= floor)):
            chosen = near.nonzero().flatten()
            step = max(1, _RESCORE_ELEMENTS // len(query))
            exact = rough[number].index_copy_(
                0, chosen, torch.cat([self._rescore(query[None], first[part][None])[0] for part in chosen.split(step)])
            )
            members = near[group].nonzero().flatten()
            values = exact[group[members]]
            least = values.topk(k).values[-1]  # no sort of all members: at collapse that is the whole bank
            above, tied = (values > least).nonzero().flatten(), (values == least).nonzero().flatten()
            kept = torch.cat([above, tied[: k - len(above)]]).sort().values
            order = kept[values[kept].argsort(dim=0, descending=True, stable=True)]
            cosine[number], index[number] = values[order], members[order]
        return cosine, index


def check_k(k: Any) -> int:
    """Return the number of neighbours."""
    if isinstance(k, bool) or not isinstance(k, Integral) or k < 1:
        raise UsageError(f"Expected k, the number of neighbours, as a whole number of at least 1 (k ≥ 1), got {k!r}.")
    return int(k)


def check_ks(k: Any) -> int | tuple[int, ...]:
    """Return one number of neighbours, or several different ones as a tuple."""
    if not isinstance(k, Iterable):
        return check_k(k)
    ks = tuple(map(check_k, k))
    if not ks or len(set(ks)) != len(ks):
        raise UsageError(f"Expected one number of neighbours or several different ones, got k={k}.")
    return ks


def together(check: Callable[[], Value], sharded: bool = True) -> Value:
    """Return what `check` returns; what one process refuses is refused on all, so that none waits for another."""
    if not sharded or distributed.world_size() == 1:
        return check()
    value, message = None, ""
    try:
        value = check()
    except UsageError as error:
        message = str(error)
    refused = [f"Process {rank}: {text}" for rank, text in enumerate(distributed.gather_objects(message)) if text]
    if refused:
        raise UsageError(" ".join(refused))
    return value  # type: ignore[return-value]  # no message: `check` returned


def _largest(similarity: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """Return values and columns of the `wanted` largest of each row, unordered; all where there are fewer.

    They lie in the groups of columns with the `wanted` largest maxima, which are quicker to find.
    """
    columns = similarity.shape[1]
    groups = columns // _GROUP
    if groups < 2 * wanted:
        return similarity.topk(min(wanted, columns), sorted=False)
    whole = groups * _GROUP
    best = similarity[:, :whole].unflatten(1, (_GROUP, groups)).amax(1).topk(wanted, sorted=False).indices
    every = torch.arange(columns, device=similarity.device)
    members = (best[:, None] + every[:whole:groups, None]).flatten(1)
    index = torch.cat([members, every[whole:].expand(len(best), -1)], 1)
    values, order = similarity.gather(1, index).topk(wanted, sorted=False)
    return values, index.gather(1, order)


def _joined(parts: list[Neighbours], k: int) -> Neighbours:
    if not parts:  # this process has no queries
        return Neighbours(*_nothing(0, k))
    return Neighbours(*map(torch.cat, zip(*parts)))


def _nothing(queries: int, k: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty(queries, k, dtype=kind, device=device) for kind in (torch.float64, torch.long))  # type: ignore[return-value]


def _digest(f: Tensor) -> str:
    """Return a checksum of the bits of all entries."""
    hashed = hashlib.blake2b(repr((f.dtype, f.shape)).encode())
    for part in f.detach().split(_FEW_ROWS):
        hashed.update(part.cpu().contiguous().view(torch.uint8).numpy())
    return hashed.hexdigest()


def _others(found: Neighbours, first: int) -> Neighbours:
    """Remove from the neighbours of rows `first`, … these rows themselves, or the last neighbour if they are absent."""
    mine = found.rows == torch.arange(first, first + len(found.rows))[:, None]
    mine[:, -1] |= ~mine.any(1)
    return Neighbours(*(part[~mine].view(len(part), part.shape[1] - 1) for part in found))


def _equal_rows(f: Tensor) -> Tensor:
    """Return for each row the first row that is bitwise equal to it, as far as one random projection tells."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(f.shape[1], dtype=torch.float64, generator=generator).to(f.device)
    key = torch.cat([(rows.double() * direction).sum(1) for rows in f.split(_FEW_ROWS)])
    _, inverse = key.unique(return_inverse=True)
    own = torch.arange(len(f), device=f.device)
    first = own.new_full((len(f),), len(f)).scatter_reduce(0, inverse, own, "amin")[inverse]
    equal = torch.cat([(f[part] == f[first[part]]).all(1) for part in own.split(_FEW_ROWS)])
    return torch.where(equal, first, own)
