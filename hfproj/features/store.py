"""Features on disk: one safetensors file that is written shard by shard, and mapped instead of read.

    <cache_dir>/<key>/features.safetensors   h [rows, …] and the others, each contiguous over all rows
    <cache_dir>/<key>/manifest.json          what the key is made of, and a checksum of every shard; written last
    <cache_dir>/<key>/progress*              while unfinished: the settings, and each process's finished shards
    <cache_dir>/<key>.lock                   held by whoever writes; the system frees it when its holder dies

A shard is a range of rows. Its place in the file follows from the shapes alone (`Layout`), so that shards can be
written in any order and by several processes, nothing has to be joined in the end, and a tensor of all rows is one
mapped array: reading a slice reads these rows only. (Arrow would split it into chunks, shard files into several
arrays.) Batches never reach over a shard's end. Their content hence depends neither on where an interrupted extraction
stopped nor on the number of processes, and the finished file has the same bytes.

A file counts only with a manifest whose checksums all fit, which is checked at each opening. Shards that do not fit are
extracted again, and all of them if the file is not the one that the manifest describes.
"""

import hashlib
import json
import os
import struct
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hfproj.distributed import barrier, broadcast_object, gather_objects, rank, world_size
from hfproj.errors import UsageError
from hfproj.files import write_atomic, write_json

FORMAT = "hfproj features 1"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 2**20
_PIECE = 2**22  # bytes read at a time while checking

Compute = Callable[[Sequence[range]], Generator[dict[str, Tensor], None, None]]


