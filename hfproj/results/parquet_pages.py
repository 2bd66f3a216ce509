"""What a parquet file of numbers will take before it is read: its rows, columns, and pages as their headers have them.

A page of a few bytes can stand for billions of values (run lengths, dictionaries, compression), and what the file's
end says of it need not be true: readers believe the page's own header. So those are read here, one by one.

References:
    The parquet format, https://github.com/apache/parquet-format (PageHeader in ``parquet.thrift``), in Thrift's compact
    protocol.
"""

from collections.abc import Iterator
from typing import Any

from hfproj import limits

_DATA, _DICTIONARY, _DATA_V2 = 5, 7, 8  # fields of a PageHeader


def check_pages(data: bytes, file: Any) -> None:
    """Refuse a file, opened as a ``pyarrow.parquet.ParquetFile``, that holds more than `hfproj.limits` or misleads.

    Raises:
        ValueError: If it does; the message says what.
    """
    metadata, schema = file.metadata, file.schema_arrow
    rows, columns = metadata.num_rows, len(schema)
    if columns > limits.HISTORY_COLUMNS or rows * (columns + 3) > limits.HISTORY_CELLS:  # a row costs as three values
        raise ValueError(f"it has {rows:,} rows of {columns:,} columns, more than {limits.HISTORY_CELLS:,} values")
    wrong = [field.name for field in schema if str(field.type) not in ("int64", "double")]
    if wrong or metadata.num_columns != columns:
        raise ValueError(f"its column {wrong[0] if wrong else ''!r:.60} holds no numbers")
    total = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        if not 0 <= group.num_rows <= rows:
            raise ValueError("its row groups do not add up")
        for chunk in map(group.column, range(columns)):
            start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
            end = start + chunk.total_compressed_size
            if not 4 <= start <= end <= len(data):
                raise ValueError("a column lies outside of the file")
            values = 0
            for kind, size, count in _pages(data, start, end):
                total += size
                values += count if kind != _DICTIONARY else 0
                if values > group.num_rows or count < 0 or (kind == _DICTIONARY and 8 * count > size):
                    raise ValueError("a page is said to hold more values than there are")
            if total > limits.HISTORY_BYTES:
                raise ValueError(f"its pages have more than {limits.HISTORY_BYTES:,} bytes")


def _pages(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield kind, uncompressed bytes and number of values of each page from `start` to `end`."""
    while start < end:
        header, start = _struct(data, start)
        sizes = uncompressed, compressed = header.get(2, -1), header.get(3, -1)
        kind = next((k for k in (_DATA, _DICTIONARY, _DATA_V2) if isinstance(header.get(k), dict)), None)
        if kind is None or not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ValueError("a page has no header")
        count, start = header[kind].get(1), start + compressed
        if not isinstance(count, int) or start > end:
            raise ValueError("a page is larger than its column")
        yield kind, uncompressed, count


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Return the fields of a struct of integers, texts and structs, and where it ends."""
    fields: dict[int, Any] = {}
    field = 0
    while depth < 4 and at < len(data):
        first, at = data[at], at + 1
        if first == 0:
            return fields, at
        kind, step = first & 15, first >> 4
        if not step:
            raise ValueError("a page's header is damaged")
        field += step
        if kind in (1, 2):  # true, false
            fields[field] = kind == 1
        elif kind in (4, 5, 6):  # integers of 16, 32 and 64 bits
            number, at = _varint(data, at)
            fields[field] = number >> 1 ^ -(number & 1)
        elif kind == 8:  # a text
            length, at = _varint(data, at)
            at += length
        elif kind == 12:
            fields[field], at = _struct(data, at, depth + 1)
        else:
            raise ValueError("a page's header is damaged")
    raise ValueError("a page's header is damaged")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = 0
    for place in range(10):
        if at + place >= len(data):
            break
        byte = data[at + place]
        number |= (byte & 127) << 7 * place
        if byte < 128:
            return number, at + place + 1
    raise ValueError("a page's header is damaged")
