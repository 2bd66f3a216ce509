"""What a run measured, as one JSON file: cards, tables and plots are made from it and from nothing else.

The file is strict JSON. A measurement has to be a finite number; NaN and infinity in the log or in a spectrum are
written as null. Nothing in it names a folder of the machine: `portable` shortens absolute paths, and `save` applies it
to everything.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfproj import limits
from hfproj.checking import checked
from hfproj.errors import AdapterFileError, UsageError, check_type
from hfproj.files import installed_versions, portable, write_atomic
from hfproj.heads.layers import is_layer_name
from hfproj.results import shown, words
from hfproj.results.content import check_content
from hfproj.results.history import file_in
from hfproj.results.measurement import (
    LAYERS,
    WHENS,
    Cell,
    Key,
    Measurement,
    Missing,
    by_cell,
    mean_std,
    missing_sentences,
    on_other_rows,
    row_names,
    short,
    unpack_outcomes,
)  # fmt: skip
from hfproj.results.verdict import findings
from hfproj.strict_json import check_size, parse_json

if TYPE_CHECKING:
    import pandas

FORMAT = 1
_KINDS: dict[str, type] = {"command": str, "config": dict, "versions": dict, "spectra": dict, "geometry": dict}
# Of an adapter's config: what a trainer sets, perhaps after a first evaluation, what decides no number, and what is
# completed when the adapter is saved.
_OF_TRAINING = ("objective", "regularizers")
_OF_USE = ("inference_mode", "peft_version", "revision", "auto_mapping", "task_type", "backbone_check")
_ADAPTERS = (("adapter",), ("adapter", "backbone_adapter"))
_GROW = (("fingerprint",), ("backbone",))
_LATER: dict[str, type] = {
    "history": list,
    "geometry": dict,
    "missing": list,
}  # not in the first files; left out while empty


@dataclass(repr=False)
class Results:
    """Measurements of a run with its configuration, seeds, versions, command, spectra and log.

    Attributes:
        config: What was run: "base_model", "adapter" (the PEFT config), and whatever the recipe adds.
        seeds: Of the runs that the measurements come from.
        versions: Of Python and the libraries.
        command: How to run it again (`command_line()`).
        measurements: The numbers.
        spectra: "h before", "h after", "z before", "z after" → covariance eigenvalues, sorted descending.
        log: The trainer's log history.
        notes: Anything a reader must know.
        history: What was measured while training, of views of a few images and not of the evaluation set: a mapping per
            step, "step", "epoch", and metrics whose names end in their layer ("rankme_h", "std_z", …) or have none
            ("loss", "lambda_min", …). Results of several seeds have "seed" too.
        geometry: Measurements that are no single number, all optional: "metric_condition_number", "orbits",
            "covariance", "feature_weights", "collapse" (the alarm: its step, cause, and what was seen), "scalars",
            "autopsy" and "invariance" (`hfproj.results.inside`).
        missing: What was to be measured and has no value, with the reasons.

    Example:
        >>> measurements = [Measurement("rankme", "h", "before", 12.8), Measurement("rankme", "h", "after", 18.7)]
        >>> r = Results(measurements=measurements)
        >>> r.value("rankme", "h", "after") > r.value("rankme", "h", "before")
        True
        >>> r
        Results(RankMe of h before and after training; .table() shows the numbers)
    """

    config: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())
    command: str = ""
    measurements: list[Measurement] = field(default_factory=list)
    spectra: dict[str, Any] = field(default_factory=dict)
    log: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    geometry: dict[str, Any] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)

    @checked
    def save(self, path: str | os.PathLike) -> Path:
        """Write strict JSON, atomically: into a file whose name ends in `.json`, or as `results.json` into a folder.

        The folder is made if needed.

        Raises:
            UsageError: If something in it cannot be written as JSON.
        """
        path = file_in(path, "results.json")
        content = portable({f.name: getattr(self, f.name) for f in fields(self)})
        content = {"format": FORMAT, **{name: v for name, v in content.items() if v or name not in _LATER}}
        write_atomic(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
        return path

    @classmethod
    @checked
    def load(cls, path: str | os.PathLike) -> "Results":
        """Read what `save` wrote: a file, or a folder that holds `results.json`.

        Raises:
            UsageError: If there is no such file.
            AdapterFileError: If the file is damaged, or of a later format.
        """
        path = file_in(path, "results.json")
        if not path.is_file():
            raise UsageError(f"There is no file {str(path)!r}; expected a results.json that Results.save wrote.")
        try:
            check_size(path.name, path.stat().st_size, str(path.parent), largest=limits.RESULTS_BYTES)
            content = parse_json(path.read_bytes(), digits=20, most=limits.RESULTS_VALUES)  # seeds of torch: 64 bits
            check_content(content)
            if content.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}; a newer hfproj may have written it")
            content = {**{name: kind() for name, kind in _LATER.items()}, **content}
            for name in ("measurements", "missing"):
                if len(content[name]) > limits.MEASUREMENTS:
                    raise ValueError(f"{name!r} has {len(content[name]):,} entries, more than {limits.MEASUREMENTS:,}")
            content["measurements"] = [Measurement(**m) for m in content["measurements"]]
            content["missing"] = [Missing(**m) for m in content["missing"]]
            for f in fields(cls):
                expected = _KINDS.get(f.name, list)
                if not isinstance(content[f.name], expected):
                    raise ValueError(f"{f.name!r} is no {expected.__name__}")
            if not all(isinstance(row.get("step"), int) for row in content["history"]):
                raise ValueError("a row of 'history' has no step")
            return cls(**content)
        except KeyError as error:
            raise AdapterFileError(f"{path.name} is damaged: it has no entry {error}.") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise AdapterFileError(f"{path.name} is damaged: {error}.") from error

    def merge(self, *others: "Results") -> "Results":
        """Return the union of several results: before and after, other data sets, other seeds.

        Equal measurements are kept once; spectra, geometry and config entries of `self` come first. Histories of
        different seeds are kept side by side, with the seed in each row; of one seed, each step is kept once. It warns
        where test sets of different sizes were measured before and after training, which nothing compares.

        Raises:
            UsageError: If a measurement or an entry of config has two values: the results belong to different models;
                or if something else than results is given. Objective and regularizers may differ where one of two was
                measured before training.
        """
        merged = Results(**{f.name: type(getattr(self, f.name))(getattr(self, f.name)) for f in fields(self)})
        for other in others:
            hint = (
                "give them one by one: merge(*results)"
                if isinstance(other, list | tuple)
                else "read a file by Results.load"
            )
            check_type("other results", other, Results, hint)
            merged.config = _join_configs(merged, other)
            if other.versions != merged.versions:
                merged.notes.append("Parts of these results come from different versions of the libraries.")
            known: dict[tuple, list[Measurement]] = {}
            for o in merged.measurements:
                known.setdefault(_identity(o), []).append(o)
            for m in other.measurements:
                same = known.setdefault(_identity(m), [])
                if any(o.value != m.value for o in same):
                    raise UsageError(
                        f"Two values of {m.label} of {m.layer} {m.when} training: {same[0].value} and {m.value}. "
                        "Give each run its own seed (`evaluate(seed=…)`) or data set name."
                    )
                if not same:
                    merged.measurements.append(m)
                    same.append(m)
            merged.missing += [m for m in other.missing if m not in merged.missing]
            merged.history = _join_histories(merged, other)
            merged.seeds += [s for s in other.seeds if s not in merged.seeds]
            merged.spectra = {**other.spectra, **merged.spectra}
            scalars = {**(other.geometry.get("scalars") or {}), **(merged.geometry.get("scalars") or {})}
            merged.geometry = {**other.geometry, **merged.geometry, **({"scalars": scalars} if scalars else {})}
            merged.command = merged.command or other.command
            merged.log += [] if other.log == merged.log else other.log
            merged.notes += [n for n in other.notes if n not in merged.notes]
        if found := on_other_rows(merged.measurements):
            warnings.warn(f"{found}: these can't be compared; measure both on the same rows.", stacklevel=2)
        merged.notes = list(dict.fromkeys(merged.notes))
        return merged

    def select(
        self, name: str, layer: str, when: str, *, dataset: str | None = None, **protocol: Any
    ) -> list[Measurement]:
        """Return the measurements of one quantity, one per seed.

        Raises:
            UsageError: If nothing was measured, or the measurements differ in more than the seed: name the data set or
                a setting of the protocol.
        """
        found = [m for m in self.measurements if (m.name, m.layer, m.when) == (name, layer, when)]
        found = [m for m in found if dataset in (None, m.dataset)]
        found = [m for m in found if all(m.protocol.get(k) == v for k, v in protocol.items())]
        if not found:
            available = sorted({f"{m.name} {m.layer} {m.when}" for m in self.measurements})
            raise UsageError(f"No measurement '{name} {layer} {when}'. Available: {', '.join(available) or 'none'}.")
        if len({m.key for m in found}) > 1:
            protocols = "; ".join(sorted({f"{m.dataset} {m.protocol}" for m in found}))
            raise UsageError(f"'{name} {layer} {when}' has several protocols: {protocols}. Say which: dataset=…, k=….")
        return found

    @checked
    def value(self, name: str, layer: str, when: str, *, dataset: str | None = None, **protocol: Any) -> float:
        """Return one number: the mean over seeds. Raises as `select`."""
        found = self.select(name, layer, when, dataset=dataset, **protocol)
        return sum(m.value for m in found) / len(found)

    def outcomes(self, name: str, layer: str, when: str, *, dataset: str | None = None, **protocol: Any) -> np.ndarray:
        """Return right (1) or wrong (0) of every test row `[seeds, rows]`, for `paired_interval`.

        Raises:
            UsageError: As `select`; and if the outcomes were not kept, or are damaged.
        """
        found = self.select(name, layer, when, dataset=dataset, **protocol)
        try:
            return np.stack([unpack_outcomes(m.outcomes) for m in found])
        except ValueError as error:
            raise UsageError(f"Outcomes of '{name} {layer} {when}' were not kept, or are damaged.") from error

    @property
    def layers(self) -> list[str]:
        """What was measured: intermediate layers in the order of the measurements, then h and z."""
        found = dict.fromkeys(m.layer for m in self.measurements)
        inside = [layer for layer in found if is_layer_name(layer)]
        before = [layer for layer in found if layer not in (*LAYERS, *inside)]
        return [*before, *["h"] * ("h" in found), *inside, *["z"] * ("z" in found)]

    def __repr__(self) -> str:
        return shown.as_line(self)

    def _repr_html_(self) -> str:  # what a notebook shows
        return shown.as_html(self)

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the measurements as a data frame, a row each: what was measured, of which layer, when, value, seed …

        Raises:
            HfprojError: If pandas is not installed.
        """
        return shown.as_frame(self.measurements)

    def table(self) -> str:
        """Return the numbers as aligned text: mean ± standard deviation where there are several seeds.

        Below it stand a table of intermediate layers, if there are any, and what training did: where an accuracy was
        measured before and after it, whether it got better, with the interval of the difference; then what could not
        be measured, and why.
        """
        return self._written(_aligned, "\n")

    def to_markdown(self) -> str:
        """Return the same in Markdown. Names that an untrusted file may hold are not escaped; a card does that."""
        return self._written(_markdown, "\n\n")

    def _written(self, table: Callable[[list[list[str]]], str], between: str) -> str:
        tables = [table(cells) for cells in (self.cells(), self.layer_cells()) if cells]
        said = [str(finding) for finding in findings(self) if finding.sense != "rank"]
        said += [f"{words.MISSING}: {sentence}" for sentence in missing_sentences(self.missing)]
        return "\n\n".join([*tables, *([between.join(said)] if said else [])])

    def cells(self, *, arrows: bool = False) -> list[list[str]]:
        """Return the cells of the table of h and z as text, the header first: a row a measurement.

        Columns of a layer, or of a time, at which nothing was measured are left out. With `arrows` names end in "↑" or
        "↓", what is better of it.
        """
        measured = [m for m in self.measurements if m.layer in LAYERS]
        layers = [layer for layer in LAYERS if not measured or any(m.layer == layer for m in measured)]
        whens = [when for when in WHENS if not measured or any(m.when == when for m in measured)]
        columns = [(layer, when) for layer in layers for when in whens]
        names, cells = self._names(LAYERS), by_cell(self.measurements)
        if arrows:
            better = {m.key: words.arrow(m.name, m.unit) for m in measured}
            names = {key: f"{name} {better[key]}".rstrip() for key, name in names.items()}
        rows = [[name, *(_cell(cells, (key, *column)) for column in columns)] for key, name in names.items()]
        return [["", *(" ".join(column) for column in columns)], *rows]

    def layer_cells(self) -> list[list[str]]:
        """Return the cells of the table of all layers, a row a layer; empty where only h and z were measured.

        It has what was measured in a unit (accuracies), and RankMe.
        """
        inner = [layer for layer in self.layers if layer not in LAYERS]
        if not inner:
            return []
        names = self._names(inner)
        shown = {(m.key, m.when) for m in self.measurements if m.layer in inner and (m.unit or m.name == "rankme")}
        columns = [(key, when) for key in names for when in WHENS if (key, when) in shown]
        cells = by_cell(self.measurements)
        rows = [[layer, *(_cell(cells, (key, layer, when)) for key, when in columns)] for layer in self.layers]
        return [["layer", *(f"{names[key]} {when}" for key, when in columns)], *rows]

    def names(self, unit: str) -> dict[Key, str]:
        """Return key → name of everything that was measured in a unit, in the order of the table."""
        units = {m.key for m in self.measurements if m.unit == unit}
        return {key: name for key, name in self._names(self.layers).items() if key in units}

    def mean_std(self, key: Key, layer: str, when: str) -> tuple[float, float] | None:
        """Return mean and standard deviation over seeds; None where it was not measured, and 0 of a single one."""
        return mean_std(m for m in self.measurements if m.cell == (key, layer, when))

    def _names(self, layers: Iterable[str]) -> dict[Key, str]:
        """Return what was measured of some layers, in the order of the table, with a name that tells it apart."""
        names = row_names(sorted((m for m in self.measurements if m.layer in layers), key=lambda m: m.key))
        several = len({key[1] for key in names}) > 1
        return {key: f"{name} ({key[1]})" if several and key[1] else name for key, name in names.items()}


