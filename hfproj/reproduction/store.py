"""Finished runs of a paper at a scale: one file each while they are made, and one file of all to be kept.

``runs/<key>-<seed>.json`` is written by the process that made the run; `gather` joins those that a study shows into
``<paper>-<scale>.json``, which is what goes into a repository: a run that is there is not made again.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from hfproj.errors import UsageError
from hfproj.files import write_json
from hfproj.saving.locks import locked


class Store:
    """The runs of a paper at a scale, by their key and seed.

    Args:
        folder: Where they are.
        paper: What names of its studies begin with.
        scale: "paper", "mini" or "trial".
    """

    def __init__(self, folder: Path, paper: str, scale: str):
        self.folder, self.kept = folder, folder / f"{paper}-{scale}.json"

    def file(self, name: str) -> Path:
        """Return where a run is written; `name` is ``key-seed``."""
        return self.folder / "runs" / f"{name}.json"

    def read(self, name: str) -> dict[str, Any] | None:
        """Return a run, or None where it is not finished."""
        file = self.file(name)
        if file.is_file():
            return _content(file)
        return self._all["runs"].get(name)

    def gather(self, names: Iterable[str]) -> None:
        """Write these runs, beside those that are there, into the file of all; what decides a run is written once.

        Raises:
            InUseError: If another process has been writing there for a minute.
        """
        with locked(self.folder, patience=60.0):
            self._gather(names)

    def _gather(self, names: Iterable[str]) -> None:
        self.__dict__.pop("_all", None)  # what another process has gathered meanwhile
        known = {**self._all["runs"]}
        settings = {**self._all["settings"]}
        for name in names:
            if (run := self.read(name)) is not None:
                run = dict(run)
                if (setting := run.pop("setting", None)) is not None:
                    settings[name.split("-")[0]] = setting
                known[name] = run
        keys = {name.split("-")[0] for name in known}
        kept = {
            "settings": {key: settings[key] for key in sorted(keys & {*settings})},
            "runs": dict(sorted(known.items())),
        }
        write_json(self.kept, kept)
        self.__dict__.pop("_all", None)

    @cached_property
    def _all(self) -> Mapping[str, Any]:
        if not self.kept.is_file():
            return {"settings": {}, "runs": {}}
        kept = _content(self.kept, ("settings", "runs"))
        for name, run in kept["runs"].items():
            _check(self.kept, run, _RUN, f"of the run {name} ")
        return kept


_OF_NAMES = ("settings", "runs", "values", "outcomes")  # mappings
_RUN = ("row", "data", "seed", "values", "outcomes", "cpu_seconds")


def _content(file: Path, needs: Sequence[str] = _RUN) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UsageError(
            f"Expected {file} to be JSON of finished runs, got a damaged file; delete it. ({error})"
        ) from error
    return _check(file, content, needs)


def _check(file: Path, content: Any, needs: Sequence[str], part: str = "") -> Any:
    """Return a run, or the runs of a file, if it has what is read of it."""

    def told(what: str) -> UsageError:
        return UsageError(f"Expected {file} to be finished runs as hfproj writes them, got {part}{what}; delete it.")

    if not isinstance(content, dict):
        raise told(f"{content!r:.40}")
    for name in needs:
        if name not in content:
            raise told(f"no {name!r}")
        if name in _OF_NAMES and not isinstance(content[name], dict):
            raise told(f"{content[name]!r:.40} as {name!r}")
    for name, value in content.get("values", {}).items():
        if not isinstance(value, int | float | None):
            raise told(f"{value!r:.40} as the value of {name!r}")
    return content
