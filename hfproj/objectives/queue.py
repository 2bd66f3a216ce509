"""A first-in first-out memory of rows, the same on all processes: MoCo's keys, NNCLR's support set, SwAV's queue."""

import torch
from torch import Tensor, nn

from hfproj import distributed
from hfproj.errors import UsageError
from hfproj.functional.rows import unit_rows
from hfproj.objectives.base import check_at_least
from hfproj.typing import Features, Views


class Queue(nn.Module):
    """The newest `size` rows of width `dim`, as buffers ``rows [size, dim]``, ``pointer`` and ``filled``.

    It starts with random unit rows from a generator with `seed`: the same on all processes and in every run.

    Raises:
        UsageError: If `size` or `dim` is below 1.

    Example:
        >>> queue = Queue(4, 2)
        >>> queue.push(torch.ones(3, 2))
        >>> queue.rows[:3].tolist(), queue.filled.item()
        ([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], 3)
    """

    rows: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, size: int, dim: int, *, seed: int = 0):
        super().__init__()
        check_at_least(1, queue_size=size, out_dim=dim)
        self.register_buffer("rows", unit_rows(torch.randn(size, dim, generator=torch.Generator().manual_seed(seed))))
        self.register_buffer("pointer", torch.tensor(0))
        self.register_buffer("filled", torch.tensor(0))

    def check(self, z: Views) -> None:
        """Refuse projections that the queue can't take.

        Raises:
            UsageError: If the width differs; in training, if a global batch is larger than the queue, or the first one
                does not divide it (later ones, such as the last of an epoch, may be smaller).
        """
        size, width = self.rows.shape
        if (found := z.shape[2]) != width:
            raise UsageError(f"The queue holds rows of {width} dimensions and z has {found}: pass out_dim={found}.")
        if not self.training:
            return
        batch = sum(distributed.row_counts(z.shape[1], z.device))
        if batch > size or (self.filled == 0 and size % batch):
            raise UsageError(
                f"A queue of {size} rows holds no whole number of batches of {batch} (over all processes); take "
                f"queue_size={max(size // batch, 1) * batch} or another batch size."
            )

    @torch.no_grad()
    def push(self, rows: Features) -> None:
        """Replace the oldest rows, if these are finite; `rows` must be the same on all processes (gathered)."""
        size = len(self.rows)
        rows = rows.detach()[-size:].to(self.rows.dtype)
        where = (self.pointer + torch.arange(len(rows), device=rows.device)) % size
        finite = rows.isfinite().all()
        count = len(rows) * finite
        self.rows[where] = torch.where(finite, rows, self.rows[where])
        self.pointer.copy_((self.pointer + count) % size)
        self.filled.copy_((self.filled + count).clamp(max=size))