def _cell(cells: dict[Cell, list[Measurement]], cell: Cell) -> str:
    measured = cells.get(cell, [])
    found = mean_std(measured)
    return words.number(cell[0][0], found[0], found[1] if len(measured) > 1 else None) if found else "–"


def _aligned(cells: list[list[str]]) -> str:
    first, *widths = [max(map(len, column)) for column in zip(*cells)]
    rows = ([row[0].ljust(first), *map(str.rjust, row[1:], widths)] for row in cells)
    return "\n".join("  ".join(row).rstrip() for row in rows)


def _markdown(cells: list[list[str]]) -> str:
    lines = [cells[0], ["---", *["---:"] * (len(cells[0]) - 1)], *cells[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _join_configs(one: Results, two: Results) -> dict[str, Any]:
    """Return the entries of both configs; where one was measured before training, what training sets is the other's."""
    untrained = [{m.when for m in results.measurements} == {"before"} for results in (one, two)]
    free = _OF_USE + _OF_TRAINING * any(untrained)
    first, other = one.config, two.config
    joined, adapters = {**other, **first}, [config.get("adapter") for config in (first, other)]
    if all(isinstance(adapter, Mapping) for adapter in adapters):
        joined["adapter"] = {}
        for adapter in adapters if untrained[0] else reversed(adapters):
            joined["adapter"].update(adapter or {})
    for name in first.keys() & other.keys():
        if found := _difference(portable(first[name]), portable(other[name]), (name,), free):
            path, *values = found
            shown = " and ".join(f"{'nothing' if v is None else short(v):.60}" for v in values)
            setting = "".join(f"[{part!r}]" for part in path)
            raise UsageError(f"The results belong to different models: config{setting} is {shown}.")
    return joined


def _difference(mine: Any, theirs: Any, path: tuple[str, ...], free: tuple[str, ...]) -> tuple[Any, ...] | None:
    """Return the first setting in which two configs differ: its path, and both values."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        names = [name for name in {**mine, **theirs} if path not in _ADAPTERS or name not in free]
        found = (_difference(mine.get(name), theirs.get(name), (*path, name), free) for name in names)
        return next(filter(None, found), None)
    later = path[1:2] in _GROW and None in (mine, theirs)
    return None if mine == theirs or later else (path, mine, theirs)


def _join_histories(first: Results, other: Results) -> list[dict]:
    """Return the rows of both; their seeds are written into them where they differ, so that no two runs mix."""
    runs = [(r.history, {"seed": r.seeds[0]} if len(r.seeds) == 1 else {}) for r in (first, other)]
    rows, more = ([{**seed, **row} if first.seeds != other.seeds else row for row in run] for run, seed in runs)
    kept = {(row.get("seed"), row["step"]) for row in rows}
    return [*rows, *(row for row in more if (row.get("seed"), row["step"]) not in kept)]


def _identity(m: Measurement) -> tuple:
    return m.layer, m.when, m.key, m.protocol.get("seed")
