"""Reading what a stranger wrote: JSON and safetensors files that may be damaged or hostile.

Everything is checked before it is used: the size of a file before it is read, the header of a safetensors file before a
tensor is made. Nothing here allocates, imports, runs or writes anything because a file says so. Each refusal is one
`AdapterFileError` of one line.

A safetensors file is refused unless its header is strict JSON without repeated names, every tensor has a known dtype, a
shape and a range of bytes that fit each other, and the ranges fill the rest of the file without gap and overlap.

References:
    The safetensors format, https://github.com/huggingface/safetensors#format; Trail of Bits, "Safetensors security
    assessment", 2023, whose findings (polyglot files, repeated names, gaps) the official parser has closed since.
"""

import json
import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hfproj.errors import AdapterFileError, UsageError

LARGEST_CONFIG = 1 << 20  # bytes; a real adapter_config.json has a few thousand
LARGEST_JSON = 1 << 26  # of results.json, which holds outcomes row by row
LARGEST_HEADER = 1 << 23  # of a safetensors file; a full ViT-L has 40 thousand bytes
MOST_TENSORS = 50_000
DEEPEST_JSON = 32
LONGEST_INTEGER = 18  # digits, so that it fits 64 bits
LONGEST_PATTERN = 1 << 17

_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8,
}  # fmt: skip
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
        return math.prod(self.shape) * _BITS[self.dtype] // 8


def short(value: Any, length: int = 60) -> str:
    """Return the `repr` of a stranger's value, cut to `length` characters, for a message of one line.

    Example:
        >>> short("a" * 100, 10)
        "'aaaaaaaa…"
    """
    text = repr(value[:1000] if isinstance(value, str) else value)
    return text if len(text) <= length else text[: length - 1] + "…"


def one_line(error: BaseException, length: int = 200) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= length else text[: length - 1] + "…"


def adapter_folder(adapter: str) -> str:
    """Return the sub-folder of adapter `adapter`: empty for "default", which lies in the root.

    Raises:
        UsageError: `adapter` is no name of one folder.

    Example:
        >>> adapter_folder("default"), adapter_folder("student")
        ('', 'student')
    """
    if not is_folder_name(adapter):
        raise UsageError(
            f"adapter={short(adapter)}: expected the name of an adapter, which is that of one folder inside the "
            "repository, without slashes; 'default' is the one in its root."
        )
    return "" if adapter == "default" else adapter


def is_folder_name(name: object) -> bool:
    """Return whether `name` can be the name of one folder on every system, and leads nowhere else."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 200
        and name.isprintable()
        and not name.startswith(".")
        and not name.endswith((".", " "))
        and not set(name) & set('/\\:*?"<>|')
    )


def regular_file(path: Path, root: Path, where: str) -> Path:
    """Return `path` if it is a file of its own below `root`.

    A link may not lead out of `root`; those of a Hub cache, whose snapshots are links to its blobs, may.

    Raises:
        AdapterFileError: it is a pipe, a device, or a link that leads elsewhere.
    """
    if not path.resolve().is_relative_to(root.resolve()) and not _links_to_blob(path):
        raise AdapterFileError(
            f"{where}: {path.name} is a link, or lies behind one, that leads out of the folder; give the folder it "
            "leads to, or copy the file."
        )
    if not stat.S_ISREG(path.stat().st_mode):
        raise AdapterFileError(f"{where}: {path.name} is no regular file.")
    return path


def _links_to_blob(path: Path) -> bool:
    snapshots = next((p.parent for p in path.absolute().parents if p.parent.name == "snapshots"), None)
    if snapshots is None or not path.is_symlink() or any(p.is_symlink() for p in _between(path.absolute(), snapshots)):
        return False
    target = Path(os.path.normpath(path.absolute().parent / os.readlink(path)))
    return target.parent == snapshots.parent / "blobs"


def _between(path: Path, root: Path) -> list[Path]:
    return [p for p in path.parents if p.is_relative_to(root)]


# --- JSON ---


def read_json(path: Path, where: str, *, largest: int = LARGEST_CONFIG) -> dict[str, Any]:
    """Return the object in a JSON file: strict UTF-8 JSON, no name twice, no NaN, no number beyond 64 bits.

    Raises:
        AdapterFileError: the file is larger than `largest` bytes, holds anything else, or is nested too deep.
    """
    size = path.stat().st_size
    if size > largest:
        raise AdapterFileError(
            f"{where}: {path.name} has {size:,} bytes, more than the {largest:,} that such a file may have; it is no "
            f"{path.name} of an adapter."
        )
    try:
        return parse_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else one_line(error)
        raise AdapterFileError(
            f"{where}: {path.name} is not JSON as expected ({reason}); download or save it again."
        ) from error


def parse_json(data: bytes) -> dict[str, Any]:
    """Return the object that `data` holds, under the rules of `read_json`.

    Raises:
        ValueError: it holds something else.
        RecursionError: it is nested too deep even to be read.

    Example:
        >>> parse_json(b'{"out_dim": 128}')
        {'out_dim': 128}
    """
    found = json.loads(
        data.decode("utf-8"),
        object_pairs_hook=_unique,
        parse_constant=_no_constant,
        parse_int=_integer,
        parse_float=_finite,
    )
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, found {type(found).__name__}")
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


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > LONGEST_INTEGER:
        raise ValueError(f"the number {short(text)} is too large")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {short(text)} is too large")
    return value


# --- safetensors ---


def read_header(path: Path, where: str) -> dict[str, TensorInfo]:
    """Return what a safetensors file holds, name → dtype and shape, without reading a tensor.

    Raises:
        AdapterFileError: the file is damaged, cut short, or made to mislead.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        header = file.read(min(length, LARGEST_HEADER)) if len(start) == 8 else b""
    try:
        return parse_header(start + header, size)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(
            f"{where}: {path.name} is damaged or cut short ({one_line(error)}); download or save it again."
        ) from error


