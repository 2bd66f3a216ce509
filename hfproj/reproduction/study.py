"""What a study is: a table or a figure of a paper as data: rows, columns, the paper's numbers, scales, claims.

Nothing here runs. A file of `hfproj.studies.papers` lists studies; `hfproj.reproduce` runs them and judges their claims
by the rules of `hfproj.reproduction.judging`, which know nothing of the single study.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hfproj.errors import UsageError, unknown
from hfproj.presets import get_preset
from hfproj.reproduction.claims import Cells, Claim, check_claims
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

    def __post_init__(self) -> None:
        if self.unit not in ("", "%"):
            raise UsageError(f"Expected the unit of column {self.name!r} as '%' or '', got {self.unit!r}.")
        if not 0 < self.share <= 1:
            raise UsageError(f"Expected share of column {self.name!r} as a fraction above 0, got {self.share}.")

    def shown(self, value: float) -> str:
        """Return a value as the table shows it.

        Example:
            >>> Column(name="20-NN", measure="knn", unit="%").shown(0.861)
            '86.1'
        """
        return f"{100 * value if self.unit == '%' else value:.{self.digits}f}"


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
        if not self.data or not self.rows or not self.columns:
            raise UsageError(f"Expected data, rows and columns of study {self.name}, got none of one of them.")
        if set(self.scales) != {"paper", "mini"}:
            raise UsageError(f"Expected scales 'paper' and 'mini' of study {self.name}, got {sorted(self.scales)}.")
        for what, names in (("row", [row.name for row in self.rows]), ("column", [c.name for c in self.every_column])):
            if len(set(names)) < len(names):
                raise UsageError(f"Expected {what}s of study {self.name} with names of their own, got {names}.")
            if split := [name for name in names if re.search(r"[|\n]", name)]:
                raise UsageError(f"Expected names of {what}s that fit a Markdown table, without '|', got {split[0]!r}.")
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
        for layer in {*self.drawn} - {*self.spectra}:
            raise unknown(f"drawn layer of study {self.name}, which must be among its spectra:", layer, self.spectra)
        check_claims(self)

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

    def places(self, cells: Cells) -> list[tuple[str, str, str]]:
        """Return what cells are: (row, data, column) of each."""
        return [
            (row.name, data, cells.column)
            for row, data in self.runs()
            if (not cells.rows or row.name in cells.rows) and (not cells.data or data in cells.data)
        ]


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse no seeds, negative ones, and one that is given twice, which would count as two runs.

    Raises:
        UsageError: If it is so.
    """
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UsageError(f"Expected seeds as different whole numbers from 0, at least one, got {list(seeds)}.")
