"""Reading files that third parties wrote: JSON and safetensors that may be damaged or hostile.

Everything is checked before it is used: the size of a file before it is read, the header of a safetensors file before a
tensor is made. Nothing here allocates, imports, runs or writes anything because a file says so. Each refusal is one
`AdapterFileError` of one line.

Whether the tensors of a safetensors file fill it without gap and overlap is checked by the official parser. What it
lets pass is checked here: strict JSON without repeated names, known dtypes, bounded sizes, no further entries.

References:
    The safetensors format, https://github.com/huggingface/safetensors#format; Trail of Bits, "Safetensors security
    assessment", 2023, whose findings (polyglot files, gaps) the official parser has closed since.
"""

import json
import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hfproj.errors import AdapterFileError, one_line
from hfproj.tuner.soundness import problem_of

LARGEST_CONFIG = 1 << 20  # bytes; a real adapter_config.json has a few thousand
LARGEST_JSON = 1 << 26  # of results.json, which holds outcomes row by row
LARGEST_HEADER = 1 << 23  # of a safetensors file; a full ViT-L has 40 thousand bytes
MOST_TENSORS = 50_000
DEEPEST_JSON = 32
LONGEST_INTEGER = 18  # digits, so that it fits 64 bits
LONGEST_PATTERN = 1 << 17

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # what JSON can say and a file's or module's name can't be
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its values."""
        return math.prod(self.shape) * _BYTES[self.dtype]


def short(value: Any, length: int = 60) -> str:
    """Return the `repr` of a value from a file, cut to `length` characters, for a message of one line.

    Example:
        >>> short("a" * 100, 10)
        "'aaaaaaaa…"
    """
    text = repr(value[:1000] if isinstance(value, str) else value)
    return text if len(text) <= length else text[: length - 1] + "…"


def is_folder_name(name: object) -> bool:
    """Return whether `name` can be the name of one folder on every system, and leads nowhere else."""
    return (
        isinstance(name, str) and 0 < len(name) <= 200 and name.isprintable() and not name.startswith(".")
        and not name.endswith((".", " ")) and not set(name) & set('/\\:*?"<>|')
    )  # fmt: skip


def regular_file(path: Path, root: Path, where: str) -> Path:
    """Return `path` if it is a file of its own below `root`; a pipe, a device or a link is an `AdapterFileError`.

    Links inside `root` are followed, and those of a Hub cache, whose snapshots are links to its blobs.
    """
    if not path.resolve().is_relative_to(root.resolve()) and not _links_to_blob(path):
        what = "is a link, or lies behind one, that leads out of the folder"
        raise AdapterFileError(f"{where}: {path.name} {what}; give the folder it leads to, or copy the file.")
    if not stat.S_ISREG(path.stat().st_mode):
        raise AdapterFileError(f"{where}: {path.name} is no regular file.")
    return path


def _links_to_blob(path: Path) -> bool:
    path = path.absolute()
    snapshots = next((p.parent for p in path.parents if p.parent.name == "snapshots"), None)
    if snapshots is None or not path.is_symlink():
        return False
    if any(p.is_symlink() for p in path.parents if p.is_relative_to(snapshots)):
        return False
    return Path(os.path.normpath(path.parent / os.readlink(path))).parent == snapshots.parent / "blobs"


def check_size(name: str, size: int, where: str, *, largest: int = LARGEST_CONFIG) -> None:
    """Refuse a file of more than `largest` bytes before it is read, by an `AdapterFileError`."""
    if size > largest:
        what = f"{where}: {name} has {size:,} bytes, more than the {largest:,} that such a file may have"
        raise AdapterFileError(f"{what}; it is not the {name} of an adapter.")


def read_json(path: Path, where: str, *, largest: int = LARGEST_CONFIG) -> dict[str, Any]:
    """Return the object in a JSON file: strict UTF-8 JSON, no name twice, no NaN, no number beyond 64 bits.

    Raises:
        AdapterFileError: If the file is too large, holds anything else, or is nested too deep.
    """
    check_size(path.name, path.stat().st_size, where, largest=largest)
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        reason = f"is not JSON as expected ({one_line(error)})"
        raise AdapterFileError(f"{where}: {path.name} {reason}; download or save it again.") from error


def parse_json(data: bytes) -> dict[str, Any]:
    """Return the object that `data` holds, under the rules of `read_json`.

    Raises:
        ValueError: If it holds something else, or is nested too deep.

    Example:
        >>> parse_json(b'{"out_dim": 128}')
        {'out_dim': 128}
    """
    number, text = _number, data.decode("utf-8")
    try:
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=number, parse_int=number, parse_float=number)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, got {type(found).__name__}")
    level: list[Any] = [found]
    for _ in range(DEEPEST_JSON):
        parts = [p for value in level for p in (value.values() if isinstance(value, dict) else value)]
        if any(isinstance(p, str) and _NO_TEXT.search(p) for p in parts):
            raise ValueError("a text in it is no valid Unicode")
        level = [p for p in parts if isinstance(p, dict | list)]
        if not level:
            return found
    raise ValueError(f"it is nested deeper than {DEEPEST_JSON}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {short(next(n for n in names if names.count(n) > 1))} comes twice")
    if any(map(_NO_TEXT.search, found)):
        raise ValueError("a name in it is no valid Unicode")
    return found


def _number(text: str) -> int | float:
    value, whole = float(text), text.lstrip("-").isdigit()
    if not math.isfinite(value) or (whole and len(text.lstrip("-")) > LONGEST_INTEGER):
        raise ValueError(f"{short(text)[1:-1]} is no number of JSON, or too large")
    return int(text) if whole else value


def read_header(path: Path, where: str) -> dict[str, TensorInfo]:
    """Return what a safetensors file holds, name → dtype and shape, without reading a tensor.

    Raises:
        AdapterFileError: If the file is damaged, cut short, or made to mislead.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER:
                raise ValueError(f"its header is said to have {length:,} bytes, more than {LARGEST_HEADER:,}")
            text = file.read(length)
        if not text.startswith(b"{"):
            raise ValueError("it does not begin with a header")
        header = parse_json(text)
        with safe_open(path, framework="pt"):  # checks shapes, ranges of bytes and metadata
            pass
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        if len(tensors) > MOST_TENSORS:
            raise ValueError(f"it lists {len(tensors):,} tensors, more than {MOST_TENSORS:,}")
        for name, entry in tensors.items():
            if set(entry) != {"dtype", "shape", "data_offsets"}:
                raise ValueError(f"the entry of {short(name)} is no tensor")
            if entry["dtype"] not in _BYTES:
                raise ValueError(f"{short(name)} has dtype {entry['dtype']}, not one of {', '.join(_BYTES)}")
    except (ValueError, SafetensorError) as error:
        raise _damaged(path, where, error) from error
    return {name: TensorInfo(entry["dtype"], tuple(entry["shape"])) for name, entry in tensors.items()}


