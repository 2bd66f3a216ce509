"""Checks of numbers and tensors that several objectives are given."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from hfproj.errors import UsageError


def check_positive(name: str, value: float, *, usual: str = "") -> float:
    """Return `value` if it is a finite number above zero.

    Args:
        name: Of the option.
        value: What was given.
        usual: What is, for the message: ``"0.05 to 1"``.

    Raises:
        UsageError: it is not.

    Example:
        >>> check_positive("temperature", -1.0, usual="0.05 to 1")
        Traceback (most recent call last):
        hfproj.errors.UsageError: temperature must be a positive number (0.05 to 1 is usual), got -1.0.
    """
    if not 0 < value < math.inf:
        raise UsageError(f"{name} must be a positive number{f' ({usual} is usual)' if usual else ''}, got {value}.")
    return value


def check_temperature(temperature: float) -> float:
    """Return a softmax temperature that can work.

    Raises:
        UsageError: it is zero, negative or not finite.
    """
    return check_positive("temperature", temperature, usual="0.05 to 1")


def check_momentum(ema_momentum: Sequence[float]) -> tuple[float, float]:
    """Return the momentum of the moving average at the start and at the end.

    Raises:
        UsageError: it is not two numbers from 0 to 1.

    Example:
        >>> check_momentum([0.99, 1.0])  # a list, as a JSON file has it
        (0.99, 1.0)
    """
    if len(ema_momentum) != 2 or not all(0 <= m <= 1 for m in ema_momentum):
        raise UsageError(f"ema_momentum must be two numbers from 0 to 1, at the start and end, got {ema_momentum}.")
    return ema_momentum[0], ema_momentum[1]


def check_shape(objective: nn.Module, name: str, value: Tensor, z: Tensor, *, views: int | None = None) -> None:
    """Refuse predictions or targets that do not belong to the projections.

    Args:
        objective: Who asks.
        name: ``"prediction"`` or ``"target"``.
        value: Expected as ``[views, batch, dim]``.
        z: The projections ``[views, batch, dim]``.
        views: How many views `value` must have at least; None: as many as `z`, and no more.

    Raises:
        UsageError: another shape.
    """
    wanted = z.shape[0] if views is None else views
    fits = value.ndim == 3 and value.shape[1:] == z.shape[1:]
    if not fits or value.shape[0] < wanted or (views is None and value.shape[0] > wanted):
        raise UsageError(
            f"{type(objective).__name__} needs {name} of shape {[wanted, *z.shape[1:]]}, the images and the width of "
            f"z {list(z.shape)}, got {list(value.shape)}."
        )
