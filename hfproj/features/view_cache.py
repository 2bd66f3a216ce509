"""Representations of augmented views, computed once: with a frozen backbone, heads train on them.

Each image has a fixed number of cached views; a training step sees some of them, chosen by (seed, epoch, index) alone.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hfproj import distributed
from hfproj.data.indexing import IndexedDataset
from hfproj.data.philox import uniforms
from hfproj.errors import UsageError
from hfproj.functional.modes import evaluating


class CachedFeatures(Dataset):
    """Representations of some views of every image, with labels if there are any.

    Args:
        features: One row per image and view.
        labels: Class of each image.

    Raises:
        UsageError: another number of labels than images.

    Example:
        >>> cached = CachedFeatures(torch.zeros(10, 4, 8), torch.arange(10))
        >>> len(cached), cached[3]["features"].shape, cached[3]["label"]
        (10, torch.Size([4, 8]), 3)
    """

    def __init__(self, features: Float[Tensor, "images views dim"], labels: Int[Tensor, " images"] | None = None):
        if labels is not None and len(labels) != len(features):
            raise UsageError(f"{len(labels)} labels came for the features of {len(features)} images.")
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {"features": self.features[index]}
        return item if self.labels is None else {**item, "label": int(self.labels[index])}


def cache_features(
    model: nn.Module,
    dataset: Any,
    views: Any,
    *,
    passes: int = 1,
    batch_size: int = 256,
    num_workers: int = 0,
) -> CachedFeatures:
    """Compute the representations h of a data set's views, in eval mode, and return them on the CPU.

    On several processes each computes a share, and all receive all rows in the order of the data set.

    Args:
        model: A model with an active head, whose backbone is frozen.
        dataset: With a length and integer indices.
        views: A collator with several views (`hfproj.ImageViews`), or one without randomness (`hfproj.EvalImages`).
        passes: How often to go over the data: each pass adds the collator's views of another epoch.
        batch_size: Images a forward pass, on each process.
        num_workers: Processes that load data.

    Raises:
        UsageError: an empty data set.
    """
    rows = len(dataset)
    if rows == 0:
        raise UsageError("The data set is empty: there is nothing to cache.")
    start, stop = (rows * (distributed.rank() + i) // distributed.world_size() for i in (0, 1))
    indexed = dataset if isinstance(dataset, IndexedDataset) else IndexedDataset(dataset)
    device = next(model.parameters()).device
    parts, labels = [], []
    with evaluating(model), torch.no_grad():
        for epoch in range(passes):
            order = [(epoch, index) for index in range(start, stop)]
            loader = DataLoader(
                indexed,
                batch_size,
                sampler=order,
                collate_fn=views,
                num_workers=num_workers,
                generator=torch.Generator(),  # a loader without its own generator advances the global one
            )
            batches = []
            for batch in loader:
                inputs = batch["views"] if "views" in batch else [batch["pixel_values"]]
                h = [model(view.to(device)).representation.float().cpu() for view in inputs]
                batches.append(torch.stack(h, dim=1))
                if epoch == 0 and batch.get("labels") is not None:
                    labels.append(batch["labels"])
            parts.append(torch.cat(batches))
    features = distributed.gather_rows(torch.cat(parts, dim=1).to(device)).cpu()
    if not labels:
        return CachedFeatures(features)
    return CachedFeatures(features, distributed.gather_rows(torch.cat(labels).to(device)).cpu())


class FeatureViews:
    """Collator of cached features: `num_views` different ones of each image, chosen by (seed, epoch, index) alone.

    Args:
        num_views: Views of each image in a batch.
        seed: Of the choice.

    Raises:
        UsageError: fewer than one view; on call, fewer cached views than that, or items without an index.

    Example:
        >>> batch = FeatureViews()([{"features": torch.zeros(4, 8), "index": 0, "epoch": 0, "label": 1}])
        >>> [view.shape for view in batch["views"]], batch["labels"].tolist()
        ([torch.Size([1, 8]), torch.Size([1, 8])], [1])
    """

    def __init__(self, num_views: int = 2, *, seed: int = 0):
        if num_views < 1:
            raise UsageError(f"num_views is at least 1; {num_views} came.")
        self.num_views, self.seed = num_views, seed

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return ``{"views", "index", "labels"?}`` of items of an `hfproj.IndexedDataset` of `CachedFeatures`."""
        if not all("index" in item for item in items):
            raise UsageError(
                "The items have no 'index', which decides their views: wrap them in hfproj.IndexedDataset."
            )
        features = torch.stack([item["features"] for item in items])
        cached = features.shape[1]
        if cached < self.num_views:
            raise UsageError(
                f"{cached} views of each image are cached and {self.num_views} are wanted; cache more passes."
            )
        index = np.array([operator.index(item["index"]) for item in items])
        epoch = np.array([operator.index(item.get("epoch", 0)) for item in items])
        order = torch.from_numpy(uniforms(cached, seed=self.seed, epoch=epoch, index=index, view=0).argsort(axis=1))
        rows = torch.arange(len(items))
        batch = {
            "views": [features[rows, order[:, view]] for view in range(self.num_views)],
            "index": torch.from_numpy(index).long(),
        }
        if all("label" in item for item in items):
            batch["labels"] = torch.tensor([int(item["label"]) for item in items])
        return batch


class EvalFeatures:
    """Collator of cached features for evaluation: the first cached view of each image.

    Example:
        >>> EvalFeatures()([{"features": torch.ones(1, 8), "label": 1}])["pixel_values"].shape
        torch.Size([1, 8])
    """

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return ``{"pixel_values", "labels"?}``; the name is that of any backbone's first input."""
        batch = {"pixel_values": torch.stack([item["features"][0] for item in items])}
        if all("label" in item for item in items):
            batch["labels"] = torch.tensor([int(item["label"]) for item in items])
        return batch
