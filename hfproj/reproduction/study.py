"""What a study is: a table or a figure of a paper as data. Rows, columns, the paper's numbers, and what is claimed.

Nothing here runs. A file of `hfproj.studies.papers` lists studies; `hfproj.reproduce` runs them and judges their claims
by the rules of `hfproj.reproduction.judging`, which know nothing of the single study.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, TypeAlias

from hfproj.errors import UsageError, unknown
from hfproj.presets import get_preset
from hfproj.reproduction.sources import Source
from hfproj.typing import OneOf

SCALES = ("paper", "mini", "trial")
# of a preset, that a row changes
PARTS = ("head_options", "objective", "predictor", "regularizers", "views", "training")
EVALUATED = "evaluated"  # as a column's layer: that which each row says
_LEFT_OPEN = ("num_train_epochs", "learning_rate")  # what a preset may leave open, and a study must not


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table: a preset, and how the row differs from it.

    Args:
        name: As the table calls it.
        preset: Name of a preset, see `hfproj.list_presets`.
        changes: Values that replace those of the preset: ``{"head_options": {"levels": 8}}`` changes one option of the
            head, ``{"head": "identity"}`` the head; a part that is None is dropped.
        paper: Data → column → the paper's number, in the unit of the column.
        data: Data of the study that the row has numbers of; all, if empty.
        x, curve: Where the row stands on the axis of a sweep, and on which curve.
        evaluated: Layer that columns with the layer "evaluated" read of this row.
        trained: False: the untrained control, measured as it begins.
        start: What the weights of the head's linear maps are multiplied with before training.
    """

    name: str
    preset: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    data: tuple[str, ...] = ()
    x: float | int | None = None
    curve: str = ""
    evaluated: str = "h"
    trained: bool = True
    start: float | int = 1.0


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table: what is measured of a trained model.

    Args:
        name: As the table calls it.
        measure: Name of a probe (`hfproj.list_probes`), of a diagnostic (`hfproj.diagnostics.by_name.MEASURES`), or of
            `hfproj.reproduction.measures.MEASURES`.
        layer: "h", "z", "head.0" …, the name of a module of the backbone, or "evaluated".
        labels: Which labels of the data a probe reads.
        options: Of the probe or the measure.
        other: A further data set of the source that the probe is fitted and scored on; "": the study's own.
        share: Fraction of the training images whose labels the probe sees.
        unit: "%" shows a fraction times 100; "" the number.
        digits: Behind the point.
        log: Differences are compared as ratios: for ranks and conditions.
    """

    name: str
    measure: str
    layer: str = "h"
    labels: str = "label"
    options: Mapping[str, Any] = field(default_factory=dict)
    other: str = ""
    share: float | int = 1.0
    unit: str = ""
    digits: int = 1
    log: bool = False

    def shown(self, value: float) -> str:
        """Return a value as the table shows it.

        Example:
            >>> Column(name="20-NN", measure="knn", unit="%").shown(0.861)
            '86.1'
        """
        return f"{100 * value if self.unit == '%' else value:.{self.digits}f}"


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
    """The column rises along the rows (or falls): the slope over their order, centred ranks, is above 0 (below)."""

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


@dataclass(frozen=True, kw_only=True)
class Scale:
    """At what size a study runs.

    Args:
        backbone: ``{"name": name, **options}`` of `hfproj.load_backbone`.
        trainable: As in `hfproj.ProjectionHeadConfig`.
        lora_rank: Of a LoRA on the backbone; 0: none.
        training: Values in place of the presets', and those that they leave open.
        views: Options of the views in place of the presets' (the size of the images).
        heads: Factor of every width inside heads and predictors, and of the number of prototypes.
        data: Name of data of the study → what takes its place at this scale.
        presets: Name of a preset → the one that takes its place.
        images, test_images: At most so many; None: all.
        seeds: That are run.
        seconds: What a run takes, about, on `machine`.
        machine: On which.
        note: What is left open by the paper and chosen here, and what is reduced.
    """

    backbone: Mapping[str, Any]
    trainable: str | int = "full"
    lora_rank: int = 0
    training: Mapping[str, Any] = field(default_factory=dict)
    views: Mapping[str, Any] = field(default_factory=dict)
    heads: float | int = 1.0
    data: Mapping[str, Source] = field(default_factory=dict)
    presets: Mapping[str, str] = field(default_factory=dict)
    images: int | None = None
    test_images: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    seconds: float | int = 0.0
    machine: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        check_seeds(self.seeds)

    def but(self, **changes: Any) -> "Scale":
        """Return this scale with other values; those of `training` and `views` are merged."""
        merged: dict[str, Any] = {n: {**getattr(self, n), **changes[n]} for n in ("training", "views") if n in changes}
        return replace(self, **{**changes, **merged})


@dataclass(frozen=True, kw_only=True)
class Study:
    """A table or a figure of a paper.

    Args:
        name: ``paper.table``, by which `hfproj.reproduce` knows it.
        title: What it asks, in a line.
        source: Paper and table, and what of its numbers is known.
        data: Name → `Source`.
        rows, columns: Of the table.
        claims: What is said about it.
        scales: "paper" and "mini" → `Scale`.
        measured: Further columns that every run measures, which the table does not show: other studies on the same runs
            show them.
        watched: What is followed along training for columns of the measure "along": metrics of
            `hfproj.SpectrumCallback`, and names of `hfproj.reproduction.watches`: "curvature" (the head's Hessian),
            "update_ratio", "online" (a linear probe that learns along), and those of papers.
        followed: Of those, name in the history → label with its unit: the page shows their curves along training.
        spectra: Layers whose covariance spectra are kept.
        drawn: Those whose spectra the page shows.
        axis, axis_scale: What `x` of the rows is, and how it is drawn: a picture of every column over it.

    Raises:
        UsageError: If a preset, a row, a column or a scale that is named does not exist, or a preset leaves open what
            no scale fills in.
    """

    name: str
    title: str
    source: str
    data: Mapping[str, Source]
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    claims: tuple[Claim, ...]
    scales: Mapping[str, Scale]
    measured: tuple[Column, ...] = ()
    watched: tuple[str, ...] = ()
    followed: Mapping[str, str] = field(default_factory=dict)
    spectra: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()
    axis: str = ""
    axis_scale: OneOf["linear", "log", "symlog"] = "linear"

    def __post_init__(self) -> None:
        if set(self.scales) != {"paper", "mini"}:
            raise UsageError(f"Expected scales 'paper' and 'mini' of study {self.name}, got {sorted(self.scales)}.")
        for what, names in (("row", [row.name for row in self.rows]), ("column", [c.name for c in self.every_column])):
            if len(set(names)) < len(names):
                raise UsageError(f"Expected {what}s of study {self.name} with names of their own, got {names}.")
        for row in self.rows:
            for name in {*row.data, *row.paper} - {*self.data}:
                raise unknown(f"data of row {row.name!r}", name, self.data)
            for column in {column for of in row.paper.values() for column in of} - {c.name for c in self.columns}:
                raise unknown(
                    f"column of the paper's numbers of row {row.name!r}", column, [c.name for c in self.columns]
                )
            for scale in self.scales.values():
                preset = get_preset(scale.presets.get(row.preset, row.preset))
                lacking = [n for n in _LEFT_OPEN if n not in {**preset.training, **scale.training}]
                if row.trained and lacking and "max_steps" not in scale.training:
                    raise UsageError(
                        f"Expected {' and '.join(lacking)} in the scales of study {self.name}: preset {row.preset} "
                        "leaves it open; say so in `note`, too."
                    )
        if not re.fullmatch(r"\w+\.\w+", self.name):
            raise UsageError(f"Expected a study's name as paper.table, in letters and digits, got {self.name!r}.")
        for claim in self.claims:
            for cells in cells_of(claim):
                self._check(cells)
            for test in claim.tests:
                self._check_scales(test)

    @property
    def every_column(self) -> tuple[Column, ...]:
        """The columns that every run measures."""
        return (*self.columns, *self.measured)

    def column(self, name: str) -> Column:
        """Return a column by its name."""
        return next(column for column in self.every_column if column.name == name)

    def runs(self) -> list[tuple[Row, str]]:
        """Return every row with every data that it has numbers of."""
        return [(row, data) for row in self.rows for data in self.data if data in (row.data or self.data)]

    def _check_scales(self, test: Test) -> None:
        """Refuse a comparison of a logarithmic column with a linear one, or with what is not positive."""
        if isinstance(test, More | Same) and isinstance(test.second, Cells):
            logs = {self.column(cells.column).log for cells in (test.first, test.second)}
            if len(logs) > 1:
                what = f"{test.first.column!r} and {test.second.column!r}"
                raise UsageError(
                    f"Expected two columns of a claim on one scale, got {what}, one of which is logarithmic."
                )
        elif isinstance(test, More) and self.column(test.first.column).log and not float(test.second) > 0:  # type: ignore[arg-type]
            raise UsageError(f"Expected a number above 0 for the logarithmic {test.first.column!r}, got {test.second}.")

    def _check(self, cells: Cells) -> None:
        for what, names, known in (
            ("row", cells.rows, [row.name for row in self.rows]), ("data", cells.data, list(self.data)),
            ("column", [cells.column], [column.name for column in self.every_column]),
        ):  # fmt: skip
            for name in set(names) - set(known):
                raise unknown(f"{what} of a claim of study {self.name}:", name, known)


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse no seeds, negative ones, and one that is given twice, which would count as two runs.

    Raises:
        UsageError: If it is so.
    """
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UsageError(f"Expected seeds as different whole numbers from 0, at least one, got {list(seeds)}.")


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
