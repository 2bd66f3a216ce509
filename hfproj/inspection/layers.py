"""The autopsy of a head: what each of its layers holds, and up to which one to keep it.

A layer is worth keeping if probes read more from it than from h. Which layer that is, is a choice among several, and
the best of several on some rows is best there by luck too: hence one random half of the test rows chooses the layer,
and the interval of its difference to h is of the other half, which chose nothing.

References:
    Bordes et al. 2022, Guillotine Regularization, arXiv 2206.13378 (which layer to cut at depends on task and data).
    Chen et al. 2020, SimCLR v2, arXiv 2006.10029, section 4.2 (a layer inside the head is best for few labels).

Deviations:
    Layers are compared by probes on frozen features, not by fine-tuning from the layer.
"""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfproj import diagnostics as d
from hfproj.checking import checked
from hfproj.data.images import ImageViews
from hfproj.errors import NotMeasurableError, UsageError
from hfproj.features.extraction import Features
from hfproj.functional.labels import UNLABELLED
from hfproj.inspection import moves, subject
from hfproj.probes.base import as_labels
from hfproj.probes.registry import ProbeLike, make_probes
from hfproj.probes.shared_rows import warn_of_shared_rows
from hfproj.results import Interval, paired_interval
from hfproj.results.inside import Autopsy, Cut, LayerFound, Score
from hfproj.typing import Data, Probe

_DIGITS = 6  # significant ones of an eigenvalue


@checked
def autopsy(
    model: nn.Module | str | Path, *, train: Data, test: Data, views: ImageViews | None = None,
    probes: ProbeLike | Sequence[ProbeLike] = ("linear", "knn"), layers: Sequence[int | str] | None = None,
    images: int = 500, level: float = 0.95, draws: int = 10_000, seed: int = 0, dataset: str = "",
    collator: Callable[[list], Mapping[str, Any]] | None = None, batch_size: int = 256,
    device: torch.device | str | None = None, num_workers: int = 0, cache_dir: str | os.PathLike | None = None,
    progress: bool = False,
) -> Autopsy:  # fmt: skip
    """Return what each layer of a head holds: rank, spectrum, labels, augmentations; and where to cut it.

    The layers are the block before the one that h is read from, h, ``head.0``, ``head.1``, …, z. Ranks and spectra are
    those of `test`; probes are fitted on `train` and scored on `test`, with the difference to h paired over test rows.
    By each probe one random half of the labelled test rows chooses the layer with the highest accuracy (of equal ones
    h, then the earliest), and the other half confirms it or does not: `Autopsy.cuts`. The intervals in the table speak
    of each layer by itself, not of the best of them.

    Args:
        model: A PEFT model with a projection head, or a folder or Hub id of an adapter (`hfproj.from_pretrained`).
        train: Items that the probes learn from.
        test: Held-out items.
        views: The views that the head was trained on: adds what each layer still knows of each transform
            (`invariance_report`, fitted on images of `train`).
        probes: By which layers are compared, names, mappings or objects that score an accuracy row by row.
        layers: Layers of the backbone instead of that one block, as in `extract_features`.
        images: Of `train` and of `test`, evenly spaced, for the transforms.
        level: Of the intervals.
        draws: Of the bootstrap.
        seed: Of the halves and of the bootstrap.
        dataset: Name of the data, for the record.
        collator: Makes batches of items, as in `extract_features`.
        batch_size: As in `extract_features`, as are those that follow.
        device: Where inputs go.
        num_workers: Processes that load data.
        cache_dir: Folder of caches.
        progress: Show bars.

    Raises:
        UsageError: If the model has no active head, there are no labels, a probe gives no outcomes row by row, two have
            one name, or as `extract_features`.
    """
    model, chosen = subject.opened(model), make_probes(probes)
    reading = {"batch_size": batch_size, "device": device, "num_workers": num_workers, "cache_dir": cache_dir}
    reading["progress"] = progress
    interval = {"level": level, "draws": draws, "seed": seed}
    before: list[Any] = subject.block_before(model) if layers is None else list(layers)
    wanted = [*before, *subject.head_layers(model)]
    bank, held = (subject.extracted(model, part, wanted, reading, collator) for part in (train, test))
    warn_of_shared_rows(bank.h, held.h, stacklevel=3)
    scores, cuts = _judged(bank, held, chosen, interval)
    found = [_measured(name, f, scores.get(name, {})) for name, f in subject.representations(held).items()]
    protocol = {
        "dataset": dataset, "train_rows": len(bank), "test_rows": len(held), **interval,
        "probes": scores.pop("", {}),
    }  # fmt: skip
    invariance = None
    if views is not None:
        invariance = moves.report(model, (train, test), views, subject.head_layers(model), images, reading, interval)
    return Autopsy(found, cuts, invariance, protocol)


