"""Five papers on projection heads: a file each, with the rows of its tables as presets and its tables as studies.

A new file here is all that a sixth paper needs: its ``PRESETS`` (name → `hfproj.presets.Preset`) and ``studies()`` (a
list of `hfproj.reproduction.Study`) are found by themselves. `PRESETS` and `STUDIES` below are those of all files.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfproj.presets import Preset
    from hfproj.reproduction import Study

    PRESETS: dict[str, Preset]
    STUDIES: dict[str, Study]


def _files() -> list[ModuleType]:
    names = sorted(found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("_"))
    return [importlib.import_module(f"{__name__}.{name}") for name in names]


def __getattr__(name: str) -> Any:
    if name == "PRESETS":  # asked for by the registry of presets, which a study looks its own up in
        return {key: preset for file in _files() for key, preset in file.PRESETS.items()}
    if name == "STUDIES":
        return {study.name: study for file in _files() for study in file.studies()}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
