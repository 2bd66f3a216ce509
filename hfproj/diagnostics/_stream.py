"""States over processes: what one process refuses all refuse; what each holds becomes one description of all rows."""

import math

import torch
from torch import Tensor

from hfproj import distributed
from hfproj.diagnostics._factors import RowFactor, reduce_rows
from hfproj.errors import UsageError


class Stream:
    """Rows that come in parts: on one process bad ones raise at once, on several later, so that none waits forever."""

    _refused = ""

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
    own = None if rows is None else (rows.size, *rows.factor.shape, rows.factor.device.type)
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
        part = distributed.gather_rows(
            factor[start : start + step], counts=[min(max(height - start, 0), step) for height in heights]
        )
        whole = reduce_rows(torch.cat([whole, part]))
    return RowFactor(int(counts.sum()), origin, offset, whole)


def uncentred(factor: Tensor) -> RowFactor:
    """Return a factor that has no mean to subtract as a description of rows."""
    zero = factor.new_zeros(factor.shape[1])
    return RowFactor(len(factor), zero, zero, factor)
