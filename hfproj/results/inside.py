"""What was found inside a head, layer by layer (`Autopsy`) and transform by transform (`Invariance`): words and tables.

Both are JSON: `Results.geometry["autopsy"]` and `["invariance"]` hold what `to_dict` gives, from which card, page and
picture are made. Numbers of a file that somebody else wrote are read strictly, its words are not told (`from_dict`).
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hfproj.checking import checked
from hfproj.errors import UsageError
from hfproj.files import portable, write_atomic
from hfproj.results import words
from hfproj.results.history import file_in
from hfproj.results.verdict import Interval

T = TypeVar("T")
FORMAT = 1
_MOST, _MOST_SERIES, _MOST_DIM = 300, 20, 1 << 20  # layers; transforms, probes; width: of a file of somebody else
NAMES = {"linear": "linear probe", "knn": "20-NN"}  # of the probes by which layers are compared


@dataclass(frozen=True)
class Score:
    """An accuracy of a layer; `over_h` is its difference to that of h with the interval paired over test rows."""

    accuracy: float
    over_h: Interval


@dataclass(frozen=True)
class LayerFound:
    """What was found of one layer.

    Attributes:
        name: "h", "head.0", …, "z", or a block of the backbone.
        dim: Its width.
        rankme: RankMe, 1 to dim.
        numerical_rank: How many singular values are above 1e-8 times the largest, and above rounding.
        condition: λ_max/λ_min of the covariance on its support; infinite where there is none.
        spectrum: Eigenvalues of the covariance of unit rows, sorted descending.
        scores: Probe → its accuracy; empty without labels.
    """

    name: str
    dim: int
    rankme: float
    numerical_rank: int
    condition: float
    spectrum: list[float]
    scores: dict[str, Score]


@dataclass(frozen=True)
class Cut:
    """Up to which layer to keep the network by one probe: chosen on some test rows, confirmed on the others.

    Attributes:
        probe: Its name.
        layer: The layer with the highest accuracy on the rows that chose.
        lead: By how much it led h there.
        confirmed: Its difference to h on the rows that chose nothing, paired.
        rows: How many chose, and how many confirmed.
    """

    probe: str
    layer: str
    lead: float
    confirmed: Interval
    rows: tuple[int, int]

    @property
    def keep(self) -> str:
        """The layer to keep: the chosen one where its interval lies above 0, else h."""
        return self.layer if self.confirmed.low > 0 else "h"

    @property
    def sentence(self) -> str:
        """What to keep, with the interval, and how it was chosen; it ends in a full stop."""
        of, probe = f"of {self.rows[1]} held-out rows that chose nothing", NAMES.get(self.probe, self.probe)
        if self.layer == "h":
            return f"By {probe}: keep h. No layer was above it on the {self.rows[0]} held-out rows that chose."
        gain, *ends = (_points(value) for value in self.confirmed)
        found = f"{gain} points [{ends[0]}, {ends[1]}] over h, {of}"
        if self.keep == self.layer:
            return f"By {probe}: keep up to {self.layer}: {found}."
        if self.confirmed.high < 0:
            return f"By {probe}: keep h. {self.layer} led it on the rows that chose, and is worse on others: {found}."
        return f"By {probe}: keep h. {self.layer} led it by {_points(self.lead)} on the rows that chose; {found}."


@dataclass(frozen=True)
class Moved:
    """What one transform of the views does to the layers.

    Attributes:
        transform: Its name.
        ends: The two strengths between which it moves, in words.
        distance: Layer → mean ‖f − f'‖ between the two, over the mean distance of two different images: 0 is
            invariant, 1 as far as another image.
        cosine: Layer → mean cosine between the two.
        known: Layer → accuracy of a linear probe that tells the two apart, with its interval; 0.5 is chance.
        lost: Accuracy of h minus that of z, paired over images.
        degeneracy: How far the head's metric is degenerate along the transform: median of vᵀGv/‖v‖² over trG/dim,
            0 annihilated, 1 average; None where the transform does not move h.
    """

    transform: str
    ends: tuple[str, str]
    distance: dict[str, float]
    cosine: dict[str, float]
    known: dict[str, Interval]
    lost: Interval
    degeneracy: float | None


@dataclass(frozen=True, repr=False)
class Invariance:
    """What each transform of the views does to the layers of a model, and how that was measured."""

    moved: list[Moved]
    protocol: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Invariance({', '.join(one.transform for one in self.moved)}; .table() shows the numbers)"

    def cells(self) -> list[list[str]]:
        """Return the table, header first: how far h and z move, what a probe still reads, degeneracy."""
        head = ["transform", "from", "to", "h moves", "z moves", "read from h", "read from z", "h − z", "degeneracy"]
        return [head, *(_row(one) for one in self.moved)]

    def layer_cells(self) -> list[list[str]]:
        """Return the table of what a linear probe reads from each layer, header first; empty for h and z alone."""
        layers = list(dict.fromkeys(name for one in self.moved for name in one.known))
        if len(layers) < 3:
            return []
        rows = [[one.transform, *(_share(one.known.get(name)) for name in layers)] for one in self.moved]
        return [["transform", *layers], *rows]

    def table(self) -> str:
        """Return the numbers as text."""
        return "\n\n".join(aligned(cells) for cells in (self.cells(), self.layer_cells()) if cells)

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads: plain JSON."""
        return {"format": FORMAT, **_plain(asdict(self))}

    @checked
    def save(self, path: str | os.PathLike) -> Path:
        """Write strict JSON into a file whose name ends in `.json`, or as `invariance.json` into a folder."""
        return _save(self.to_dict(), file_in(path, "invariance.json"))

    @classmethod
    def from_dict(cls, content: Any) -> "Invariance":
        """Read what `to_dict` gave.

        Raises:
            UsageError: If it is something else.
        """
        try:
            return cls([_moved(one) for one in _items(content["moved"], _MOST_SERIES)], dict(content["protocol"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"Expected what Invariance.to_dict gives, got something else: {error!r:.80}.") from None


@dataclass(frozen=True, repr=False)
class Autopsy:
    """A head, layer by layer: what is left of rank, of labels and of the augmentations, and where to cut.

    Attributes:
        layers: From the backbone's penultimate block over h to z.
        cuts: One for each probe; empty without labels.
        invariance: What each transform of the views does; None without views.
        protocol: How it was measured.
    """

    layers: list[LayerFound]
    cuts: list[Cut]
    invariance: Invariance | None = None
    protocol: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        said = " ".join(cut.sentence for cut in self.cuts) or "No labels, no cut."
        return f"Autopsy({', '.join(layer.name for layer in self.layers)}; {said} .table() shows the numbers)"

    def cells(self) -> list[list[str]]:
        """Return the table of the layers, header first."""
        probes = list(dict.fromkeys(name for layer in self.layers for name in layer.scores))
        head = ["layer", "width", "RankMe", "rank", "condition"]
        for probe in probes:
            head += [NAMES.get(probe, probe), "over h, points"]
        rows = []
        for layer in self.layers:
            row = [layer.name, str(layer.dim), words.number("rankme", layer.rankme), str(layer.numerical_rank)]
            row.append(f"{layer.condition:.2g}" if math.isfinite(layer.condition) else "∞")
            for probe in probes:
                row += _score(layer.scores.get(probe), layer.name == "h")
            rows.append(row)
        return [head, *rows]

    def table(self) -> str:
        """Return the numbers as text, with the sentences of the cuts."""
        parts = [aligned(self.cells()), "\n".join(cut.sentence for cut in self.cuts)]
        parts += [] if self.invariance is None else [self.invariance.table()]
        return "\n\n".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads: plain JSON; an infinite condition number is null."""
        invariance = None if self.invariance is None else self.invariance.to_dict()
        own = {"layers": [asdict(one) for one in self.layers], "cuts": [asdict(one) for one in self.cuts]}
        return {"format": FORMAT, **_plain(own), "invariance": invariance, "protocol": _plain(self.protocol)}

    @checked
    def save(self, path: str | os.PathLike) -> Path:
        """Write strict JSON into a file whose name ends in `.json`, or as `autopsy.json` into a folder."""
        return _save(self.to_dict(), file_in(path, "autopsy.json"))

    @classmethod
    def from_dict(cls, content: Any) -> "Autopsy":
        """Read what `to_dict` gave.

        Raises:
            UsageError: If it is something else.
        """
        try:
            layers = [_layer(one) for one in _items(content["layers"])]
            cuts = [_cut(one) for one in _items(content["cuts"], _MOST_SERIES)]
            kept = content.get("invariance")
            invariance = None if kept is None else Invariance.from_dict(kept)
            return cls(layers, cuts, invariance, dict(content["protocol"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"Expected what Autopsy.to_dict gives, got something else: {error!r:.80}.") from None


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Return a table as text, the first column to the left and the others to the right.

    Example:
        >>> print(aligned([["layer", "width"], ["h", "384"]]))
        layer  width
        h        384
    """
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for first, *rest in cells:
        right = "  ".join(text.rjust(width) for text, width in zip(rest, widths[1:]))
        lines.append(f"{first.ljust(widths[0])}  {right}".rstrip())
    return "\n".join(lines)


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}".replace("-", "−")


def _score(score: Score | None, reference: bool) -> list[str]:
    if score is None:
        return ["–", "–"]
    gain, low, high = (_points(value) for value in score.over_h)
    return [f"{score.accuracy:.3f}", "" if reference else f"{gain} [{low}, {high}]"]


def _share(interval: Interval | None) -> str:
    return "–" if interval is None else f"{interval[0]:.2f} [{interval[1]:.2f}, {interval[2]:.2f}]"


def _row(one: Moved) -> list[str]:
    moves = [f"{one.distance[layer]:.2f}" if layer in one.distance else "–" for layer in ("h", "z")]
    gain, low, high = (_points(value) for value in one.lost)
    read = [_share(one.known.get(layer)) for layer in ("h", "z")]
    bent = "–" if one.degeneracy is None else f"{one.degeneracy:.2g}"
    return [one.transform, *one.ends, *moves, *read, f"{gain} [{low}, {high}]", bent]


def _plain(value: Any) -> Any:
    """Return numbers, texts, lists and dicts; what is not finite is null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _save(content: dict[str, Any], path: Path) -> Path:
    text = json.dumps(portable(content), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())
    return path


def _items(value: Any, most: int = _MOST) -> Iterable[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"expected a list of at most {most}")
    return value


def _named(value: Any, read: Callable[[Any], T], most: int = _MOST) -> dict[str, T]:
    if not isinstance(value, Mapping) or len(value) > most:
        raise ValueError(f"expected at most {most} entries by name")
    return {_text(name): read(one) for name, one in value.items()}


def _whole(value: Any) -> int:
    if not 0 <= _number(value) <= _MOST_DIM:
        raise ValueError(f"expected a width or a rank, got {value!r:.40}")
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise ValueError(f"expected a number, got {value!r:.40}")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 200:
        raise ValueError(f"expected a name, got {value!r:.40}")
    return value


def _interval(value: Any) -> Interval:
    difference, low, high = map(_number, value)
    return Interval(difference, low, high)


def _layer(one: Any) -> LayerFound:
    condition = math.inf if one["condition"] is None else _number(one["condition"])
    scores = _named(one["scores"], _one_score, _MOST_SERIES)
    spectrum = [math.nan if value is None else _number(value) for value in _items(one["spectrum"], _MOST_DIM)]
    dim, rank = _whole(one["dim"]), _whole(one["numerical_rank"])
    return LayerFound(_text(one["name"]), dim, _number(one["rankme"]), rank, condition, spectrum, scores)


def _one_score(one: Any) -> Score:
    return Score(_number(one["accuracy"]), _interval(one["over_h"]))


def _cut(one: Any) -> Cut:
    first, second = map(_rows, one["rows"])
    confirmed = _interval(one["confirmed"])
    return Cut(_text(one["probe"]), _text(one["layer"]), _number(one["lead"]), confirmed, (first, second))


def _rows(value: Any) -> int:
    if not 0 <= _number(value) < 1e12:
        raise ValueError(f"expected a number of rows, got {value!r:.40}")
    return int(value)


def _moved(one: Any) -> Moved:
    first, second = map(_text, one["ends"])
    distance, cosine = (_named(one[part], _number) for part in ("distance", "cosine"))
    known = _named(one["known"], _interval)
    bent = None if one["degeneracy"] is None else _number(one["degeneracy"])
    return Moved(_text(one["transform"]), (first, second), distance, cosine, known, _interval(one["lost"]), bent)
