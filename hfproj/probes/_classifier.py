"""What probes that train a classifier on features share: checks, scaling, a held-out part and what scoring keeps."""

import inspect
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from hfproj.errors import UsageError
from hfproj.functional.feature_rows import check_features, double_rows
from hfproj.probes._labels import Labels, as_labels
from hfproj.typing import Features

_BLOCK_ELEMENTS = 2**17  # of float64 at a time: 1 MiB, which stays in a CPU's cache


def options_of(probe: Any) -> dict[str, Any]:
    """Return the constructor's options with their values on `probe`."""
    return {name: getattr(probe, name) for name in inspect.signature(type(probe)).parameters}


def describe(probe: Any, *, without: Collection[str] = ()) -> str:
    """Return the call that makes `probe`; options that have no effect may be left out."""
    options = [f"{name}={value!r}" for name, value in options_of(probe).items() if name not in without]
    return f"{type(probe).__name__}({', '.join(options)})"


def check_numbers(**values: int | float) -> None:
    """Refuse whole numbers below 1 and others that are not positive and finite.

    Raises:
        UsageError: the option is named.

    Example:
        >>> check_numbers(epochs=0)
        Traceback (most recent call last):
        hfproj.errors.UsageError: Expected epochs ≥ 1, got 0.
    """
    for name, value in values.items():
        if isinstance(value, int) and value < 1:
            raise UsageError(f"Expected {name} ≥ 1, got {value}.")
        if not 0 < value < float("inf"):
            raise UsageError(f"Expected a finite {name} > 0, got {value}.")


def training_set(f: Tensor, y: Labels) -> tuple[Int[Tensor, " classes"], Int[Tensor, " rows"]]:
    """Return the classes in `y`, sorted, and each row's number among them, on the CPU.

    Raises:
        UsageError: no rows, rows that are not finite, or labels that are no integers or do not match the rows.
    """
    check_features(f, minimum=1, what="training features")
    classes, codes = torch.unique(as_labels(y, len(f)), return_inverse=True)
    return classes, codes


def check_queries(probe: Any, f: Tensor, dim: int | None) -> None:
    """Refuse features that a probe fitted on `dim` columns can't classify.

    Raises:
        UsageError: not fitted (`dim` None), no rows, another width, or rows that are not finite.
    """
    if dim is None:
        raise UsageError(f"This {type(probe).__name__} is not fitted yet: call fit(features, labels) first.")
    check_features(f, minimum=1)
    if f.shape[1] != dim:
        raise UsageError(f"The probe was fitted on {dim} columns, these features have {f.shape[1]}.")


def keep_accuracy(probe: Any, predicted: Tensor, y: Labels, protocol: dict[str, Any]) -> float:
    """Set `correct_` and `results_` of `probe`, and return the accuracy."""
    probe.correct_ = predicted == as_labels(y, len(predicted))
    value = probe.correct_.double().mean().item()
    probe.results_ = {"value": value, "protocol": {**protocol, "test_rows": len(predicted)}}
    return value


def hold_out(
    codes: Int[Tensor, " rows"], share: float, generator: torch.Generator
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " held"]]:
    """Return the rows that are kept and those held out, each in random order.

    Each class gives its `share`, rounded, but at least one row and not its last: a class of one row gives none.

    Example:
        >>> kept, held = hold_out(torch.tensor([0] * 10 + [1] * 2 + [2]), 0.2, torch.Generator().manual_seed(0))
        >>> len(kept), (held < 10).sum().item(), (held == 12).any().item()
        (10, 2, False)
    """
    order = torch.randperm(len(codes), generator=generator)
    by_class = order[codes[order].argsort(stable=True)]
    sizes = torch.bincount(codes)
    wanted = (sizes * share).round().long().clamp_min(1).minimum((sizes - 1).clamp_min(0))
    place = torch.arange(len(codes)) - (sizes.cumsum(0) - sizes)[codes[by_class]]  # in its class
    held = torch.zeros(len(codes), dtype=torch.bool)
    held[by_class] = place < wanted[codes[by_class]]
    return order[~held[order]], order[held[order]]


class Scaling(NamedTuple):
    """x = (f − mean) · factor, with statistics of the training set in float64; the factor of constant columns is 0."""

    mean: Float64[Tensor, " dim"]
    factor: Float64[Tensor, " dim"]

    @classmethod
    def of(cls, f: Features, *, scale: bool = True) -> "Scaling":
        """Return the scaling that centres the columns of `f` and, if `scale`, divides by the standard deviation.

        Example:
            >>> scaling = Scaling.of(torch.tensor([[1.0, 7.0], [3.0, 7.0]]))
            >>> scaling.apply(torch.tensor([[4.0, 9.0]])).tolist()
            [[2.0, 0.0]]
        """
        parts = []
        for rows in f.split(max(1, _BLOCK_ELEMENTS // f.shape[1])):
            block = double_rows(rows)
            mean = block.mean(0)
            parts.append((len(block), mean, (block - mean).square_().mean(0)))
        mean = torch.stack([rows * of_block for rows, of_block, _ in parts]).sum(0) / len(f)
        if not scale:
            return cls(mean, torch.ones_like(mean))
        squares = [rows * (spread + (of_block - mean).square()) for rows, of_block, spread in parts]
        variance = torch.stack(squares).sum(0) / len(f)
        # The mean of equal numbers has a rounding error, which must not become the unit of a column.
        constant = variance.sqrt() <= 1e-12 * mean.abs()
        return cls(mean, torch.where(constant, 0.0, variance.clamp_min(torch.finfo(mean.dtype).tiny).rsqrt()))

    def apply(self, f: Features, order: Int[Tensor, " kept"] | None = None) -> Float[Tensor, "kept dim"]:
        """Return the scaled rows, those of `order` if given; of features narrower than float64 rounded to float32."""
        dtype = torch.promote_types(f.dtype, torch.float32)
        rows = len(f) if order is None else len(order)
        out = torch.empty(rows, f.shape[1], dtype=dtype, device=self.mean.device)
        step = max(1, _BLOCK_ELEMENTS // f.shape[1])
        for start in range(0, rows, step):
            part = slice(start, start + step)
            block = f[part] if order is None else f[order[part].to(f.device)]
            out[part] = (block.to(self.mean.device).double() - self.mean) * self.factor
        return out
