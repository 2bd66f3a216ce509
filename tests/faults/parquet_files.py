"""Histories made to mislead: tables whose pages stand for many values, and each number of their headers changed.

The numbers are found by walking through Thrift's compact protocol, see `hfproj.results.parquet_pages`.
"""

import io
import random

import pyarrow
import pyarrow.parquet

from hfproj.results import read_history

NUMBERS = [0, 1, 99, 101, 10**6, 2**31 - 1, 2**40, -1]
_TRUE, _FALSE, _BYTE, _DOUBLE, _TEXT, _LISTS, _STRUCT = 1, 2, 3, 7, 8, (9, 10), 12


def table(rows, columns=1, **options):
    """Return the bytes of a table of equal numbers."""
    same, buffer = pyarrow.repeat(pyarrow.scalar(1), rows), io.BytesIO()
    names = ["step", *(f"c{i}" for i in range(columns - 1))]
    pyarrow.parquet.write_table(pyarrow.table([same] * columns, names=names), buffer, **options)
    return buffer.getvalue()


def varint(value):
    """Return an integer as Thrift writes it: seven bits a byte."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def zigzag(value):
    """Return a signed integer as Thrift writes it."""
    return varint(value << 1 if value >= 0 else ~(value << 1))


def walk(data, at, kind=_STRUCT):
    """Return the numbers of a value at `at`, and where it ends: of each place, end, the bytes of another."""
    if kind in (_TRUE, _FALSE):
        return [], at
    if kind in (_BYTE, _DOUBLE):
        return [], at + (1 if kind == _BYTE else 8)
    if kind == _STRUCT:
        found = []
        while head := data[at]:
            at += 1
            if not head >> 4:  # the field's number stands in full
                at = _end(data, at)
            more, at = walk(data, at, head & 15)
            found += more
        return found, at + 1
    if kind in _LISTS:
        of, count, end = data[at] & 15, data[at] >> 4, at + 1
        if count == 15:
            end = _end(data, at + 1)
            count = _value(data, at + 1)
        found = [(at, end, lambda value: bytes([15 << 4 | of]) + varint(max(value, 0)))]
        at = end
        for _ in range(count):
            more, at = walk(data, at + (of in (_TRUE, _FALSE)), of)
            found += more
        return found, at
    end = _end(data, at)
    if kind == _TEXT:
        return [(at, end, lambda value: varint(max(value, 0)))], end + _value(data, at)
    return [(at, end, zigzag)], end


def _end(data, at):
    while data[at] > 127:
        at += 1
    return at + 1


def _value(data, at):
    return sum((byte & 127) << 7 * place for place, byte in enumerate(data[at : _end(data, at)]))


def with_footer(data, change):
    """Return a file with its footer changed by a function of its bytes."""
    length = int.from_bytes(data[-8:-4], "little")
    footer = change(data[-8 - length : -8])
    return data[: -8 - length] + footer + len(footer).to_bytes(4, "little") + data[-4:]


def footers(data):
    """Yield files with one number of the footer changed."""
    length = int.from_bytes(data[-8:-4], "little")
    found, _ = walk(data[-8 - length : -8], 0)
    for number, (start, end, encoded) in enumerate(found):
        for value in NUMBERS:
            other = encoded(value)
            yield f"footer {number} {value}", with_footer(data, lambda f: f[:start] + other + f[end:])


def page_headers(data):
    """Yield files of one page with one number of its header changed, and the footer's sizes with it."""
    size = pyarrow.parquet.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(0).total_compressed_size
    found, _ = walk(data, 4)
    for number, (start, end, encoded) in enumerate(found):
        for value in NUMBERS:
            other = encoded(value)
            changed, more = data[:start] + other + data[end:], len(other) - (end - start)
            old, new = zigzag(size), zigzag(size + more)
            yield f"page {number} {value}", with_footer(changed, lambda f: f.replace(b"\x16" + old, b"\x16" + new))


def groups_beyond(groups, rows):
    """Return a file whose row groups hold more rows than its footer says there are."""
    data = table(groups * rows, row_group_size=rows, store_schema=False, compression="none", write_statistics=False)
    old, new = b"\x16" + zigzag(groups * rows), b"\x16" + zigzag(rows)
    return with_footer(data, lambda footer: footer.replace(old, new, 1))


def upon_another(columns, rows):
    """Return a file whose columns all lie where the first one does."""
    data = table(rows, columns, compression="none", write_statistics=False, use_dictionary=False)
    group = pyarrow.parquet.ParquetFile(io.BytesIO(data)).metadata.row_group(0)
    places = [group.column(index).data_page_offset for index in range(columns)]

    def change(footer):
        for place in places[1:]:
            footer = footer.replace(b"\x26" + zigzag(place), b"\x26" + zigzag(places[0]))
        return footer

    return with_footer(data, change)


def histories(folder, whole):
    """Tables whose pages stand for many values, or lie."""
    path, draw = folder / "history.parquet", random.Random(0)
    made = {
        **{f"{rows:,} rows {codec}": lambda rows=rows, codec=codec: table(rows, compression=codec)
           for rows in (2_000_000, 30_000_000) for codec in ("zstd", "none")},
        "10,000 columns": lambda: table(10, 10_000), "wide and long": lambda: table(30_000, 300, compression="zstd"),
        "groups beyond the rows": lambda: groups_beyond(20, 1_000_000), "columns": lambda: upon_another(50, 20_000),
        "a page a row": lambda: table(300_000, data_page_size=1, write_batch_size=1, use_dictionary=False),
        "a group a row": lambda: table(30_000, row_group_size=1),
        "a long footer": lambda: with_footer(table(9), lambda footer: footer + b"\0" * (1 << 25)),
    }  # fmt: skip
    for name, make in made.items():
        path.write_bytes(make())
        yield name, lambda: read_history(path)
    for name, values in {"texts": ["x" * 10**6] * 3, "lists": [[1] * 10**5] * 3, "gaps": [None, 1, 2]}.items():
        pyarrow.parquet.write_table(pyarrow.table({"step": pyarrow.array(values)}), path)
        yield name, lambda: read_history(path)
    sound, plain = table(100, 2, row_group_size=50), table(100, use_dictionary=False)
    for make in (
        footers(sound),
        page_headers(plain),
        page_headers(table(100, use_dictionary=False, data_page_version="2.0")),
    ):
        for name, data in make:
            path.write_bytes(data)
            yield name, lambda: read_history(path)
    sound = table(100)
    for number in range(140):
        data = bytearray(sound)
        data[draw.randrange(len(data) if number % 2 else 60)] = draw.choice([0, 255, 127, draw.randrange(256)])
        path.write_bytes(data)
        yield f"byte {number}", lambda: read_history(path)
