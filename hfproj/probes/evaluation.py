"""Measure a model: probes on h, z and intermediate layers, rank, spread and spectra; and what needs no labels."""

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hfproj import diagnostics as d
from hfproj import distributed
from hfproj.checking import checked
from hfproj.data.indexing import as_item
from hfproj.diagnostics.spectrum import FIT_RANGE
from hfproj.errors import NotMeasurableError, UsageError, check_type
from hfproj.features.extraction import Features, extract_features
from hfproj.features.similarity import linear_cka, mutual_knn
from hfproj.features.views import FixedViews
from hfproj.files import portable
from hfproj.functional.labels import UNLABELLED, check_classes
from hfproj.heads.layers import is_layer_name
from hfproj.probes.base import as_labels, left_out
from hfproj.probes.registry import ProbeLike, make_probes
from hfproj.probes.shared_rows import warn_of_shared_rows
from hfproj.results import LAYERS, Measurement, Missing, Results, pack_outcomes
from hfproj.tuner.description import describe_adapter
from hfproj.typing import Data, OneOf, Probe, When

_EPS = 1e-7  # RankMe's, part of its protocol
_RIDGE = 1e-4  # LiDAR's
_OVERLAP = 20  # neighbours
_POSITIVE_IMAGES = 512
Number = tuple[str, float, dict[str, Any]]  # name, value, protocol
Measure = tuple[str, Callable[[], float], dict[str, Any]]


