"""Features before they are measured: validated, in float64, a block of rows at a time; without gradient."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hfproj.errors import NotMeasurableError, UsageError, check_type

_BLOCK_ELEMENTS = 2**22  # 32 MiB of float64


def check_features(f: Tensor, *, minimum: int = 2, what: str = "features") -> None:
    """Refuse anything but a `[rows, dim]` matrix of at least `minimum` finite floating-point rows, called `what`.

    Raises:
        UsageError: If the shape or dtype is another, or a row holds NaN or infinity; the message names these rows.
        NotMeasurableError: If there are too few rows or no column.

    Example:
        >>> check_features(torch.tensor([[0.0], [float("nan")], [1.0]]))
        Traceback (most recent call last):
        hfproj.errors.UsageError: 1 of 3 rows of the features are NaN or infinite: row 1. ...
    """
    check_shape(f, minimum=minimum, what=what)
    if refusal := describe_bad_rows(f, what=what):
        raise UsageError(refusal)


def check_shape(f: Tensor, *, minimum: int = 2, what: str = "features") -> None:
    """Do what `check_features` does without reading the numbers."""
    hint = "make a tensor of them: torch.tensor(…)"
    if isinstance(f, nn.Module):
        hint = "extract them: hfproj.extract_features(model, dataset).h"
    elif hasattr(f, "h"):
        hint = "take h or z of them: features.h"
    check_type(what, f, Tensor, hint)
    if f.ndim != 2 or not f.is_floating_point() or f.is_meta:
        raise UsageError(
            f"Expected {what} as floating-point numbers of shape [rows, dim], got {f.dtype} of shape {list(f.shape)}"
            f"{' without data (meta)' if f.is_meta else ''}; "
            "turn views into rows by flatten(0, 1)."
        )
    if f.shape[0] < minimum or f.shape[1] < 1:
        rows = f"{minimum} row{'s' * (minimum != 1)}"
        raise NotMeasurableError(f"Expected at least {rows} and a column of {what}, got shape {list(f.shape)}.")


def describe_bad_rows(f: Tensor, *, what: str = "features", start: int = 0, stream: str = "") -> str:
    """Return which rows (numbered from `start`, over what `stream` says) are not finite and a hint, or nothing."""
    if not f.numel() or torch.isfinite(torch.stack(torch.aminmax(f))).all():  # a tenth of the cost of asking every row
        return ""
    bad = (~torch.isfinite(f).all(1)).nonzero().flatten().tolist()
    shown = ", ".join(str(start + row) for row in bad[:10]) + (", …" if len(bad) > 10 else "")
    return (
        f"{len(bad)} of {f.shape[0]} rows of the {what} are NaN or infinite: row{'s' * (len(bad) != 1)} "
        f"{shown}{stream}. Look at these inputs, or at the model: its training may have diverged."
    )


def exact_unit_rows(f: Tensor) -> Tensor:
    """Return `f` with rows of norm 1, however short they are; only a row of zeros stays as it is."""
    norm = torch.linalg.vector_norm(f, dim=1, keepdim=True)
    return f / norm.masked_fill(norm == 0, 1.0)


def double(x: Tensor) -> Tensor:
    """Return `x` in float64, on the CPU where its device has none (Apple's MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def double_rows(f: Tensor, *, normalize: bool = False) -> Tensor:
    """Return `f` in float64, on request with rows of norm 1."""
    return exact_unit_rows(double(f)) if normalize else double(f)


def blocks(f: Tensor, *, normalize: bool = False, rows: int = 1) -> Iterator[Tensor]:
    """Yield consecutive rows of `f` as float64, `rows` or more at once: no float64 copy of the whole exists."""
    for block in f.split(max(rows, _BLOCK_ELEMENTS // f.shape[1])):
        yield double_rows(block, normalize=normalize)
