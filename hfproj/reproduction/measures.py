"""What is measured of a trained model, by the names that columns of studies have.

Three kinds: probes (`hfproj.list_probes`), fitted on the bank and scored on the test images; diagnostics of features
(`hfproj.diagnostics.by_name`), of the test images; and the functions of `MEASURES`, of the whole run. Papers' own are
added by `register_measure` in their file.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from scipy import stats
from torch import Tensor, nn

from hfproj.diagnostics.by_name import MEASURES as DIAGNOSTICS
from hfproj.diagnostics.by_name import OF_VIEWS
from hfproj.errors import NotMeasurableError, UsageError, check_choice, unknown
from hfproj.features import Features, extract_features
from hfproj.heads.layers import layer_widths
from hfproj.probes import list_probes
from hfproj.probes.registry import make_probe
from hfproj.reproduction.setting import Setting, active_head
from hfproj.reproduction.sources import Splits
from hfproj.reproduction.study import EVALUATED, Column
from hfproj.results import pack_outcomes
from hfproj.tuner.layer import CHILD


@dataclass
class Trained:
    """A model after (or, of a control, without) its training, and what has been read of it.

    Attributes:
        setting: What it is.
        model: With its head.
        splits: Its data.
        seed: Of the run.
        history: What was watched along training.
        features: What has been read: of "train", "test" and further data sets.
    """

    setting: Setting
    model: PeftModel
    splits: Splits
    seed: int
    history: list[dict[str, Any]] = field(default_factory=list)
    features: dict[str, Features] = field(default_factory=dict)

    def of(self, split: str, layer: str = "h", other: str = "") -> Tensor:
        """Return features of a layer, ``[rows, dim]``, of "train" or "test", or of those of a further data set."""
        key = f"{other} {split}"
        if key not in self.features:
            splits = self.splits.others[other] if other else self.splits
            self.features[key] = self.read(getattr(splits, split), inner=not other)
        found = self.features[key].by_name()
        if layer not in found:
            raise NotMeasurableError(f"there is no layer {layer} in this row")
        return found[layer]

    def read(self, data: Any, *, inner: bool = True) -> Features:
        """Return the features of any images; `inner`: of all layers that the study's columns read."""
        study = self.setting.study
        layers = sorted({*(c.layer for c in study.every_column), *study.spectra} - {"h", "z", "", EVALUATED})
        pixels = self.setting.source.pixels(self.model, self.setting.scale.views.get("size"))
        wanted = [name for name in layers if self.has(name)] if inner else []
        return extract_features(self.model, data, layers=wanted, collator=pixels, batch_size=500)

    def has(self, layer: str) -> bool:
        """Return whether the model has a layer by this name."""
        if not layer.startswith("head."):
            return True
        return int(layer.removeprefix("head.")) < len(layer_widths(active_head(self.model)))

    def labels(self, name: str, split: str, other: str = "") -> Tensor:
        """Return labels of a split by their name.

        Raises:
            UsageError: If the data have none of this name.
        """
        known = (self.splits.others[other] if other else self.splits).labels
        if name not in known:
            raise UsageError(f"Expected labels of {', '.join(known)}, got {name!r}.")
        return known[name][split == "test"]


Measure = Callable[[Trained, Column], float]


class Registered(NamedTuple):
    """A measure of a whole run, with the names of the options that its columns need and may have."""

    measure: Measure
    needs: tuple[str, ...]
    may: tuple[str, ...]


MEASURES: dict[str, Registered] = {}


def register_measure(
    name: str, *, needs: tuple[str, ...] = (), may: tuple[str, ...] = ()
) -> Callable[[Measure], Measure]:
    """Return a decorator that makes a function of (trained, column) a measure by this name.

    Args:
        name: What columns call it.
        needs: Names of the options that a column of it must have.
        may: Names of those that it can have.
    """

    def add(measure: Measure) -> Measure:
        MEASURES[name] = Registered(measure, needs, may)
        return measure

    return add


def check_measure(column: Column) -> None:
    """Refuse a column whose measure does not exist, or does not have or lacks one of its options.

    Raises:
        UsageError: If so.
    """
    if column.measure not in {*MEASURES, *DIAGNOSTICS, *list_probes()}:
        known = ", ".join(sorted({*MEASURES, *DIAGNOSTICS, *list_probes()}))
        raise UsageError(
            f"Expected the measure of column {column.name!r} to be one of {known}, got {column.measure!r}."
        )
    where = f"column {column.name!r} of the measure {column.measure!r}"
    if column.measure in OF_VIEWS:
        raise UsageError(f"Expected {where} to be of single images, got one of views; a study's columns have none.")
    if column.measure in list_probes():
        make_probe({"name": column.measure, **column.options})  # names what it does not have
        return
    registered = MEASURES.get(column.measure)
    needs, may = (registered.needs, registered.may) if registered else ((), ())  # a diagnostic has none
    for name in set(column.options) - {*needs, *may}:
        raise unknown(f"option of {where}:", name, {*needs, *may})
    if missing := [name for name in needs if name not in column.options]:
        raise UsageError(f"Expected {where} to have the options {', '.join(needs)}, got no {missing[0]}; add it.")


