"""Measure a model: probes on h, z and intermediate layers, rank, spread and spectra; and what needs no labels."""

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfproj import diagnostics as d
from hfproj.diagnostics.spectrum import FIT_RANGE
from hfproj.errors import UsageError
from hfproj.features.extraction import Features, extract_features
from hfproj.features.similarity import linear_cka, mutual_knn
from hfproj.features.views import FixedViews
from hfproj.files import portable
from hfproj.probes.registry import ProbeLike, make_probes
from hfproj.results import LAYERS, Measurement, Results, pack_outcomes
from hfproj.tuner.description import describe_adapter
from hfproj.typing import Data, OneOf, Probe, When

_EPS = 1e-7  # RankMe's, part of its protocol
_RIDGE = 1e-4  # LiDAR's
_OVERLAP = 20  # neighbours
_POSITIVE_IMAGES = 512
Number = tuple[str, float, dict[str, Any]]  # name, value, protocol


def evaluate(
    model: nn.Module, *, probes: ProbeLike | Sequence[ProbeLike] | None = None, train: Data | None = None, test: Data,
    labels: OneOf["auto"] | None = "auto", layers: Sequence[int | str] | OneOf["all"] = (),
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
        layers: Intermediate layers to measure too, as in `extract_features`: indices of blocks, names, or "all".
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
        progress: As in `extract_features`.

    Raises:
        UsageError: If a probe is unknown, if there are probes but no labels or no `train`, if features are not finite
            (the message names the rows), or as `extract_features`.
    """
    if labels not in ("auto", None):
        raise UsageError(f"Expected labels='auto' (those that the collator gives) or None, got {labels!r}.")
    chosen = None if probes is None else make_probes(probes)
    options: dict[str, Any] = {"batch_size": batch_size, "collator": collator, "device": device}
    options |= {"num_workers": num_workers, "cache_dir": cache_dir, "progress": progress}
    read = {**options, "layers": layers, "tokens": any(_on(probe) == "tokens" for probe in chosen or [])}
    held_out = extract_features(model, test, **read)
    bank = extract_features(model, train, **read) if train is not None and labels is not None else None
    labelled = bank is not None and bank.labels is not None and held_out.labels is not None
    if chosen and not labelled:
        raise UsageError("Probes need labels in `train` and `test`, got none; pass probes=[] to go without probes.")
    chosen = make_probes(["knn"] * labelled) if chosen is None else chosen
    results = Results(config=describe_adapter(model), seeds=[seed])
    name = str(portable(dataset)) if dataset else ""

    def add(layer: str, number: Number, unit: str = "", outcomes: str = "") -> None:
        what, value, protocol = number
        protocol = {**protocol, "seed": seed}
        results.measurements.append(Measurement(what, layer, when, value, name, unit, protocol, outcomes))

    for layer, f in held_out.by_name().items():
        for probe in chosen:
            if bank is not None and _on(probe) == "features":
                _score(add, layer, probe, (bank.by_name()[layer], bank.labels), (f, held_out.labels))
        add(layer, ("rankme", d.rankme(f, eps=_EPS), {"rows": len(f), "eps": _EPS}))
        add(layer, ("representation_std", d.representation_std(f), {"rows": len(f)}))
        if layer in LAYERS:
            results.spectra[f"{layer} {when}"] = d.covariance_spectrum(f).tolist()
    for probe in chosen:
        if _on(probe) == "tokens" and bank is not None:
            _score(add, "tokens", probe, (bank.tokens, bank.labels), (held_out.tokens, held_out.labels))
        elif _on(probe) == "model":
            _score(add, "h", probe, (model, train), (test,))
    positive: dict[str, Tensor] = {}
    if views is not None:
        fixed = FixedViews(test, views, images=_POSITIVE_IMAGES, batch_size=batch_size)
        positive = dict(zip(LAYERS, fixed.features(model, device)))
    for layer, f in positive.items():
        add(layer, ("positive_cosine", d.positive_cosine(f), {"views": f.shape[0], "images": f.shape[1]}))
    if not labelled:
        results.notes += _add_without_labels(add, held_out, positive, _reference(model, reference, test, options))
    return results


def _on(probe: Probe) -> str:
    return getattr(probe, "on", "features")


def _score(add: Callable[..., None], layer: str, probe: Probe, train: tuple, test: tuple) -> None:
    """Fit a copy of the probe on `train`, score it on `test`, and add every number that it gives."""
    fitted = copy.deepcopy(probe).fit(*train)
    value = fitted.score(*test)
    found = fitted.results_
    if not isinstance(found, Mapping) or not isinstance(found.get("protocol"), Mapping):
        wanted = f"results_ of the probe {probe.name!r} as a dict with 'protocol', a dict of its settings"
        raise UsageError(f"Expected {wanted}, got {found!r}; set it in score().")
    # "seed" in a measurement is that of the training run.
    protocol = {"probe_seed" if name == "seed" else name: value for name, value in found["protocol"].items()}
    unit = getattr(probe, "unit", "")
    correct = getattr(fitted, "correct_", None)
    add(layer, (probe.name, value, protocol), unit, "" if correct is None else pack_outcomes(correct.tolist()))
    for key, other in found.get("values", {}).items():
        setting, _, of = key.partition("=")
        if of:  # the same number under another setting, such as k=10
            if str(protocol.get(setting)) != of:
                add(layer, (probe.name, other, {**protocol, setting: int(of)}), unit)
        elif key != unit:
            add(layer, (f"{probe.name}_{key}", other, protocol))


def _add_without_labels(
    add: Callable[..., None], held_out: Features, positive: Mapping[str, Tensor], before: Tensor | None
) -> list[str]:
    """Add what needs no labels, and return notes of LiDAR's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for layer, f in held_out.by_name().items():
            for number in _without_labels(f, positive.get(layer), before):
                add(layer, number)
    return list(dict.fromkeys(str(w.message) for w in caught if "LiDAR" in str(w.message)))


def _without_labels(f: Tensor, views: Tensor | None, before: Tensor | None) -> Iterator[Number]:
    """Yield what needs no labels of features, of views of them, and of h before training."""
    if min(f.shape[0] - 1, f.shape[1]) > FIT_RANGE[0] + 2:
        yield "alpha_req", d.alpha_req(f).alpha, {"rows": len(f), "fit_range": list(FIT_RANGE)}
    if views is not None:
        protocol = {"views": views.shape[0], "images": views.shape[1]}
        yield "alignment", d.alignment(views), protocol
        yield "lidar", d.lidar_of_views(views, ridge=_RIDGE), {**protocol, "ridge": _RIDGE}
    yield "uniformity", d.uniformity(f), {"rows": len(f)}
    if before is not None:
        k = min(_OVERLAP, len(f) - 1)
        yield "knn_overlap", mutual_knn(f, before, k=k), {"rows": len(f), "k": k}
        yield "cka", linear_cka(f, before), {"rows": len(f)}


def _reference(model: Any, reference: nn.Module | None, test: Any, options: Mapping[str, Any]) -> Tensor | None:
    """Return h of the reference; None where there is nothing to compare with."""
    if reference is not None:
        return extract_features(reference, test, **options).h
    if not hasattr(model, "disable_adapter"):
        return None
    with model.disable_adapter():
        return extract_features(model, test, **options).h
