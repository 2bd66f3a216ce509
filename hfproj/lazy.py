"""Public names that are imported when first used, so that ``import hfproj`` stays cheap.

A package that is lazy at run time names its public objects twice: under ``TYPE_CHECKING``, where editors and type
checkers read them, and in the table given here. ``tests/test_public_api.py`` compares the two.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Getter = Callable[[str], Any]


def lazy_names(package: str, public: Mapping[str, Sequence[str]], rooms: Sequence[str] = ()) -> tuple[Getter, Callable]:
    """Return ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: Its ``__name__``.
        public: Module inside the package → names that are imported from there.
        rooms: Subpackages and modules that can be reached as attributes before they were imported.

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
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{origin[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*origin, *rooms})

    return __getattr__, __dir__
