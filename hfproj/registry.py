"""Names for classes: ``create(name, **options)``, imported only when asked for; constructors are the config."""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from hfproj.checking import check_types
from hfproj.errors import UsageError, unknown

Made = TypeVar("Made")


class Registry(Generic[Made]):
    """A table from a name to a class, given as ``"module:Class"`` so that listing names imports nothing.

    Args:
        kind: What the entries are, in the singular, for messages: ``"head"``.
        entries: name → (``"module:Class"``, one line that says what it is), with a dict of options as a third part
            where the name stands for a class with other defaults.
        base: What a registered class derives from.
        needs: Methods and class attributes that a registered class defines itself.
        options: Keywords that the constructor of a registered class takes.
        calls: Class → method → what the library passes to it, keywords as ``"step="``.
    """

    def __init__(
        self, kind: str, entries: dict[str, tuple[str, str] | tuple[str, str, dict[str, Any]]], *,
        base: type[Made] | None = None, needs: Sequence[str] = (), options: Sequence[str] = (),
        calls: Callable[[type], Mapping[str, Sequence[str]]] = lambda cls: {},
    ):  # fmt: skip
        self._a_kind = f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
        self.kind, self._base, self._needs, self._options, self._calls = kind, base or object, needs, options, calls
        self._entries: dict[str, tuple[str | type, str, dict[str, Any]]] = {
            name: (entry[0], entry[1], entry[2] if len(entry) > 2 else {}) for name, entry in entries.items()
        }

    def register(self, name: str, cls: type[Made], line: str = "") -> None:
        """Add a class of your own under `name`; `line` is by default the first line of its docstring.

        Raises:
            UsageError: If the name is taken, or the class lacks what the library needs of it.
        """
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
            first = f"; the name comes first: register_{self.kind}('mine', {getattr(name, '__name__', name)})"
            hint = first if isinstance(name, type) else ""
            wanted = f"a name of letters, digits, '_', '-' and '.' for {self._a_kind}"
            raise UsageError(f"Expected {wanted}, got {name!r}{hint}.")
        if name in self._entries:
            wanted = f"a new name for {self._a_kind}"
            raise UsageError(f"Expected {wanted}, got {name!r}, which exists; choose another name.")
        self.check(cls)
        self._entries[name] = (cls, line or next(iter((cls.__doc__ or "").strip().splitlines()), ""), {})

    def check(self, cls: Any) -> None:
        """Refuse a class that lacks what the library needs of it.

        Raises:
            UsageError: If `cls` is no class, has another base class, lacks a method, an attribute or an option, or
                can't be made or called as the library does it.

        Example:
            >>> Registry("probe", {}, needs=["fit"]).check(Exception)
            Traceback (most recent call last):
            hfproj.errors.UsageError: Expected a probe with fit, got Exception without fit; define it.
        """
        if not (isinstance(cls, type) and issubclass(cls, self._base)):
            wanted = "a class" if self._base is object else f"a subclass of {self._base.__name__}"
            raise UsageError(f"Expected {wanted} as {self._a_kind}, got {cls!r}; pass the class, not an instance.")
        missing = [n for n in self._needs if getattr(cls, n, None) is getattr(self._base, n, None)]
        taken = inspect.signature(cls).parameters if self._options or not missing else {}
        if cls is not nn.Module and cls.__init__ is nn.Module.__init__:  # type: ignore[misc]  # takes and refuses any option
            taken = {}
        if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            missing += [f"__init__({n}=…)" for n in self._options if n not in taken]
        no_name = [n for n, p in taken.items() if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
        missing += [f"__init__({n}=…)" for n in no_name]
        if missing:
            wanted = " and ".join([*self._needs, *(f"__init__({n}=…)" for n in self._options)])
            raise UsageError(
                f"Expected {self._a_kind} with {wanted}, got {cls.__name__} without {', '.join(missing)}; define "
                f"{'it' if len(missing) == 1 else 'them'}."
            )
        for method, given in self._calls(cls).items():
            signature = inspect.signature(getattr(cls, method))
            itself = [cls] if inspect.isfunction(inspect.getattr_static(cls, method)) else []
            keywords = [name for name in given if name.endswith("=")]
            try:
                signature.bind(*itself, *given[: len(given) - len(keywords)], **{name[:-1]: None for name in keywords})
            except TypeError as error:
                own = [p.replace(annotation=p.empty) for p in signature.parameters.values()][len(itself) :]
                raise UsageError(
                    f"Expected {method}({', '.join(given).replace('=', '=…')}), as each {self.kind} is called, got "
                    f"{cls.__name__}.{method}{inspect.Signature(own)}: {error}; let it take all of these"
                    f"{', those that it does not use as **others' if keywords else ''}."
                ) from None

    def list(self) -> dict[str, str]:
        """Return every name with the line that describes it."""
        return {name: line for name, (_, line, _) in sorted(self._entries.items())}

    def get(self, name: str) -> type[Made]:
        """Return the class behind `name`.

        Raises:
            UsageError: If no entry has this name.
        """
        if not isinstance(name, str) or name not in self._entries:
            raise unknown(self.kind, name, self._entries)
        target: Any = self._entries[name][0]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = getattr(importlib.import_module(module), attribute)
        return target

    def create(self, name: str, **options: Any) -> Made:
        """Return ``get(name)(**options)``, with the name's own defaults; it remembers both in ``created``.

        Raises:
            UsageError: If no entry has this name, it has no such option, an option is missing, or a value has another
                type than the constructor's annotation.
        """
        cls = self.get(name)
        parameters = inspect.signature(cls).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            for option in options:
                if option == "weight" and self.kind == "regularizer" and option not in parameters:
                    how = f"the trainer has the weights: regularizers={{{name!r}: {options[option]!r}}}"
                    raise UsageError(f"The regularizer {name!r} has no option 'weight'; {how}.")
                if option not in parameters:
                    raise unknown(f"option of {self.kind} {name!r}:", option, parameters)
        given = {**self._entries[name][2], **options}
        by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        required = [n for n, p in parameters.items() if p.default is p.empty and p.kind in by_name]
        if absent := [n for n in required if n not in given]:
            raise UsageError(f"The {self.kind} {name!r} needs {', '.join(f'{n}=…' for n in absent)}.")
        check_types(f"{self.kind} {name!r}", cls.__init__, given)  # type: ignore[misc]
        made: Any = cls(**given)
        made.created = {"name": name, **options}
        return made

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """Return the options of `name`, with the name's own defaults.

        Raises:
            UsageError: If no entry has this name.
        """
        own = self._entries[name][2] if name in self._entries else {}
        parameters = inspect.signature(self.get(name)).parameters
        return {n: p.replace(default=own.get(n, p.default)) for n, p in parameters.items()}


def options_of(made: Any) -> dict[str, Any]:
    """Return the options of an object: what its constructor takes and keeps under the same name.

    Example:
        >>> class Probe:
        ...     def __init__(self, *, k: int = 20, quiet: bool = True):
        ...         self.k = k
        >>> options_of(Probe(k=5))
        {'k': 5}
    """
    return {name: getattr(made, name) for name in inspect.signature(type(made)).parameters if hasattr(made, name)}


class ShowsOptions:
    """Beside ``nn.Module``: its ``repr`` shows the options, those that are modules or tensors left to torch.

    Example:
        >>> class Loss(ShowsOptions, nn.Module):
        ...     def __init__(self, dim: int, *, temperature: float = 0.2):
        ...         super().__init__()
        ...         self.dim, self.temperature = dim, temperature
        >>> Loss(8)
        Loss(8, temperature=0.2)
    """

    def extra_repr(self) -> str:
        """Return the options for ``repr``, those that are taken by position without their names."""
        parameters = inspect.signature(type(self)).parameters
        shown = [(parameters[n], v) for n, v in options_of(self).items() if not isinstance(v, nn.Module | Tensor)]
        return ", ".join(f"{p.name}={v!r}" if p.kind is p.KEYWORD_ONLY else repr(v) for p, v in shown)
