"""What a pickled checkpoint will take, found without making any of it: a reading in which nothing is what it says.

Every class and function that the pickle names is replaced by a stand-in that does nothing, and every tensor by its size
and strides, which are compared with the file's own bytes. So a file can't take more than it has: not by a compressed
archive, storages that are larger than the file, tensors that repeat one number a billion times (stride 0), many tensors
of one storage, or a call that makes a large object.
"""

import io
import math
import mmap
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

from hfproj import limits
from hfproj.strict_json import short

_ITEM = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "UntypedStorage": 1,
}  # fmt: skip
_REBUILDS = tuple(f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3"))
_OF_TYPE = "torch._tensor._rebuild_from_type_v2"  # calls one of those
_DTYPE = re.compile(r"[<>=|]?[?biuf][1248]?")
# What may be called: containers, and what `hfproj.converters.checkpoint` allows. `torch.load` decides what is loaded;
# this decides what may take memory by its arguments.
_CALLED = {
    "collections.OrderedDict", "argparse.Namespace", "torch.Size", "torch.device", "torch._utils._rebuild_parameter",
    "numpy.dtype", "torch._utils._rebuild_parameter_with_state", "_codecs.encode", "__builtin__.set", "builtins.set",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", *_REBUILDS,
}  # fmt: skip


def check_pickles(path: Path) -> None:
    """Refuse a checkpoint of `torch.save` that would take more memory than its own bytes and `hfproj.limits`.

    Raises:
        ValueError: If it would; what is damaged raises whatever reading it raises.
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        if not zipfile.is_zipfile(path):
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _old_format(data, size)
        records = _records(file, size)
        name = next((n for n in records if n.endswith("/data.pkl")), "")
        if records.get(name, 0) > limits.PICKLE_BYTES:
            raise ValueError(f"its data.pkl has {records[name]:,} bytes, more than {limits.PICKLE_BYTES:,}")
        if name:  # else torch says what is wrong
            with zipfile.ZipFile(file) as archive:
                _Reading(io.BytesIO(archive.read(name)), size, records).load()


def _records(file: Any, size: int) -> dict[str, int]:
    """Return name → bytes of what a zip archive holds; `torch.save` compresses nothing and adds no comment."""
    file.seek(max(size - 22, 0))
    if not file.read().startswith(b"PK\5\6"):
        raise ValueError("its archive does not end where the file does")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    records = {entry.filename: entry.file_size for entry in entries}
    sizes = sum(entry.file_size for entry in entries)
    if any(entry.compress_type or entry.file_size != entry.compress_size for entry in entries) or sizes > size:
        raise ValueError(f"its archive is compressed, {sizes:,} bytes in {size:,}; torch.save compresses nothing")
    if len(records) < len(entries) or len(entries) > 4 * limits.TENSORS:
        raise ValueError("its archive holds a name twice, or too many")
    return records


def _old_format(data: Any, size: int) -> None:
    """Read the pickles before the tensors of a file of torch before 1.6."""
    for _ in range(5):  # magic number, protocol, system, content, keys
        _Reading(data, size, size).load()


class _Storage:
    def __init__(self, item: int, count: int):
        self.item, self.count = item, count


class _StandIn:
    """In place of a class, or of what it makes: takes every call that unpickling makes of one, and does nothing."""

    name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_StandIn":
        if cls.name not in _CALLED:
            raise pickle.UnpicklingError(f"GLOBAL {cls.name}")  # as torch says it
        of = args[0] if cls.name == "numpy.dtype" and args else "f4"
        coding = args[1] if cls.name == "_codecs.encode" and len(args) > 1 else "latin1"
        if coding != "latin1" or not (isinstance(of, str) and _DTYPE.fullmatch(of)):
            raise ValueError("it holds a value of no known kind")
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any): ...

    def __setstate__(self, state: Any) -> None:
        if self.name == "numpy.dtype" and any(isinstance(n, int) and n > 8 for n in state):
            raise ValueError("it holds a value of no known kind")

    def __setitem__(self, name: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None:
        """Take an entry."""

    def add(self, value: Any) -> None:
        """Take an entry."""


class _Reading(pickle._Unpickler):  # type: ignore[name-defined]  # in Python: C's takes memory for numbers in a file
    """One checkpoint; `storages` is the size of its file, or of each of its records."""

    dispatch = {
        code: call for code, call in pickle._Unpickler.dispatch.items()  # type: ignore[attr-defined]
        if bytes([code]) not in (pickle.BYTEARRAY8, pickle.EXT1, pickle.EXT2, pickle.EXT4)
    }  # fmt: skip

    def __init__(self, file: Any, size: int, storages: "int | dict[str, int]"):
        super().__init__(file, encoding="utf-8")
        self._file_read = self._exactly
        self.file, self.bytes, self.storages = file, size, storages
        self.known: dict[str, int] = {}  # key of a storage → its bytes
        self.in_storages = self.in_tensors = 0

    def _exactly(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) < count:
            raise EOFError("it ends too early")
        if self.file.tell() > limits.PICKLE_BYTES:
            raise ValueError(f"it has more than {limits.PICKLE_BYTES:,} bytes beside its tensors")
        return data

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in."""
        full = f"{module}.{name}"
        if full == _OF_TYPE:
            return lambda call, _, arguments, *__: call(*arguments)
        return self.rebuilt if full in _REBUILDS else type("StandIn", (_StandIn,), {"name": full})

    def persistent_load(self, pid: Any) -> Any:
        """Return the size of a storage; one that is larger than its place in the file is a ValueError."""
        kind, key, count = (pid[1], pid[2], pid[4]) if isinstance(pid, tuple) and len(pid) >= 5 else (None, None, None)
        item = _ITEM.get(getattr(kind, "name", "").removeprefix("torch.").removeprefix("storage."))
        if item is None or not isinstance(key, str) or not isinstance(count, int) or count < 0:
            raise ValueError(f"it names a storage of no known kind, {short(getattr(kind, 'name', kind))}")
        here = self.storages if isinstance(self.storages, int) else self.record(key)
        self.in_storages += item * count * (key not in self.known)
        if item * count > min(here, self.known.setdefault(key, item * count)) or self.in_storages > self.bytes:
            raise ValueError(f"it names a storage of {item * count:,} bytes, and has {here:,}")
        return _Storage(item, count)

    def record(self, key: str) -> int:
        """Return the bytes of the record of a storage."""
        assert isinstance(self.storages, dict)
        folder = next(n for n in self.storages if n.endswith("/data.pkl")).removesuffix("data.pkl")
        return self.storages.get(f"{folder}data/{key}", -1)

    def rebuilt(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Any:
        """Compare a tensor with its storage, and all tensors with the file."""
        numbers = [offset, *shape, *strides]
        if not isinstance(storage, _Storage) or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
            raise ValueError("it holds a tensor of no known kind")
        if len(shape) > limits.DIMENSIONS or math.prod(shape) > storage.count:
            raise ValueError(
                f"it holds a tensor of shape {short(tuple(shape))} in a storage of {storage.count:,} numbers"
            )
        self.in_tensors += storage.item * math.prod(shape)
        if self.in_tensors > limits.COPIES * self.bytes:
            raise ValueError("its tensors are several times as large as the file")
        return object.__new__(_StandIn)
