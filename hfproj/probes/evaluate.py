"""Measure a model: probes on h and z, RankMe, spread, spectra and, with views, the cosine of positive pairs."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfproj.diagnostics import covariance_spectrum, positive_cosine, rankme, representation_std
from hfproj.errors import UsageError
from hfproj.files import portable
from hfproj.probes.features import extract_features
from hfproj.probes.knn import KNNProbe
from hfproj.probes.views import FixedViews
from hfproj.results import Measurement, Results, pack_outcomes

_EPS = 1e-7  # RankMe's, part of its protocol
_POSITIVE_IMAGES = 512


def evaluate(
    model: nn.Module,
    *,
    probes: Sequence[Any] | None = None,
    train: Any,
    test: Any,
    batch_size: int = 256,
    collator: Callable[[list], Mapping[str, Any]] | None = None,
    when: str = "after",
    dataset: str | None = None,
    views: Callable[[list], Mapping[str, Any]] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    num_workers: int = 0,
) -> Results:
    """Return what the probes and diagnostics say about h and z; every number comes with its protocol.

    Probes are fitted on `train` and scored on `test`; RankMe, representation std and spectra are those of `test`. The
    model runs in eval mode and comes back as it was; the global random state is not used. Call it before and after
    training and merge the two.

    Args:
        model: A PEFT model with a projection head.
        probes: Objects with `name`, `fit(f, y)`, `score(f, y)`, `results_` and optionally `correct_`; each is
            copied for h and z. Default: `[KNNProbe()]` where there are labels.
        train: Labelled bank or training set of the probes.
        test: Held-out items.
        batch_size: Items a forward pass.
        collator: As in `extract_features`.
        when: "before" or "after" training.
        dataset: Name of the data set in the results, best its Hub id.
        views: A collator that gives `{"views": [tensor or mapping, …]}` (`ImageViews`) for items of
            `IndexedDataset(test)`: adds the mean cosine of positive pairs over up to 512 evenly spaced test items.
        seed: Of the training run; it tells runs apart when results are merged.
        device: As in `extract_features`.
        num_workers: As in `extract_features`.

    Raises:
        UsageError: probes without labels, features that are not finite (the rows are named), or what
            `extract_features` raises.
    """
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "collator": collator,
        "device": device,
        "num_workers": num_workers,
    }
    bank, held_out = extract_features(model, train, **options), extract_features(model, test, **options)
    labelled = bank.labels is not None and held_out.labels is not None
    if probes and not labelled:
        raise UsageError(
            "Probes need labels in `train` and `test`, but the collator gave none; pass probes=[] to go without."
        )
    probes = [KNNProbe()] * labelled if probes is None else probes

    results = Results(config=_config(model), seeds=[seed])
    name = str(portable(dataset)) if dataset else ""

    def add(what: str, layer: str, value: float, protocol: dict, unit: str = "", outcomes: str = "") -> None:
        protocol = {**protocol, "seed": seed}
        results.measurements.append(Measurement(what, layer, when, value, name, unit, protocol, outcomes))

    for layer in ("h", "z"):
        f, bank_f = getattr(held_out, layer), getattr(bank, layer)
        for probe in probes:
            fitted = copy.deepcopy(probe).fit(bank_f, bank.labels)
            value = fitted.score(f, held_out.labels)
            correct = getattr(fitted, "correct_", None)
            packed = "" if correct is None else pack_outcomes(correct.tolist())
            add(probe.name, layer, value, fitted.results_["protocol"], getattr(probe, "unit", ""), packed)
        add("rankme", layer, rankme(f, eps=_EPS), {"rows": len(f), "eps": _EPS})
        add("representation_std", layer, representation_std(f), {"rows": len(f)})
        results.spectra[f"{layer} {when}"] = covariance_spectrum(f).tolist()
    if views is not None:
        h, z = FixedViews(test, views, images=_POSITIVE_IMAGES, batch_size=batch_size).features(model, device)
        for layer, f in (("h", h), ("z", z)):
            add("positive_cosine", layer, positive_cosine(f), {"views": f.shape[0], "images": f.shape[1]})
    return results


def _config(model: nn.Module) -> dict[str, Any]:
    """Return base model and adapter config, without paths of this machine."""
    adapters = getattr(model, "peft_config", None)
    if not adapters:
        return {}
    active = getattr(model, "active_adapter", None)
    config = adapters.get(active if isinstance(active, str) else None) or next(iter(adapters.values()))
    adapter = config.to_dict() if hasattr(config, "to_dict") else dict(vars(config))
    backbone = adapter.get("backbone")
    base = (backbone.get("id") if isinstance(backbone, Mapping) else None) or adapter.get("base_model_name_or_path")
    base = _base_model(base)
    for owner, key in ((adapter, "base_model_name_or_path"), (backbone, "id")):
        if isinstance(owner, dict) and owner.get(key):
            owner[key] = base
    return portable({"base_model": base, "adapter": {k: v for k, v in adapter.items() if v is not None}})


def _base_model(base: Any) -> str | None:
    """Return a Hub id as it is and a folder as `./name`."""
    if not base:
        return None
    base = os.fspath(base)
    return f"./{os.path.basename(os.path.normpath(base))}" if os.path.isabs(base) or os.path.exists(base) else base