def check_layers(setting: Setting, model: PeftModel) -> None:
    """Refuse a layer that the backbone does not have, before anything is trained; a row may lack layers of the head.

    Raises:
        UsageError: If a column or spectrum of the study names one.
    """
    backbone = dict(model.get_base_model().named_modules())
    for layer in sorted({*(c.layer for c in setting.study.every_column), *setting.study.spectra}):
        if layer not in ("h", "z", "", EVALUATED) and not layer.startswith("head.") and layer not in backbone:
            raise unknown(f"layer of {setting.study.name}, for a {setting.scale.backbone['name']}:", layer, backbone)


def check_labels(column: Column, splits: Splits) -> None:
    """Refuse a probe of labels or of a further data set that the data do not have, before anything is trained.

    Raises:
        UsageError: If they don't.
    """
    if column.other and column.other not in splits.others:
        raise unknown(f"further data set of column {column.name!r}:", column.other, splits.others)
    labels = (splits.others[column.other] if column.other else splits).labels
    if column.measure in list_probes() and column.labels not in labels:
        raise unknown(f"labels of column {column.name!r}:", column.labels, labels)


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
        if not math.isfinite(value):
            missing[column.name] = f"its value is {value}"
        elif column.log and value <= 0:
            missing[column.name] = f"its value is {value:g}, which has no logarithm"
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
        return float(MEASURES[name].measure(trained, column)), None
    layer = trained.setting.row.evaluated if column.layer == EVALUATED else column.layer
    f = trained.of("test", layer, column.other)
    if name in DIAGNOSTICS:
        return float(DIAGNOSTICS[name](f)), None
    probe = fitted_probe(trained, column, layer)
    truth = trained.labels(column.labels, "test", column.other)
    value = probe.score(f[truth >= 0], truth[truth >= 0])
    return float(value), getattr(probe, "correct_", None)


def fitted_probe(trained: Trained, column: Column, layer: str) -> Any:
    """Return the probe of a column, fitted on the labelled images of the bank, or on a share of them."""
    bank, known = trained.of("train", layer, column.other), trained.labels(column.labels, "train", column.other)
    chosen = (known >= 0).nonzero().flatten()
    if column.share < 1:
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))
        chosen = chosen[order[: max(2, round(column.share * len(chosen)))]]
    options: Mapping[str, Any] = column.options
    if column.measure == "knn":
        options = {**options, "k": min(options.get("k", 20), len(chosen))}
    return make_probe({"name": column.measure, **options}).fit(bank[chosen], known[chosen])


def _shuffled(splits: Splits) -> Splits:
    generator = torch.Generator().manual_seed(0)
    labels = {
        name: tuple(part[torch.randperm(len(part), generator=generator)] for part in both)
        for name, both in splits.labels.items()
    }
    others = {name: _shuffled(other) for name, other in splits.others.items()}
    return replace(splits, labels=labels, others=others)  # type: ignore[arg-type]


_ALONG: Mapping[str, tuple[str, ...]] = {"spearman": ("with",), "negative": ("error",), "median": ()}


@register_measure("along", needs=("of", "what"), may=("with", "error"))
def along(trained: Trained, column: Column) -> float:
    """What became of a number along training: ``options={"of": name, "what": …}``.

    "spearman": its rank correlation with the number ``"with"``; "negative": at which share of the steps it is below 0
    by more than the bound ``"error"``; "median".

    Raises:
        NotMeasurableError: If nothing was watched.
    """
    what = column.options["what"]
    check_choice("what of a number along training", what, _ALONG)
    names = [column.options[part] for part in ("of", *_ALONG[what])]
    rows = [[row.get(name) for name in names] for row in trained.history]
    known = [row for row in rows if all(value is not None and math.isfinite(value) for value in row)]
    if len(known) < 3:
        raise NotMeasurableError(f"{' and '.join(names)} were watched together at fewer than three steps")
    values, *others = zip(*known, strict=True)
    if what == "spearman":
        return float(stats.spearmanr(values, others[0]).statistic)
    if what == "negative":
        return sum(value < -error for value, error in zip(values, others[0], strict=True)) / len(values)
    return statistics.median(values)


@register_measure("covariance_rank")
def covariance_rank(trained: Trained, column: Column) -> float:
    """Number of directions of a layer: exp of the entropy of the eigenvalues of the covariance of unit rows."""
    values = torch.tensor(spectrum(trained.of("test", column.layer)), dtype=torch.float64).clamp_min(0)
    shares = values / values.sum()
    return math.exp(-torch.special.xlogy(shares, shares).sum().item())


@register_measure("collapsed_row_norms")
def collapsed_row_norms(trained: Trained, column: Column) -> float:
    """Length of the weight rows of the tenth of a layer's dimensions with the least variance, over that of the others.

    The layer is the head's last linear map for z and the backbone's last convolution or linear map for h; a row is what
    one dimension of it is computed by. 1: variance and length have nothing to do with each other.

    Raises:
        NotMeasurableError: If no weight has one row for each dimension of the layer.
    """
    f = trained.of("test", column.layer).double()
    root = active_head(trained.model) if column.layer == "z" else trained.model.get_base_model()
    maps = [
        module for name, module in root.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith(CHILD)
    ]  # fmt: skip
    if not maps or maps[-1].weight.shape[0] != f.shape[1]:
        raise NotMeasurableError(f"no weight matrix ends in {column.layer}")
    rows = maps[-1].weight.detach().flatten(1).double().norm(dim=1)
    low = f.var(0).argsort()[: max(1, f.shape[1] // 10)]
    others = torch.ones(len(rows), dtype=torch.bool).index_fill_(0, low, False)
    return (rows[low].mean() / rows[others].mean()).item()
