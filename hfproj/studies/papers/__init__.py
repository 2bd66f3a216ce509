"""Five papers on projection heads: a file each, with the rows of its tables as presets and its tables as studies.

A new file here is all that a sixth paper needs: its ``studies()`` (a list of `hfproj.reproduction.Study`) and, where it
has some of its own, ``PRESETS`` (name → `hfproj.presets.Preset`) are found by themselves. `PRESETS` and `STUDIES` below
are those of all files.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hfproj.errors import UsageError

if TYPE_CHECKING:
    from hfproj.presets import Preset
    from hfproj.reproduction import Study

    PRESETS: dict[str, Preset]
    STUDIES: dict[str, Study]


def _files() -> list[ModuleType]:
    names = sorted(found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("_"))
    return [importlib.import_module(f"{__name__}.{name}") for name in names]


def _joined(what: str, of_file: Callable[[ModuleType], Mapping[str, Any]]) -> dict[str, Any]:
    """Return name → what the files have, each name once."""
    found: dict[str, Any] = {}
    for file in _files():
        own = of_file(file)
        if twice := found.keys() & own.keys():
            raise UsageError(
                f"Expected {what} with names of their own, got {sorted(twice)[0]!r} of {file.__name__} a second time; "
                "give it another name."
            )
        found |= own
    return found


def _studies(file: ModuleType) -> dict[str, Any]:
    if not hasattr(file, "studies"):
        raise UsageError(
            f"Expected a function studies() in {file.__file__}, which returns the tables of a paper, got none; name "
            "files that are no paper with an underscore in front."
        )
    return {study.name: study for study in file.studies()}


def __getattr__(name: str) -> Any:
    if name == "PRESETS":  # asked for by the registry of presets, which a study looks its own up in
        return _joined("presets", lambda file: getattr(file, "PRESETS", {}))
    if name == "STUDIES":
        return _joined("studies", _studies)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
