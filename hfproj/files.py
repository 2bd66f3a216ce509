"""Files of results: whole or not at all, without the paths of this machine, and measured once."""

import contextlib
import errno
import functools
import json
import math
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from hfproj.errors import UsageError
from hfproj.redaction import known_secrets, redact_words, redacted

PACKAGES = ("hfproj", "torch", "transformers", "peft", "timm", "accelerate", "datasets")


def portable(value: Any) -> Any:
    """Return `value` as plain JSON without paths of this machine and without secrets (`hfproj.redaction`).

    Tensors and arrays become lists, sets sorted lists, enums their value; NaN and infinity become None. An absolute
    path (or one that begins with `~`) becomes relative to the working directory where it lies inside, otherwise
    `./` and its last part; a home folder itself becomes `~`.

    Raises:
        UsageError: If JSON cannot hold a value.

    Example:
        >>> portable({"data": "/home/someone/data/cifar10", "lr": float("nan"), "ids": {2, 1}})
        {'data': './cifar10', 'lr': None, 'ids': [1, 2]}
    """
    return _without_paths(redacted(_plain(value)), functools.lru_cache(maxsize=None)(_portable_text))


def _without_paths(value: Any, text: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return text(value)
    if isinstance(value, dict):
        return {text(k): _without_paths(v, text) for k, v in value.items()}
    return [_without_paths(v, text) for v in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(_plain(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(v) for v in value), key=str)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return _plain(value.tolist())
    if hasattr(value, "value") and type(value).__module__ != "builtins" and not callable(value):  # enums
        return _plain(value.value)
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float):
        return value
    raise UsageError(f"A {type(value).__name__} cannot be written to results.json: {value!r}.")


_PATH = re.compile(
    r"(?<![\w.~/\\])(?:file:(?://(?:localhost)?)?(?=/))?(?:~[\w.-]*[/\\]|/(?=[\w.@~-])(?!(?<=</)\w+>)|[A-Za-z]:[/\\])[^\s'\",;=()]+"
)


def _portable_text(text: str) -> str:
    here = os.getcwd() if "/" in text else ""
    return _PATH.sub(lambda match: _shorten(match.group(), here), text)


_FILE = re.compile(r"file:(//(localhost)?)?")
_HOME = re.compile(r"(/home|/Users|[A-Za-z]:[/\\]Users)[/\\][^/\\]+[/\\]?|/root/?")


def _shorten(path: str, here: str) -> str:
    path = path[match.end() :] if (match := _FILE.match(path)) else path
    if _HOME.fullmatch(path):
        return "~"
    if not path.startswith("/"):
        return f"./{PureWindowsPath(path).name}"
    if path.startswith(here) and PurePosixPath(path).is_relative_to(here):
        return f"./{PurePosixPath(path).relative_to(here)}"
    return f"./{next((part for part in reversed(path.split('/')) if part not in ('', '.')), '')}"


_AS_IT_IS = re.compile(r"[\w@%+=:,./$~-]+", re.ASCII)  # of a variable, that a shell puts its value in its place


def command_line(argv: Iterable[str] | None = None) -> str:
    """Return the command of this program without paths of this machine and secrets, for `Results.command`.

    Of several processes, or with the launcher's mixed precision, it is the one that launches the same on this machine.

    Example:
        >>> command_line(["/home/someone/recipes/simclr_vit.py", "--epochs", "3"])
        'python ./simclr_vit.py --epochs 3'
    """
    import shlex

    known = known_secrets()
    words = [_portable_text(word) for word in redact_words(map(str, sys.argv if argv is None else argv), known)]
    processes, precision = os.environ.get("WORLD_SIZE", "1"), os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    several = f" --num_processes {processes}" if processes != "1" else ""
    mixed = f" --mixed_precision {precision}" if precision != "no" else ""
    launch = (f" --multi_gpu{several}" if several else "") + mixed
    quoted = [word if _AS_IT_IS.fullmatch(word) else shlex.quote(word) for word in words]
    recipe = os.environ.get("HFPROJ_RECIPE", "")  # set by `hfproj run`
    if words and recipe and PurePosixPath(recipe).stem == PurePosixPath(words[0]).stem:
        launch = (several or " --num_processes 1") + mixed if launch else ""
        return " ".join([f"hfproj run {_portable_text(recipe)}{launch}", *quoted[1:]])
    return f"{f'accelerate launch{launch}' if launch else 'python'} {' '.join(quoted)}"


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a result depends on; absent ones are left out."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part, even after a loss of power.

    The folder is made if needed.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"Expected a file to write, got the folder {str(path)!r}; give the file a name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's files are private, a result is to be read by others
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if (
            isinstance(error, OSError) and error.errno and error.filename is None
        ):  # of a full disk the system names no file
            error.filename = str(path)
        raise


def sync(path: str | os.PathLike) -> None:
    """Wait until a file, or the names in a folder, are on disk, where the system can say so."""
    if os.name == "nt":
        return  # no folder can be opened there, and no file that is open for reading be synced
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):  # of file systems that sync no folders
            raise
    finally:
        os.close(handle)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write `content` as JSON, as `write_atomic` does."""
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


def rounded(value: Any, digits: int = 6) -> Any:
    """Return `value` with its floats at so many significant digits, in dictionaries and lists too.

    Example:
        >>> rounded({"loss": [0.123456789, 12345678.9], "steps": 12345678})
        {'loss': [0.123457, 12345700.0], 'steps': 12345678}
    """
    if isinstance(value, dict):
        return {name: rounded(part, digits) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part, digits) for part in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def measured_once(path: str | os.PathLike, measure: Callable[[], Any]) -> Any:
    """Return what is in a JSON file; where it is missing, what `measure` returns, `rounded`, which is then kept there.

    Studies of many runs continue where they were interrupted. Whatever a measurement depends on belongs in the path.
    """
    path = Path(path)
    if not path.is_file():
        write_json(path, rounded(measure()))
    return json.loads(path.read_text(encoding="utf-8"))
