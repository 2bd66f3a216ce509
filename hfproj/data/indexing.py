"""Items that know their index and epoch, so that a collator can derive each view from them and from nothing else.

``DataLoader`` workers hold a copy of the data set that was made when they started, so an epoch set on it later does not
reach them; accelerate's loader does not forward it in every case either. Here the epoch travels with the index:
`EpochSampler` yields ``(epoch, index)`` pairs, and `IndexedDataset` writes both into the item.

A loader prepared by accelerate calls ``set_epoch`` with its own counter, which starts at 0, whenever an iterator is
made: set the epoch on the prepared loader (``loader.set_epoch(e)``) and on the sampler.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from hfproj.errors import UsageError
from hfproj.functional.labels import class_number, described
from hfproj.typing import Data

_UNREADABLE = (OSError, SyntaxError)  # what Pillow raises for missing, truncated and broken files (PNG: SyntaxError)
Key = SupportsIndex | tuple[SupportsIndex, SupportsIndex]  # an index (epoch 0), or (epoch, index)


def as_item(value: Any) -> dict[str, Any]:
    """Return an item of a data set as a dict; `UsageError` if it is a tuple but no pair.

    Args:
        value: A dict (copied), an ``(image, label)`` pair as torchvision gives, or a bare image.

    Example:
        >>> as_item(("an image", 3)) == {"image": "an image", "label": 3}
        True
    """
    if isinstance(value, dict):
        return dict(value)
    if not isinstance(value, tuple):
        return {"image": value}
    if len(value) != 2:
        what = f"Expected items that are dicts, (image, label) pairs or images, got a tuple of {len(value)}"
        raise UsageError(f"{what}. Return a dict from the data set, for example {{'image': …, 'label': …}}.")
    return {"image": value[0], "label": value[1]}


def index_and_labels(items: Sequence[dict], label_column: str | None) -> dict[str, Int[Tensor, " batch"]]:
    """Return ``index``, if all items have it, and, but for `label_column` None, ``labels``, if one has; both int64.

    An item without a label (no such entry, None or NaN) has the label −1.

    Raises:
        UsageError: If a label is a score, a name, or anything else that is no whole number.

    Example:
        >>> index_and_labels([{"index": 7, "label": 2}, {"index": 8, "label": None}], "label")
        {'index': tensor([7, 8]), 'labels': tensor([ 2, -1])}
    """
    found = {}
    if all("index" in item for item in items):
        try:
            found["index"] = torch.tensor([operator.index(item["index"]) for item in items], dtype=torch.int64)
        except TypeError as error:
            raise UsageError(f"Column 'index' must hold positions, which are whole numbers: {error}.") from None
    if label_column is not None and any(label_column in item for item in items):
        numbers = []
        for value in (item.get(label_column) for item in items):
            try:
                numbers.append(class_number(value))
            except TypeError:
                raise UsageError(
                    f"Column {label_column!r} must hold class numbers, {described(value)}, name another "
                    "label_column, or set label_column=None."
                ) from None
        found["labels"] = torch.tensor(numbers, dtype=torch.int64)
    return found


class IndexedDataset(Dataset):
    """A map-style data set whose items also hold ``"index"`` and ``"epoch"``.

    Indexed with an int (epoch 0) or with an ``(epoch, index)`` pair from `EpochSampler`. A column of the data set that
    is itself called ``index`` or ``epoch`` is replaced.

    Args:
        dataset: Anything with ``__getitem__`` and ``__len__``: a ``datasets.Dataset``, a torchvision data set, a list.

    Raises:
        UsageError: If the data set has no length or no ``__getitem__``; on access, if an item is a tuple but no pair,
            or its file cannot be read (the message names the index).

    Example:
        >>> dataset = IndexedDataset([{"image": "a", "label": 0}, {"image": "b", "label": 1}])
        >>> dataset[4, 1] == {"image": "b", "label": 1, "index": 1, "epoch": 4}
        True
        >>> dataset[-1]["index"], dataset[0]["epoch"]
        (1, 0)
    """

    def __init__(self, dataset: Data):
        if not (isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")):
            what = f"IndexedDataset wraps data sets with a length and indices, got a {type(dataset).__name__}"
            raise UsageError(f"{what}. Wrap a stream in hfproj.data.StreamDataset instead.")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = self._split(key)
        try:
            value = self.dataset[index]
        except _UNREADABLE as error:
            what = f"Item {index} of the data set cannot be read ({type(error).__name__}: {error})"
            raise UsageError(f"{what}. Repair the file, or drop the row, for example with dataset.select().") from error
        return {**as_item(value), "index": index, "epoch": epoch}

    def __getitems__(self, keys: Sequence[Key]) -> list[dict[str, Any]]:
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

    def _split(self, key: Key) -> tuple[int, int]:
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
        UsageError: If the length is below 1.

    Example:
        >>> sampler = EpochSampler(3, shuffle=False)
        >>> sampler.set_epoch(2)
        >>> list(sampler)
        [(2, 0), (2, 1), (2, 2)]
    """

    # No attribute may be called `generator`: accelerate would take it for a random sampler's and synchronise it.
    ended = False  # whether iterators that are made from now on are empty

    def __init__(self, length: int, *, seed: int = 0, shuffle: bool = True):
        if length < 1:
            raise UsageError(f"EpochSampler needs a data set with at least one item, got a length of {length}.")
        self.length, self.seed, self.shuffle, self.epoch = length, seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the iterators made from now on."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self.ended:
            return
        epoch = self.epoch  # of this iterator, even if set_epoch is called while it runs
        order: Sequence[int] = range(self.length)
        if self.shuffle:
            # numpy's SeedSequence mixes the two numbers; torch's manual_seed(seed + epoch) would repeat permutations
            # between neighbouring seeds.
            order = np.random.default_rng([self.seed % 2**64, epoch % 2**64]).permutation(self.length).tolist()
        for index in order:
            yield epoch, index


class StreamDataset(IterableDataset):
    """A stream whose items also hold ``"index"``, their position in the stream, and ``"epoch"``.

    The position is that of the whole stream: accelerate either lets process 0 read for all, or lets every process read
    the whole stream and keep its part, so views do not depend on the number of processes. A stream that was already
    divided between processes or workers (``datasets.distributed.split_dataset_by_node``) counts within its own part.

    Args:
        iterable: A ``datasets.IterableDataset`` or any iterable of items; `set_epoch` is passed on to it if it has one.

    Raises:
        UsageError: On iteration, if there are several ``DataLoader`` workers, which would each count from 0.

    Example:
        >>> stream = StreamDataset([{"image": "a"}, {"image": "b"}])
        >>> stream.set_epoch(3)
        >>> [(item["epoch"], item["index"]) for item in stream]
        [(3, 0), (3, 1)]
    """

    ended = False  # whether iterators that are made from now on are empty

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
            what = f"Expected one worker for a stream, since positions decide views, got {worker.num_workers}"
            raise UsageError(f"{what}. Set dataloader_num_workers to 0 or 1.")
        epoch = int(self._epoch)
        if self.ended:
            return
        for position, value in enumerate(self.iterable):
            yield {**as_item(value), "index": position, "epoch": epoch}
