"""A study's results as a page: the table with the paper's numbers beside ours, the verdicts, what was reduced."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hfproj import plots
from hfproj.errors import unknown
from hfproj.plots.over_steps import over_steps
from hfproj.reproduction.claims import Agree, Cells, More, Trend
from hfproj.reproduction.judging import Judged, judge, values_of
from hfproj.reproduction.study import Column, Scale, Study

Runs = Sequence[Mapping[str, Any]]


def page(study: Study, name: str, scale: Scale, runs: Runs, pictures: Sequence[str] = ()) -> str:
    """Return the Markdown of a study at a scale.

    Args:
        study: The study.
        name: Of its scale.
        scale: The scale.
        runs: What is finished.
        pictures: Files beside the page.
    """
    made = {run.get("name", number): run for number, run in enumerate(runs)}  # rows of one setting show one run
    hours = sum(run["cpu_seconds"] for run in made.values()) / 3600
    seeds = len({run["seed"] for run in runs})
    state = f"{len(made)} runs, {seeds} seed{'s' * (seeds != 1)}, {hours:.1f} CPU hours"
    wanted = {(row.name, data, seed) for row, data in study.runs() for seed in scale.seeds}
    missing = wanted - {(run["row"], run["data"], run["seed"]) for run in runs}
    if missing and name != "trial":
        state += f"; {len(missing)} of {len(wanted)} runs are missing, and the table is not whole"
    parts = [
        f"# {study.name}: {study.title}",
        f"Written by `hfproj run reproduce {study.name} --scale {name}`: {state}.",
        f"*Source.* {study.source}",
        f"*Scale {name}.* {scale.note}",
        *(_table(study, data, runs) for data in study.data),
        "## Claims",
        _claims(study, runs),
        *(f"![{Path(picture).stem}]({picture})" for picture in pictures),
    ]
    if note := _missing(study, runs):
        parts.append(note)
    return "\n\n".join(parts) + "\n"


def verdicts(study: Study, runs: Runs) -> list[dict[str, Any]]:
    """Return what became of every claim, as plain JSON."""
    found = []
    for claim in study.claims:
        verdict, tests = judge(study, claim, runs)
        numbers = [{k: _number(v) for k, v in test._asdict().items()} for test in tests]
        found.append(
            {"claim": claim.text, "source": claim.source, "ours": claim.ours, "verdict": verdict, "tests": numbers}
        )
    return found


def _table(study: Study, data: str, runs: Runs) -> str:
    """Return the table of one data set: mean ± standard deviation over seeds, beside the paper's numbers."""
    rows = [row for row, on in study.runs() if on == data]
    with_paper = [c for c in study.columns if any(c.name in row.paper.get(data, {}) for row in rows)]
    header = ["", *(title for c in study.columns for title in ([c.name, "paper"] if c in with_paper else [c.name]))]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row in rows:
        cells = [row.name]
        for column in study.columns:
            cells.append(_cell(column, values_of(study, runs, row.name, data, column.name)))
            if column in with_paper:
                paper = row.paper.get(data, {}).get(column.name)
                cells.append("–" if paper is None else f"{paper:g}")
        lines.append(cells)
    units = {c.name: " (%)" for c in study.columns if c.unit == "%"}
    lines[0] = [f"{title}{units.get(title, '')}" for title in lines[0]]
    title = f"## {data}\n\n" if len(study.data) > 1 else ""
    return title + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(column: Column, values: np.ndarray) -> str:
    if not len(values):
        return "–"
    values = np.exp(values) if column.log else values
    spread = f" ± {column.shown(float(values.std(ddof=1)))}" if len(values) > 1 else ""
    return f"{column.shown(float(values.mean()))}{spread}"


def _claims(study: Study, runs: Runs) -> str:
    lines = ["| claim | source | verdict | measured, 95 % interval |", "|---|---|---|---|"]
    for claim in study.claims:
        verdict, tests = judge(study, claim, runs)
        numbers = "; ".join(_shown(study, test, one) for test, one in zip(claim.tests, tests, strict=True))
        lines.append(f"| {claim.text} | {claim.source}{' (ours)' * claim.ours} | **{verdict}** | {numbers} |")
    return "\n".join(lines)


def _shown(study: Study, test: Any, one: Judged) -> str:
    if one.why:
        return one.why
    if not math.isfinite(one.low) or not math.isfinite(one.high):
        return "one seed: no interval"
    if isinstance(test, Agree):
        return f"ρ = {one.value:.2f} [{one.low:.2f}, {one.high:.2f}]"
    if isinstance(test, Trend):
        return f"slope a row: {_contrast(study.column(test.cells.column), test, one)}"
    return _contrast(study.column(test.first.column), test, one)


