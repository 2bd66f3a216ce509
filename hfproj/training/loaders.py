"""Data loaders that `transformers` does not make as self-supervision needs them."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from hfproj import distributed
from hfproj.data.indexing import IndexedDataset
from hfproj.training.arguments import ProjectionTrainingArguments


def stream_loader(dataset: Any, collator: Callable, args: ProjectionTrainingArguments) -> DataLoader:
    """Return the loader of a stream, which drops the last incomplete batch as that of a data set with a length does.

    `transformers` would keep it, and accelerate would fill it with images that were there before.
    """
    return DataLoader(
        dataset,
        batch_size=args.train_batch_size,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        drop_last=args.dataloader_drop_last,
    )


def eval_views_loader(dataset: Any, collator: Callable, args: ProjectionTrainingArguments) -> DataLoader | None:
    """Return this process's share of joint batches of views, the same at each call; None for a single image."""
    world, rank = distributed.world_size(), distributed.rank()
    size = min(args.per_device_eval_batch_size, len(dataset) // world)
    if size * world < 2:
        return None
    starts = range(rank * size, len(dataset) - (world - rank) * size + 1, world * size)
    return DataLoader(
        IndexedDataset(dataset),
        batch_sampler=[list(range(start, start + size)) for start in starts],
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        generator=torch.Generator(),  # else the loader advances the global one, and measuring would change the run
    )
