"""Augmented views of images: a few that a model in training is watched on, and h of all, computed once.

With a frozen backbone, heads train on cached representations: each image has a fixed number of cached views, and a
training step sees some of them, chosen by (seed, epoch, index) alone.
"""

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from hfproj.checking import checked
from hfproj.data.indexing import IndexedDataset, index_and_labels
from hfproj.data.philox import uniforms
from hfproj.distributed import gather_rows, rank, world_size
from hfproj.errors import NotMeasurableError, UsageError
from hfproj.features.extraction import Source, check_source, collect
from hfproj.features.reader import Reader, run_head, view_batches
from hfproj.functional.modes import evaluating
from hfproj.heads.layers import LayerTrace, layer_name
from hfproj.typing import Data

H = Float[Tensor, "views images dim"]
Z = Float[Tensor, "views images out_dim"]


class FixedViews:
    """Views of `images` evenly spaced items of a data set, those of epoch 0; each process makes some of them.

    They are made once and kept on the CPU: two views of 256 images of 224 pixels take 308 MB.

    Args:
        dataset: With a length and integer indices.
        collator: Gives ``{"views": [tensor or mapping, …]}`` for items of ``IndexedDataset(dataset)``, as
            `hfproj.ImageViews` does.
        images: How many of the items, if there are so many.
        batch_size: Images per forward pass, on each process.

    Raises:
        UsageError: If the data set has no length, or fewer items than there are processes, or if the collator gives no
            views.
    """

    @checked
    def __init__(self, dataset: Data, collator: Callable[[list], Mapping], *, images: int = 256, batch_size: int = 256):
        dataset = dataset if isinstance(dataset, IndexedDataset) else IndexedDataset(dataset)
        rows, count = len(dataset), min(images, len(dataset))
        if count < max(2, world_size()):
            raise NotMeasurableError(
                f"Expected at least 2 images and 1 per process, got {count} for {world_size()} processes."
            )
        self.images = count
        own = range(count * rank() // world_size(), count * (rank() + 1) // world_size())
        loader = DataLoader(
            Subset(dataset, [i * rows // count for i in own]),  # spread over the set, which may be sorted by class
            batch_size=batch_size, collate_fn=collator,
            generator=torch.Generator(),  # a loader without its own generator advances the global one
        )  # fmt: skip
        self.batches = list(loader)
        if not isinstance(self.batches[0], Mapping) or not self.batches[0].get("views"):
            raise UsageError("The collator gave no 'views'; use hfproj.ImageViews.for_model(model).")

    def own_features(self, model: nn.Module, device: torch.device | str | None = None) -> tuple[H, Z]:
        """Return h and z of this process's images ``[views, own images, dim]``, on the device, in float32 or better."""
        found = self._own(model, device)
        return found["h"], found["z"]

    def features(self, model: nn.Module, device: torch.device | str | None = None) -> tuple[H, Z]:
        """Return h and z of all images ``[views, images, dim]``, on the CPU, with the model in eval mode."""
        found = self.layers(model, device)
        return found["h"], found["z"]

    def layers(
        self, model: nn.Module, device: torch.device | str | None = None, *, head: nn.Module | None = None
    ) -> dict[str, H]:
        """Return h, "head.0", … of `head`, the model's active one (None: without), and z, as `features` does."""
        with torch.no_grad():
            by_image = {name: f.transpose(0, 1).contiguous() for name, f in self._own(model, device, head).items()}
            return {name: gather_rows(f).transpose(0, 1).cpu() for name, f in by_image.items()}

    def _own(
        self, model: nn.Module, device: torch.device | str | None, head: nn.Module | None = None
    ) -> dict[str, Tensor]:
        device = torch.device(device) if device is not None else next(model.parameters()).device
        rows: dict[str, list[Tensor]] = {}
        with evaluating(model), torch.no_grad(), nullcontext() if head is None else LayerTrace(head) as trace:
            for batch in self.batches:
                views: dict[str, list[Tensor]] = {}
                for view in view_batches(batch):
                    out = run_head(model, view, device)
                    inside = [] if trace is None else [f.flatten(0, -2) for f in trace.outputs]
                    named = {"h": out.representation, **{layer_name(i): f for i, f in enumerate(inside)}}
                    for name, f in {**named, "z": out.projection}.items():
                        views.setdefault(name, []).append(_precise(f))
                for name, of_views in views.items():
                    rows.setdefault(name, []).append(torch.stack(of_views))
        return {name: torch.cat(parts, 1) for name, parts in rows.items()}

    def bare(self, model: Any, device: torch.device | str | None = None) -> H:
        """Return h of all images as the backbone gives it without its adapter ``[views, images, dim]``, on the CPU."""
        with model.disable_adapter():
            return self.read(model, device)["h"]

    def read(
        self, model: Any, device: torch.device | str | None = None, *, layers: Sequence[int | str] | str = ()
    ) -> dict[str, H]:
        """Return `layers` by their names as `extract_features` reads them, h and z if any, as `features` does.

        The model is not wrapped (by DDP, for example).
        """
        device = torch.device(device) if device is not None else next(model.parameters()).device
        rows: dict[str, list[Tensor]] = {}
        with Reader(model, device, layers=layers) as read:
            for batch in self.batches:
                views = [read(view) for view in view_batches(batch)]
                for name in {"h", "z"} & views[0].keys():
                    rows.setdefault(name, []).append(torch.stack([view[name] for view in views], 1))
                for name in read.layers:
                    rows.setdefault(name, []).append(torch.stack([view[f"layers.{name}"] for view in views], 1))
        return {name: gather_rows(torch.cat(own).to(device)).transpose(0, 1).cpu() for name, own in rows.items()}

    def own(self, name: str) -> Tensor | None:
        """Return what the collator gave of this process's images beside views: "index", or "labels" if there are."""
        parts = [batch.get(name) for batch in self.batches]
        return None if any(part is None for part in parts) else torch.cat([torch.as_tensor(part) for part in parts])


def _precise(f: Tensor) -> Tensor:
    return f.to(torch.promote_types(f.dtype, torch.float32))


class CachedFeatures(Dataset):
    """Representations of some views of every image, with labels if there are any.

    Args:
        features: One row per image and view.
        labels: Class of each image (−1: none), or a score.

    Raises:
        UsageError: If there are not as many labels as images.

    Example:
        >>> cached = CachedFeatures(torch.zeros(10, 4, 8), torch.arange(10))
        >>> len(cached), cached[3]["features"].shape, cached[3]["label"]
        (10, torch.Size([4, 8]), 3)
    """

    @checked
    def __init__(
        self,
        features: Float[Tensor, "images views dim"],
        labels: Int[Tensor, " images"] | Float[Tensor, " images"] | None = None,
    ):
        if labels is not None and len(labels) != len(features):
            raise UsageError(f"Expected a label for each of {len(features)} images, got {len(labels)} labels.")
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {"features": self.features[index]}
        return item if self.labels is None else {**item, "label": self.labels[index].item()}


@checked
def cache_features(
    model: nn.Module, dataset: Data, views: Callable[[list], Mapping[str, Any]], *, passes: int = 1,
    batch_size: int = 256, num_workers: int = 0, cache_dir: str | os.PathLike | None = None,
    data_key: str | None = None, preprocessing_key: str | None = None,
) -> CachedFeatures:  # fmt: skip
    """Compute the representations h of a data set's views, in eval mode, and return them on the CPU.

    On several processes each computes some of the rows, and all receive all rows in the order of the data set.

    Args:
        model: A model with an active head, whose backbone is frozen.
        dataset: With a length and integer indices.
        views: A collator with several views (`hfproj.ImageViews`), or one without randomness (`hfproj.EvalImages`).
        passes: How often to go over the data: each pass adds the collator's views of another epoch.
        batch_size: Images per forward pass, on each process.
        num_workers: Processes that load data.
        cache_dir: Keep the views there and map them, as `hfproj.extract_features` does.
        data_key: As in `hfproj.extract_features`.
        preprocessing_key: As in `hfproj.extract_features`.

    Raises:
        UsageError: If the data set is empty, or as `hfproj.extract_features`.
    """
    indexed = dataset if isinstance(dataset, IndexedDataset) else IndexedDataset(dataset)
    if not len(indexed):
        raise UsageError("The data set is empty: there is nothing to cache.")
    check_source(indexed, num_workers)
    if min(passes, batch_size) < 1:
        raise UsageError(f"Expected passes and batch_size of at least 1, got {passes} and {batch_size}.")
    device = next(model.parameters()).device
    source = Source(Reader(model, device), indexed, views, batch_size, num_workers, passes=passes)
    found = collect(source, cache_dir, data_key, preprocessing_key)
    return CachedFeatures(found["h"], found.get("labels"))


class FeatureViews:
    """Collator of cached features: `num_views` different ones of each image, chosen by (seed, epoch, index) alone.

    Args:
        num_views: Views of each image in a batch.
        seed: Seed of the choice.

    Raises:
        UsageError: If `num_views` is below 1; on call, if fewer views are cached, or if items have no index.

    Example:
        >>> batch = FeatureViews()([{"features": torch.zeros(4, 8), "index": 0, "epoch": 0, "label": 1}])
        >>> [view.shape for view in batch["views"]], batch["labels"].tolist()
        ([torch.Size([1, 8]), torch.Size([1, 8])], [1])
    """

    @checked
    def __init__(self, num_views: int = 2, *, seed: int = 0):
        if num_views < 1:
            raise UsageError(f"Expected num_views to be at least 1, got {num_views}.")
        self.num_views, self.seed = num_views, seed

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return ``{"views", "index", "labels"?}`` of items of an `hfproj.IndexedDataset` of `CachedFeatures`."""
        if not all("index" in item for item in items):
            raise UsageError("The items have no 'index' to choose views by; wrap them in hfproj.IndexedDataset.")
        features = torch.stack([item["features"] for item in items])
        cached = features.shape[1]
        if cached < self.num_views:
            raise UsageError(f"Expected {self.num_views} cached views of each image, got {cached}; cache more passes.")
        index = np.array([operator.index(item["index"]) for item in items])
        epoch = np.array([operator.index(item.get("epoch", 0)) for item in items])
        order = torch.from_numpy(uniforms(cached, seed=self.seed, epoch=epoch, index=index, view=0).argsort(axis=1))
        rows = torch.arange(len(items))
        views = [features[rows, order[:, view]] for view in range(self.num_views)]
        return {"views": views, "index": torch.from_numpy(index).long(), **_labels(items)}


class EvalFeatures:
    """Collator of cached features for evaluation: the first cached view of each image.

    Example:
        >>> EvalFeatures()([{"features": torch.ones(1, 8), "label": 1}])["pixel_values"].shape
        torch.Size([1, 8])
    """

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return ``{"pixel_values", "labels"?}``; the name is that of any backbone's first input."""
        return {"pixel_values": torch.stack([item["features"][0] for item in items]), **_labels(items)}


def _labels(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    own = [{name: item[name] for name in ("label",) if name in item} for item in items]
    return index_and_labels(own, "label")  # without the index of cached items
