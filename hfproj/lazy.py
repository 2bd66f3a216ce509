"""Public names that are imported when first used, and what is done when another package comes to be imported, so that
``import hfproj`` stays cheap: it takes 0.05 seconds and imports neither torch nor PEFT.

A package that is lazy at run time names its public objects twice: under ``TYPE_CHECKING``, where editors and type
checkers read them, and in the table given here. ``tests/test_public_api.py`` compares the two.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from hfproj.hints import nearest

Getter = Callable[[str], Any]


def lazy_names(package: str, public: Mapping[str, Sequence[str]], rooms: Sequence[str] = ()) -> tuple[Getter, Callable]:
    """Return ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: Its ``__name__``.
        public: Module inside the package → names that are imported from there.
        rooms: Subpackages and modules that can be reached as attributes before they were imported.

    An AttributeError names the name that was probably meant.

    Example:
        >>> get, names = lazy_names("hfproj", {"errors": ["UsageError"]}, ["results"])
        >>> get("UsageError").__name__, names()
        ('UsageError', ['UsageError', 'results'])
    """
    origin = {name: module for module, names in public.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name in rooms:
            return importlib.import_module(f"{package}.{name}")
        if name not in origin:
            meant = None if name.startswith("_") else nearest(name, [*origin, *rooms])
            hint = f". Did you mean {meant!r}?" if meant else ""
            raise AttributeError(f"module {package!r} has no attribute {name!r}{hint}")
        return getattr(importlib.import_module(f"{package}.{origin[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*origin, *rooms})

    return __getattr__, __dir__


def when_imported(name: str, then: Callable[[], None], *, outside: str) -> None:
    """Call `then` as soon as the module `name` has been imported: at once if it has been.

    It is not called in the middle of the import of a module of the package `outside`, which `then` may need whole, but
    at its end. A finder at the head of ``sys.meta_path`` waits for these modules, and leaves when `then` has been
    called; what `then` raises, the import raises that it was called in. Where two threads import `name` and what `then`
    imports at the same time, neither blocks the other: Python gives a thread that would wait for ever the module as it
    is, and `name` is whole by then.

    Example:
        >>> found = []
        >>> when_imported("sys", lambda: found.append("is there"), outside="hfproj")
        >>> found
        ['is there']
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        then()
    else:
        sys.meta_path.insert(0, _Waiting(name, then, f"{outside}."))


class _Waiting:
    """A finder that finds what the others find, and looks after a module's own code whether it is time for `then`."""

    def __init__(self, name: str, then: Callable[[], None], prefix: str):
        self.name, self.then, self.prefix = name, then, prefix

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name and not name.startswith(self.prefix):
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if finder is not self and find is not None and (spec := find(name, path, target)) is not None:
                if spec.loader is not None:  # a namespace package has none, and no code that could run
                    spec.loader = _Loading(spec.loader, self)
                return spec
        return None

    def loaded(self, module: ModuleType) -> None:
        """Call `then` and leave, unless `name` is still to come or a module of the package is under way."""
        if self.name not in sys.modules or not any(finder is self for finder in sys.meta_path):
            return
        others = [m for n, m in list(sys.modules.items()) if n.startswith(self.prefix) and m is not module]
        if not any(getattr(getattr(other, "__spec__", None), "_initializing", False) for other in others):
            self.then()
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]


class _Loading:
    """The loader of a module, which afterwards is again the only one that the module knows."""

    def __init__(self, loader: Any, waiting: _Waiting):
        self._loader, self._waiting = loader, waiting

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader  # type: ignore[union-attr]
        self._loader.exec_module(module)
        self._waiting.loaded(module)
