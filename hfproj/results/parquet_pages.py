"""What a parquet file of numbers will take before it is read: its rows, columns, and pages as their headers have them.

A page of a few bytes can stand for billions of values (run lengths, dictionaries, compression), and what the file's
footer says of it need not be true: readers take memory by one or the other. So both are read here, compared with each
other and with `hfproj.limits`, before pyarrow opens the file: it ends the process at some footers.

References:
    The parquet format, https://github.com/apache/parquet-format (``parquet.thrift``), in Thrift's compact protocol.
"""

from collections.abc import Iterator
from typing import Any

from hfproj import limits

_TYPES = (2, 5)  # INT64, DOUBLE
_REPEATED = 2
_DICTIONARY = 7
_PAGES = {0: 5, 2: _DICTIONARY, 3: 8}  # the type of a page → the field of its header that counts its values
_DEPTH, _LIST = 8, 2 * limits.HISTORY_COLUMNS


def open_table(data: bytes) -> Any:
    """Return a file of numbers as a ``pyarrow.parquet.ParquetFile`` that is safe to read.

    Raises:
        ValueError: If it holds more than `hfproj.limits`, or misleads; the message says what.
    """
    import pyarrow.parquet

    length = int.from_bytes(data[-8:-4], "little")
    if data[:4] != b"PAR1" or data[-4:] != b"PAR1" or not 12 + length <= len(data):
        raise ValueError("it is no parquet file")
    if length > limits.HISTORY_FOOTER:
        raise ValueError(f"its footer has {length:,} bytes, more than {limits.HISTORY_FOOTER:,}")
    footer = _struct(data[-8 - length : -8], 0)[0]
    try:
        _check_columns(footer)
        _check_groups(data, footer)
    except (KeyError, TypeError, IndexError) as error:  # a field is missing, or of another type
        raise ValueError("its footer is damaged") from error
    file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
    if wrong := [field.name for field in file.schema_arrow if str(field.type) not in ("int64", "double")]:
        raise ValueError(f"its column {wrong[0]!r:.60} holds no numbers")
    return file


def _check_columns(footer: dict[int, Any]) -> None:
    rows, (root, *schema) = footer[3], footer[2]
    columns = len(schema)
    # A row costs as three values.
    if rows < 0 or columns > limits.HISTORY_COLUMNS or rows * (columns + 3) > limits.HISTORY_CELLS:
        raise ValueError(f"it has {rows:,} rows of {columns:,} columns, more than {limits.HISTORY_CELLS:,} values")
    if root.get(5) != columns:
        raise ValueError("its columns are not those that it lists")
    for index, column in enumerate(schema):
        if column.get(1) not in _TYPES or column.get(3) == _REPEATED or 5 in column:
            raise ValueError(f"its column {index} holds no numbers")


def _check_groups(data: bytes, footer: dict[int, Any]) -> None:
    """Compare what the footer says of rows, values and bytes with each other, and with the header of each page."""
    rows, columns, groups = footer[3], len(footer[2]) - 1, footer[4]
    if any(group[3] < 0 for group in groups) or sum(group[3] for group in groups) != rows:
        raise ValueError("its row groups do not add up to its rows")
    pages = size = taken = 0
    for group in groups:
        if len(group[1]) != columns:
            raise ValueError("a row group has other columns")
        for chunk in (column[3] for column in group[1]):
            start = min(chunk[9], chunk[11] if chunk.get(11, 0) > 0 else chunk[9])
            end, pages, values = start + chunk[7], pages + 1, 0
            taken += chunk[7]
            if not 0 <= start <= end <= len(data) or chunk[7] < 0 or taken > len(data):
                raise ValueError("a column lies outside of the file, or upon another")
            for kind, uncompressed, count in _pages(data, start, end) if chunk[5] else ():  # else none is read
                pages, size, values = pages + 1, size + uncompressed, values + count * (kind != _DICTIONARY)
                if size > limits.HISTORY_BYTES or pages > limits.HISTORY_PAGES:
                    raise ValueError(
                        f"it has more than {limits.HISTORY_PAGES:,} pages or {limits.HISTORY_BYTES:,} bytes"
                    )
                if values > group[3] or count < 0 or (kind == _DICTIONARY and 8 * count > uncompressed):
                    raise ValueError("a page is said to hold more values than there are")
            if not values == chunk[5] == group[3]:
                raise ValueError("a column has other values than its row group has rows")


def _pages(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield kind, uncompressed bytes and number of values of each page from `start` to `end`."""
    while start < end:
        header, start = _struct(data, start)
        kind, uncompressed, compressed = _PAGES[header[1]], header[2], header[3]
        count, start = header[kind][1], start + compressed
        if uncompressed < 0 or compressed < 0 or start > end:
            raise ValueError("a page is larger than its column")
        yield kind, uncompressed, count


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Return the fields of a struct by their number, and where it ends."""
    fields: dict[int, Any] = {}
    field = 0
    while at < len(data) and depth < _DEPTH:
        first, at = data[at], at + 1
        if first == 0:
            return fields, at
        if not first >> 4:  # fields may come in any order then, and twice
            break
        field += first >> 4
        fields[field], at = (first & 15 == 1, at) if first & 15 in (1, 2) else _value(data, at, first & 15, depth)
    raise ValueError("a header in it is damaged")


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    """Return a value of Thrift's kinds, and where it ends; texts and floats are passed over."""
    if kind in (1, 2, 3):  # a bool in a list, a byte
        return None, at + 1
    if kind in (4, 5, 6):  # integers of 16, 32 and 64 bits
        number, at = _varint(data, at)
        return number >> 1 ^ -(number & 1), at
    if kind == 7:
        return None, at + 8
    if kind == 8:
        length, at = _varint(data, at)
        return None, at + length
    if kind == 12:
        return _struct(data, at, depth + 1)
    if kind != 9 or at >= len(data) or depth >= _DEPTH:
        raise ValueError("a header in it is damaged")
    of, count, at = data[at] & 15, data[at] >> 4, at + 1
    if count == 15:
        count, at = _varint(data, at)
    if count > _LIST:
        raise ValueError(f"a list in its footer has {count:,} entries, more than {_LIST:,}")
    entries = []
    for _ in range(count):
        entry, at = _value(data, at, of, depth + 1)
        entries.append(entry)
    return entries, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = 0
    for place in range(10):
        if at + place >= len(data):
            break
        byte = data[at + place]
        number |= (byte & 127) << 7 * place
        if byte < 128:
            return number, at + place + 1
    raise ValueError("a header in it is damaged")
