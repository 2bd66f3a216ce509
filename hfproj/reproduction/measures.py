"""What is measured of a trained model, by the names that columns of studies have.

Three kinds: probes (`hfproj.list_probes`), fitted on the bank and scored on the test images; diagnostics of features
(`hfproj.diagnostics.by_name`), of the test images; and the functions of `MEASURES`, of the whole run. Papers' own are
added by `register_measure` in their file.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from hfproj.diagnostics.by_name import MEASURES as DIAGNOSTICS
from hfproj.diagnostics.by_name import OF_VIEWS
from hfproj.errors import NotMeasurableError, UsageError
from hfproj.features import Features, extract_features
from hfproj.probes import list_probes
from hfproj.probes.registry import make_probe
from hfproj.reproduction.setting import Setting
from hfproj.reproduction.sources import Splits
from hfproj.reproduction.study import Column
from hfproj.results import pack_outcomes

PERCENT = "accuracy"


@dataclass
class Trained:
    """A model after (or, of a control, without) its training, and what has been read of it.

    Attributes:
        setting: What it is.
        model: With its head.
        splits: Its data.
        seed: Of the run.
        log: What the trainer logged.
        features: (split, layer) → features.
    """

    setting: Setting
    model: PeftModel
    splits: Splits
    seed: int
    log: list[dict[str, Any]] = field(default_factory=list)
    features: dict[str, Features] = field(default_factory=dict)

    def of(self, split: str, layer: str = "h") -> Tensor:
        """Return the features of a layer, ``[rows, dim]``, of "train" or "test"."""
        if split not in self.features:
            layers = [c.layer for c in self.setting.study.every_column] + list(self.setting.study.spectra)
            inner = sorted({layer for layer in layers} - {"h", "z", ""})
            size = self.setting.scale.views.get("size")
            pixels = self.setting.study.data[self.setting.data].pixels(self.model, size)
            data = getattr(self.splits, split)
            self.features[split] = extract_features(
                self.model, data, layers=[n for n in inner if self.has(n)], collator=pixels, batch_size=500
            )
        found = self.features[split].by_name()
        if layer not in found:
            raise NotMeasurableError(f"there is no layer {layer} in this row")
        return found[layer]

    def has(self, layer: str) -> bool:
        """Return whether the model has a layer by this name."""
        if not layer.startswith("head."):
            return True
        return int(layer.removeprefix("head.")) < len(head_layers(self.model))

    def labels(self, name: str, split: str) -> Tensor:
        """Return labels of a split by their name.

        Raises:
            UsageError: If the data have none of this name.
        """
        if name not in self.splits.labels:
            raise UsageError(f"Expected labels of {', '.join(self.splits.labels)}, got {name!r}.")
        return self.splits.labels[name][split == "test"]


Measure = Callable[[Trained, Column], float]
MEASURES: dict[str, Measure] = {}


def register_measure(name: str) -> Callable[[Measure], Measure]:
    """Return a decorator that makes a function of (trained, column) a measure by this name."""

    def add(measure: Measure) -> Measure:
        MEASURES[name] = measure
        return measure

    return add


def check_measure(column: Column) -> None:
    """Refuse a column whose measure does not exist.

    Raises:
        UsageError: If it does not.
    """
    if column.measure not in {*MEASURES, *DIAGNOSTICS, *list_probes()}:
        known = ", ".join(sorted({*MEASURES, *DIAGNOSTICS, *list_probes()}))
        raise UsageError(f"Expected the measure of column {column.name!r} to be one of {known}, got {column.measure!r}.")


def measured(trained: Trained, *, shuffled: bool = False) -> dict[str, Any]:
    """Return every column's number, the answers of probes, and the spectra that are kept.

    Args:
        trained: The run.
        shuffled: Whether all labels are shuffled, for a negative control.
    """
    values: dict[str, float | None] = {}
    outcomes: dict[str, str] = {}
    missing: dict[str, str] = {}
    if shuffled:
        trained.splits = _shuffled(trained.splits)
    for column in trained.setting.study.every_column:
        try:
            value, answers = _value(trained, column)
        except NotMeasurableError as error:
            values[column.name], missing[column.name] = None, str(error)
            continue
        values[column.name] = value if math.isfinite(value) else None
        if answers is not None:
            outcomes[column.name] = pack_outcomes(answers.tolist())
    spectra = {}
    for layer in trained.setting.study.spectra:
        try:
            spectra[layer] = [float(f"{v:.4g}") for v in spectrum(trained.of("test", layer))]
        except NotMeasurableError:
            continue
    return {"values": values, "outcomes": outcomes, "missing": missing, "spectra": spectra}


def spectrum(f: Tensor) -> list[float]:
    """Return the eigenvalues of the covariance of unit rows, descending, ``[dim]``."""
    from hfproj.diagnostics import covariance_spectrum

    return covariance_spectrum(f).tolist()


def _value(trained: Trained, column: Column) -> tuple[float, Any]:
    name = column.measure
    if name in MEASURES:
        return float(MEASURES[name](trained, column)), None
    if name in OF_VIEWS:
        raise UsageError(f"{name} is of views, which a column of a study does not have.")
    f = trained.of("test", column.layer)
    if name in DIAGNOSTICS:
        return float(DIAGNOSTICS[name](f)), None
    bank = trained.of("train", column.layer)
    known, truth = (trained.labels(column.labels, split) for split in ("train", "test"))
    options: Mapping[str, Any] = column.options
    if name == "knn":
        options = {**options, "k": min(options.get("k", 20), len(bank))}
    probe = make_probe({"name": name, **options})
    value = probe.fit(bank, known).score(f, truth)
    return float(value), getattr(probe, "correct_", None)


def head_layers(model: Any) -> list[str]:
    """Return the names of the layers inside the active head, in order."""
    from hfproj.features.head_layers import names_of

    return names_of(model)


def _shuffled(splits: Splits) -> Splits:
    generator = torch.Generator().manual_seed(0)
    labels = {
        name: tuple(part[torch.randperm(len(part), generator=generator)] for part in both)
        for name, both in splits.labels.items()
    }
    return Splits(splits.train, splits.test, labels)  # type: ignore[arg-type]
