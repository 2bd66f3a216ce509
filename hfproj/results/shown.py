"""Results as a line, as HTML for a notebook, and as a table of pandas."""

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any

from hfproj.errors import HfprojError
from hfproj.results import words
from hfproj.results.measurement import WHENS, Measurement, missing_sentences
from hfproj.results.verdict import findings

if TYPE_CHECKING:
    from hfproj.results.record import Results


def as_line(results: "Results") -> str:
    """Return what was measured of what, in one line."""
    measured = results.measurements
    if not measured:
        return "Results(nothing measured)"
    whens = [when for when in WHENS if any(m.when == when for m in measured)]
    names = _listed(dict.fromkeys(m.label for m in measured), 4)
    parts = [f"{names} of {_listed(results.layers, 4)} {' and '.join(whens)} training"]
    datasets = dict.fromkeys(m.dataset for m in measured if m.dataset)
    parts += [f"on {_listed(datasets, 3)}"] * bool(datasets)
    parts += [f"{len(results.seeds)} seeds"] * (len(results.seeds) > 1)
    return f"Results({', '.join(parts)}; .table() shows the numbers)"


def _listed(names: Iterable[str], most: int) -> str:
    names = [str(name)[:40] for name in names]
    return ", ".join([*names[:most], *[f"{len(names) - most} more"] * (len(names) > most)])


def as_html(results: "Results") -> str:
    """Return the tables and what training did as HTML, every value escaped."""
    parts = [_table(cells) for cells in (results.cells(), results.layer_cells()) if len(cells) > 1]
    said = [(f.headline, f.text) for f in findings(results) if f.sense != "rank"]
    said += [(words.MISSING, sentence) for sentence in missing_sentences(results.missing)]
    parts += [f"<p><strong>{escape(head)}</strong>: {escape(text)}</p>" for head, text in said]
    return "\n".join(parts) or "<p>Nothing was measured.</p>"


def _table(cells: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in cells[0])
    rows = (
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in cells[1:]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def as_frame(measurements: Iterable[Measurement]) -> Any:
    """Return a `pandas.DataFrame`, a row a measurement.

    Raises:
        HfprojError: If pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise HfprojError("Results.to_pandas() needs pandas: pip install pandas.") from error
    columns = ["measure", "layer", "when", "value", "dataset", "unit", "seed", "name", "protocol"]
    rows = [
        (m.label, m.layer, m.when, m.value, m.dataset, m.unit, m.protocol.get("seed"), m.name, m.settings)
        for m in measurements
    ]
    return pandas.DataFrame(rows, columns=columns)
