"""What is looked at: a model with an active head, the names of its layers, and features of some of the items."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hfproj.backbones import blocks_of
from hfproj.data.indexing import what_to_pass
from hfproj.errors import UsageError
from hfproj.features.extraction import Features, extract_features
from hfproj.heads.layers import layer_name, layer_widths
from hfproj.hub import from_pretrained
from hfproj.results import Interval, paired_interval
from hfproj.tuner.active import active_config, active_modules


def opened(model: Any) -> Any:
    """Return a model with an active head: itself, or the adapter of a folder or of the Hub.

    Raises:
        UsageError: If it has no active head.
    """
    model = from_pretrained(model) if isinstance(model, str | Path) else model
    if not hasattr(model, "get_base_model") or active_head(model) is None:
        wanted = "Expected a model with an active projection head, or a folder with an adapter"
        hint = "attach one (hfproj.ProjectionHeadConfig), or switch its adapter on"
        raise UsageError(f"{wanted}, got a {type(model).__name__} without one; {hint}.")
    return model


def active_head(model: Any) -> nn.Module | None:
    """Return the head of the active adapter, or None."""
    try:
        return active_modules(model).head
    except (AttributeError, KeyError, TypeError):
        return None


def head_layers(model: Any) -> list[str]:
    """Return the names of the layers of the active head: of one without a linear map none."""
    return [layer_name(i) for i in range(len(layer_widths(active_modules(model).head)))]


def block_before(model: Any) -> list[str]:
    """Return the name of the block before the one that h is read from, in a list; an empty one where there is none."""
    try:
        blocks = blocks_of(model.get_base_model())
    except UsageError:
        return []
    layer = active_config(model).layer
    last = (layer if isinstance(layer, int) else -1) % len(blocks) if blocks else 0
    return blocks[last - 1 : last] if last > 0 else []


def representations(features: Features) -> dict[str, Tensor]:
    """Return layers by name, in the order of the forward pass; a last layer of the head that is z itself is z alone."""
    found = features.by_name()
    inside = [name for name in found if name in features.layers and name.startswith(layer_name(0)[:-1])]
    if inside and features.z is not None and torch.equal(found[inside[-1]], features.z):
        del found[inside[-1]]
    return found


class Some(Dataset):
    """Evenly spaced items of a data set.

    Example:
        >>> Some(list("abcdef"), 3)[1], len(Some([0, 1], 5))
        ('c', 2)
    """

    def __init__(self, dataset: Any, count: int, *, what: str = "test"):
        try:
            rows = len(dataset)
        except TypeError:
            hint = what_to_pass(dataset, what) or "take items into a list first"
            raise UsageError(f"Expected `{what}` with a length, got a {type(dataset).__name__}; {hint}.") from None
        self.dataset = dataset
        self.rows = [i * rows // min(count, rows) for i in range(min(count, rows))] if rows else []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.rows[index]]


def extracted(
    model: Any, dataset: Any, layers: Sequence[int | str], options: Mapping[str, Any],
    collator: Callable[[list], Mapping[str, Any]] | None = None,
) -> Features:  # fmt: skip
    """Return features of a data set with the layers asked for."""
    return extract_features(model, dataset, layers=layers, collator=collator, **options)


def of_mean(values: Tensor, options: Mapping[str, Any]) -> Interval:
    """Return the mean of numbers of rows with its bootstrap interval."""
    return paired_interval(values.double(), np.zeros(len(values)), **options)
