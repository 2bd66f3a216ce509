"""What is claimed of a table, as data: tests of its cells, which `hfproj.reproduction.judging` judges."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

from hfproj.errors import UsageError, unknown

if TYPE_CHECKING:
    from hfproj.reproduction.study import Study

POINTS = 5  # that ranks are compared of, at least


@dataclass(frozen=True)
class Cells:
    """The mean over some rows, and over some data, of a column; of all of them, if none are named."""

    column: str
    rows: tuple[str, ...] = ()
    data: tuple[str, ...] = ()


@dataclass(frozen=True)
class More:
    """`first` is larger than `second` (cells or a number) by more than `margin`; `less`: smaller, by more than that."""

    first: Cells
    second: Cells | float | int
    margin: float | int = 0.0
    less: bool = False

    def turned(self) -> "More":
        """Return the opposite."""
        return replace(self, less=not self.less)


@dataclass(frozen=True)
class Same:
    """`first` and `second` differ by less than `margin`; `apart`: by more."""

    first: Cells
    second: Cells
    margin: float | int
    apart: bool = False

    def turned(self) -> "Same":
        """Return the opposite."""
        return replace(self, apart=not self.apart)


@dataclass(frozen=True)
class Trend:
    """The column rises along the rows on average (or falls): the slope over their order, centred ranks, is above 0.

    It may fall between two rows and rise on the whole; `ordered` asks that it does so nowhere.
    """

    cells: Cells
    rises: bool = True

    def turned(self) -> "Trend":
        """Return the opposite."""
        return replace(self, rises=not self.rises)


@dataclass(frozen=True)
class Agree:
    """Two columns rank the rows alike, or with ``sign=-1`` the other way round: Spearman's ρ over rows and data."""

    x: Cells
    y: str
    sign: int = 1

    def turned(self) -> "Agree":
        """Return the opposite."""
        return replace(self, sign=-self.sign)


Test: TypeAlias = More | Same | Trend | Agree


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper says about its table; it holds if each of its tests does, and fails if one does.

    Args:
        text: The claim in words.
        tests: What it comes to in numbers.
        source: Where the paper says so.
        ours: The paper does not say so: a control or a question of ours.
    """

    text: str
    tests: tuple[Test, ...]
    source: str
    ours: bool = False

    def on(self, data: str) -> "Claim":
        """Return the claim for one data set alone."""

        def there(part: Any) -> Any:
            if isinstance(part, Cells):
                return replace(part, data=(data,))
            cells = {f.name: there(own) for f in fields(part) if isinstance(own := getattr(part, f.name), Cells)}
            return replace(part, **cells)

        return replace(self, text=f"{self.text}, {data}", tests=tuple(map(there, self.tests)))

    def turned(self) -> "Claim":
        """Return the claim turned round, for a negative control: where one test is left, the other way."""
        return replace(self, text=f"Turned round: {self.text}", tests=tuple(test.turned() for test in self.tests))


def cells_of(claim: Claim) -> list[Cells]:
    """Return what cells a claim speaks of."""
    found: list[Cells] = []
    for test in claim.tests:
        if isinstance(test, Agree):
            found += [test.x, replace(test.x, column=test.y)]
        elif isinstance(test, Trend):
            found.append(test.cells)
        else:
            found += [cells for cells in (test.first, test.second) if isinstance(cells, Cells)]
    return found


def ordered(column: str, *rows: str, data: Sequence[str] = ()) -> tuple[More, ...]:
    """Return that the column falls from each row to the next.

    Example:
        >>> [(t.first.rows, t.second.rows) for t in ordered("20-NN", "a", "b", "c")]
        [(('a',), ('b',)), (('b',), ('c',))]
    """
    cells = [Cells(column, (row,), tuple(data)) for row in rows]
    return tuple(More(first, second) for first, second in pairwise(cells))


def check_claims(study: "Study") -> None:
    """Refuse a claim that can't be judged, whatever is measured.

    Raises:
        UsageError: If it names rows, data or columns that do not exist or rows that are not on its data, compares a
            logarithmic column with a linear one or with what is not positive, has a margin that decides it, or has too
            few cells.
    """
    for claim in study.claims:
        where = f"claim {claim.text!r} of study {study.name}"
        if not claim.tests:
            raise UsageError(f"Expected tests of the {where}, got none.")
        for cells in cells_of(claim):
            _check_cells(study, cells, where)
        for test in claim.tests:
            _check_test(study, test, where)


def _check_cells(study: "Study", cells: Cells, where: str) -> None:
    for what, names, known in (
        ("row", cells.rows, [row.name for row in study.rows]), ("data", cells.data, list(study.data)),
        ("column", [cells.column], [column.name for column in study.every_column]),
    ):  # fmt: skip
        for name in set(names) - set(known):
            raise unknown(f"{what} of a {where}:", name, known)
    there = {(row, data) for row, data, _ in study.places(cells)}
    for row in cells.rows:
        for data in cells.data:
            if (row, data) not in there:
                raise UsageError(f"Expected a {where} of rows that are on its data, got {row!r}, not on {data!r}.")
    if not there:
        raise UsageError(f"Expected cells of a {where}, got none: no row is on {', '.join(cells.data)}.")


def _check_test(study: "Study", test: Test, where: str) -> None:
    margin = getattr(test, "margin", 0.0)
    if not 0 <= margin < math.inf or (isinstance(test, Same) and not margin):
        raise UsageError(f"Expected the margin of a {where} as a number from 0, of Same above 0, got {margin}.")
    if isinstance(test, Trend) and len(test.cells.rows or study.rows) < 2:
        raise UsageError(f"Expected a trend of a {where} along two rows at least, got one.")
    if isinstance(test, Agree) and (count := len(study.places(test.x))) < POINTS:
        raise UsageError(f"Expected a {where} to rank {POINTS} rows on data at least, got {count}.")
    if isinstance(test, More | Same) and isinstance(test.second, Cells):
        logs = {study.column(cells.column).log for cells in (test.first, test.second)}
        if len(logs) > 1:
            what = f"{test.first.column!r} and {test.second.column!r}"
            raise UsageError(f"Expected two columns of a claim on one scale, got {what}, one of which is logarithmic.")
    elif isinstance(test, More) and study.column(test.first.column).log and not float(test.second) > 0:  # type: ignore[arg-type]
        raise UsageError(f"Expected a number above 0 for the logarithmic {test.first.column!r}, got {test.second}.")
