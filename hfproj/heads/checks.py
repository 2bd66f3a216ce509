"""Checks that every head makes on its options and on its input."""

from torch import Tensor

from hfproj.errors import UsageError, unknown


def check_positive(name: str, value: object) -> int:
    """Return `value` if it is an integer of at least 1.

    Raises:
        UsageError: it is not.

    Example:
        >>> check_positive("out_dim", 128)
        128
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}.")
    return value


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Pass if `value` is one of `choices`.

    Raises:
        UsageError: it is not; the message lists the choices.
    """
    if value not in choices:
        raise unknown(f"{name}:", value, map(str, choices))


def check_input(who: str, h: Tensor, width: int) -> None:
    """Pass if `h` is ``[batch, width]`` or ``[views, batch, width]``.

    Raises:
        UsageError: it is not.
    """
    if h.ndim not in (2, 3) or h.shape[-1] != width:
        raise UsageError(
            f"{who} expects h of shape [batch, {width}] or [views, batch, {width}], got {list(h.shape)}. "
            + (
                f"Make it with in_dim={h.shape[-1]}, or give it features of width {width}."
                if h.ndim in (2, 3)
                else "Pool tokens or feature maps to one vector per image first."
            )
        )