@dataclass
class Layout:
    """The layout of a file of features.

    Example:
        >>> layout = Layout("0f", 10, {"h": (torch.float16, (4,)), "index": (torch.int64, ())})
        >>> list(layout.tensors), layout.place("h", 3) - layout.place("index", 0)
        (['index', 'h'], 104)
    """

    key: str
    rows: int  # of every tensor
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # name → type and shape of a row

    def __post_init__(self) -> None:
        if not {dtype for dtype, _ in self.tensors.values()} <= set(_NAMES):
            raise ValueError(f"a type that is not kept: {dict(self.tensors)}")
        # Widest type first, so that each tensor begins at a multiple of its type's size.
        self.tensors = dict(sorted(self.tensors.items(), key=lambda entry: (-entry[1][0].itemsize, entry[0])))
        self._places, end = {}, 0
        for name in self.tensors:
            self._places[name] = end
            end += self.row_bytes(name) * self.rows
        self._start = len(self.header())
        self.size = self._start + end  # bytes of the whole file

    def row_bytes(self, name: str) -> int:
        """Return the bytes of one row."""
        dtype, shape = self.tensors[name]
        return dtype.itemsize * torch.Size(shape).numel()

    def place(self, name: str, row: int) -> int:
        """Return where in the file a row begins."""
        return self._start + self._places[name] + row * self.row_bytes(name)

    def header(self) -> bytes:
        """Return what the file begins with, up to the first tensor."""
        entries: dict[str, object] = {"__metadata__": {"format": FORMAT, "key": self.key}}
        for name, (dtype, shape) in self.tensors.items():
            at = self._places[name]
            end = at + self.row_bytes(name) * self.rows
            entries[name] = {"dtype": _NAMES[dtype], "shape": [self.rows, *shape], "data_offsets": [at, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @classmethod
    def of(cls, path: str | os.PathLike) -> "Layout":
        """Return the layout that a file announces."""
        with open(path, "rb") as file:
            start = file.read(8)
            raw = file.read(min(int.from_bytes(start, "little"), _MAX_HEADER))
        try:
            header = json.loads(raw)
            key = header.pop("__metadata__")["key"]
            (rows,) = {entry["shape"][0] for entry in header.values()}
            layout = cls(key, rows, {n: (_DTYPES[e["dtype"]], tuple(e["shape"][1:])) for n, e in header.items()})
            same = layout.header() == start + raw
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError("another header") from error
        if not same:
            raise ValueError("another header")
        return layout


@dataclass
class _Record:
    """What a manifest or the notes of an unfinished extraction say, with the layout of the file if it is theirs."""

    settings: dict[str, Any] = field(default_factory=dict)
    shards: dict[int, str] = field(default_factory=dict)  # number → checksum
    finished: bool = False
    layout: Layout | None = None


class FeatureStore:
    """The features of one key, kept in `cache_dir` with what the key is the digest of (`made_of`).

    On several processes all of them make it and call its method together. An unfinished extraction is continued only
    under the same `settings` (batch size, device, versions). Of the `names` of tensors "labels" and "z" may be missing.
    """

    def __init__(
        self, cache_dir: str | os.PathLike, key: str, *, made_of: Mapping[str, Any], rows: int, shard_rows: int,
        settings: Mapping[str, Any], names: Sequence[str],
    ):  # fmt: skip
        if not key or set(key) - set("0123456789abcdef"):
            raise UsageError(f"Expected a hexadecimal cache key, got {key!r}.")
        self.key, self.made_of, self.rows, self.names = key, dict(made_of), rows, set(names)
        self.settings = {**settings, "shard_rows": shard_rows}
        self.folder = Path(cache_dir).expanduser() / key
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cache_dir={str(cache_dir)!r} is no folder that can be written to ({error}).") from error
        self.file, self.manifest = self.folder / "features.safetensors", self.folder / "manifest.json"
        self.progress = self.folder / "progress.json"
        self._about = {"format": FORMAT, "key": key, "rows": rows}

    def get(self, compute: Compute) -> dict[str, Tensor]:
        """Return the mapped tensors, after extracting what is missing: `compute` yields a dict of tensors per range."""
        record, problem = self._recorded()
        if problem or not record.finished:
            with self._locked():
                record, problem = self._recorded()  # another process may have finished it meanwhile
                if problem and rank() == 0:
                    damage = f"The feature cache {self.folder.name} is damaged: {problem}"
                    warnings.warn(f"{damage}. What does not fit is extracted again.", stacklevel=4)
                if problem or not record.finished:
                    self._extract(compute, record)
        with safe_open(self.file, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict

    # --- what is there ---

    def _recorded(self) -> tuple[_Record, str]:
        """Return what is on record, without the shards whose bytes do not fit, and what is wrong; "" for nothing."""
        record, problem = broadcast_object(self._read_record() if rank() == 0 else None)
        if problem or not record.settings:
            return record, problem
        record.layout, problem = broadcast_object(self._read_layout() if rank() == 0 else None)
        if record.layout is None:  # without any shard the writer was killed before it had made the file
            return replace(record, shards={}), problem if record.finished or record.shards else ""
        own = sorted(record.shards)[rank() :: world_size()]
        bad = {shard for part in gather_objects(self._bad_shards(record, record.layout, own)) for shard in part}
        if bad:
            problem = f"the content of {len(bad)} of {len(record.shards)} shards has changed"
        return replace(record, shards={n: c for n, c in record.shards.items() if n not in bad}), problem

    def _read_record(self) -> tuple[_Record, str]:
        finished = self.manifest.is_file()
        if not finished and not self.progress.is_file():
            return _Record(), ""
        try:
            found = json.loads((self.manifest if finished else self.progress).read_bytes())
            settings, count = found["settings"], self._count(found["settings"])
            if any(found[name] != value for name, value in self._about.items()):
                return _Record(), "the manifest belongs to other features" if finished else ""
            shards = dict(enumerate(map(str, found["shards"]))) if finished else self._noted(count)
            if finished and len(shards) != count:
                return _Record(), "the manifest is incomplete"
            return _Record(settings, shards, finished), ""
        except (OSError, ValueError, KeyError, TypeError) as error:
            return _Record(), f"its manifest cannot be read ({type(error).__name__})" if finished else ""

    def _count(self, settings: Mapping[str, Any]) -> int:
        """Return how many shards there are."""
        shard_rows = settings["shard_rows"]
        if type(shard_rows) is not int or shard_rows < 1:
            raise ValueError(f"shard_rows={shard_rows!r}")
        return -(-self.rows // shard_rows)

    def _noted(self, count: int) -> dict[int, str]:
        shards = {}
        for journal in sorted(self.folder.glob("progress-*.jsonl")):
            for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    shard, checksum = json.loads(line)
                except (ValueError, TypeError):
                    continue  # a blank line, or the last one before the process was killed
                if isinstance(shard, int) and 0 <= shard < count:
                    shards[shard] = str(checksum)
        return shards

    def _read_layout(self) -> tuple[Layout | None, str]:
        """Return the layout of the file, or None and the reason why it is not the file of these features."""
        if self.file.is_symlink() or not self.file.is_file():
            return None, "features.safetensors is missing"
        try:
            layout = self._checked(Layout.of(self.file))
        except (OSError, ValueError):
            return None, "features.safetensors is another file"
        if layout.key != self.key:
            return None, "features.safetensors belongs to other features"
        if (size := self.file.stat().st_size) != layout.size:
            return None, f"features.safetensors has {size} bytes instead of {layout.size}"
        return layout, ""

    def _checked(self, layout: Layout) -> Layout:
        names, optional = set(layout.tensors), {"z", "labels"}
        if layout.rows != self.rows or names - optional != self.names - optional or names - self.names:
            raise ValueError(f"unexpected tensors {sorted(names)}")
        return layout

    def _bad_shards(self, record: _Record, layout: Layout, shards: Sequence[int]) -> list[int]:
        size = record.settings["shard_rows"]
        with open(self.file, "rb", buffering=0) as file:
            return [s for s in shards if _checksum(file, layout, self._range(s, size)) != record.shards[s]]

    def _range(self, shard: int, shard_rows: int) -> range:
        return range(shard * shard_rows, min((shard + 1) * shard_rows, self.rows))

    # --- writing ---

    @contextmanager
    def _locked(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder.with_suffix(".lock"))

        def taken() -> bool:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                return False
            return True

        warned = False
        while not broadcast_object(taken() if rank() == 0 else None):  # again and again, as collectives have timeouts
            if rank() == 0 and not warned:
                warnings.warn(f"Another process extracts features {self.folder.name}; waiting for it.", stacklevel=6)
            warned = True
            time.sleep(0.2)
        try:
            yield
        finally:
            if rank() == 0:
                lock.release()

    def _extract(self, compute: Compute, record: _Record) -> None:
        goes_on = record.layout is not None and record.settings == self.settings
        if not goes_on or not self._fill(compute, dict(record.shards), record.layout):
            self._fill(compute, {}, None)  # what is there was not made by this extraction

    def _fill(self, compute: Compute, done: dict[int, str], layout: Layout | None) -> bool:
        """Extract the shards that are not done and write the manifest; False where they do not fit the `layout`."""
        shard_rows = self.settings["shard_rows"]
        missing = [s for s in range(self._count(self.settings)) if s not in done]
        first, stop = (-(-len(missing) * (rank() + i) // world_size()) for i in (0, 1))  # rank 0 has one if any has
        own = missing[first:stop]
        if rank() == 0:
            self._note_start(done)
        barrier()
        with closing(compute([self._range(s, shard_rows) for s in own])) as results:
            result = next(results, None)
            wanted = self._layout_of(result) if result is not None else layout
            agreed = broadcast_object(wanted)
            if layout is not None and agreed != layout:
                return False
            if any(gather_objects(result is not None and wanted != agreed)):
                raise UsageError("The processes give features of different shapes; have they the same model?")
            if layout is None and rank() == 0:
                write_atomic(self.file, agreed.header())  # a new file: who has mapped the old one keeps it
                os.truncate(self.file, agreed.size)
            barrier()
            if any(gather_objects(self._read_layout()[0] != agreed)):
                raise UsageError("Not all processes see the file of process 0; cache_dir must be a folder they share.")
            with (
                open(self.file, "r+b", buffering=0) as file,
                open(self.folder / f"progress-{rank()}.jsonl", "a", encoding="utf-8") as journal,
            ):
                for shard in own:
                    assert result is not None
                    done[shard] = _write(file, agreed, self._range(shard, shard_rows), result)
                    journal.write(f"\n{json.dumps([shard, done[shard]])}")  # before it: the last line may be cut off
                    journal.flush()
                    result = next(results, None)
                os.fsync(file.fileno())
        for part in gather_objects(done):
            done |= part
        if rank() == 0:
            shards = [done[shard] for shard in range(len(done))]
            what = {"made_of": self.made_of, "settings": self.settings}
            write_json(self.manifest, {**self._about, **what, "shards": shards})
            for note in self.folder.glob("progress*"):
                note.unlink()
        barrier()
        return True

    def _layout_of(self, result: Mapping[str, Tensor]) -> Layout:
        tensors = {name: (tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in result.items()}
        return self._checked(Layout(self.key, self.rows, tensors))

    def _note_start(self, done: Mapping[int, str]) -> None:
        """Replace what was on record by the finished shards that are kept; those first, the manifest last."""
        kept = self.folder / "progress-0.jsonl"
        write_atomic(kept, "".join(f"\n{json.dumps([s, checksum])}" for s, checksum in done.items()).encode())
        for journal in self.folder.glob("progress-*.jsonl"):
            if journal != kept:
                journal.unlink()
        write_json(self.progress, {**self._about, "settings": self.settings})
        self.manifest.unlink(missing_ok=True)


def _checksum(file: FileIO, layout: Layout, part: range) -> str:
    content = hashlib.sha256()
    for name in layout.tensors:
        file.seek(layout.place(name, part.start))
        left = len(part) * layout.row_bytes(name)
        while left:
            piece = file.read(min(left, _PIECE))
            if not piece:
                return ""
            content.update(piece)
            left -= len(piece)
    return content.hexdigest()[:32]


def _write(file: FileIO, layout: Layout, part: range, result: Mapping[str, Tensor]) -> str:
    """Write the rows of a shard and return their checksum."""
    content = hashlib.sha256()
    for name, (dtype, shape) in layout.tensors.items():
        tensor, expected = result.get(name), (len(part), *shape)
        if tensor is None or (tensor.dtype, tensor.shape) != (dtype, expected):
            found = None if tensor is None else tuple(tensor.shape)
            rows = f"rows {part.start} to {part.stop - 1}"
            raise UsageError(f"{name!r} of {rows} has shape {found}, expected {expected} as in the first rows.")
        raw: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        data = memoryview(raw)
        content.update(data)
        file.seek(layout.place(name, part.start))
        while data:
            data = data[file.write(data) :]
    return content.hexdigest()[:32]
