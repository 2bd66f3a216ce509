"""Collectives that autograd sees through; with one process, or none initialised, each is the identity.

Convention of the whole library: **every rank's loss is the value of the global loss** (that of one process
holding all rows), and **collectives sum in the backward**. With W processes a rank's gradient is then that of W·L with
respect to its own copy of the parameters,

    dθ_r = W · ∂L/∂θ_r,        mean over ranks (what DDP does) = Σ_r ∂L/∂θ_r = dL/dθ,

exactly the gradient of one process with the global batch, also where ranks hold different numbers of rows.

Rules that follow from it: all ranks call the same collectives in the same order, hence a tensor requires a gradient on
every rank or on none; tensors lie on the device of the backend (CUDA for nccl).
This is the only file that calls ``torch.distributed``; it uses the default process group.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from hfproj.errors import HfprojError

# torch 2.14 renamed it and deprecates the old name.
_all_gather_into: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _initialised() else 1


def rank() -> int:
    """Return the index of this process, from 0."""
    return dist.get_rank() if _initialised() else 0


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def row_counts(n: int, device: torch.device | str = "cpu") -> list[int]:
    """Return how many rows each process holds, in rank order.

    Args:
        n: Rows of this process.
        device: Where the collective runs: that of the tensor whose rows are counted.

    Example:
        >>> row_counts(5)
        [5]
    """
    if world_size() == 1:
        return [n]
    counts = torch.empty(world_size(), dtype=torch.int64, device=device)
    _all_gather_into(counts, torch.tensor([n], dtype=torch.int64, device=device))
    return counts.tolist()


def gather_rows(
    x: Shaped[Tensor, "rows *rest"], *, counts: list[int] | None = None
) -> Shaped[Tensor, "all_rows *rest"]:
    """Concatenate the rows of all processes in rank order; ranks may hold different numbers of rows, or none.

    The backward sums the gradients of all processes and returns the slice of this rank. It is itself differentiable.

    Args:
        x: Rows of this process; the other dimensions agree over the processes.
        counts: What :func:`row_counts` returned, if known: saves its synchronisation.

    Example:
        >>> gather_rows(torch.arange(3.0)).tolist()
        [0.0, 1.0, 2.0]
    """
    if world_size() == 1:
        return x
    return _GatherRows.apply(x, row_counts(x.shape[0], x.device) if counts is None else counts)


def all_reduce_sum(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Return the sum over processes; the backward sums the gradients over processes, and is itself differentiable.

    Example:
        >>> all_reduce_sum(torch.tensor(2.0)).item()
        2.0
    """
    return x if world_size() == 1 else _AllReduceSum.apply(x)


def all_reduce_max(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Return the elementwise maximum over processes, without a gradient.

    Example:
        >>> all_reduce_max(torch.tensor(2.0, requires_grad=True)).requires_grad
        False
    """
    x = x.detach()
    if world_size() > 1:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def broadcast_object(value: Any, src: int = 0) -> Any:
    """Return the value that process `src` holds (pickled between the processes of one job, never to disk).

    Example:
        >>> broadcast_object("run-7"), rank(), world_size()
        ('run-7', 0, 1)
    """
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all processes in rank order, on every process.

    Example:
        >>> gather_objects({"rank": rank()})
        [{'rank': 0}]
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(call: Callable[[], Any]) -> Any:
    """Return what `call` returns on the main process, on all of them; an error of this library is raised on all.

    Example:
        >>> on_main(lambda: "run-7")
        'run-7'
    """
    found: Any = None
    if rank() == 0:
        try:
            found = call()
        except HfprojError as error:
            found = error
    found = broadcast_object(found)
    if isinstance(found, HfprojError):
        raise found
    return found


def first(value: Any) -> Any:
    """Return the value of the first process that holds a true one, on all of them, and None where none does.

    Example:
        >>> first("the disk is full"), first(None)
        ('the disk is full', None)
    """
    return next(filter(None, gather_objects(value)), None)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        ctx.start, ctx.rows = sum(counts[: rank()]), x.shape[0]
        longest = max(counts)
        if longest == x.shape[0]:
            padded = x.contiguous()
        else:  # collectives want equal shapes
            padded = x.new_zeros(longest, *x.shape[1:])
            padded[: x.shape[0]] = x
        blocks = x.new_empty(len(counts) * longest, *x.shape[1:])
        _all_gather_into(blocks, padded)
        if min(counts) == longest:
            return blocks
        return torch.cat([block[:count] for block, count in zip(blocks.split(longest), counts)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grad)[ctx.start : ctx.start + ctx.rows], None


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, dist.ReduceOp.SUM)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad)
