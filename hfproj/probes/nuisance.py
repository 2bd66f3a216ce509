"""Guillotine gap: how much of a nuisance (rotation, say) h still holds that the head removed from z.

    gap of the layers = acc(h) − acc(z),   gap of the probes = acc(MLP) − acc(linear)

A gap of the layers above 0 says that the head discards the nuisance; a gap of the probes above 0, that it is there but
not linearly.

References:
    Bordes et al. 2022, Guillotine Regularization, arXiv 2206.13378; Gidaris, Singh, Komodakis 2018, arXiv 1803.07728
    (four rotations); Chaudhry 2026, arXiv 2605.17180 (both probes on both layers).

Deviations:
    Test rows with the same index, the four rotations of one image, are drawn together in the bootstrap: they are hard
    or easy together. Both layers get the same MLP by default; `MLPProbe.rotation` has the paper's two.
"""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hfproj.checking import checked
from hfproj.data.indexing import as_item
from hfproj.data.pixels import to_image_tensor
from hfproj.errors import UsageError, unknown
from hfproj.functional.labels import check_classes, labelled_rows
from hfproj.probes.base import Labels, as_labels
from hfproj.probes.registry import ProbeLike, make_probe
from hfproj.results.verdict import Interval, paired_interval
from hfproj.typing import Data

LAYERS = ("h", "z")


@runtime_checkable
class Layers(Protocol):
    """What `extract_features` returns, as far as it is read here."""

    h: Tensor
    z: Tensor
    labels: Tensor | None


class ProbeGap(NamedTuple):
    """Accuracies of a nuisance, and their gaps with paired bootstrap intervals.

    Attributes:
        accuracy: By probe and layer: "linear h", "linear z", "mlp h", "mlp z".
        gaps: "linear h − z", "mlp h − z", "h mlp − linear", "z mlp − linear".
        protocol: Of each accuracy, by the same names, and of the intervals, as "interval".
    """

    accuracy: dict[str, float]
    gaps: dict[str, Interval]
    protocol: dict[str, dict[str, Any]]


@checked
def probe_gap(
    train: Layers, test: Layers, *, train_labels: Labels | None = None, test_labels: Labels | None = None,
    probes: Mapping[str, ProbeLike | Mapping[str, ProbeLike]] | None = None, level: float = 0.95, draws: int = 10_000,
    seed: int = 0,
) -> ProbeGap:  # fmt: skip
    """Return the accuracies of a linear and an MLP probe for a nuisance on h and z, and what differs between them.

    Args:
        train: Features of the training rows, as `extract_features` returns them, for example of `RotatedImages`.
        test: Those of the test rows; where `index` repeats equally often, its rows are drawn together.
        train_labels: The nuisance of each training row; default: the labels of `train`.
        test_labels: The same for `test`.
        probes: "linear" and "mlp" → a probe (as `evaluate` takes it), or a dict of a probe for "h" and "z" each.
            Default: `LinearProbe()` and `MLPProbe()`.
        level: Confidence level of the intervals.
        draws: Draws of the bootstrap.
        seed: Seed of the bootstrap.

    Raises:
        UsageError: If there are no labels, if `probes` has other names, or as the probes and `paired_interval`.
        NotMeasurableError: If no row has a label, the training rows' are of one class, or the test rows' are all of
            others.

    Example (the head keeps the first of two coordinates, and the nuisance is in the second):
        >>> from types import SimpleNamespace
        >>> h = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).repeat(16, 1)
        >>> rows = SimpleNamespace(h=h, z=h[:, :1], labels=(h[:, 1] > 0).long())
        >>> found = probe_gap(rows, rows)
        >>> found.accuracy["linear h"], found.gaps["linear h − z"].low > 0.2
        (1.0, True)
    """
    given: dict[str, Any] = {"linear": "linear", "mlp": "mlp", **(probes or {})}
    if other := [name for name in given if name not in ("linear", "mlp")]:
        raise unknown("probe of the gap", other[0], ["linear", "mlp"])
    y = train.labels if train_labels is None else train_labels
    truth = test.labels if test_labels is None else test_labels
    if y is None or truth is None:
        raise UsageError("The features hold no labels of the nuisance: pass train_labels and test_labels.")
    check_classes(as_labels(y, len(train.h)), "training", as_labels(truth, len(test.h)))
    accuracy, correct, protocol = {}, {}, {}
    for kind, one in given.items():
        by_layer = one if isinstance(one, Mapping) and "name" not in one else dict.fromkeys(LAYERS, one)
        for layer in LAYERS:
            if layer not in by_layer:
                raise UsageError(f"Expected probes for 'h' and 'z' in probes[{kind!r}], got one for {list(by_layer)}.")
            probe = copy.deepcopy(make_probe(by_layer[layer]))
            probe.fit(getattr(train, layer), y)
            name = f"{kind} {layer}"
            accuracy[name] = probe.score(getattr(test, layer), truth)
            correct[name], protocol[name] = probe.correct_, probe.results_["protocol"]
    index, known = getattr(test, "index", None), labelled_rows(as_labels(truth, len(test.h)), "test")
    groups = _rows_together(index if index is None else index.cpu()[known], int(known.sum()))
    drawn = {name: values[groups].double().mean(1) for name, values in correct.items()}

    def gap(after: str, before: str) -> Interval:
        return paired_interval(drawn[after], drawn[before], level=level, draws=draws, seed=seed)

    gaps = {f"{kind} h − z": gap(f"{kind} h", f"{kind} z") for kind in given}
    gaps |= {f"{layer} mlp − linear": gap(f"mlp {layer}", f"linear {layer}") for layer in LAYERS}
    protocol["interval"] = {"level": level, "draws": draws, "seed": seed, "rows_drawn_together": groups.shape[1]}
    return ProbeGap(accuracy, gaps, protocol)


