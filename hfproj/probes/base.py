"""What probes share: labels, checks, scaling, a held-out part, and a base class with `predict`, `score` and ``repr``.

A probe of your own needs no base class, only what `hfproj.typing.Probe` lists. One that predicts labels from features
is shortest when it derives from `Classifier`: a constructor that keeps its options under their names,
``_fit(f, codes)`` and ``_codes(f)``.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from hfproj.checking import checked
from hfproj.errors import NonFiniteLossError, UsageError
from hfproj.functional.feature_rows import check_features, double_rows
from hfproj.functional.labels import class_numbers, labelled_rows
from hfproj.registry import options_of
from hfproj.typing import Features

Inputs = Float[Tensor, "rows *rest"] | Float[np.ndarray, "rows *rest"]  # features [rows, dim] or tokens
Labels = Int[Tensor, " rows"] | Int[np.ndarray, " rows"] | Iterable[int | float | None]  # None, NaN and −1: no label

Own = TypeVar("Own", bound="Classifier")

_CONSTANT = 2  # in units of the dtype's spacing: the largest rounding error is a half
_BLOCK_ELEMENTS = 2**17  # of float64 at a time: 1 MiB, which stays in a CPU's cache


class Named:
    """``repr`` and results of every probe here.

    Attributes:
        name: What the registry and `results.json` call it.
        unit: What `score` returns.
        on: What `fit` and `score` get from `evaluate`: "features", "tokens" or "model".
        results_: After scoring: ``{"value": …, "protocol": {…}}``, and ``"values"``, a mapping of further numbers.
    """

    name = ""
    unit = "accuracy"
    on = "features"
    results_: dict[str, Any]
    _train_unlabelled = 0
    _left_out: tuple[str, ...] = ()  # options that change no number, or have no plain form

    def _options(self) -> dict[str, Any]:
        return {name: value for name, value in options_of(self).items() if name not in self._left_out}

    def _settings(self, seed: str = "probe_seed") -> dict[str, Any]:
        """Return the options for a protocol, where "seed" may be taken: that of the training run."""
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in self._options().items()}
        return {seed if name == "seed" else name: value for name, value in plain.items()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{n}={v!r}' for n, v in self._options().items())})"


class Classifier(Named):
    """A probe that is fitted on features (or tokens) and their labels, and predicts labels.

    Attributes:
        classes_: `[classes]` labels, sorted.
        correct_: After scoring: `[labelled rows]` bool, for `paired_interval`.
    """

    classes_: Int[Tensor, " classes"]
    correct_: Tensor
    _rows: int
    _dim: int

    @checked
    def fit(self: Own, f: Inputs, y: Labels) -> Own:
        """Fit on the rows of `f` that have a label: `y`, integers; −1, None and NaN are none.

        Raises:
            UsageError: If there are no rows, if rows are not finite, or if labels are no integers or do not match them.
            NotMeasurableError: If no row has a label.
            NonFiniteLossError: If the loss became NaN or infinite.
        """
        self._check_input(f, "training features")
        f, labels, self._train_unlabelled = labelled(f, y, "training")
        self.classes_, codes = torch.unique(labels, return_inverse=True)
        self._rows = len(f)
        self._fit(f, codes)
        self._dim = f.shape[-1]
        return self

    def _fit(self, f: Any, codes: Int[Tensor, " rows"]) -> None:
        """Learn from features and the number of each row's class, on the CPU."""
        raise NotImplementedError

    def _codes(self, f: Any) -> Int[Tensor, " rows"]:
        """Return the number of the predicted class of each row."""
        raise NotImplementedError

    def _protocol(self) -> dict[str, Any]:
        return self._settings()

    def _check_input(self, f: Any, what: str) -> None:
        check_features(f, minimum=1, what=what)

    def _check(self, f: Any) -> None:
        if not hasattr(self, "_dim"):
            raise UsageError(f"This {type(self).__name__} is not fitted yet: call fit(features, labels) first.")
        self._check_input(f, "features")
        if f.shape[-1] != self._dim:
            raise UsageError(f"The probe was fitted on {self._dim} columns, these features have {f.shape[-1]}.")

    def predict(self, f: Inputs) -> Int[Tensor, " rows"]:
        """Return the predicted label of every row, on the CPU.

        Raises:
            UsageError: If the probe is not fitted, if there are no rows or their width is not that of `fit`, or if rows
                are not finite.
        """
        self._check(f)
        return self.classes_[self._codes(f).cpu()]

    @checked
    def score(self, f: Inputs, y: Labels) -> float:
        """Return the accuracy on the rows of `f` that have a label, and keep it with its protocol in `results_`.

        `correct_` has it row by row.

        Raises:
            UsageError: As `predict`, or if labels are no integers or do not match the rows.
            NotMeasurableError: If no row has a label.
        """
        self._check(f)
        f, truth, left_out = self._scored(f, y)
        predicted = self.predict(f)
        self.correct_ = predicted == truth
        value = self.correct_.double().mean().item()
        sizes = {"train_rows": self._rows, "classes": len(self.classes_), "test_rows": len(predicted)}
        self.results_ = {"value": value, "protocol": {**self._protocol(), **sizes, **left_out}}
        return value

    def _scored(self, f: Any, y: Labels) -> tuple[Any, Int[Tensor, " labelled"], dict[str, int]]:
        """Return the test rows that have a label, their labels, and for the protocol how many were left out."""
        f, truth, unlabelled = labelled(f, y, "test")
        return f, truth, left_out(self._train_unlabelled, unlabelled)


