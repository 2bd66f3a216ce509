"""Labels as probes take them: any integers, one for each row."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hfproj.errors import UsageError

Labels = Int[Tensor, " rows"] | Int[np.ndarray, " rows"] | Sequence[int]


def as_labels(y: Any, rows: int) -> Tensor:
    """Return labels as int64 `[rows]` on the CPU.

    Raises:
        UsageError: they are no integers, or not as many as rows.

    Example:
        >>> as_labels([3, -7], 2)
        tensor([ 3, -7])
    """
    try:
        labels = torch.as_tensor(y).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"Expected one integer label for each of {rows} rows, got {type(y).__name__}: {error}"
        ) from error
    if labels.dtype == torch.bool or labels.shape == (0,):  # torch takes an empty list for floats
        labels = labels.long()
    if labels.is_floating_point() or labels.is_complex() or labels.shape != (rows,):
        raise UsageError(
            f"Expected one integer label for each of {rows} rows, got {labels.dtype} of shape {list(labels.shape)}."
        )
    return labels.long()
