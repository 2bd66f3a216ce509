"""Views of a few images that are the same at every call: what a model in training is watched on."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from hfproj.data.indexing import IndexedDataset
from hfproj.distributed import gather_rows, rank, world_size
from hfproj.errors import UsageError
from hfproj.features.extraction import forward
from hfproj.functional.modes import evaluating

H = Float[Tensor, "views images dim"]
Z = Float[Tensor, "views images out_dim"]


class FixedViews:
    """Views of `images` evenly spaced items of a data set, those of epoch 0; each process makes a share of them.

    They are made once and kept on the CPU: two views of 256 images of 224 pixels take 308 MB.

    Args:
        dataset: With a length and integer indices.
        collator: Gives ``{"views": [tensor or mapping, …]}`` for items of ``IndexedDataset(dataset)``, as
            `hfproj.ImageViews` does.
        images: How many of the items, if there are so many.
        batch_size: Images a forward pass, on each process.

    Raises:
        UsageError: the data set has no length, or fewer items than there are processes; the collator gives no views.
    """

    def __init__(self, dataset: Any, collator: Callable[[list], Any], *, images: int = 256, batch_size: int = 256):
        dataset = dataset if isinstance(dataset, IndexedDataset) else IndexedDataset(dataset)
        rows, count = len(dataset), min(images, len(dataset))
        if count < max(2, world_size()):
            raise UsageError(f"{count} images came for {world_size()} processes; give at least one each, two in all.")
        self.images = count
        # Spread over the set, which may be sorted by class.
        share = range(count * rank() // world_size(), count * (rank() + 1) // world_size())
        loader = DataLoader(
            Subset(dataset, [i * rows // count for i in share]),
            batch_size=batch_size,
            collate_fn=collator,
            generator=torch.Generator(),  # a loader without its own generator advances the global one
        )
        self.batches = [batch for batch in loader]
        if not isinstance(self.batches[0], Mapping) or not self.batches[0].get("views"):
            raise UsageError("The collator gave no 'views'; use hfproj.ImageViews.for_model(model).")

    def own_features(self, model: nn.Module, device: torch.device | str | None = None) -> tuple[H, Z]:
        """Return h and z of this process's images ``[views, own images, dim]``, on the device, in float32 or better."""
        device = torch.device(device) if device is not None else next(model.parameters()).device
        h, z = [], []
        with evaluating(model), torch.no_grad():
            for batch in self.batches:
                inputs = [{"inputs": v} if isinstance(v, Mapping) else {"pixel_values": v} for v in batch["views"]]
                outputs = [forward(model, view, device) for view in inputs]
                h.append(torch.stack([_precise(out.representation) for out in outputs]))
                z.append(torch.stack([_precise(out.projection) for out in outputs]))
        return torch.cat(h, 1), torch.cat(z, 1)

    def features(self, model: nn.Module, device: torch.device | str | None = None) -> tuple[H, Z]:
        """Return h and z of all images ``[views, images, dim]``, on the CPU, with the model in eval mode."""
        with torch.no_grad():
            h, z = (
                gather_rows(f.transpose(0, 1).contiguous()).transpose(0, 1).cpu()
                for f in self.own_features(model, device)
            )
        return h, z

    def own(self, name: str) -> Tensor | None:
        """Return what the collator gave of this process's images beside views: "index", or "labels" if there are."""
        parts = [batch.get(name) for batch in self.batches]
        return None if any(part is None for part in parts) else torch.cat([torch.as_tensor(part) for part in parts])


def _precise(f: Tensor) -> Tensor:
    return f.to(torch.promote_types(f.dtype, torch.float32))