def _contrast(column: Column, test: Any, one: Judged) -> str:
    if one.ratio:
        return f"{'×' if not _alone(test) else ''}{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]"
    sign, digits = "" if _alone(test) else "+", max(column.digits, 1)
    shown = (round(100 * v if column.unit == "%" else v, digits) + 0.0 for v in one[1:4])  # −0.0 + 0.0 is 0.0
    value, low, high = (f"{v:{sign}.{digits}f}" for v in shown)
    return f"{value} [{low}, {high}]"


def _alone(test: Any) -> bool:
    """Whether a column is compared with a number."""
    return isinstance(test, More) and not isinstance(test.second, Cells)


def _missing(study: Study, runs: Runs) -> str:
    """Return which shown columns some rows have no number of, and why."""
    of: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for column in study.columns:
            if (why := run.get("missing", {}).get(column.name)) and run["row"] not in of.setdefault(
                (column.name, why), []
            ):
                of[column.name, why].append(run["row"])
    return " ".join(f"{column} has no number of {', '.join(rows)}: {why}." for (column, why), rows in of.items())


def _number(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_")


def draw(study: Study, runs: Runs, stem: Path) -> list[str]:
    """Draw what a study wants drawn, and return the names of the files."""
    drawn = []

    def path(of: str) -> Path:
        name = f"{stem.name}-{_file_name(of)}"
        while f"{name}.png" in drawn:  # 'ρ' and 'λ' become the same
            name += "_"
        drawn.append(f"{name}.png")
        return stem.with_name(drawn[-1])

    for data in study.data:
        of_row = {
            row.name: own for row in study.rows
            if (own := [run for run in runs if (run["row"], run["data"]) == (row.name, data)])
        }  # fmt: skip
        for layer in study.drawn:
            if curves := _spectra(of_row, layer):
                plots.plot_spectrum(curves, path(f"{data}-{layer}"))
        for name, label in study.followed.items():
            if curves := _along(of_row, name):
                plots.plot_curves(curves, "step", label, path(f"{data}-{name}"))
    for column in study.columns if study.axis else ():
        if curves := _sweep(study, column, runs):
            unit = " (%)" if column.unit == "%" else ""
            plots.plot_curves(curves, study.axis, f"{column.name}{unit}", path(column.name), x_scale=study.axis_scale,
                              x_ticks=_ticks(study), y_scale="log" if column.log else "linear")  # fmt: skip
    return drawn


def _spectra(of_row: Mapping[str, Runs], layer: str) -> dict[str, list[float]]:
    """Return the geometric mean over seeds of each row's spectrum of a layer."""
    known = {name: [run["spectra"][layer] for run in own if layer in run["spectra"]] for name, own in of_row.items()}
    return {
        name: np.exp(np.log(np.clip(found, 1e-12, None)).mean(0)).tolist() for name, found in known.items() if found
    }


def _along(of_row: Mapping[str, Runs], name: str) -> dict[str, Any]:
    """Return steps, mean and standard deviation over seeds of each row's number along training.

    Raises:
        UsageError: If there are steps, and none has the number.
    """
    known = {key for own in of_row.values() for run in own for step in run["history"] for key in step}
    if known and name not in known:
        raise unknown("number along training in followed:", name, known - {"step", "epoch"})
    curves = {row: over_steps([step for run in own for step in run["history"]], name) for row, own in of_row.items()}
    return {row: (x, y) if std is None else (x, y, std) for row, (x, y, std) in curves.items() if np.isfinite(y).any()}


def _ticks(study: Study) -> dict[float | int, str]:
    """Return what stands at each x of a sweep: the number, or the name of the one row there that does not have it."""
    rows: dict[float | int, list[str]] = {}
    for row in study.rows:
        if row.x is not None:
            rows.setdefault(row.x, []).append(row.name)
    return {x: names[0] if len(names) == 1 and f"{x:g}" not in names[0] else f"{x:g}" for x, names in rows.items()}


def _sweep(study: Study, column: Column, runs: Runs) -> dict[str, Any]:
    points: dict[str, list[tuple[float, float, float]]] = {}
    for row, data in study.runs():
        values = values_of(study, runs, row.name, data, column.name)
        if row.x is None or not len(values):
            continue
        values = (np.exp(values) if column.log else values) * (100 if column.unit == "%" else 1)
        curve = ", ".join(filter(None, (row.curve, data if len(study.data) > 1 else ""))) or column.name
        points.setdefault(curve, []).append((row.x, float(values.mean()), float(values.std(ddof=len(values) > 1))))
    return {name: tuple(map(list, zip(*sorted(own), strict=True))) for name, own in points.items() if len(own) > 1}