@checked
def evaluate(
    model: nn.Module, *, probes: ProbeLike | Sequence[ProbeLike] | None = None, train: Data | None = None, test: Data,
    labels: OneOf["auto"] | None = "auto", layers: Sequence[int | str] | OneOf["all", "head"] = (),
    reference: nn.Module | None = None, batch_size: int = 256,
    collator: Callable[[list], Mapping[str, Any]] | None = None, when: When = "after", dataset: str | None = None,
    views: Callable[[list], Mapping[str, Any]] | None = None, seed: int = 0, device: torch.device | str | None = None,
    num_workers: int = 0, cache_dir: str | os.PathLike | None = None, progress: bool = False,
) -> Results:  # fmt: skip
    """Return what probes and diagnostics say about h, z and other layers; every number comes with its protocol.

    Probes are fitted on `train` and scored on `test`; RankMe, representation std and spectra are those of `test`. The
    model runs in eval mode and comes back as it was; the global random state is not used. Call it before and after
    training and merge the two.

    Without labels (`labels=None`, or a collator that gives none) it measures what needs none: α-ReQ; with `views`
    LiDAR, alignment and uniformity; and how much of the neighbourhoods of h before training is left (mutual k-NN and
    linear CKA with the backbone whose adapter is disabled, or with `reference`).

    Args:
        model: A PEFT model with a projection head, or a backbone, which has no z.
        probes: One or several names (`hfproj.list_probes`), mappings such as ``{"name": "knn", "k": 10}`` or objects
            (`hfproj.typing.Probe`); each is copied for every layer. Those with ``on = "tokens"`` get the tokens, those
            with ``on = "model"`` the model and the data sets themselves. Default: "knn" if there are labels.
        train: Labelled bank or training set of the probes. None: no probes.
        test: Held-out items.
        labels: "auto": those that the collator gives; None: measure without labels.
        layers: Intermediate layers to measure too, as in `extract_features`: indices of blocks, names, "all", "head".
        reference: What h is compared with if no labels are used. Default: the model with its adapter disabled.
        when: "before" or "after" training.
        dataset: Name of the data set in the results, best its Hub id.
        views: A collator that gives `{"views": [tensor or mapping, …]}` (`ImageViews`) for items of
            `IndexedDataset(test)`: adds the mean cosine of positive pairs over up to 512 evenly spaced test items.
        seed: Seed of the training run; it tells runs apart when results are merged.
        batch_size: Items per forward pass.
        collator: As in `extract_features`.
        device: As in `extract_features`.
        num_workers: As in `extract_features`.
        cache_dir: As in `extract_features`: features are computed once for all calls that share it.
        progress: Show bars of the extraction and of the layers that are probed (first process only).

    Raises:
        UsageError: If a probe is unknown, if there are probes but no labels or no `train`, if features are not finite
            (the message names the rows), or as `extract_features`.
    """
    if labels not in ("auto", None):
        what = f"Expected labels='auto' (those that the collator gives) or None, got {labels!r:.80}"
        raise UsageError(f"{what}; name their column: collator=hfproj.EvalImages.for_model(model, label_column=…).")
    name = "the name of the data set"
    check_type(name, dataset, (str, os.PathLike, type(None)), "best its Hub id; the items go to train=… and test=…")
    chosen = None if probes is None else make_probes(probes)
    options: dict[str, Any] = {"batch_size": batch_size, "collator": collator, "device": device}
    options |= {"num_workers": num_workers, "cache_dir": cache_dir, "progress": progress}
    read = {**options, "layers": layers, "tokens": any(_on(probe) == "tokens" for probe in chosen or [])}
    held_out = extract_features(model, test, **read)
    bank = extract_features(model, train, **read) if train is not None and labels is not None else None
    rows, why = _labelled_rows(bank, held_out, (train, test), collator)
    if chosen and bank is None:
        lack = "got labels=None" if labels is None else "there is no training set; pass train=…"
        raise UsageError(f"Probes need labels in `train` and `test`: {lack}, or probes=[] to go without probes.")
    if train is None and chosen is None and labels is not None and held_out.labels is not None:
        warnings.warn(
            "`test` has labels, but there is no training set for a probe: it is measured without labels. Pass train=…, "
            "or labels=None to say that you know.",
            stacklevel=3,
        )
    if bank is not None and bank.labels is not None and chosen != []:
        warn_of_shared_rows(bank.h, held_out.h, stacklevel=3)
    if chosen and rows is None and (bank is None or None in (bank.labels, held_out.labels)):
        raise UsageError(f"Probes need labels in `train` and `test`: {why}. Pass probes=[] to go without probes.")
    chosen = make_probes(["knn"] * (bank is not None)) if chosen is None else chosen
    results = Results(config=describe_adapter(model), seeds=[seed])
    adding = _Adding(results, when, str(portable(dataset)) if dataset else "", seed, rows, why, _column(collator))

    named = held_out.by_name().items()
    for layer, f in tqdm(named, desc="probes", unit="layer", disable=not (progress and distributed.rank() == 0)):
        for probe in chosen:
            if bank is not None and _on(probe) == "features":
                adding.score(layer, probe, bank.by_name()[layer], f)
        adding.measure(layer, "rankme", partial(d.rankme, f, eps=_EPS), {"rows": len(f), "eps": _EPS})
        adding.measure(layer, "representation_std", partial(_directed, d.representation_std, f), {"rows": len(f)})
        if (layer in LAYERS or is_layer_name(layer)) and len(f) > 1:
            results.spectra[f"{layer} {when}"] = d.covariance_spectrum(f).tolist()
    for probe in chosen:
        if _on(probe) == "tokens" and bank is not None:
            adding.score("tokens", probe, bank.tokens, held_out.tokens)
        elif _on(probe) == "model":
            adding.score_model(probe, (model, train), (test,))
    positive: dict[str, Tensor] = {}
    if views is not None:
        positive = adding.views(test, views, batch_size, model, device)
    if rows is None:
        results.notes += _add_without_labels(adding, held_out, positive, _reference(model, reference, test, options))
    return results


def _on(probe: Probe) -> str:
    return getattr(probe, "on", "features")


def _column(collator: Any) -> str | None:
    """Return which column a collator reads labels from, as far as it says so; None: nothing, or not known."""
    return "label" if collator is None else getattr(collator, "label_column", None)