def as_labels(y: Any, rows: int) -> Int[Tensor, " rows"]:
    """Return labels as int64 `[rows]` on the CPU, −1 for None and NaN.

    Example:
        >>> as_labels([3, -7, None], 3)
        tensor([ 3, -7, -1])
    """
    try:
        labels = class_numbers(y)
    except (UsageError, TypeError) as error:
        reason = str(error).removeprefix("Expected class numbers, ").rstrip(".")
        raise UsageError(f"Expected one integer label for each of {rows} rows, {reason}.") from error
    if labels.shape != (rows,):
        found = f"got {labels.dtype} of shape {list(labels.shape)}"
        raise UsageError(f"Expected one integer label for each of {rows} rows, {found}.")
    return labels


def labelled(f: Any, y: Any, what: str) -> tuple[Any, Int[Tensor, " labelled"], int]:
    """Return the rows (of a tensor or an array) that have a class, their labels, and how many rows have none.

    Raises:
        NotMeasurableError: If none has.

    Example:
        >>> labelled(torch.tensor([[1.0], [2.0]]), [-1, 5], "test")
        (tensor([[2.]]), tensor([5]), 1)
    """
    labels = as_labels(y, len(f))
    kept = labelled_rows(labels, what)
    if kept.all():
        return f, labels, 0
    rows = kept.to(f.device) if isinstance(f, Tensor) else kept.numpy()
    return f[rows], labels[kept], int((~kept).sum())


def left_out(train: int, test: int) -> dict[str, int]:
    """Return for a protocol how many rows had no label, where there were any.

    Example:
        >>> left_out(0, 3)
        {'test_unlabelled': 3}
    """
    return {name: n for name, n in (("train_unlabelled", train), ("test_unlabelled", test)) if n}


def check_numbers(**values: int | float) -> None:
    """Refuse whole numbers below 1 and others that are not positive and finite.

    Example:
        >>> check_numbers(epochs=0)
        Traceback (most recent call last):
        hfproj.errors.UsageError: Expected epochs ≥ 1, got 0.
    """
    for name, value in values.items():
        if isinstance(value, int) and value < 1:
            raise UsageError(f"Expected {name} ≥ 1, got {value}.")
        if not 0 < value < math.inf:
            raise UsageError(f"Expected a finite {name} > 0, got {value}.")


def check_decay(weight_decay: float) -> None:
    """Refuse a weight decay that is negative or not finite."""
    if not 0 <= weight_decay < math.inf:
        raise UsageError(f"Expected a finite weight_decay ≥ 0, got {weight_decay}.")


