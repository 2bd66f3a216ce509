"""Where in a safetensors file the rows of each tensor lie: known from the shapes, before anything is written.

8 bytes: length of the header · the header, JSON · the tensors, each contiguous over all rows
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch

FORMAT = "hfproj features 1"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 2**20


@dataclass
class Layout:
    """The layout of a file of features.

    Args:
        key: Names the features, and is kept in the file's metadata.
        rows: Number of rows of every tensor.
        tensors: Name → type and shape of a row. They are ordered, widest type first, so that each tensor begins at a
            multiple of its type's size.

    Raises:
        ValueError: If a tensor has a type that the file format has no name for.

    Example:
        >>> layout = Layout("0f", 10, {"h": (torch.float16, (4,)), "index": (torch.int64, ())})
        >>> list(layout.tensors), layout.place("h", 3) - layout.place("index", 0)
        (['index', 'h'], 104)
    """

    key: str
    rows: int
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

    def __post_init__(self) -> None:
        if not {dtype for dtype, _ in self.tensors.values()} <= set(_NAMES):
            raise ValueError(f"a type that is not kept: {dict(self.tensors)}")
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
        """Return the layout that a file announces.

        Raises:
            ValueError: If the file does not begin with exactly the header of a layout.
            OSError: If the file cannot be read.
        """
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
