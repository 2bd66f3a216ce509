"""h and z of a whole data set, in its order, on the CPU, on every process."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from hfproj.distributed import gather_rows, rank, world_size
from hfproj.errors import UsageError
from hfproj.functional.modes import evaluating


@dataclass(frozen=True)
class Features:
    """Features of a data set: float32 on the CPU, row i is item i.

    Attributes:
        h: Representations.
        z: Projections.
        labels: What the collator gave as "labels", or None.
        index: What the collator gave as "index", or the position in the data set.
    """

    h: Float[Tensor, "rows dim"]
    z: Float[Tensor, "rows out_dim"]
    labels: Int[Tensor, " rows"] | None
    index: Int[Tensor, " rows"]

    def __len__(self) -> int:
        return len(self.h)


def extract_features(
    model: nn.Module,
    dataset: Any,
    *,
    batch_size: int = 256,
    collator: Callable[[list], Mapping[str, Any]] | None = None,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    progress: bool = False,
) -> Features:
    """Return h and z of every item, with the model in eval mode; its training flags come back as they were.

    On several processes each computes a contiguous share, and all of them receive all rows in the order of the data
    set. The global random state is left alone, so that measuring in the middle of a training run does not change it.

    Args:
        model: Called with the batch's `pixel_values` or, where the batch holds "inputs", with that mapping; returns an
            object with `representation` and `projection`.
        dataset: With a length and integer indices; 🤗 datasets are read a batch at a time.
        batch_size: Items a forward pass, on each process.
        collator: Makes a batch `{"pixel_values" or "inputs", "labels"?, "index"?}` of a list of items. Default:
            `hfproj.data.images.EvalImages.for_model(model)`.
        device: Where inputs go. Default: where the model's parameters are.
        num_workers: Processes that load data.
        progress: Show a bar (first process only).

    Raises:
        UsageError: an empty data set, a batch without inputs, or a model output without h and z.
    """
    rows = len(dataset)
    if rows == 0:
        raise UsageError("The data set is empty: there is nothing to extract features from.")
    if collator is None:
        from hfproj.data.images import EvalImages

        collator = EvalImages.for_model(model)
    device = torch.device(device) if device is not None else next(model.parameters()).device

    start, stop = rows * rank() // world_size(), rows * (rank() + 1) // world_size()
    share = range(start, stop) or range(1)  # a process without a share still has to know the widths
    loader = DataLoader(
        Subset(dataset, share),
        batch_size=batch_size,
        collate_fn=collator,
        num_workers=num_workers,
        generator=torch.Generator(),  # a loader without its own generator advances the global one
    )
    batches: Any = loader
    if progress and rank() == 0:
        from tqdm.auto import tqdm

        batches = tqdm(loader, desc="features", unit="batch")

    parts: dict[str, list[Tensor]] = {"h": [], "z": [], "labels": [], "index": []}
    with evaluating(model), torch.inference_mode():
        for batch in batches:
            output = forward(model, batch, device)
            parts["h"].append(output.representation.float().cpu())
            parts["z"].append(output.projection.float().cpu())
            for key in ("labels", "index"):
                if batch.get(key) is not None:
                    parts[key].append(torch.as_tensor(batch[key]).cpu().long())

    # Joined outside inference mode: a probe that trains on the features could not use inference tensors.
    whole = {key: torch.cat(tensors)[: stop - start] for key, tensors in parts.items() if tensors}
    whole.setdefault("index", torch.arange(start, stop))
    for key, tensor in whole.items():
        if len(tensor) != stop - start:
            raise UsageError(f"The collator's {key!r} has {len(tensor)} rows in all, expected {stop - start}.")
    if world_size() > 1:
        with torch.no_grad():
            whole = {key: gather_rows(tensor.to(device)).cpu() for key, tensor in whole.items()}
    return Features(h=whole["h"], z=whole["z"], labels=whole.get("labels"), index=whole["index"])


def forward(model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> Any:
    """Run the model on the inputs of a batch: `inputs` (a mapping) or `pixel_values`.

    Raises:
        UsageError: the batch has neither, or the output has no h and z.
    """
    if "inputs" in batch:
        inputs = {key: value.to(device, non_blocking=True) for key, value in batch["inputs"].items()}
        output = model(**inputs)
    elif "pixel_values" in batch:
        # By position: timm and plain modules call their first argument otherwise than transformers do.
        output = model(batch["pixel_values"].to(device, non_blocking=True))
    else:
        raise UsageError(
            f"The collator gave {sorted(batch)}; expected 'pixel_values' or 'inputs' (a mapping) among them."
        )
    if getattr(output, "representation", None) is None or getattr(output, "projection", None) is None:
        raise UsageError(
            f"The model returned {type(output).__name__} without `representation` and `projection`; expected a model "
            "with an active projection head. Is its adapter disabled, or was the head never attached?"
        )
    return output