def _rows_together(index: Tensor | None, rows: int) -> Tensor:
    """Return rows `[groups, size]` of equal index, or each row alone where indices do not repeat equally often."""
    if index is None:
        return torch.arange(rows)[:, None]
    _, codes, sizes = torch.unique(index.cpu(), return_inverse=True, return_counts=True)
    if (sizes != sizes[0]).any():
        return torch.arange(rows)[:, None]
    return codes.argsort(stable=True).view(len(sizes), -1)


class RotatedImages(Dataset):
    """Each image four times, turned by 0°, 90°, 180° and 270° counterclockwise, which is its label: 0, 1, 2, 3.

    Pixels are moved, not interpolated. Item 4i + r is image i with label r; its "index" is i, and other entries of the
    item stay as they are. `EvalImages` reads it, and `extract_features` takes it as a data set.

    Args:
        dataset: Anything with a length and integer indices: a ``datasets.Dataset``, a torchvision data set, a list.
        image_column: Entry of an item that holds the image; it becomes a tensor ``[channels, height, width]``.
        label_column: Entry that becomes the label.
        channels: How many the backbone takes.

    Raises:
        UsageError: If the data set has no length or no indices; on access, if an item has no image.

    Example:
        >>> turned = RotatedImages([{"image": torch.tensor([[0, 1], [2, 3]]), "label": 7}])
        >>> len(turned), turned[1]["image"][0].tolist(), turned[1]["label"], turned[1]["index"]
        (4, [[1, 3], [0, 2]], 1, 0)
    """

    @checked
    def __init__(
        self, dataset: Data, *, image_column: str = "image", label_column: str = "label", channels: int = 3
    ):  # fmt: skip
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise UsageError(f"Expected a data set with a length and indices, got a {type(dataset).__name__}.")
        self.dataset, self.image_column, self.label_column = dataset, image_column, label_column
        self.channels = channels

    def __len__(self) -> int:
        return 4 * len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for a data set of {len(self)} items")
        row, turns = divmod(int(index) % len(self), 4)
        item = as_item(self.dataset[row])
        if self.image_column not in item:
            have = ", ".join(map(repr, item))
            raise UsageError(f"The items have no column {self.image_column!r}, got {have}; pass image_column=….")
        image = to_image_tensor(item[self.image_column], self.channels, self.image_column)
        image = torch.rot90(image, turns, (1, 2))
        return {**item, self.image_column: image.contiguous(), self.label_column: turns, "index": row}
