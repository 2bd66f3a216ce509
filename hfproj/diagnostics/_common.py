"""What every diagnostic does first: refuse what cannot be measured, and read rows in float64 a block at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hfproj.errors import UsageError

_BLOCK_ELEMENTS = 2**22  # 32 MiB of float64


def check_features(f: Tensor, *, minimum: int = 2, what: str = "features") -> None:
    """Refuse features that are no `[rows, dim]` matrix of at least `minimum` finite floating-point rows.

    Raises:
        UsageError: wrong shape or dtype, too few rows, no column, or rows with NaN or infinity (which are named).

    Example:
        >>> check_features(torch.tensor([[0.0], [float("nan")], [1.0]]))
        Traceback (most recent call last):
        hfproj.errors.UsageError: 1 of 3 rows of the features are NaN or infinite: row 1. ...
    """
    if f.ndim != 2 or not f.is_floating_point():
        raise UsageError(
            f"Expected {what} as floating-point numbers of shape [rows, dim], got {f.dtype} of shape {list(f.shape)}."
        )
    if f.shape[0] < minimum or f.shape[1] < 1:
        raise UsageError(
            f"Expected at least {minimum} row{'s' * (minimum != 1)} and a column of {what}, got shape {list(f.shape)}."
        )
    bad = (~torch.isfinite(f).all(1)).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(map(str, bad[:10])) + (", …" if len(bad) > 10 else "")
        raise UsageError(
            f"{len(bad)} of {f.shape[0]} rows of the {what} are NaN or infinite: row{'s' * (len(bad) != 1)} {shown}. "
            "Look at these inputs, or at the model: its training may have diverged."
        )


def unit_rows(f: Tensor) -> Tensor:
    """Return `f` with rows of norm 1; a row of zeros stays zero."""
    norm = torch.linalg.vector_norm(f, dim=1, keepdim=True)
    return f / norm.masked_fill(norm == 0, 1.0)


def blocks(f: Tensor, *, normalize: bool = False) -> Iterator[Tensor]:
    """Yield consecutive rows of `f` as float64, so that no float64 copy of the whole matrix exists."""
    rows = max(1, _BLOCK_ELEMENTS // f.shape[1])
    for start in range(0, f.shape[0], rows):
        block = f[start : start + rows]
        block = block.cpu() if block.device.type == "mps" else block  # Apple's GPUs have no float64
        yield unit_rows(block.double()) if normalize else block.double()


def mean_row(f: Tensor, *, normalize: bool = False) -> Tensor:
    """Return the mean of the rows `[dim]` in float64."""
    return torch.stack([block.sum(0) for block in blocks(f, normalize=normalize)]).sum(0) / f.shape[0]


def gram(f: Tensor, *, shift: Tensor | None = None, scale: float = 1.0, normalize: bool = False) -> Tensor:
    """Return `gᵀg` `[dim, dim]` in float64 for `g = (f − shift)/scale`, a block of rows at a time."""
    total = torch.zeros(
        f.shape[1], f.shape[1], dtype=torch.float64, device="cpu" if f.device.type == "mps" else f.device
    )
    for block in blocks(f, normalize=normalize):
        block = (block if shift is None else block - shift) / scale
        total.addmm_(block.T, block)
    return total