def check_path(name: str, values: Sequence[int | float]) -> tuple[int | float, ...]:
    """Return strengths or learning rates to choose from as a tuple."""
    if not values:
        raise UsageError(f"{name} is empty; give at least one number.")
    for value in values:
        check_numbers(**{f"number in {name}": float(value)})
    return tuple(values)


def check_fraction(**values: int | float) -> None:
    """Refuse what is no number between 0 and 1."""
    for name, value in values.items():
        if not 0 < value < 1:
            raise UsageError(f"Expected a fraction 0 < {name} < 1, got {value}.")


def descend(
    groups: list[dict[str, Any]], batches: Iterable[Any], loss_of: Callable[[Any], Tensor],
    factor: Callable[[int], float], *, what: str, scaler: torch.amp.GradScaler | None = None,
    max_norm: float | None = None,
) -> None:  # fmt: skip
    """Train groups of parameters by AdamW, a step per batch, with `factor` of the peak rates ``groups[i]["lr"]``."""
    optimizer = torch.optim.AdamW(groups)
    peaks = [group["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(enabled=False) if scaler is None else scaler
    for step, batch in enumerate(batches):
        loss = loss_of(batch)
        if not torch.isfinite(loss):
            hint = f"lower learning_rate ({' and '.join(f'{rate:g}' for rate in sorted(set(peaks)))} now)"
            raise NonFiniteLossError(f"The loss of {what} became {loss.item()} at step {step + 1}; {hint}.")
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * factor(step)
        if max_norm is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], max_norm)
        scaler.step(optimizer)
        scaler.update()


def cosine(step: int, steps: int) -> float:
    """Return half a cosine from 1 down to 0.

    Example:
        >>> [round(cosine(step, 4), 3) for step in range(3)]
        [1.0, 0.854, 0.5]
    """
    return (1 + math.cos(math.pi * step / steps)) / 2


def hold_out(
    codes: Int[Tensor, " rows"], fraction: float, generator: torch.Generator
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " held"]]:
    """Return the rows that are kept and those held out, each in random order.

    Example:
        >>> kept, held = hold_out(torch.tensor([0] * 10 + [1] * 2 + [2]), 0.2, torch.Generator().manual_seed(0))
        >>> len(kept), (held < 10).sum().item(), (held == 12).any().item()
        (10, 2, False)
    """
    order, place = shuffled_classes(codes, generator)
    sizes = torch.bincount(codes)
    wanted = (sizes * fraction).round().long().clamp_min(1).minimum((sizes - 1).clamp_min(0))
    held = place < wanted[codes]
    return order[~held[order]], order[held[order]]


def shuffled_classes(
    codes: Int[Tensor, " rows"], generator: torch.Generator
) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
    """Return a random order of the rows, and the place of each row in that order among the rows of its class.

    Example:
        >>> codes = torch.tensor([0, 1, 0, 1, 1])
        >>> shuffled_classes(codes, torch.Generator())[1][codes == 1].sort().values.tolist()
        [0, 1, 2]
    """
    order = torch.randperm(len(codes), generator=generator)
    by_class = order[codes[order].argsort(stable=True)]
    sizes = torch.bincount(codes)
    place = torch.empty_like(order)
    place[by_class] = torch.arange(len(codes)) - (sizes.cumsum(0) - sizes)[codes[by_class]]
    return order, place


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
        # The mean of equal numbers has a rounding error, and numbers that a model computed have that of their dtype;
        # neither must become the unit of a column.
        constant = variance.sqrt() <= max(1e-12, _CONSTANT * torch.finfo(f.dtype).eps) * mean.abs()
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


def scaled(f: Tensor, scaling: Scaling | None) -> Float[Tensor, "rows dim"]:
    """Return features scaled, or in float32 or better as they are."""
    if scaling is not None:
        return scaling.apply(f.detach())
    x = f.detach().to(torch.promote_types(f.dtype, torch.float32))
    return x.clone() if x.is_inference() else x  # gradients cannot flow through inference tensors
