"""Features on disk: one safetensors file that is written shard by shard, and mapped instead of read.

    <cache_dir>/<key>/features.safetensors   h [rows, dim] and the others, each contiguous over all rows
    <cache_dir>/<key>/manifest.json          what the key is made of, and a checksum of every shard; written last
    <cache_dir>/<key>/progress*              while unfinished: the settings, and each process's finished shards
    <cache_dir>/<key>.lock                   held by whoever writes; the system frees it when its holder dies

A shard is a range of rows. Its place in the file follows from the shapes alone, so that shards can be written in any
order and by several processes, nothing has to be joined in the end, and a tensor of all rows is one mapped array:
reading a slice reads these rows only, whatever the size of the file. (Arrow would split it into chunks, and separate
shard files into several arrays.) Batches never reach over a shard's end. Their content hence depends neither on where
an interrupted extraction stopped nor on the number of processes, and the finished file has the same bytes.

A file counts only with a manifest whose checksums fit, all of them, at each opening. Shards that do not are extracted
again, and all of them where the file is another one than the manifest says.
"""

import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hfproj.distributed import barrier, broadcast_object, gather_objects, rank, world_size
from hfproj.errors import UsageError
from hfproj.features.store_layout import FORMAT, Layout
from hfproj.files import write_atomic, write_json

_PIECE = 2**22  # bytes read at a time while checking

Compute = Callable[[Sequence[range]], Generator[dict[str, Tensor], None, None]]


@dataclass
class _Record:
    """What a manifest, or the notes of an unfinished extraction, say."""

    settings: dict[str, Any]
    shards: dict[int, str] = field(default_factory=dict)
    finished: bool = False


