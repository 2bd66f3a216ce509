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


def check_at_least(fewest: int, **values: int | float) -> None:
    """Refuse numbers below `fewest`, and NaN.

    Raises:
        UsageError: one is.

    Example:
        >>> check_at_least(1, w_iter=0)
        Traceback (most recent call last):
        hfproj.errors.UsageError: w_iter must be at least 1, got 0.
    """
    for name, value in values.items():
        if not fewest <= value < math.inf:
            raise UsageError(f"{name} must be at least {fewest}, got {value}.")


def check_shape(
    objective: nn.Module, name: str, value: Tensor, z: Tensor, *, views: int | None = None, dim: int | None = None
) -> None:
    """Refuse predictions, targets or scores that do not belong to the projections.

    Args:
        objective: Who asks.
        name: ``"prediction"``, ``"target"`` or ``"scores"``.
        value: Expected as ``[views, batch, dim]``.
        z: The projections ``[views, batch, dim]``.
        views: How many views `value` must have at least; None: as many as `z`, and no more.
        dim: Its width; None: that of `z`.

    Raises:
        UsageError: another shape.
    """
    wanted = [z.shape[0] if views is None else views, z.shape[1], z.shape[2] if dim is None else dim]
    fits = value.ndim == 3 and list(value.shape[1:]) == wanted[1:]
    if not fits or value.shape[0] < wanted[0] or (views is None and value.shape[0] > wanted[0]):
        like = "the images and the width" if dim is None else "the images"
        raise UsageError(
            f"{type(objective).__name__} needs {name} of shape {wanted}, {like} of z {list(z.shape)}, got "
            f"{list(value.shape)}."
        )


def check_per_image(objective: nn.Module, name: str, value: Tensor, z: Tensor) -> None:
    """Refuse labels or numbers of images that are not one whole number for each image.

    Args:
        objective: Who asks.
        name: ``"labels"`` or ``"index"``.
        value: Expected as ``[batch]``.
        z: The projections ``[views, batch, dim]``.

    Raises:
        UsageError: they are not.
    """
    if value.shape != z.shape[1:2] or value.is_floating_point():
        raise UsageError(
            f"{type(objective).__name__} needs one whole number for each of the {z.shape[1]} images as {name}, got "
            f"{value.dtype} of shape {list(value.shape)}."
        )
