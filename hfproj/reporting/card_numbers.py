"""The tables of a card: h and z before and after training, with the interval of each difference; and other layers."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hfproj.reporting.card_markdown import code, inline, settings, table
from hfproj.results import LAYERS, WHENS, Measurement, Results
from hfproj.results.verdict import Verdict

Key = tuple[str, str, str]

# Measures that use no labels, in the order of their table, and how to read them.
UNLABELLED = {
    "rankme": "effective number of directions that the features use",
    "representation_std": "spread of the unit features over each dimension; 0 at collapse, at most 1/√width",
    "positive_cosine": "cosine between views of one item; 1 at collapse",
    "alignment": "distance between views of one item; 0 at collapse",
    "uniformity": "spread on the sphere, lower is more even; 0 at collapse",
    "lidar": "effective number of directions that tell items apart",
    "alpha_req": "exponent of the decay of the covariance's eigenvalues",
    "knn_overlap": "share of the nearest neighbours that are those of h before training",
    "cka": "similarity with h before training; 1 is the same up to rotation and scale",
}
_BLANK = "\u00a0"  # a blank that does not break: numbers stay whole on a telephone
_COUNTS = ("rankme", "lidar")  # numbers of directions: one decimal


def needs_labels(m: Measurement) -> bool:
    """Whether a number was scored with labels."""
    return m.name not in UNLABELLED


def tables(results: Results, judged: Iterable[Verdict]) -> str:
    """Return the tables of h and z, those with labels first, under a heading for each of several data sets.

    Args:
        results: What was measured.
        judged: Its verdicts on h and z.
    """
    datasets = list(dict.fromkeys(m.dataset for m in results.measurements if m.layer in LAYERS))
    known = {(v.key, v.layer): v for v in judged}
    parts = []
    for dataset in datasets:
        if len(datasets) > 1:
            parts.append(f"### {code(dataset) if dataset else 'Unnamed data set'}")
        for labelled in (True, False):
            chosen = [
                m
                for m in results.measurements
                if m.layer in LAYERS and m.dataset == dataset and needs_labels(m) == labelled
            ]
            if chosen:
                what = "Scored with labels:" if labelled else "Measured without labels:"
                parts += [what, _table(results, chosen, known)]
    return "\n\n".join(parts)


def _table(results: Results, measured: Sequence[Measurement], judged: Mapping[tuple[Key, str], Verdict]) -> str:
    layers = [layer for layer in LAYERS if any(m.layer == layer for m in measured)]
    whens = [when for when in WHENS if any(m.when == when for m in measured)]
    compared = len(whens) == 2
    rows, intervals = [], False
    for key, name in row_names(measured).items():
        own = [layer for layer in layers if any((m.key, m.layer) == (key, layer) for m in measured)]
        for layer in own:
            verdict = judged.get((key, layer))
            intervals |= verdict is not None and verdict.interval is not None
            change = [_change(results, key, layer, verdict)] if compared else []
            cells = [cell(results, key, layer, when) for when in whens]
            rows.append([inline(name) if layer == own[0] else "", layer, *cells, *change])
    change = ["change (95 % interval)" if intervals else "change"] if compared else []
    header = ["", "of", *(whens if compared else [f"{when} training" for when in whens]), *change]
    return table(header, rows, numbers=len(header) - 2)


def _change(results: Results, key: Key, layer: str, verdict: Verdict | None) -> str:
    if verdict is not None and verdict.interval is not None:
        difference, low, high = verdict.interval
        return f"**{signed(difference)}** ({signed(low)}{_BLANK}to{_BLANK}{signed(high)})"
    before, after = (results.mean_std(key, layer, when) for when in WHENS)
    return signed(after[0] - before[0], _digits(key)) if before is not None and after is not None else "–"


def layer_tables(results: Results) -> str:
    """Return what was measured of every layer, a row a layer; empty where there is nothing but h and z.

    It has what was measured in a unit (accuracies), and RankMe: a table for each of several data sets.
    """
    inner = [layer for layer in results.layers if layer not in LAYERS]
    shown = [m for m in results.measurements if m.layer in inner and (m.unit or m.name == "rankme")]
    datasets = list(dict.fromkeys(m.dataset for m in shown))
    parts = []
    for dataset in datasets:
        names = row_names(m for m in shown if m.dataset == dataset)
        rows = [[code(layer), *(_way(results, key, layer) for key in names)] for layer in results.layers]
        parts += [f"On {code(dataset)}:"] * (len(datasets) > 1)
        parts.append(table(["layer", *map(inline, names.values())], rows, numbers=len(names)))
    return "\n\n".join(parts)


def _way(results: Results, key: Key, layer: str) -> str:
    """Return "before → after training", or what there is of it."""
    cells = [cell(results, key, layer, when) for when in WHENS]
    measured = [when for when in WHENS if any((m.key, m.when) == (key, when) for m in results.measurements)]
    return " → ".join(cells) if len(measured) == 2 else cells[WHENS.index(measured[0])]


def row_names(measured: Iterable[Measurement]) -> dict[Key, str]:
    """Return the name of every row as text, in the order of the table; with settings where they tell two rows apart."""
    first: dict[Key, Measurement] = {}
    for m in measured:
        first.setdefault(m.key, m)
    order = list(UNLABELLED)
    keys = sorted(first, key=lambda key: order.index(key[0]) if key[0] in order else -1)
    names = {}
    for key in keys:
        alike = [first[k].settings for k in keys if first[k].label == first[key].label and k[1] == key[1]]
        own = first[key].settings
        apart = {n: v for n, v in own.items() if any(_as_text(other.get(n)) != _as_text(v) for other in alike)}
        names[key] = first[key].label + (f" ({settings(apart)})" if apart else "")
    return names


def protocol_lines(results: Results) -> list[str]:
    """Return a line of Markdown for everything that was measured, with its settings: those of all data sets once."""
    found: dict[str, dict[str, dict[str, Any]]] = {}  # name → data set → settings
    meanings = {}
    for dataset in dict.fromkeys(m.dataset for m in results.measurements):
        measured = {m.key: m for m in results.measurements if m.dataset == dataset}
        alike: dict[tuple[str, str], list[Key]] = {}  # numbers of one probe with one protocol share a line
        for key in row_names(measured.values()):
            alike.setdefault((measured[key].name.split("_")[0], key[2]), []).append(key)
        names = row_names(measured.values())
        for keys in alike.values():
            name = inline(", ".join(names[key] for key in keys))
            meanings[name] = UNLABELLED.get(keys[0][0], "")
            found.setdefault(name, {})[dataset] = measured[keys[0]].settings
    lines = []
    for name, by_dataset in found.items():
        first = next(iter(by_dataset.values()))
        shared = {n: v for n, v in first.items() if all(n in own and own[n] == v for own in by_dataset.values())}
        own = {d: {n: v for n, v in values.items() if n not in shared} for d, values in by_dataset.items()}
        parts = [meanings[name], inline(settings(shared), 1000)]
        parts += [f"{code(dataset)}: {inline(settings(values), 1000)}" for dataset, values in own.items() if values]
        lines.append(f"**{name}**: " + "; ".join(part for part in parts if part))
    return lines


def cell(results: Results, key: Key, layer: str, when: str) -> str:
    """Return a number as text: mean ± standard deviation over seeds, without the latter where all seeds agree."""
    found = results.mean_std(key, layer, when)
    if found is None:
        return "–"
    digits = _digits(key)
    spread = f"{_BLANK}±{_BLANK}{found[1]:.{digits}f}" if found[1] else ""
    return f"{found[0]:.{digits}f}{spread}".replace("-", "−")


def signed(value: float, digits: int = 4) -> str:
    """Return a number with its sign, a minus of the same width as the plus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def _digits(key: Key) -> int:
    return 1 if key[0] in _COUNTS else 4


def _as_text(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)