def _measured(name: str, f: Tensor, scores: dict[str, Score]) -> LayerFound:
    spectrum = [float(f"{value:.{_DIGITS}g}") for value in d.covariance_spectrum(f).tolist()]
    condition = d.covariance_condition_number(f, normalize=False).on_support
    return LayerFound(name, f.shape[1], d.rankme(f), d.numerical_rank(f), condition, spectrum, scores)


def _judged(
    bank: Features, held: Features, probes: list[Probe], interval: dict[str, Any]
) -> tuple[dict[str, Any], list[Cut]]:
    """Return layer → probe → score, under "" probe → its protocol, and a cut for each probe."""
    labels, truth = (_labels(features, name) for features, name in ((bank, "train"), (held, "test")))
    rows, tests = labels != UNLABELLED, truth != UNLABELLED
    known, asked = subject.representations(bank), subject.representations(held)
    layers = [name for name in asked if name in known]
    scores: dict[str, Any] = {name: {} for name in layers}
    scores[""] = {}
    cuts = []
    for probe in probes:
        name_of = _name_of(probe)
        if name_of in scores[""]:
            raise UsageError(f"Expected probes with names of their own, got {name_of!r} twice; give one of them.")
        correct: dict[str, Tensor] = {}
        for name in layers:
            fitted = copy.deepcopy(probe).fit(known[name][rows], labels[rows])
            accuracy = fitted.score(asked[name][tests], truth[tests])
            outcomes = getattr(fitted, "correct_", None)
            if not isinstance(outcomes, Tensor) or len(outcomes) != int(tests.sum()):
                hint = "take 'linear', 'knn' or another with `correct_`"
                raise UsageError(f"Expected probes that say row by row what is right, got {probe.name!r}; {hint}.")
            correct[name] = outcomes.double()
            scores[name][name_of] = accuracy
        scores[""][name_of] = fitted.results_["protocol"]
        for name in layers:
            accuracy = scores[name][name_of]
            scores[name][name_of] = Score(accuracy, paired_interval(correct[name], correct["h"], **interval))
        cuts.append(cut_by(name_of, correct, interval))
    return scores, cuts


def _name_of(probe: Probe) -> str:
    """Return what a probe is called in the tables: "knn", which is read as 20-NN, of another k by that k."""
    k = getattr(probe, "k", 20)
    k = k[0] if isinstance(k, tuple) else k
    return f"{k}-NN" if probe.name == "knn" and k != 20 else probe.name


def cut_by(probe: str, correct: Mapping[str, Tensor], interval: Mapping[str, Any]) -> Cut:
    """Return the layer that a random half of the rows chooses, with its difference to h on the other half.

    Example:
        >>> right = {"h": torch.zeros(100), "head.0": torch.ones(100)}
        >>> cut_by("linear", right, {"level": 0.95, "draws": 100, "seed": 0}).keep
        'head.0'
    """
    rows = len(correct["h"])
    if rows < 4:
        raise NotMeasurableError(f"Expected at least 4 labelled test rows, two halves of two, got {rows}.")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(interval["seed"]))
    first, second = order[: rows // 2], order[rows // 2 :]
    right = {name: float(values[first].sum()) for name, values in correct.items()}
    # Of equal ones h, for which nothing has to be changed, then the earliest.
    best = max(right, key=lambda name: (right[name], name == "h"))
    lead = (right[best] - right["h"]) / len(first)
    if best == "h":
        return Cut(probe, best, 0.0, Interval(0.0, 0.0, 0.0), (len(first), len(second)))
    confirmed = paired_interval(correct[best][second], correct["h"][second], **interval)
    return Cut(probe, best, lead, confirmed, (len(first), len(second)))


def _labels(features: Features, name: str) -> Tensor:
    if features.labels is None:
        hint = "name their column: collator=hfproj.EvalImages.for_model(model, label_column=…)"
        raise UsageError(f"Expected labels in `{name}`, by which layers are compared; {hint}.")
    return as_labels(features.labels, len(features))
