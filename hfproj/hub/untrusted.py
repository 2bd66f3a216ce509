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

import math
import os
import re
import stat
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hfproj import limits
from hfproj.errors import AdapterFileError, one_line
from hfproj.strict_json import parse_json, short
from hfproj.tuner.soundness import problem_of

LONGEST_PATTERN = 1 << 17

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
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


_DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    "conin$",
    "conout$",
    *(f"{d}{n}" for d in ("com", "lpt") for n in "123456789¹²³"),
}


def shape_of(value: object) -> tuple[int, ...]:
    """Return a shape that a header gives as a list; anything else, or one of no tensor, is a `ValueError`."""
    sizes = isinstance(value, list | tuple) and len(value) <= limits.DIMENSIONS and all(type(n) is int for n in value)
    if not isinstance(value, list | tuple) or not sizes or any(not 0 <= n < 1 << 48 for n in value):
        raise ValueError(f"{short(value)} is no shape")
    return tuple(value)


def is_folder_name(name: object) -> bool:
    """Return whether `name` can be the name of one folder on every system, and leads nowhere else.

    Example:
        >>> is_folder_name("student"), is_folder_name("../student"), is_folder_name("aux.1")
        (True, False, False)
    """
    return (
        isinstance(name, str) and 0 < len(name) <= 200 and name.isprintable() and not name.startswith(".")
        and not name.endswith((".", " ")) and not set(name) & set('/\\:*?"<>|')
        and name.partition(".")[0].rstrip(" ").lower() not in _DEVICES
    )  # fmt: skip


def same_folder(name: str) -> str:
    """Return what two names share that are one folder where case and the form of accents don't count."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


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


def read_header(path: Path, where: str) -> dict[str, TensorInfo]:
    """Return what a safetensors file holds, name → dtype and shape, without reading a tensor.

    Raises:
        AdapterFileError: If the file is damaged, cut short, or made to mislead.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > limits.HEADER_BYTES:
                raise ValueError(f"its header is said to have {length:,} bytes, more than {limits.HEADER_BYTES:,}")
            text = file.read(length)
        if not text.startswith(b"{"):
            raise ValueError("it does not begin with a header")
        header = parse_json(text)
        with safe_open(path, framework="pt"):  # checks shapes, ranges of bytes and metadata
            pass
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        if len(tensors) > limits.TENSORS:
            raise ValueError(f"it lists {len(tensors):,} tensors, more than {limits.TENSORS:,}")
        for name, entry in tensors.items():
            if set(entry) != {"dtype", "shape", "data_offsets"}:
                raise ValueError(f"the entry of {short(name)} is no tensor")
            if entry["dtype"] not in _BYTES:
                raise ValueError(f"{short(name)} has dtype {entry['dtype']}, not one of {', '.join(_BYTES)}")
            shape_of(entry["shape"])
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
