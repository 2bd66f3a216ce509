"""Names for classes: ``create(name, **options)``, imported only when asked for."""

import importlib
import inspect
from typing import Any

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
            UsageError: no entry has this name, or it has no such option.
        """
        cls = self.get(name)
        parameters = inspect.signature(cls).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            for option in options:
                if option not in parameters:
                    raise unknown(f"option of {self.kind} {name!r}:", option, parameters)
        made = cls(**{**self._entries[name][2], **options})
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
