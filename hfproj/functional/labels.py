"""What a label says: a class number, nothing (unlabelled), or a score, which is no class.

Class numbers are whole numbers: integers of any library, and booleans. −1, which data sets give to what has no label,
None and NaN are no class; other negative numbers are classes like others (of the objective SupCon they are none). Any
other floating-point number is a score, 3.0 too: whether a column holds scores must not depend on the rows of a batch.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hfproj.errors import NotMeasurableError, UsageError

UNLABELLED = -1


def class_number(value: Any) -> int:
    """Return a label as a class number, and `UNLABELLED` for None and NaN.

    Raises:
        TypeError: If it is a score, a name, or anything else that is no whole number of 64 bits.

    Example:
        >>> [class_number(value) for value in (3, True, None, float("nan"), -7)]
        [3, 1, -1, -1, -7]
    """
    value = value.as_py() if hasattr(value, "as_py") else value  # of pyarrow
    if value is None or value is np.ma.masked or type(value).__name__ == "NAType":  # of pandas
        return UNLABELLED
    if isinstance(value, np.bool_):
        return int(value)
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: torch, of a tensor that has no one value
        if isinstance(value, str | bytes) or not _is_nan(value):
            raise TypeError from None
        return UNLABELLED
    if not -(2**63) <= number < 2**63:
        raise TypeError
    return number


def class_numbers(y: Any) -> Int[Tensor, " rows"]:
    """Return labels `[rows]` as int64 on the CPU; `UNLABELLED` for None and NaN.

    Raises:
        UsageError: If a label is a score, a name, or anything else that is no whole number.

    Example:
        >>> class_numbers([3, None, True]).tolist(), class_numbers(np.array([2, 0])).tolist()
        ([3, -1, 1], [2, 0])
    """
    if isinstance(y, Tensor) and y.is_meta:
        raise UsageError("Expected class numbers, got a tensor without data (meta).")
    if isinstance(y, Tensor) and y.dtype == torch.uint64:
        y = y.detach().cpu().numpy()
    if isinstance(y, Tensor) and not (y.is_floating_point() or y.is_complex()):
        return y.detach().cpu().long()
    if isinstance(y, np.ndarray) and y.dtype.kind in "biu" and not isinstance(y, np.ma.MaskedArray):
        if y.dtype.kind == "u" and y.size and y.max() >= 2**63:
            raise UsageError(f"Expected class numbers, {described(int(y.max()))}.")
        return torch.from_numpy(y.astype(np.int64))
    found: list[int] = []
    for value in y.detach().cpu() if isinstance(y, Tensor) else y:
        try:
            found.append(class_number(value))
        except TypeError:
            raise UsageError(f"Expected class numbers, {described(value)}.") from None
    return torch.tensor(found, dtype=torch.int64)


def labels_as_given(y: Any) -> Tensor:
    """Return labels as `class_numbers` does, but scores as they are, and NaN for a missing one.

    Example:
        >>> labels_as_given([0.5, None]), labels_as_given([1, None])
        (tensor([0.5000,    nan]), tensor([ 1, -1]))
    """
    try:
        return class_numbers(y)
    except UsageError as error:
        if isinstance(y, Sequence):
            y = [float("nan") if value is None else value for value in y]
        try:
            return torch.as_tensor(y).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            raise error from None


def described(value: Any) -> str:
    """Return what is wrong with a value that is no class number, and what to do.

    Example:
        >>> described(3.5)
        'got float 3.5. A score is no class, ...'
    """
    got = f"got {type(value).__name__} {str(value)!r:.60}" if isinstance(value, str | bytes) else ""
    if got:
        how = "dataset.class_encode_column(…), numpy.unique(y, return_inverse=True)[1]"
        return f"{got}. Encode names as class numbers: {how}"
    if isinstance(value, int):
        return f"got a whole number of {value.bit_length()} bits, more than 64. Number the classes from 0"
    hint = "A score is no class, a whole one neither: cast class numbers to integers, with −1 where there is none"
    return f"got {type(value).__name__} {_shown(value)}. {hint}"


def labelled_rows(labels: Int[Tensor, " rows"], what: str) -> Bool[Tensor, " rows"]:
    """Return which rows have a class.

    Raises:
        NotMeasurableError: If none has.

    Example:
        >>> labelled_rows(torch.tensor([4, -1]), "test").tolist()
        [True, False]
    """
    kept = labels != UNLABELLED
    if not kept.any():
        raise NotMeasurableError(f"none of {len(labels)} {what} rows has a label")
    return kept


def check_classes(labels: Int[Tensor, " rows"], what: str, test: Int[Tensor, " test_rows"] | None = None) -> None:
    """Refuse labels of a single class, on which every classifier is right, and `test` without one of their classes.

    Raises:
        NotMeasurableError: If they are so, or none is a class.

    Example:
        >>> check_classes(torch.tensor([4, -1, 4]), "training")
        Traceback (most recent call last):
        hfproj.errors.NotMeasurableError: all labelled training rows are of one class, 4
    """
    classes = labels[labelled_rows(labels, what)].unique()
    if len(classes) < 2:
        raise NotMeasurableError(f"all labelled {what} rows are of one class, {int(classes)}")
    if test is not None:
        asked = test[labelled_rows(test, "test")].unique()
        if not set(asked.tolist()) & set(classes.tolist()):
            of_test, of_train = (f"{int(y.min())} to {int(y.max())}" for y in (asked, classes))
            raise NotMeasurableError(
                f"no class of the test rows ({of_test}) is among those of the {what} rows ({of_train})"
            )


def _shown(value: Any) -> str:
    try:
        if getattr(value, "shape", ()):  # it may be large, or show more than it holds
            return f"of shape {list(value.shape)}"
        return f"{getattr(value, 'tolist', lambda: value)()!s:.60}"
    except Exception:  # of an object's own making
        return "that has no text"


def _is_nan(value: Any) -> bool:
    try:
        return math.prod(getattr(value, "shape", ())) == 1 and bool(value != value)
    except (TypeError, ValueError, RuntimeError):  # an array, for example
        return False