class FeatureStore:
    """The features of one key. On several processes all of them make it and call its method together.

    Args:
        cache_dir: Folder of all caches, on a file system that all processes share.
        key: Of these features, hexadecimal.
        made_of: What the key is the digest of, for the manifest.
        rows: Of the data set.
        shard_rows: Rows of a shard.
        settings: What else the last bits of the numbers depend on (batch size, device, versions): an unfinished
            extraction goes on only under the same.
        names: Names of the tensors that are expected; "labels" may be there and "z" too.
    """

    def __init__(
        self,
        cache_dir: str | os.PathLike,
        key: str,
        *,
        made_of: Mapping[str, Any],
        rows: int,
        shard_rows: int,
        settings: Mapping[str, Any],
        names: Sequence[str],
    ):
        if not key or set(key) - set("0123456789abcdef"):
            raise UsageError(f"A cache key is hexadecimal; {key!r} came.")
        self.key, self.made_of, self.rows, self.names = key, dict(made_of), rows, set(names)
        self.settings = {**settings, "shard_rows": shard_rows}
        self.folder = Path(cache_dir).expanduser() / key
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cache_dir={str(cache_dir)!r} is no folder that can be written to ({error}).") from error
        self.file, self.manifest = self.folder / "features.safetensors", self.folder / "manifest.json"

    def get(self, compute: Compute) -> dict[str, Tensor]:
        """Return the mapped tensors, after extracting what is missing.

        Args:
            compute: Gets ranges of rows and yields a dict of tensors for each.

        Raises:
            UsageError: the processes do not share the folder, or give different tensors.
        """
        if not self._is_whole(tell=False):
            with self._locked():
                if not self._is_whole(tell=True):  # another process may have finished it meanwhile
                    self._extract(compute)
        with safe_open(self.file, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}

    # --- what is there ---

    def _is_whole(self, *, tell: bool) -> bool:
        record, reason = self._recorded(finished=True)
        if tell:
            self._tell(reason)
        return record is not None and not reason

    def _tell(self, reason: str) -> None:
        if reason and rank() == 0:
            warnings.warn(
                f"The feature cache {self.folder.name} is damaged: {reason}. What does not fit is extracted again.",
                stacklevel=6,
            )

    def _recorded(self, *, finished: bool) -> tuple[_Record | None, str]:
        """Return what is on record, less the shards whose bytes do not fit, and what is wrong; "" for nothing."""
        record, reason = broadcast_object(self._read_record(finished) if rank() == 0 else None)
        if record is None:
            return record, reason
        layout, problem = broadcast_object(self._read_layout() if rank() == 0 else None)
        if layout is None:
            told = problem if record.finished or record.shards else ""  # else it was killed before it made the file
            return _Record(record.settings, finished=record.finished), told
        own = sorted(record.shards)[rank() :: world_size()]
        bad = sorted(shard for part in gather_objects(self._bad(layout, record, own)) for shard in part)
        good = {shard: checksum for shard, checksum in record.shards.items() if shard not in set(bad)}
        if bad:
            reason = f"the content of {len(bad)} of {len(record.shards)} shards has changed"
        return _Record(record.settings, good, record.finished), reason

    def _read_record(self, finished: bool) -> tuple[_Record | None, str]:
        try:
            if self.manifest.is_file():
                found = json.loads(self.manifest.read_bytes())
                shards = dict(enumerate(map(str, found["shards"])))
                if (found["format"], found["key"], found["rows"]) != (FORMAT, self.key, self.rows):
                    return None, "the manifest belongs to other features"
                if len(shards) != self._count(found["settings"]):
                    return None, "the manifest is incomplete"
                return _Record(found["settings"], shards, finished=True), ""
            if finished or not (self.folder / "progress.json").is_file():
                return None, ""
            found = json.loads((self.folder / "progress.json").read_bytes())
            if (found["format"], found["key"], found["rows"]) != (FORMAT, self.key, self.rows):
                return None, ""
            return _Record(found["settings"], self._noted(found["settings"])), ""
        except (OSError, ValueError, KeyError, TypeError) as error:
            return None, f"its manifest cannot be read ({type(error).__name__})" if self.manifest.exists() else ""

    def _count(self, settings: Mapping[str, Any]) -> int:
        """Return how many shards there are."""
        shard_rows = settings["shard_rows"]
        if type(shard_rows) is not int or shard_rows < 1:
            raise ValueError(f"shard_rows={shard_rows!r}")
        return -(-self.rows // shard_rows)

    def _noted(self, settings: Mapping[str, Any]) -> dict[int, str]:
        shards, count = {}, self._count(settings)
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
            layout = Layout.of(self.file)
            self._check_layout(layout)
        except (OSError, ValueError):
            return None, "features.safetensors is another file"
        if layout.key != self.key:
            return None, "features.safetensors belongs to other features"
        expected, size = layout.size, self.file.stat().st_size
        if size != expected:
            return None, f"features.safetensors has {size} bytes instead of {expected}"
        return layout, ""

    def _check_layout(self, layout: Layout) -> None:
        optional = {"z", "labels"}
        names = set(layout.tensors)
        if layout.rows != self.rows or names - optional != self.names - optional or names - self.names:
            raise ValueError(f"unexpected tensors {sorted(names)}")

    def _bad(self, layout: Layout, record: _Record, shards: Sequence[int]) -> list[int]:
        if not shards:
            return []
        with open(self.file, "rb", buffering=0) as file:
            size = record.settings["shard_rows"]
            return [s for s in shards if self._checksum(file, layout, self._range(s, size)) != record.shards[s]]

    def _checksum(self, file: Any, layout: Layout, part: range) -> str:
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

        told = False
        while not broadcast_object(taken() if rank() == 0 else None):  # again and again, as collectives have timeouts
            if rank() == 0 and not told:
                warnings.warn(
                    f"Another process extracts the features {self.folder.name}; waiting for it.", stacklevel=6
                )
            told = True
            time.sleep(0.2)
        try:
            yield
        finally:
            if rank() == 0:
                lock.release()

    def _extract(self, compute: Compute) -> None:
        record, reason = self._recorded(finished=False)
        if record is not None and not record.finished:  # else it is told already
            self._tell(reason)
        done, layout = {}, None
        if record is not None and record.settings == self.settings:
            layout, _ = broadcast_object(self._read_layout() if rank() == 0 else None)
            done = record.shards if layout is not None else {}
        if not self._fill(compute, done, layout):
            self._fill(compute, {}, None)  # what is there was not made by this extraction

    def _fill(self, compute: Compute, done: dict[int, str], layout: Layout | None) -> bool:
        """Extract the shards that are not done and write the manifest; False where they don't fit the `layout`."""
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
                self._make_file(agreed)
            barrier()
            if any(gather_objects(self._read_layout()[0] != agreed)):
                raise UsageError(
                    "Not all processes see the file that process 0 made; cache_dir has to lie on a file system that "
                    "they share."
                )
            with (
                open(self.file, "r+b", buffering=0) as file,
                open(self.folder / f"progress-{rank()}.jsonl", "a", encoding="utf-8") as journal,
            ):
                for shard in own:
                    assert result is not None
                    done[shard] = self._write(file, agreed, shard, result)
                    journal.write(f"\n{json.dumps([shard, done[shard]])}")  # before it: the last line may be cut off
                    journal.flush()
                    result = next(results, None)
                os.fsync(file.fileno())
        for part in gather_objects(done):
            done |= part
        if rank() == 0:
            self._finish(done)
        barrier()
        return True

    def _layout_of(self, result: Mapping[str, Tensor]) -> Layout:
        layout = Layout(self.key, self.rows, {name: (t.dtype, tuple(t.shape[1:])) for name, t in result.items()})
        self._check_layout(layout)
        return layout

    def _note_start(self, done: Mapping[int, str]) -> None:
        """Replace what was on record by the finished shards that are kept; those first, the manifest last."""
        kept = self.folder / "progress-0.jsonl"
        write_atomic(kept, "".join(f"\n{json.dumps([s, checksum])}" for s, checksum in done.items()).encode())
        for journal in self.folder.glob("progress-*.jsonl"):
            if journal != kept:
                journal.unlink()
        about = {"format": FORMAT, "key": self.key, "rows": self.rows, "settings": self.settings}
        write_json(self.folder / "progress.json", about)
        self.manifest.unlink(missing_ok=True)

    def _make_file(self, layout: Layout) -> None:
        """Put an empty file in place of whatever is there: who maps the old one keeps it."""
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".features.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(layout.header())
                file.truncate(layout.size)
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)  # mkstemp's files are private
            os.replace(temporary, self.file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _write(self, file: Any, layout: Layout, shard: int, result: Mapping[str, Tensor]) -> str:
        part, content = self._range(shard, self.settings["shard_rows"]), hashlib.sha256()
        for name, (dtype, shape) in layout.tensors.items():
            tensor = result.get(name)
            if tensor is None or (tensor.dtype, tensor.shape) != (dtype, (len(part), *shape)):
                came = None if tensor is None else tuple(tensor.shape)
                raise UsageError(
                    f"{name!r} of rows {part.start} to {part.stop - 1} has shape {came}, expected "
                    f"{(len(part), *shape)} as in the first rows."
                )
            raw: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            data = memoryview(raw)
            content.update(data)
            file.seek(layout.place(name, part.start))
            while data:
                data = data[file.write(data) :]
        return content.hexdigest()[:32]

    def _finish(self, shards: Mapping[int, str]) -> None:
        content = {
            "format": FORMAT,
            "key": self.key,
            "rows": self.rows,
            "made_of": self.made_of,
            "settings": self.settings,
            "shards": [shards[shard] for shard in range(len(shards))],
        }
        write_json(self.manifest, content)
        for file in self.folder.glob("progress*"):
            file.unlink()