def _labelled_rows(
    bank: Features | None, held_out: Features, data: tuple[Any, Any], collator: Any
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor] | None, str]:
    """Return labels and labelled rows of the training and the test set, or None and why probes can't be scored."""
    if bank is None:
        return None, ""
    found: list[Tensor] = []
    for name, features, dataset in zip(("train", "test"), (bank, held_out), data):
        if features.labels is None:
            return None, _why_no_labels(name, dataset, collator)
        try:
            labels = as_labels(features.labels, len(features))
        except UsageError as error:
            hint = "Pass labels=None to measure without labels"
            raise UsageError(f"The labels of `{name}` are no classes. {error} {hint}.") from error
        found += [labels, labels != UNLABELLED]
    labels, known, truth, scored = found
    left = [
        f"{int((~k).sum())} of {len(k)} {n} rows" for n, k in (("training", known), ("test", scored)) if not k.all()
    ]
    if left:
        warnings.warn(f"{' and '.join(left)} have no label and are left out of the probes.", stacklevel=3)
    try:
        check_classes(labels, "training", truth)
    except NotMeasurableError as error:
        return None, str(error)
    return (labels, known, truth, scored), ""


def _why_no_labels(name: str, dataset: Any, collator: Any) -> str:
    if collator is not None and _column(collator) is None:
        reads = "reads no labels (label_column=None)" if hasattr(collator, "label_column") else "gave no 'labels'"
        return f"the collator {reads}"
    columns = getattr(dataset, "column_names", None)
    have = ", ".join(map(repr, columns if isinstance(columns, Sequence) else as_item(dataset[0])))
    hint = "name it: collator=hfproj.EvalImages.for_model(model, label_column=…)"
    return f"the items of `{name}` have no column {_column(collator)!r}, only {have}; {hint}"


