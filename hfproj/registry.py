"""Names for classes: ``create(name, **options)``, imported only when asked for."""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from hfproj.errors import UsageError, unknown


class Registry:
    """A table from a name to a class, given as ``"module:Class"`` so that listing names imports nothing.

    Args:
        kind: What the entries are, in the singular, for messages: ``"head"``.
        entries: name → (``"module:Class"``, one line that says what it is), with a dict of options as a third part
            where the name stands for a class with other defaults.
    """

    def __init__(self, kind: str, entries: dict[str, tuple[str, str] | tuple[str, str, dict[str, Any]]]):
        self.kind = kind
        self._entries: dict[str, tuple[str | type, str, dict[str, Any]]] = {
            name: (entry[0], entry[1], entry[2] if len(entry) > 2 else {}) for name, entry in entries.items()
        }

    def register(self, name: str, cls: type, line: str = "") -> None:
        """Add a class of your own under `name`; an adapter saved with it needs the same call before loading.

        Raises:
            UsageError: the name is taken.
        """
        if name in self._entries:
            raise UsageError(f"A {self.kind} named {name!r} exists already; choose another name.")
        self._entries[name] = (cls, line or next(iter((cls.__doc__ or "").strip().splitlines()), ""), {})

    def list(self) -> dict[str, str]:
        """Return every name with the line that describes it."""
        return {name: line for name, (_, line, _) in sorted(self._entries.items())}

    def get(self, name: str) -> type:
        """Return the class behind `name`.

        Raises:
            UsageError: no entry has this name.
        """
        if name not in self._entries:
            raise unknown(self.kind, name, self._entries)
        target = self._entries[name][0]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = getattr(importlib.import_module(module), attribute)
        return target

    def create(self, name: str, **options: Any) -> Any:
        """Return ``get(name)(**options)``, with the name's own defaults; it remembers both in ``created``.

        Raises:
            UsageError: no entry has this name, it has no such option, an option is missing, or a value has another type
                than the constructor's annotation.
        """
        cls = self.get(name)
        parameters = inspect.signature(cls).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            for option in options:
                if option not in parameters:
                    raise unknown(f"option of {self.kind} {name!r}:", option, parameters)
        given = {**self._entries[name][2], **options}
        missing = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.KEYWORD_ONLY]
        if absent := [n for n in missing if n not in given]:
            raise UsageError(f"The {self.kind} {name!r} needs {', '.join(f'{n}=…' for n in absent)}.")
        _check_types(f"{self.kind} {name!r}", cls, given)
        made = cls(**given)
        made.created = {"name": name, **options}
        return made

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """Return the options of `name`, with the name's own defaults.

        Raises:
            UsageError: no entry has this name.
        """
        own = self._entries[name][2] if name in self._entries else {}
        parameters = inspect.signature(self.get(name)).parameters
        return {n: p.replace(default=own.get(n, p.default)) for n, p in parameters.items()}


def options_of(made: Any) -> dict[str, Any]:
    """Return the options of an object: what its constructor takes by keyword and keeps under the same name.

    Example:
        >>> class Probe:
        ...     def __init__(self, *, k: int = 20, quiet: bool = True):
        ...         self.k = k
        >>> options_of(Probe(k=5))
        {'k': 5}
    """
    parameters = inspect.signature(type(made)).parameters.values()
    return {p.name: getattr(made, p.name) for p in parameters if p.kind is p.KEYWORD_ONLY and hasattr(made, p.name)}


class ShowsOptions:
    """Beside ``nn.Module``: its ``repr`` shows the options, those that are modules or tensors left to torch.

    Example:
        >>> class Loss(ShowsOptions, nn.Module):
        ...     def __init__(self, *, temperature: float = 0.2):
        ...         super().__init__()
        ...         self.temperature = temperature
        >>> Loss()
        Loss(temperature=0.2)
    """

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        shown = {n: v for n, v in options_of(self).items() if not isinstance(v, nn.Module | Tensor)}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


_WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    dict: "a dict",
    Mapping: "a dict",
    Sequence: "a list",
    NoneType: "None",
}


def _check_types(who: str, cls: type, options: Mapping[str, Any]) -> None:
    """Refuse values that are of another type than the constructor says: ``temperature="0.1"``, ``gather="no"``."""
    try:
        hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    except (NameError, TypeError):  # annotations of a class of the user's own that can't be read
        return
    for name, value in options.items():
        hint = hints.get(name, Any)
        if not _fits(value, hint):
            words = [_WORDS.get(get_origin(kind) or kind, str(kind)) for kind in _alternatives(hint)]
            wanted = " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
            raise UsageError(f"{name} of {who} must be {wanted}, got {value!r} of type {type(value).__name__}.")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    return any(_is(value, kind) for kind in _alternatives(hint))


def _is(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin in (int, float):  # a bool is an int to Python, an int fits where a float is asked for
        return isinstance(value, Integral if origin is int else Real) and not isinstance(value, bool)
    if origin is Sequence:
        return isinstance(value, list | tuple) and all(_fits(item, parts[0] if parts else Any) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(_fits(v, parts[1] if parts else Any) for v in value.values())
    return isinstance(value, origin) if origin in (bool, str, NoneType) else True
