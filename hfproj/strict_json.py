"""JSON that third parties wrote: strict, and within `hfproj.limits` before memory is taken for it."""

import json
import math
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from hfproj import limits
from hfproj.errors import AdapterFileError, one_line

_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # what JSON can say and a file's or module's name can't be


def short(value: Any, length: int = 60) -> str:
    """Return the `repr` of a value from a file, cut to `length` characters, for a message of one line.

    Example:
        >>> short("a" * 100, 10)
        "'aaaaaaaa…"
    """
    text = repr(value[:1000] if isinstance(value, str | bytes | list | tuple) else value)
    return text if len(text) <= length else text[: length - 1] + "…"


def check_size(name: str, size: int, where: str, *, largest: int = limits.CONFIG_BYTES) -> None:
    """Refuse a file of more than `largest` bytes before it is read, by an `AdapterFileError`."""
    if size > largest:
        what = f"{where}: {name} has {size:,} bytes, more than the {largest:,} that such a file may have"
        raise AdapterFileError(f"{what}; it is not the {name} of an adapter.")


def read_json(path: Path, where: str, *, largest: int = limits.CONFIG_BYTES) -> dict[str, Any]:
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


def parse_json(
    data: bytes, *, digits: int = limits.INTEGER_DIGITS, most: int | None = None
) -> dict[str, Any]:  # fmt: skip
    """Return the object that `data` holds, under the rules of `read_json`.

    Integers have at most so many digits, and there are at most so many values (`limits.JSON_VALUES`).

    Raises:
        ValueError: If it holds something else, too many values, or is nested too deep.

    Example:
        >>> parse_json(b'{"out_dim": 128}')
        {'out_dim': 128}
    """
    most = limits.JSON_VALUES if most is None else most
    if (values := sum(map(data.count, (b",", b"[", b"{")))) > most:
        raise ValueError(f"it holds up to {values:,} values, more than {most:,}")
    number, text = partial(_number, most=digits), data.decode("utf-8")
    try:
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=number, parse_int=number, parse_float=number)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, got {type(found).__name__}")
    level: list[Any] = [found]
    for _ in range(limits.JSON_DEPTH):
        parts = [p for value in level for p in (value.values() if isinstance(value, dict) else value)]
        if any(isinstance(p, str) and _NO_TEXT.search(p) for p in parts):
            raise ValueError("a text in it is no valid Unicode")
        level = [p for p in parts if isinstance(p, dict | list)]
        if not level:
            return found
    raise ValueError(f"it is nested deeper than {limits.JSON_DEPTH}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {short(twice)} comes twice")
    if any(map(_NO_TEXT.search, found)):
        raise ValueError("a name in it is no valid Unicode")
    return found


def _number(text: str, most: int) -> int | float:
    digits = text.lstrip("-")
    whole = digits.isdigit()
    # No float has more than 767 digits that count, and reading longer texts is not linear.
    value = math.nan if len(text) > 1000 or (whole and len(digits) > most) else float(text)
    if not math.isfinite(value):
        raise ValueError(f"{short(text)[1:-1]} is no number of JSON, or too large")
    return int(text) if whole else value
