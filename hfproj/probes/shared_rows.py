"""Are images that probes are scored on among those they learnt from?"""

import warnings

import numpy as np
from torch import Tensor

_CHUNK = 8192  # rows
_FEW = 0.01  # of the test rows: real data sets hold some images twice


def share_in(train: Tensor, test: Tensor) -> float:
    """Return the fraction of the rows of `test` that are, bit by bit, rows of `train`.

    Rows that `test` has more than once don't count: of a collapsed model all are alike.

    Args:
        train: ``[rows, dim]``.
        test: ``[rows, dim]``.

    Example:
        >>> import torch
        >>> share_in(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [5.0]]))
        0.5
    """
    there, here = (_digests(f) for f in (train, test))
    rows, counts = np.unique(here, return_counts=True)
    return int(np.isin(rows[counts == 1], there).sum()) / max(1, len(here))


def _digests(f: Tensor) -> np.ndarray:
    """Return a number of 64 bits for each row, of its bits in float32."""
    random = np.random.default_rng(0)
    weights = random.integers(0, 2**64, size=f.shape[1], dtype=np.uint64) | np.uint64(1)
    parts = (part.detach().cpu().float().contiguous().numpy().view(np.uint32) for part in f.split(_CHUNK))
    return np.concatenate([np.empty(0, np.uint64), *((part * weights).sum(1, dtype=np.uint64) for part in parts)])


def warn_of_shared_rows(train: Tensor, test: Tensor, *, stacklevel: int) -> None:
    """Warn where more than one in a hundred rows of `test` are in `train`, too: probes know their answers."""
    share = share_in(train, test)
    if share > _FEW:
        what = "are the same data" if share == 1 else f"share images: {share:.0%} of `test` is in `train`, too"
        warnings.warn(
            f"`train` and `test` {what}, of which probes know the answers: their scores say nothing about other data. "
            "Pass held-out data as test=….",
            stacklevel=stacklevel + 1,
        )
