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


def check_kept_width(who: str, in_dim: object, out_dim: object) -> int:
    """Return `in_dim`, the width of z too, for a head that keeps the width.

    Raises:
        UsageError: it is no width, or `out_dim` is given and differs.

    Example:
        >>> check_kept_width("This head", 384, None)
        384
    """
    width = check_positive("in_dim", in_dim)
    if out_dim not in (None, width):
        raise UsageError(
            f"{who} keeps the width: out_dim must be in_dim={width}, got {out_dim}. "
            "Leave out_dim away, or use the head 'linear' to change the width."
        )
    return width


def check_d0(d0: object, in_dim: object) -> tuple[int, int]:
    """Return `d0` and `in_dim` if the first d0 entries can be taken from so many.

    Raises:
        UsageError: they can't.

    Example:
        >>> check_d0(360, 2048)
        (360, 2048)
    """
    kept, width = check_positive("d0", d0), check_positive("in_dim", in_dim)
    if kept > width:
        raise UsageError(
            f"d0={kept} entries can't be taken from a representation of {width}: choose d0 from 1 to {width} "
            "(DirectCLR keeps 360 of 2048)."
        )
    return kept, width


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
