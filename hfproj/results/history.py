"""What was measured while training, as a table beside `results.json`: `history.parquet`, the rows of `Results.history`.

`step` and `seed` are whole numbers, every other column is float64: null where a row lacks it, NaN where the row has it
but the number was not finite. So reading gives back what was written.
"""

import functools
import io
import math
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from hfproj import limits
from hfproj.checking import checked
from hfproj.errors import AdapterFileError, UsageError, check_path, one_line
from hfproj.files import write_atomic
from hfproj.redaction import known_secrets, redact
from hfproj.results.parquet_pages import open_table
from hfproj.strict_json import check_size, short

HISTORY_FILE = "history.parquet"
_WHOLE = ("step", "seed")


@checked
def write_history(rows: Iterable[Mapping[str, Any]], path: str | PathLike) -> Path:
    """Write rows as a table, atomically and sorted by seed and step; a folder gets a `history.parquet`.

    Of several rows of one seed and step the last is kept: a resumed run may measure a step again.

    Args:
        rows: Each with a whole number "step"; further numbers by name (scalars of torch and numpy too). NaN, infinity
            and None are one: measured, and no number.
        path: A file, whose name ends in `.parquet`, or a folder, which is made if needed.

    Raises:
        UsageError: If a row has no step, or a value is not a number.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     read_history(write_history([{"step": 10, "rankme_h": 12.5}, {"step": 0, "loss": float("nan")}], folder))
        [{'step': 0, 'loss': None}, {'step': 10, 'rankme_h': 12.5}]
    """
    import pyarrow.parquet

    known = known_secrets()
    name_of = functools.cache(lambda name: redact(str(name), known))
    rows = rows if isinstance(rows, list | tuple) else list(rows)
    if not all(isinstance(row, Mapping) for row in rows):
        raise UsageError(f"Expected the history as dicts, one for each step, got {rows!r:.80}; pass trainer.history.")
    by_step: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        numbers = {name_of(name): _number(name, value) for name, value in row.items()}
        if numbers.get("step") is None:
            raise UsageError(f"Expected each row of the history with a whole number 'step', got {dict(row)!r:.80}.")
        by_step[numbers.get("seed") or 0, numbers["step"]] = numbers
    ordered = [by_step[key] for key in sorted(by_step)]
    names = dict.fromkeys(["step", *(name for row in ordered for name in row)])
    kinds = {name: pyarrow.int64() if name in _WHOLE else pyarrow.float64() for name in names}
    columns = {name: pyarrow.array([row.get(name) for row in ordered], kind) for name, kind in kinds.items()}
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    write_atomic(path := file_in(path, HISTORY_FILE), buffer.getvalue())
    return path


@checked
def read_history(path: str | PathLike, *, until: int | None = None) -> list[dict[str, Any]]:
    """Return the rows that `write_history` wrote; None where the number was not finite.

    Args:
        path: The file, or the folder that holds it.
        until: Leave out rows of later steps: a run that resumes at this step measures them anew.

    Raises:
        UsageError: If there is no file of this name.
        AdapterFileError: If the file is damaged, or not a history.
    """
    import pyarrow

    path = file_in(path, HISTORY_FILE)
    if not path.is_file():
        raise UsageError(f"There is no file {str(path)!r}; expected a {HISTORY_FILE} that write_history wrote.")
    check_size(path.name, path.stat().st_size, str(path.parent), largest=limits.HISTORY_BYTES)
    data = path.read_bytes()
    try:
        table = open_table(data).read()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise AdapterFileError(f"{path.name} is damaged, or no history: {one_line(error)}.") from error
    names = table.column_names
    if "step" not in names or len(set(names)) < len(names) or table["step"].null_count:
        hint = "it has no column 'step', one with gaps, or a column twice"
        raise AdapterFileError(f"{path.name} is no history: {hint}; its columns are {short(names, 200)}.")
    rows: list[dict[str, Any]] = [row for row in table.to_pylist() if until is None or row["step"] <= until]
    return [{n: None if v != v else v for n, v in row.items() if v is not None} for row in rows]


def file_in(path: str | PathLike, name: str) -> Path:
    """Return `path` if it is a file or ends as `name` does; else it is a folder, and that of the file `name` in it."""
    check_path("the path", path)
    path = Path(path)
    return path if path.is_file() or (path.suffix == Path(name).suffix and not path.is_dir()) else path / name


def _number(name: str, value: Any) -> float | int | None:
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None if name in _WHOLE else math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"Expected a number as {name!r} of the history, got {value!r:.80}.")
    if name in _WHOLE and value != int(value):
        raise UsageError(f"Expected a whole number as {name!r} of the history, got {value!r}.")
    if (name in _WHOLE and abs(value) >= 2**63) or (isinstance(value, int) and abs(value) >= 2**1023):
        raise UsageError(f"Expected a number of 64 bits as {name!r} of the history, got a larger one.")
    return int(value) if name in _WHOLE else float(value)