def _damaged(path: Path, where: str, error: Exception) -> AdapterFileError:
    reason = one_line(error)
    return AdapterFileError(f"{where}: {path.name} is damaged or cut short ({reason}); download or save it again.")


def check_finite(path: Path, where: str) -> None:
    """Refuse a file whose tensors can't be computed with in float32 (`problem_of`), by an `AdapterFileError`."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118  a handle, no dictionary
            found = [(short(name, 120), problem) for name, t in tensors if (problem := problem_of(name, t))]
    except SafetensorError as error:
        raise _damaged(path, where, error) from error
    if found:
        bad = [name for name, problem in found if problem == found[0][1]]
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        what = f"{where}: {path.name} holds {found[0][1]} in {', '.join(bad[:3])}{more}"
        raise AdapterFileError(f"{what}: its training diverged or it is damaged; take an earlier checkpoint.")


_TOKEN = re.compile(
    r"(?P<one>\\[\Wdwsb]|\[\^?(?:(?:\\[\Wdws]|[\w. /:])-?)+\]|[\w \-/:,.])"
    r"|(?P<open>\((?:\?:)?)|(?P<close>\))|(?P<alternative>\|)|(?P<anchor>[\^$])"
    r"|(?P<repeat>(?:[*+]|\{\d{1,3}(?:,\d{0,3})?\})\??)|(?P<optional>\?\??)",
    re.ASCII,
)
_TYPICAL_NAME = 60  # characters of a module's name


def pattern_cost(pattern: str) -> float:
    r"""Return a bound on the steps that matching a module's name may take; infinite where no bound is known.

    Only single characters and classes may be repeated: no repeated groups, no look around, no back references. Names of
    modules need no more, and what remains can't take exponential time unnoticed.

    Example:
        >>> pattern_cost(r".*\.(q|v)_proj"), pattern_cost(r"(a+)+$")
        (120.0, inf)
    """
    if len(pattern) > LONGEST_PATTERN:
        return math.inf
    position, before, total, cost = 0, "", 0, 1
    choices: list[int] = []  # alternatives of the groups that are open
    while position < len(pattern):
        match = _TOKEN.match(pattern, position)
        kind = match.lastgroup if match else None
        allowed = {"repeat": before == "one", "optional": before in ("one", "close"), "close": bool(choices)}
        if match is None or not allowed.get(kind or "", True):
            return math.inf
        if kind == "repeat":
            cost *= _TYPICAL_NAME
        elif kind == "optional":
            cost *= 2
        elif kind == "open":
            choices.append(1)
        elif kind == "close":
            cost *= choices.pop()
        elif kind == "alternative" and choices:
            choices[-1] += 1
        elif kind == "alternative":
            total, cost = total + cost, 1
        if cost > 1 << 40:
            return math.inf
        position, before = match.end(), kind or ""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return math.inf
    return float(total + cost)
