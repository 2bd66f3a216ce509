"""Errors that a user can act on: each message says what was expected, what was given and what to do."""

import os
from collections.abc import Collection, Iterable

from hfproj.hints import listed, nearest


class HfprojError(Exception):
    """Base of every error that this library raises on purpose."""


class UsageError(HfprojError, ValueError):
    """An argument, option, input or combination is invalid; the message is one line, whatever value it quotes."""

    def __init__(self, *args: object):
        super().__init__(*(" ".join(a.split()) if isinstance(a, str) and "\n" in a else a for a in args))


class CallError(UsageError, TypeError):
    """A function was called with too many, too few or unknown arguments; the message says how it is called."""


class NotMeasurableError(UsageError):
    """The data has no value of what was asked for: no label, one class, one row. The message is the reason."""


class AdapterFileError(HfprojError, ValueError):
    """A saved adapter is missing, damaged or meant for another backbone."""


class HubError(HfprojError, OSError):
    """The Hub refused, failed, or could not be reached."""


class SaveError(HfprojError, OSError):
    """A checkpoint or an adapter could not be written; the message says what lies there now."""


class NonFiniteLossError(HfprojError, FloatingPointError):
    """The loss or its gradient became NaN or infinite."""


class CollapseWarning(UserWarning):
    """The representation or the projection collapses while training."""


def unknown(kind: str, name: object, available: Iterable[str]) -> UsageError:
    """Return the error for a name that is not in a list, with the nearest name that is.

    Example:
        >>> str(unknown("head", "mpl", ["identity", "linear", "mlp"]))
        "Unknown head 'mpl'. Did you mean 'mlp'? Available: identity, linear, mlp."
    """
    names = sorted(available)
    close = nearest(name, names)
    hint = f" Did you mean {close!r}?" if close else ""
    shown = " ".join(repr(name).split())
    shown = shown if len(shown) <= 200 else f"{shown[:199]}…"
    return UsageError(f"Unknown {kind} {shown}.{hint} Available: {listed(name, names)}.")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Refuse an option's value that is none of `choices`.

    Raises:
        UsageError: If it is none of them; the message lists them.

    Example:
        >>> check_choice("side", "left", ("left", "right"))
    """
    try:
        known = value in choices
    except (TypeError, ValueError, RuntimeError):  # of arrays, which compare element by element
        known = False
    if not known:
        raise unknown(name, value, map(str, choices))


def check_type(what: str, value: object, kind: type | tuple[type, ...], hint: str) -> None:
    """Refuse a value that is of another type.

    Raises:
        UsageError: If it is; the message ends in the hint.

    Example:
        >>> check_type("features", [[1.0, 2.0]], dict, "name each layer")
        Traceback (most recent call last):
        hfproj.errors.UsageError: Expected features as dict, got list; name each layer.
    """
    if not isinstance(value, kind):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise UsageError(f"Expected {what} as {kinds}, got {type(value).__name__}; {hint}.")


def check_path(what: str, value: object) -> None:
    """Refuse anything but a path, as `check_type` does."""
    check_type(what, value, (str, os.PathLike), "give the path as a string or a pathlib.Path")


def one_line(error: BaseException, length: int = 200) -> str:
    r"""Return the first line of an error's message without its last full stop, or its type where it has no message.

    Example:
        >>> one_line(ValueError("The shapes differ.\nSee the manual.")), one_line(KeyError())
        ('The shapes differ', 'KeyError')
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0].removesuffix(".") if lines else type(error).__name__
    return text if len(text) <= length else text[: length - 1] + "…"
