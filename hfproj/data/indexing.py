"""Items that know their index and epoch, so that a collator can derive each view from them and from nothing else.

``DataLoader`` workers hold a copy of the data set that was made when they started, so an epoch set on it later does not
reach them; accelerate's loader does not forward it in every case either. Here the epoch travels with the index:
`EpochSampler` yields ``(epoch, index)`` pairs, and `IndexedDataset` writes both into the item.

A loader prepared by accelerate calls ``set_epoch`` with its own counter, which starts at 0, whenever an iterator is
made: set the epoch on the prepared loader (``loader.set_epoch(e)``) and on the sampler.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from hfproj.errors import UsageError

_UNREADABLE = (OSError, SyntaxError)  # what Pillow raises for missing, truncated and broken files (PNG: SyntaxError)


def as_item(value: Any) -> dict[str, Any]:
    """Return an item of a data set as a dict.

    Args:
        value: A dict (copied), an ``(image, label)`` pair as torchvision gives, or a bare image.

    Raises:
        UsageError: a tuple that is no pair.

    Example:
        >>> as_item(("an image", 3)) == {"image": "an image", "label": 3}
        True
    """
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, tuple):
        if len(value) != 2:
            raise UsageError(
                f"Expected items that are dicts, (image, label) pairs or images; a tuple of {len(value)} came. "
                "Return a dict from the data set, for example {'image': …, 'label': …}."
            )
        return {"image": value[0], "label": value[1]}
    return {"image": value}


def _unreadable(index: int, error: BaseException) -> UsageError:
    return UsageError(
        f"Item {index} of the data set cannot be read ({type(error).__name__}: {error}). "
        "Repair the file, or drop the row, for example with dataset.select()."
    )


class IndexedDataset(Dataset):
    """A map-style data set whose items also hold ``"index"`` and ``"epoch"``.

    Indexed with an int (epoch 0) or with an ``(epoch, index)`` pair from `EpochSampler`. A column of the data set that
    is itself called ``index`` or ``epoch`` is replaced.

    Args:
        dataset: Anything with ``__getitem__`` and ``__len__``: a ``datasets.Dataset``, a torchvision data set, a list.

    Raises:
        UsageError: the data set has no length or no ``__getitem__``; on access, an item that is a tuple but no pair, or
            whose file cannot be read (the message names the index).

    Example:
        >>> dataset = IndexedDataset([{"image": "a", "label": 0}, {"image": "b", "label": 1}])
        >>> dataset[4, 1] == {"image": "b", "label": 1, "index": 1, "epoch": 4}
        True
        >>> dataset[-1]["index"], dataset[0]["epoch"]
        (1, 0)
    """

    def __init__(self, dataset: Any):
        if not (isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")):
            raise UsageError(
                f"IndexedDataset wraps data sets with a length and indices; a {type(dataset).__name__} came. "
                "Wrap a stream in hfproj.data.StreamDataset instead."
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        epoch, index = self._split(key)
        try:
            value = self.dataset[index]
        except _UNREADABLE as error:
            raise _unreadable(index, error) from error
        return {**as_item(value), "index": index, "epoch": epoch}

    def __getitems__(self, keys: Sequence[Any]) -> list[dict[str, Any]]:
        """Return the items of a whole batch, read at once where the data set can do that."""
        read = getattr(self.dataset, "__getitems__", None)
        if read is None:
            return [self[key] for key in keys]
        pairs = [self._split(key) for key in keys]
        try:
            values = read([index for _, index in pairs])
        except _UNREADABLE:
            return [self[key] for key in keys]  # one by one, to name the item that fails
        return [{**as_item(value), "index": index, "epoch": epoch} for value, (epoch, index) in zip(values, pairs)]

    def _split(self, key: Any) -> tuple[int, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index, length = operator.index(index), len(self)
        if not -length <= index < length:
            raise IndexError(f"index {index} is out of range for a data set of {length} items")
        return operator.index(epoch), index % length


class EpochSampler(Sampler):
    """Yields ``(epoch, index)`` pairs; the order depends on (seed, epoch) only and is the same on every rank.

    For `IndexedDataset`. Give it to a ``DataLoader`` and call `set_epoch` before each epoch's iterator is made.

    Args:
        length: Number of items.
        seed: Seed of the permutation.
        shuffle: False keeps the order 0, 1, 2, …

    Raises:
        UsageError: a length below 1.

    Example:
        >>> sampler = EpochSampler(3, shuffle=False)
        >>> sampler.set_epoch(2)
        >>> list(sampler)
        [(2, 0), (2, 1), (2, 2)]
    """

    # No attribute may be called `generator`: accelerate would take it for a random sampler's and synchronise it.

    def __init__(self, length: int, *, seed: int = 0, shuffle: bool = True):
        if length < 1:
            raise UsageError(f"EpochSampler needs a data set with at least one item; its length is {length}.")
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the iterators made from now on."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch  # of this iterator, even if set_epoch comes while it runs
        if self.shuffle:
            # numpy's SeedSequence mixes the two numbers; torch's manual_seed(seed + epoch) would repeat permutations
            # between neighbouring seeds.
            order = np.random.default_rng([self.seed % 2**64, epoch % 2**64]).permutation(self.length).tolist()
        else:
            order = range(self.length)
        for index in order:
            yield epoch, index


class StreamDataset(IterableDataset):
    """A stream whose items also hold ``"index"``, their position in the stream, and ``"epoch"``.

    The position is that of the whole stream: accelerate either lets process 0 read for all, or lets every process read
    the whole stream and keep its share, so views do not depend on the number of processes. A stream that was already
    divided between processes or workers (``datasets.distributed.split_dataset_by_node``) counts within its own part.

    Args:
        iterable: A ``datasets.IterableDataset`` or any iterable of items; `set_epoch` is passed on to it if it has one.

    Raises:
        UsageError: on iteration in one of several ``DataLoader`` workers, which would each count from 0.

    Example:
        >>> stream = StreamDataset([{"image": "a"}, {"image": "b"}])
        >>> stream.set_epoch(3)
        >>> [(item["epoch"], item["index"]) for item in stream]
        [(3, 0), (3, 1)]
    """

    def __init__(self, iterable: Iterable):
        self.iterable = iterable
        # Shared memory, so that a persistent worker sees the epoch that the main process sets.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the iterators made from now on, also in running workers."""
        self._epoch.fill_(int(epoch))
        if hasattr(self.iterable, "set_epoch"):
            self.iterable.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise UsageError(
                f"A stream is read by one worker, since positions decide views; {worker.num_workers} workers came. "
                "Set dataloader_num_workers to 0 or 1."
            )
        epoch = int(self._epoch)
        for position, value in enumerate(self.iterable):
            yield {**as_item(value), "index": position, "epoch": epoch}
