"""One number with everything needed to read it, and what is computed of several: their mean, their names in a table."""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from hfproj.checking import check_types, checked
from hfproj.errors import UsageError
from hfproj.files import portable
from hfproj.results import words
from hfproj.typing import When

LAYERS, WHENS = ("h", "z"), ("before", "after")
Key = tuple[str, str, str]
Cell = tuple[Key, str, str]  # with layer and time


@dataclass(frozen=True)
class Measurement:
    """One number with everything needed to read it.

    Attributes:
        name: What was measured: "knn", "rankme", "representation_std", "positive_cosine", or a probe's own name.
        layer: "h", "z", or an intermediate layer's name ("block_3").
        when: "before" or "after" training.
        value: Finite.
        dataset: What it was measured on.
        unit: "accuracy" and the like: of what was scored with labels; it follows the name in tables. Else empty.
        protocol: The settings that the number depends on. A "seed" in it tells runs of one experiment apart; "chosen"
            holds what a probe chose from its training data (a strength, a rate).
        outcomes: Right or wrong row by row, packed as hexadecimal digits (`pack_outcomes`), or empty.

    Raises:
        UsageError: If a field has another type, the layer's name holds a blank, or the value is not finite.
    """

    name: str
    layer: str
    when: When
    value: float
    dataset: str = ""
    unit: str = ""
    protocol: dict[str, Any] = field(default_factory=dict)
    outcomes: str = ""

    def __post_init__(self) -> None:
        check_types(type(self).__name__, type(self).__init__, vars(self))
        for name in ("name", "layer", "dataset", "unit", "protocol"):
            kind, value = dict if name == "protocol" else str, getattr(self, name)
            if not isinstance(value, kind):
                raise UsageError(f"Expected the {name} of a measurement to be a {kind.__name__}, got {value!r}.")
        layer, value = self.layer, self.value
        if not re.fullmatch(r"[\w.-]+", layer) or self.when not in WHENS:
            raise UsageError(f"Expected a layer's name without blanks, when in {WHENS}; got {layer!r}, {self.when!r}.")
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise UsageError(f"Expected the measurement {self.name!r} of {layer} to be a finite number, got {value!r}.")

    @cached_property
    def key(self) -> Key:
        """Name, data set and settings: equal keys are comparable numbers, one row of the table."""
        return self.name, self.dataset, json.dumps(portable(self.settings), sort_keys=True)

    @property
    def cell(self) -> Cell:
        """Its place in the table: measurements of one cell differ in their seed alone."""
        return self.key, self.layer, self.when

    @property
    def settings(self) -> dict[str, Any]:
        """The protocol without its seed and what was chosen."""
        return {k: v for k, v in self.protocol.items() if k not in ("seed", "chosen")}

    @property
    def label(self) -> str:
        """The name as people write it, with the part of the protocol that belongs to it."""
        return words.label(self.name, self.unit, self.protocol)


@dataclass(frozen=True)
class Missing:
    """A measure that the data has no value of, and why.

    Attributes:
        name, layer, when, dataset, unit: As of a `Measurement`.
        reason: In words, without a full stop.

    Raises:
        UsageError: If a field has another type.
    """

    name: str
    layer: str
    when: str
    reason: str
    dataset: str = ""
    unit: str = ""

    def __post_init__(self) -> None:
        check_types(type(self).__name__, type(self).__init__, vars(self))
        for name, value in vars(self).items():
            if not isinstance(value, str):
                raise UsageError(f"The {name} of a missing measure must be a str, got {value!r}.")


def missing_sentences(missing: Iterable[Missing]) -> list[str]:
    """Return what was not measured and why, a sentence for each reason.

    Example:
        >>> missing_sentences(Missing("knn", layer, "after", "no labels", unit="accuracy") for layer in ("h", "z"))
        ['k-NN accuracy of h and z after training: no labels.']
    """
    layers: dict[tuple[str, ...], list[str]] = {}
    for m in missing:
        layers.setdefault((words.label(m.name, m.unit, {}), m.when, m.dataset, m.reason), []).append(m.layer)
    return [words.missing(name, list(dict.fromkeys(of)), *rest) for (name, *rest), of in layers.items()]


@runtime_checkable
class Measured(Protocol):
    """What verdicts are made from: `Results`."""

    measurements: list[Measurement]
    geometry: dict[str, Any]


