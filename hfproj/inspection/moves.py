"""What each transform of the views does to h and z: how far they move, what a probe still reads, how the metric bends.

With f and f' a layer at two strengths of one transform of the same image (`hfproj.data.transforms`):

    distance = mean ‖f − f'‖ / mean over different images ‖f_i − f_j‖,      known = accuracy of telling f from f',
    degeneracy = median of (vᵀGv/‖v‖²) / (tr G/dim),   v = h' − h, G = JᵀJ the metric of the head at h

A head that is invariant to a transform has distance 0, chance accuracy 0.5 and degeneracy 0 where h still moves.
The probe is the linear one, fitted on both strengths of some images and asked about both strengths of others.

References:
    Bordes et al. 2022, arXiv 2206.13378 (what is discarded between h and z). Chaudhry 2026, arXiv 2605.17180, Prop. 5.2
    (degeneracy of the metric along augmentations).

Deviations:
    v is the difference between the two strengths, not the limit of small ones: flips and grey have no small ones.
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfproj.checking import checked
from hfproj.data.images import ImageViews
from hfproj.data.transforms import TransformedImages, transforms_of
from hfproj.errors import NotMeasurableError, UsageError
from hfproj.functional.rows import unit_rows
from hfproj.geometry import metric_degeneracy
from hfproj.inspection import subject
from hfproj.probes.linear import LinearProbe
from hfproj.results import paired_interval
from hfproj.results.inside import Invariance, Moved
from hfproj.tuner.active import active_modules
from hfproj.typing import Data

_BENT = 64  # images at which the metric of the head is looked at
_FEWEST = 8  # images on either side of a probe
_ROUNDING = 1e-3  # of the distance of two images: what moves less (a hue of grey images) is not read, but called still
_PATH = (1.0, 0.1, 0.01, 0.001)  # strengths of the probe; two classes that part need no smaller one


@checked
def invariance_report(
    model: nn.Module | str | Path, test: Data, views: ImageViews, *, train: Data | None = None,
    layers: bool = False, images: int = 500, level: float = 0.95, draws: int = 10_000, seed: int = 0,
    batch_size: int = 256, device: torch.device | str | None = None, num_workers: int = 0,
    cache_dir: str | os.PathLike | None = None, progress: bool = False,
) -> Invariance:  # fmt: skip
    """Return, for each transform of the views, how far it moves h and z and what a probe still reads of it.

    Args:
        model: A PEFT model with a projection head, or a folder or Hub id of an adapter.
        test: Held-out images; no label is used.
        views: The views that the head was trained on, whose transforms are looked at one by one.
        train: Images that the probes learn from. None: a random half of those of `test`; the other half is asked.
        layers: Whether the head's layers between h and z are looked at too.
        images: How many of `train` and of `test`, evenly spaced.
        level: Of the intervals, over images.
        draws: Of the bootstrap.
        seed: Of the bootstrap, and of the halves.
        batch_size: As in `extract_features`, as are those that follow.
        device: Where inputs go.
        num_workers: Processes that load data.
        cache_dir: Folder of caches.
        progress: Show bars.

    Raises:
        UsageError: If the model has no active head, all transforms are off, there are too few images, or as
            `extract_features`.
    """
    model = subject.opened(model)
    reading = {"batch_size": batch_size, "device": device, "num_workers": num_workers, "cache_dir": cache_dir}
    interval = {"level": level, "draws": draws, "seed": seed}
    wanted = subject.head_layers(model) if layers else []
    return report(model, (train, test), views, wanted, images, {**reading, "progress": progress}, interval)


def report(
    model: Any, data: tuple[Any, Any], views: ImageViews, layers: list[str], images: int, reading: Mapping[str, Any],
    interval: Mapping[str, Any],
) -> Invariance:  # fmt: skip
    """Return the report of a model with an active head; `data` are train, or None, and test."""
    known = transforms_of(views)
    if not known:
        raise UsageError("Expected views with a transform, got ones with all parts off; pass those of the training.")
    parts = [subject.Some(part, images, what=name) for part, name in zip(data, ("train", "test")) if part is not None]
    needed = _FEWEST * (3 - len(parts))
    if min(map(len, parts)) < needed:
        got = " and ".join(str(len(part)) for part in parts)
        raise NotMeasurableError(f"Expected at least {needed} images for the transforms, got {got}.")
    found = []
    for name, transform in known.items():
        sides = [
            [_features(model, part, TransformedImages(views, name, end), layers, reading) for end in (0, 1)]
            for part in parts
        ]
        if len(sides) == 1:
            sides = _halves(sides[0], interval["seed"])
        found.append(_moved(model, name, transform.ends, sides, interval))
    asked = len(parts[-1]) if len(parts) == 2 else len(parts[0]) // 2
    learnt = len(parts[0]) - (asked if len(parts) == 1 else 0)
    probe = {"probe": "linear", "l2_path": list(_PATH), "fitted_on_images": learnt, "asked_of_images": asked}
    return Invariance(found, {**probe, "metric_at_images": min(_BENT, asked), **interval})


Sides = list[dict[str, Tensor]]  # of the first and of the second strength: layer → features


def _features(model: Any, part: Any, collator: Any, layers: list[str], reading: Mapping[str, Any]) -> dict[str, Tensor]:
    return subject.representations(subject.extracted(model, part, layers, reading, collator))


def _halves(sides: Sides, seed: int) -> list[Sides]:
    rows = len(sides[0]["h"])
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    halves = order[rows // 2 :], order[: rows // 2]
    return [[{name: f[own] for name, f in side.items()} for side in sides] for own in halves]


def _moved(model: Any, name: str, ends: tuple[str, str], sides: list[Sides], interval: Mapping[str, Any]) -> Moved:
    learnt, asked = sides
    distance, cosine, known, right = {}, {}, {}, {}
    layers = [layer for layer in asked[0] if all(layer in side for part in sides for side in part)]
    for layer in layers:
        a, b = (side[layer].double() for side in asked)
        distance[layer] = float((a - b).norm(dim=1).mean() / apart(a))
        cosine[layer] = float((unit_rows(a) * unit_rows(b)).sum(1).mean())
        right[layer] = torch.full((len(a),), 0.5, dtype=torch.float64)
        if distance[layer] > _ROUNDING:
            right[layer] = _told_apart([side[layer] for side in learnt], [side[layer] for side in asked])
        known[layer] = subject.of_mean(right[layer], interval)
    lost = paired_interval(right["h"], right["z"], **interval)
    bent = None
    if distance["h"] > _ROUNDING:
        bent = _degeneracy(model, *(side["h"][:_BENT] for side in asked))
    return Moved(name, ends, distance, cosine, known, lost, bent)


def apart(f: Tensor) -> float:
    """Return the mean distance of two different rows, of the first thousand.

    Example:
        >>> apart(torch.tensor([[0.0], [1.0], [3.0]]))  # 1, 2 and 3
        2.0
    """
    found = torch.pdist(f[:1000].double()).mean()
    return float(found) if found > 0 else float("inf")


def _told_apart(learnt: list[Tensor], asked: list[Tensor]) -> Tensor:
    """Return for each image which fraction of its two strengths a linear probe tells."""
    labels, truth = (torch.arange(2).repeat_interleave(len(part[0])) for part in (learnt, asked))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The linear probe did not reach its optimum")  # two classes that part
        probe = LinearProbe(l2_path=_PATH).fit(torch.cat(learnt), labels)
    probe.score(torch.cat(asked), truth)
    return probe.correct_.double().view(2, -1).mean(0)


def _degeneracy(model: Any, h: Tensor, moved: Tensor) -> float | None:
    """Return the median degeneracy of the head's metric along the moves of h; None where no h moves."""
    rows = (h != moved).any(1)
    if not rows.any():
        return None
    head = active_modules(model).head
    at, modes = next((p.device for p in head.parameters()), h.device), [(m, m.training) for m in head.modules()]
    try:
        head.eval()
        found = metric_degeneracy(head, h[rows].to(at), (moved - h)[rows].to(at))
    except UsageError:  # a head without derivatives of its own, such as one that rounds
        return None
    finally:
        for module, mode in modes:
            module.training = mode
    found = found[found.isfinite()]
    return float(found.median()) if len(found) else None
