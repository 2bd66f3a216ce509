"""What ``ls`` and ``--help`` answer without importing torch: registered names and flags, in ``tables.json``.

    python -m hfproj.commands.tables      # writes it anew: after a change of a recipe, a flag or a registered name

A test compares the file with the code. Flags that `transformers` brings differ between its versions: those are shown
from the file where the version is the one it was written with, and are asked of the recipe otherwise.
"""

import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hfproj.commands.flags import Flag, flags_of

FILE = Path(__file__).with_name("tables.json")
_START = "cli.start(__file__)"  # what a recipe that ships has; scripts of this repository do not


@dataclass(frozen=True)
class Known:
    """What the table knows of a recipe: its flags, those that its help shows, and whether all are of these versions."""

    flags: list[Flag]
    shown: list[str]
    current: bool


def read() -> dict[str, Any]:
    """Return the table."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def of_recipe(path: Path) -> Known | None:
    """Return what is known of a recipe, by its content: of one that was changed nothing is."""
    table, digest = read(), _digest(path)
    for known in table["recipes"].values():
        if known["sha256"] == digest:
            flags = [Flag(*values) for values in known["flags"]]
            version = metadata.version("transformers")
            return Known(flags, known["shown"], not known["transformers"] or version == known["transformers"])
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()


# --- made from the code ---


def made(folder: Path) -> dict[str, Any]:
    """Return the table of the code as it is, with the recipes of a folder; imports all of them."""
    import hfproj

    names = {kind: getattr(hfproj, f"list_{kind}")() for kind in ("heads", "objectives", "regularizers", "probes")}
    recipes = [path for path in sorted(folder.glob("*.py")) if _START in path.read_text(encoding="utf-8")]
    names["presets"], names["studies"] = hfproj.list_presets(), hfproj.list_studies()
    return {"names": names, "recipes": {path.stem: _made_of(path) for path in recipes}}


class _CapturedError(Exception):
    pass


def _made_of(path: Path) -> dict[str, Any]:
    from transformers import HfArgumentParser

    from hfproj.commands import arguments

    found: list[Any] = []

    def capture(parser: Any, shown: Sequence[str], text: str) -> None:
        listed = [action for action in parser._actions if action.help != "==SUPPRESS=="]
        flags = flags_of(_of(listed))
        of_theirs = isinstance(parser, HfArgumentParser) and len(flags) > 60
        found.append((flags, list(shown), metadata.version("transformers") if of_theirs else ""))
        raise _CapturedError

    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    before, arguments.capture = arguments.capture, capture
    try:
        spec.loader.exec_module(module)
        module.main()
    except _CapturedError:
        pass
    finally:
        arguments.capture = before
        del sys.modules[spec.name]
    flags, shown, version = found[0]
    line = re.split(r"(?<=[.?:])\s", " ".join((module.__doc__ or "").split("\n\n")[0].split()))[0]
    return {
        "line": line.rstrip(":"), "sha256": _digest(path), "transformers": version, "shown": shown,
        "flags": [astuple(flag) for flag in flags],
    }  # fmt: skip


def _of(actions: list) -> Any:
    from argparse import ArgumentParser

    parser = ArgumentParser(add_help=False)
    parser._actions = actions
    return parser


def text_of(table: dict[str, Any]) -> str:
    """Return the table as it is written: a line for each name and each flag."""
    compact = json.dumps(table, indent=1, ensure_ascii=False)
    return re.sub(r"\[\s*((?:\"(?:[^\"\\]|\\.)*\",?\s*)+)\]", lambda m: f"[{' '.join(m[1].split())}]", compact) + "\n"


def main() -> None:
    """Write the table."""
    from hfproj.commands.recipes import folder
    from hfproj.files import write_atomic

    write_atomic(FILE, text_of(made(folder())).encode())
    print(f"Wrote {FILE}.")


if __name__ == "__main__":
    main()