def on_other_rows(measured: Iterable[Measurement]) -> str | None:
    """Return, in words, what was measured on so many test rows before training and on so many others after it, or None.

    Example:
        >>> on_other_rows([Measurement("rankme", "h", "before", 3.0, protocol={"rows": 64}),
        ...                Measurement("rankme", "h", "after", 2.0, protocol={"rows": 30})])
        'RankMe of h on 64 test rows before training and on 30 after it'
    """
    counts: dict[tuple[str, ...], dict[str, set[int]]] = {}
    for m in measured:
        count = next((m.protocol[name] for name in ("queries", "test_rows", "rows") if name in m.protocol), None)
        if isinstance(count, int):
            key = words.label(m.name, m.unit, m.protocol), m.layer, m.dataset
            counts.setdefault(key, {"before": set(), "after": set()})[m.when].add(count)
    for (label, layer, _), of in counts.items():
        if of["before"] and of["after"] and not of["before"] & of["after"]:
            before, after = (" and ".join(map(str, sorted(of[when]))) for when in WHENS)
            return f"{label} of {layer} on {before} test rows before training and on {after} after it"
    return None


def by_cell(measured: Iterable[Measurement]) -> dict[Cell, list[Measurement]]:
    """Return the measurements of each cell."""
    cells: dict[Cell, list[Measurement]] = {}
    for m in measured:
        cells.setdefault(m.cell, []).append(m)
    return cells


def grouped(measured: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """Return the measurements on each data set."""
    found: dict[str, list[Measurement]] = {}
    for m in measured:
        found.setdefault(m.dataset, []).append(m)
    return found


def mean_std(found: Iterable[Measurement]) -> tuple[float, float] | None:
    """Return mean and standard deviation over the seeds of a cell; None of none, and 0 of a single one."""
    values = [m.value for m in found]
    return (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0) if values else None


def row_names(measured: Iterable[Measurement]) -> dict[Key, str]:
    """Return the name of every row, those without labels last; with settings where they tell two rows apart.

    Example:
        >>> rows = [Measurement("linear", "h", "after", 0.9, protocol={"epochs": n}) for n in (10, 100)]
        >>> list(row_names(rows).values())
        ['linear (epochs = 10)', 'linear (epochs = 100)']
    """
    first: dict[Key, Measurement] = {}
    for m in measured:
        first.setdefault(m.key, m)
    order = list(words.UNLABELLED)
    alike: dict[tuple[str, str], dict[str, Counter[str]]] = {}  # label and data set → setting → its values as text
    sizes = Counter((m.label, m.dataset) for m in first.values())
    for m in first.values():
        for name, value in m.settings.items():
            alike.setdefault((m.label, m.dataset), {}).setdefault(name, Counter())[_text(value)] += 1
    names = {}
    for key in sorted(first, key=lambda key: order.index(key[0]) if key[0] in order else -1):
        own, label = first[key].settings, first[key].label
        group, size = alike.get((label, key[1]), {}), sizes[label, key[1]]
        apart = {n: v for n, v in own.items() if group[n][_text(v)] + (v is None) * (size - group[n].total()) < size}
        names[key] = f"{label} ({settings_text(apart)})" if apart else label
    return names


def settings_text(settings: dict[str, Any]) -> str:
    """Return settings as text.

    Example:
        >>> settings_text({"k": 20, "metric": "cosine", "rates": [0.1, 1.0]})
        'k = 20, metric = cosine, rates = 0.1/1.0'
    """
    return ", ".join(f"{name} = {short(value)}" for name, value in settings.items())


def short(value: Any) -> str:
    """Return a setting as text: a list by slashes, a long one by its ends, other structures as JSON."""
    if isinstance(value, list | tuple) and value:
        long = f"{len(value)} values from {short(value[0])} to {short(value[-1])}"
        return long if len(value) > 6 else "/".join(map(short, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


@checked
def pack_outcomes(correct: ArrayLike) -> str:
    """Return right/wrong answers as text: their number, a colon, hexadecimal digits.

    Example:
        >>> unpack_outcomes(pack_outcomes([True, False, True])).tolist()
        [1, 0, 1]
    """
    try:
        bits = np.asarray(correct, dtype=np.uint8)
    except (TypeError, ValueError, OverflowError, NotImplementedError, RuntimeError):
        given = f"got {type(correct).__name__}"
        raise UsageError(f"Expected right and wrong answers, True or False for each row, {given}.") from None
    return f"{bits.size}:{np.packbits(bits).tobytes().hex()}"


@checked
def unpack_outcomes(text: str) -> np.ndarray:
    """Return what `pack_outcomes` packed, as 0 and 1 `[rows]`.

    Raises:
        UsageError: If the text is damaged, or names more rows than it holds.
    """
    count, _, digits = text.partition(":")
    try:
        if not 0 <= int(count) <= 4 * len(digits):  # four rows a digit: more would be made up, and too many to hold
            raise ValueError
        return np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8), count=int(count))
    except ValueError:
        raise UsageError("The outcomes are damaged: expected '<rows>:<hexadecimal digits>'.") from None
