"""Are images that probes are scored on among those they learnt from?"""

import warnings

import numpy as np
from torch import Tensor

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
    there, here = (_as_bytes(f) for f in (train, test))
    rows, counts = np.unique(here, return_counts=True)
    return int(np.isin(rows[counts == 1], there).sum()) / max(1, len(here))


def _as_bytes(f: Tensor) -> np.ndarray:
    """Return each row as one value that can be sorted."""
    rows = np.ascontiguousarray(f.detach().cpu().float().numpy())
    return rows.view(f"V{rows.itemsize * rows.shape[1]}").ravel()


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