@dataclass
class _Adding:
    """Adds measurements of a data set to `results`, and what the data has no value of, with the reason."""

    results: Results
    when: When
    dataset: str
    seed: int
    rows: tuple[Tensor, Tensor, Tensor, Tensor] | None  # labels and labelled rows of the training and the test set
    why: str  # there are none
    column: str | None  # of the labels

    def number(self, layer: str, number: Number, unit: str = "", outcomes: str = "") -> None:
        what, value, protocol = number
        if isinstance(value, float) and not math.isfinite(value):
            return self.missing(layer, what, f"its value is {value}", unit)
        protocol = {**protocol, "seed": self.seed}
        self.results.measurements.append(
            Measurement(what, layer, self.when, value, self.dataset, unit, protocol, outcomes)
        )

    def missing(self, layer: str, name: str, reason: str, unit: str = "") -> None:
        self.results.missing.append(Missing(name, layer, self.when, reason.removesuffix("."), self.dataset, unit))

    def measure(self, layer: str, name: str, compute: Callable[[], float], protocol: dict[str, Any]) -> None:
        try:
            self.number(layer, (name, compute(), protocol))
        except NotMeasurableError as error:
            self.missing(layer, name, str(error))

    def score(self, layer: str, probe: Probe, train: Any, test: Any) -> None:
        """Fit a copy of the probe on the labelled rows of `train`, score it on those of `test`."""
        if self.rows is None:
            return self.missing(layer, probe.name, self.why, getattr(probe, "unit", ""))
        labels, known, truth, scored = self.rows
        parts = [(f, y) if k.all() else (f[k], y[k]) for f, y, k in ((train, labels, known), (test, truth, scored))]
        left = left_out(int((~known).sum()), int((~scored).sum()))
        self.score_model(probe, *parts, layer=layer, said=left | _said(self.column))

    def score_model(
        self,
        probe: Probe,
        train: tuple,
        test: tuple,
        *,
        layer: str = "h",
        said: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Fit a copy of the probe on `train`, score it on `test`, and add every number that it gives."""
        fitted, unit = copy.deepcopy(probe), getattr(probe, "unit", "")
        try:
            value = fitted.fit(*train).score(*test)
        except NotMeasurableError as error:
            return self.missing(layer, probe.name, str(error), unit)
        found = fitted.results_
        if not isinstance(found, Mapping) or not isinstance(found.get("protocol"), Mapping):
            raise UsageError(
                f"Expected results_ of the probe {probe.name!r} as a dict with 'protocol', a dict of its settings, got "
                f"{found!r}; set it in score()."
            )
        # "seed" in a measurement is that of the training run.
        protocol = {"probe_seed" if name == "seed" else name: v for name, v in found["protocol"].items()} | dict(said)
        correct = getattr(fitted, "correct_", None)
        outcomes = "" if correct is None else pack_outcomes(correct.tolist())
        self.number(layer, (probe.name, value, protocol), unit, outcomes)
        for key, other in found.get("values", {}).items():
            setting, _, of = key.partition("=")
            if of:  # the same number under another setting, such as k=10
                if str(protocol.get(setting)) != of:
                    self.number(layer, (probe.name, other, {**protocol, setting: int(of)}), unit)
            elif key != unit:
                self.number(layer, (f"{probe.name}_{key}", other, protocol))

    def views(
        self, test: Any, views: Callable, batch_size: int, model: nn.Module, device: torch.device | str | None
    ) -> dict[str, Tensor]:
        """Add the cosine of positive pairs; return the features of views, where there are two of two items or more."""
        try:
            fixed = FixedViews(test, views, images=_POSITIVE_IMAGES, batch_size=batch_size)
        except NotMeasurableError as error:
            for layer in LAYERS:
                self.missing(layer, "positive_cosine", str(error))
            return {}
        found = dict(zip(LAYERS, fixed.features(model, device)))
        for layer, f in found.items():
            protocol = {"views": f.shape[0], "images": f.shape[1]}
            self.measure(layer, "positive_cosine", partial(_directed, d.positive_cosine, f), protocol)
        return found


def _said(column: str | None) -> dict[str, str]:
    return {"labels": column} if column not in (None, "label") else {}


def _directed(measure: Callable[[Tensor], float], f: Tensor) -> float:
    """Return a measure of directions; rows that are all zero have none."""
    if not f.any():
        raise NotMeasurableError("all rows are zero and have no direction")
    return measure(f)


def _spread(f: Tensor) -> float:
    return float(d.covariance_spectrum(f)[0])  # of unit rows


def _compared(measure: Callable[[Tensor, Tensor], float], spread: Callable[[Tensor], float], *both: Tensor) -> float:
    """Return how alike two representations are; one without spread is like anything."""
    if min(map(spread, both)) == 0:
        raise NotMeasurableError("all rows of one of the representations are the same")
    return measure(*both)


def _add_without_labels(
    adding: _Adding, held_out: Features, positive: Mapping[str, Tensor], before: Tensor | None
) -> list[str]:
    """Add what needs no labels, and return notes of LiDAR's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for layer, f in held_out.by_name().items():
            for measure in _without_labels(f, positive.get(layer), before):
                adding.measure(layer, *measure)
    return list(dict.fromkeys(str(w.message) for w in caught if "LiDAR" in str(w.message)))


def _without_labels(f: Tensor, views: Tensor | None, before: Tensor | None) -> Iterator[Measure]:
    """Yield what needs no labels of features, of views of them, and of h before training."""
    yield "alpha_req", lambda: d.alpha_req(f).alpha, {"rows": len(f), "fit_range": list(FIT_RANGE)}
    if views is not None:
        protocol = {"views": views.shape[0], "images": views.shape[1]}
        yield "alignment", lambda: _directed(d.alignment, views), protocol
        yield "lidar", lambda: d.lidar_of_views(views, ridge=_RIDGE), {**protocol, "ridge": _RIDGE}
    yield "uniformity", lambda: _directed(d.uniformity, f), {"rows": len(f)}
    if before is not None:
        k = min(_OVERLAP, len(f) - 1)
        overlap = partial(mutual_knn, k=max(1, k))
        yield "knn_overlap", lambda: _compared(overlap, _spread, f, before), {"rows": len(f), "k": k}
        yield "cka", lambda: _compared(linear_cka, d.nesum, f, before), {"rows": len(f)}


def _reference(model: Any, reference: nn.Module | None, test: Any, options: Mapping[str, Any]) -> Tensor | None:
    """Return h of the reference; None where there is nothing to compare with."""
    if reference is not None:
        return extract_features(reference, test, **options).h
    if not hasattr(model, "disable_adapter"):
        return None
    with model.disable_adapter():
        return extract_features(model, test, **options).h