def parse_header(start: bytes, size: int) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file of `size` bytes that begins with `start`, which covers its header.

    Raises:
        ValueError: the header is none, or does not describe a file of this size.
        RecursionError: it is nested too deep to be read.
    """
    if size < 10 or len(start) < 8:
        raise ValueError(f"{size} bytes are too few")
    length = int.from_bytes(start[:8], "little")
    if length > size - 8:
        raise ValueError(f"its header is said to have {length:,} bytes, the file has {size:,}")
    if length > LARGEST_HEADER:
        raise ValueError(f"its header has {length:,} bytes, more than {LARGEST_HEADER:,}")
    if len(start) < 8 + length or start[8:9] != b"{":
        raise ValueError("it does not begin with a header")
    header = parse_json(start[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata is no object of texts")
    if len(header) > MOST_TENSORS:
        raise ValueError(f"it lists {len(header):,} tensors, more than {MOST_TENSORS:,}")
    ranges = []
    tensors = {}
    for name, entry in header.items():
        tensors[name], first, last = _tensor(name, entry)
        ranges.append((first, last))
    end = 0
    for first, last in sorted(ranges):
        if first != end:
            raise ValueError(f"the bytes of its tensors leave a gap or overlap at {min(first, end):,}")
        end = last
    if end != size - 8 - length:
        raise ValueError(f"its tensors take {end:,} bytes, the file has {size - 8 - length:,} for them")
    return tensors


def _tensor(name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {short(name)} is no tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{short(name)} has dtype {short(dtype)}, expected one of {', '.join(_BITS)}")
    if not _whole(shape) or len(shape) > 8:
        raise ValueError(f"{short(name)} has shape {short(shape)}")
    if not _whole(offsets) or len(offsets) != 2:
        raise ValueError(f"{short(name)} lies at {short(offsets)}")
    info = TensorInfo(dtype, tuple(shape))
    if info.bytes != offsets[1] - offsets[0]:
        raise ValueError(f"{short(name)} of shape {short(shape)} does not fill the bytes {short(offsets)}")
    return info, offsets[0], offsets[1]


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)


def check_finite(path: Path, where: str) -> None:
    """Refuse a file of tensors that holds NaN or infinity; its header has been checked before.

    Raises:
        AdapterFileError: it does. Whatever is computed with such tensors is NaN too.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            bad = []
            for name in file.keys():  # noqa: SIM118  a handle, no dictionary
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    bad.append(name)
    except SafetensorError as error:
        raise AdapterFileError(
            f"{where}: {path.name} is damaged or cut short ({one_line(error)}); download or save it again."
        ) from error
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise AdapterFileError(
            f"{where}: {path.name} holds NaN or infinity in {', '.join(short(n, 120) for n in bad[:3])}{more}: its "
            "training diverged or the file is damaged; take an earlier checkpoint."
        )


# --- patterns ---

_TOKEN = re.compile(
    r"(?P<one>\\[\Wdwsb]|\[\^?(?:(?:\\[\Wdws]|[\w. /:])-?)+\]|[\w \-/:,.])"
    r"|(?P<open>\((?:\?:)?)|(?P<close>\))|(?P<alternative>\|)|(?P<anchor>[\^$])"
    r"|(?P<repeat>(?:[*+]|\{\d{1,3}(?:,\d{0,3})?\})\??)|(?P<optional>\?\??)",
    re.ASCII,
)
_TYPICAL_NAME = 60  # characters of a module's name


def pattern_cost(pattern: str) -> float:
    r"""Return a bound on the steps that matching a module's name may take; infinite where there is none to give.

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
        if match is None or (kind == "repeat" and before != "one"):
            return math.inf
        if kind == "optional" and before not in ("one", "close"):
            return math.inf
        if kind == "close" and not choices:
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
