"""Public calls with wrong arguments, or those of another type than annotations say: one line comes of it."""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from jaxtyping import AbstractArray
from torch import Tensor, nn

from hfproj.errors import CallError, HfprojError, UsageError, one_line
from hfproj.hints import nearest

Made = TypeVar("Made")
Call = TypeVar("Call", bound=Callable[..., Any])
_WORDS: dict[Any, str] = {
    bool: "True or False", int: "a whole number", float: "a number", str: "a string", dict: "a dict", Mapping: "a dict",
    Sequence: "a list", NoneType: "None", Callable: "a function", Iterable: "something to iterate over",
}  # fmt: skip
_SHOWN = 80  # characters of a wrong value
_LARGEST = 2**63


def checked(call: Call) -> Call:
    """Return a function whose errors about arguments of another type than its annotations say are one line.

    The function's own refusals stay, and so does what works although it is of another type; numbers that are NaN or
    have more than 64 bits are refused at once. Arguments that are unknown, missing or too many are a `CallError`, which
    says how the function is called.

    Example:
        >>> @checked
        ... def scaled(x: float, *, by: int = 2) -> float:
        ...     return x**by
        >>> scaled(1.5, by="2")
        Traceback (most recent call last):
        hfproj.errors.UsageError: Expected by of scaled to be a whole number, got '2' of type str.
    """
    signature = inspect.signature(call)
    who = call.__qualname__.removesuffix(".__init__")

    @functools.wraps(call)
    def checking(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            raise call_error(who, signature, args, kwargs) from None
        for name, value in given.items():
            _check_number(f"{name} of {who}", value)
        try:
            return call(*args, **kwargs)
        except HfprojError:
            raise
        except Exception as error:  # whatever came of a wrong argument
            try:
                check_types(who, call, given)
                _check_data(who, given)
            except UsageError as refused:
                raise refused from error
            raise

    return checking  # type: ignore[return-value]


def explained(cls: type[Made]) -> type[Made]:
    """Let a class say, by a `CallError`, which arguments of its constructor are unknown, missing or too many.

    For dataclasses, whose constructor is no function to put `checked` before. A static method ``_belongs(name, value)``
    may say how an option is written that belongs elsewhere; else it returns None.
    """
    made: Any = cls.__init__
    signature = inspect.signature(made)

    @functools.wraps(made)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            signature.bind(self, *args, **kwargs)
        except TypeError:
            raise call_error(type(self).__name__, signature, (self, *args), kwargs) from None
        made(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@contextmanager
def in_our_words(options: Any) -> Iterator[None]:
    """Return a context in which a library's refusal of an option's value names the option, in one line of ours.

    Raises:
        UsageError: In place of a ValueError.

    Example:
        >>> from types import SimpleNamespace
        >>> with in_our_words(SimpleNamespace(optim="adam")):
        ...     raise ValueError("adam is not a valid OptimizerNames, please select one of ['adamw', 'sgd']")
        Traceback (most recent call last):
        hfproj.errors.UsageError: Expected optim to be one of adamw, sgd, got 'adam'. Did you mean 'adamw'?
    """
    try:
        yield
    except HfprojError:
        raise
    except ValueError as error:
        said = one_line(error, 1000)
        found = re.fullmatch(r"(\S+) is not a valid \w+, please select one of \[(.*)\]", said)
        found = found or re.fullmatch(r"(\S+) is not supported, only (.*) are supported", said)
        if found is None:
            raise UsageError(f"{said}; change or leave out one of them.") from error
        value, known = found[1], found[2].replace("'", "").split(", ")
        names = [n for n, v in vars(options).items() if v == value or (isinstance(v, list) and value in v)]
        meant = nearest(value, known)
        hint = f" Did you mean {meant!r}?" if meant else ""
        which = " or ".join(names) or "an option"
        raise UsageError(f"Expected {which} to be one of {_some(known, 20)}, got {value!r}.{hint}") from error


def call_error(who: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CallError:
    """Return the error for a call that a signature does not take.

    Example:
        >>> def fit(x, *, y, steps=1): ...
        >>> str(call_error("fit", inspect.signature(fit), (1, 2), {}))
        'fit takes 1 argument by position (x), got 2; give the others by name: fit(x, y=…, steps=…).'
    """
    taken = {n: p for n, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    of_object = next(iter(taken), None) in ("self", "cls")
    names = [n for n in taken if n not in ("self", "cls")]
    by_position = [n for n in names if taken[n].kind is not inspect.Parameter.KEYWORD_ONLY]
    count = len(args) - of_object
    cls = (args[0] if isinstance(args[0], type) else type(args[0])) if of_object and args else None
    by_model = f" {cls.__name__}.for_model(model) knows what the model needs." if hasattr(cls, "for_model") else ""  # type: ignore[union-attr]
    any_name = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    wrong = [] if any_name else [n for n in kwargs if n not in names]
    if wrong:
        name, belongs = wrong[0], getattr(cls, "_belongs", lambda name, value: None)(wrong[0], kwargs[wrong[0]])
        if belongs:
            return CallError(f"{who} got an unexpected keyword argument {name!r}; write {belongs}.")
        meant = nearest(name, names)
        hint = f" Did you mean {meant!r}?" if meant else ""
        return CallError(f"{who} got an unexpected keyword argument {name!r}.{hint} It takes {_some(names)}.")
    if count > len(by_position):
        others = [f"{n}=…" for n in names if n not in by_position and n not in kwargs]
        named = _some([*others, *[f"**{p.name}" for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]])
        first = f"{len(by_position)} argument{'s' * (len(by_position) != 1)} by position ({', '.join(by_position)})"
        first = first if by_position else "no argument by position"
        how = ", ".join([*by_position, named])
        return CallError(f"{who} takes {first}, got {count}; give the others by name: {who}({how}).{by_model}")
    if twice := [n for n in by_position[:count] if n in kwargs]:
        return CallError(f"{who} got {twice[0]} twice, by position and by name; give it once.")
    needed = [n for n in names[count:] if taken[n].default is inspect.Parameter.empty and n not in kwargs]
    return CallError(f"{who} needs {', '.join(f'{n}=…' for n in needed)}.{by_model}")


def _some(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _check_data(who: str, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if isinstance(value, Tensor) and value.is_meta:
            raise UsageError(f"Expected {name} of {who} with data, got {_shown(value)}.")


def _check_number(what: str, value: Any) -> None:
    if isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) >= _LARGEST:
        raise UsageError(f"Expected {what} to have 64 bits, got a number of {int(value).bit_length()}.")
    if isinstance(value, Real) and value != value:
        raise UsageError(f"Expected {what} to be a number, got NaN.")


@functools.lru_cache(maxsize=1024)
def _hints(call: Callable[..., Any]) -> Mapping[str, Any]:
    try:
        return get_type_hints(inspect.unwrap(call))
    except (NameError, TypeError):  # annotations of a class of the user's own that can't be read
        return {}


def check_types(who: str, call: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse values that are of another type than the annotations say: ``temperature="0.1"``, ``gather="no"``.

    Raises:
        UsageError: If one is.
    """
    hints = _hints(call)
    for name, value in options.items():
        kinds = _alternatives(hints.get(name, Any))
        if not any(_is(value, kind) for kind in kinds):
            words = [_in_words(kind) for kind in kinds]
            wanted = " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
            raise UsageError(
                f"Expected {name} of {who} to be {wanted}, got {_shown(value)}{_cure(name, value, kinds)}."
            )
        if isinstance(value, Integral):
            _check_number(f"{name} of {who}", value)
        if torch.device in kinds and isinstance(value, str | torch.device):
            check_device(f"{name} of {who}", value)


def _cure(name: str, value: Any, kinds: Sequence[Any]) -> str:
    """Return what to do about a value of another type, where there is one answer."""
    if isinstance(value, str) and any(isinstance(k, type) and issubclass(k, nn.Module) for k in kinds):
        return f"; load it: hfproj.load_backbone({value!r})" if name in ("model", "backbone") else ""
    if isinstance(value, list | tuple) and value and str in kinds and isinstance(value[0], str):
        return f"; one at a time: {value[0]!r}"
    if int in kinds and hasattr(value, "__len__") and not isinstance(value, str | Tensor):
        return {"length": "; give its length: len(dataset)", "images": "; the data set is dataset=…"}.get(name, "")
    return ""


def check_fields(who: str, cls: type, settings: Any, *, leave: Iterable[str] = ()) -> None:
    """Refuse fields of a dataclass `cls` that hold another type than annotated, or NaN.

    What a field holds by default passes, and so does whatever those hold that `leave` names.

    Raises:
        UsageError: If one does.

    Example:
        >>> @dataclasses.dataclass
        ... class Settings:
        ...     steps: int = 1
        >>> check_fields("the settings", Settings, Settings(steps="3"))
        Traceback (most recent call last):
        hfproj.errors.UsageError: Expected steps of the settings to be a whole number, got '3' of type str.
    """
    hints = _hints(cls)
    for field in dataclasses.fields(settings):
        name, value = field.name, getattr(settings, field.name)
        kinds = {get_origin(kind) or kind for kind in _alternatives(hints.get(name, Any))}
        if name in leave or value is field.default or not all(isinstance(kind, type) for kind in kinds):
            continue
        if dict in kinds and dataclasses.is_dataclass(value) and not isinstance(value, type):
            continue  # what a dict becomes
        check_types(who, cls, {name: value})
        _check_number(f"{name} of {who}", value)


def check_ranges(settings: Any, ranges: Iterable[Sequence[Any]]) -> None:
    """Refuse attributes beyond their range; None passes.

    Args:
        settings: What has the attributes.
        ranges: Names, divided by spaces; the smallest and the largest number; what is expected, in words.

    Raises:
        UsageError: If one is.

    Example:
        >>> check_ranges(3j, [("real imag", 0, 3, "at most 3")])
    """
    for names, low, high, expected in ranges:
        for name in names.split():
            value = getattr(settings, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"Expected {name} to be {expected}, got {value}.")


_REFUSALS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, ImportError)


@contextmanager
def refused_as(what: str) -> Iterator[None]:
    """Return a context in which another library's refusal of a value is a UsageError that begins with `what`.

    What is no refusal (a device without memory, an interrupt, a file system's error) stays what it is.

    Example:
        >>> with refused_as("The date can't be read"):
        ...     int("tomorrow")
        Traceback (most recent call last):
        hfproj.errors.UsageError: The date can't be read (ValueError: invalid literal for int() with base 10: 'to...
    """
    try:
        yield
    except HfprojError:
        raise
    except _REFUSALS as error:
        raise UsageError(f"{what} ({type(error).__name__}: {error}).") from error


def check_device(what: str, value: str | torch.device) -> torch.device:
    """Return a device, which has to be one that torch sees on this machine.

    Raises:
        UsageError: If it is none, or not there.

    Example:
        >>> check_device("device", "gpu")
        Traceback (most recent call last):
        hfproj.errors.UsageError: Expected device to be a device such as 'cpu', 'cuda' or 'cuda:1', got 'gpu'.
    """
    try:
        found = torch.device(value)
    except RuntimeError:
        raise UsageError(f"Expected {what} to be a device such as 'cpu', 'cuda' or 'cuda:1', got {value!r}.") from None
    backend: Any = getattr(torch, found.type, None)  # torch.mps, torch.xpu …
    count = backend.device_count() if found.type != "cpu" and hasattr(backend, "device_count") else None
    if count is not None and (found.index or 0) >= count:
        sees, use = f"{count} of this kind" if count else "none of this kind", found.type if count else "cpu"
        what = f"Expected {what} to be a device of this machine, got '{found}'"
        raise UsageError(f"{what}, but torch sees {sees}; use {use!r}.")
    return found


def _in_words(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if isinstance(kind, type) and issubclass(kind, AbstractArray):
        dtype = kind.__name__.partition("[")[0].lower()
        return f"a tensor [{', '.join(kind.dim_str.split())}] of {dtype} numbers"
    if origin is tuple and len(get_args(kind)) == 2 and Ellipsis not in get_args(kind):
        return "a pair such as (0.4, 1.0)"
    if origin is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return _WORDS.get(origin) or f"a {getattr(origin, '__name__', origin)}"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        meta = " without data" if value.is_meta else ""
        return f"{value.dtype} of shape {list(value.shape)}{meta} of type {type(value).__name__}"
    if isinstance(value, nn.Module):
        return f"a module of type {type(value).__name__}"  # whose repr is a page
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= _SHOWN else text[: _SHOWN - 1] + '…'} of type {type(value).__name__}"


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind) or kind, get_args(kind)

    def all_fit(items: Any, part: int) -> bool:
        return not parts or all(any(_is(item, k) for k in _alternatives(parts[part])) for item in items)

    if origin in (int, float):  # a bool is an int to Python, an int fits where a float is asked for
        return isinstance(value, Integral if origin is int else Real) and not isinstance(value, bool)
    if origin is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str | bytes) and all_fit(value, 0)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all_fit(value.values(), 1)
    if origin is tuple:  # a list, as JSON has it, fits too; ``tuple[int, ...]`` of any length
        lengths = parts and parts[-1] is not Ellipsis
        kinds = parts if lengths else parts[:1] * (len(value) if isinstance(value, list | tuple) else 0)
        return (
            isinstance(value, list | tuple)
            and (not parts or len(value) == len(kinds))
            and all(any(_is(item, k) for k in _alternatives(part)) for item, part in zip(value, kinds))
        )
    if origin is Literal:
        return isinstance(value, str | int | NoneType) and value in parts
    if origin is type:
        return isinstance(value, type)
    if origin is Callable:
        return callable(value)
    if isinstance(origin, type) and issubclass(origin, AbstractArray):
        return not issubclass(origin.array_type, Tensor) or (
            isinstance(value, origin) and not getattr(value, "is_meta", False)
        )
    if origin is Iterable and getattr(value, "ndim", 1) == 0:  # a tensor of one number has an __iter__ that fails
        return False
    try:
        return origin in (Any, object) or not isinstance(origin, type) or isinstance(value, origin)
    except TypeError:  # a protocol that only type checkers know
        return True
