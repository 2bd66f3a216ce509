"""Items that know their index and epoch, so that a collator can derive each view from them and from nothing else.

``DataLoader`` workers hold a copy of the data set that was made when they started, so an epoch set on it later does not
reach them; accelerate's loader does not forward it in every case either. Here the epoch travels with the index:
`EpochSampler` yields ``(epoch, index)`` pairs, and `IndexedDataset` writes both into the item.

Files that can't be read end a run, or with ``on_bad_image="skip"`` another image takes the place of each, drawn from
(epoch, index) alone, so that every process keeps its batch, on any number of them and after a resume. Of a stream they
are left out. A batch then has ``"skipped"``, a list of (index, reason).

A loader prepared by accelerate calls ``set_epoch`` with its own counter, which starts at 0, whenever an iterator is
made: set the epoch on the prepared loader (``loader.set_epoch(e)``) and on the sampler.
"""

import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from hfproj.checking import checked
from hfproj.data.pixels import BY_SKIPPING, bounded, decoded, to_image_tensor
from hfproj.data.readable import UNREADABLE, unreadable
from hfproj.errors import HfprojError, UsageError, check_choice, one_line
from hfproj.functional.labels import class_number, described
from hfproj.typing import Data, OneOf

POLICIES = ("raise", "skip")
OnBadImage = OneOf["raise", "skip"]
SKIPPED = "skipped"  # entry of an item and of a batch
_TRIES = 100  # images in a row that can't be read: it is the disk that can't
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


def what_to_pass(given: Any, split: str = "train") -> str | None:
    """Return what to pass instead of something that is no data set, or None where there is no telling.

    Example:
        >>> what_to_pass("digits"), what_to_pass({"train": [], "test": []})
        ("load it first: hfproj.load_image_dataset('digits')", "pass one of its splits, such as ['train']")
    """
    if isinstance(given, str | os.PathLike):
        return f"load it first: hfproj.load_image_dataset({str(given)!r})"
    if isinstance(given, Mapping) and given:
        name = split if split in given else next(iter(given))
        return f"pass one of its splits, such as [{name!r}]"
    if isinstance(given, DataLoader):
        return "pass what it reads, loader.dataset: batches are made here"
    return None


def check_items(items: Any) -> None:
    """Refuse what is no list of items of a data set.

    Raises:
        UsageError: If it is none, or it is empty.

    Example:
        >>> check_items([{"image": 3}])
    """
    if not isinstance(items, list | tuple) or not items or not all(isinstance(item, Mapping) for item in items):
        found = items[0] if isinstance(items, list | tuple) and items else items
        raise UsageError(
            f"Expected items of a data set as a list of dicts, such as {{'image': …, 'index': 0}}, got "
            f"{type(found).__name__}; wrap the data set: hfproj.IndexedDataset(dataset)."
        )


def index_and_labels(items: Sequence[dict], label_column: str | None) -> dict[str, Any]:
    """Return ``index``, if all items have it, and, but for `label_column` None, ``labels``, if one has; both int64.

    An item without a label (no such entry, None or NaN) has the label −1. Where an item stands for others that can't be
    read, ``skipped`` lists them.

    Raises:
        UsageError: If a label is a score, a name, or anything else that is no whole number.

    Example:
        >>> index_and_labels([{"index": 7, "label": 2}, {"index": 8, "label": None}], "label")
        {'index': tensor([7, 8]), 'labels': tensor([ 2, -1])}
    """
    found: dict[str, Any] = {}
    if skipped := [bad for item in items for bad in item.get(SKIPPED, ())]:
        found[SKIPPED] = skipped
    if all("index" in item for item in items):
        found["index"] = torch.tensor(whole_numbers(items, "index"), dtype=torch.int64)
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


def whole_numbers(items: Sequence[dict], column: str) -> list[int]:
    """Return the column ``"index"`` or ``"epoch"`` of items, 0 where one has none.

    Raises:
        UsageError: If one is no whole number of 64 bits.

    Example:
        >>> whole_numbers([{"epoch": np.int64(3)}, {}], "epoch")
        [3, 0]
    """
    found = []
    for item in items:
        value = item.get(column, 0)
        try:
            found.append(operator.index(value))
            if not -(2**63) <= found[-1] < 2**63:
                raise OverflowError
        except (TypeError, RuntimeError, OverflowError):
            given = f"got a {type(value).__name__}; wrap the data set: hfproj.IndexedDataset(dataset)"
            raise UsageError(f"Expected column {column!r} to hold whole numbers of 64 bits, {given}.") from None
    return found


class _Checks:
    """What the two data sets share: which images are let through."""

    def __init__(self, on_bad_image: OnBadImage, image_column: str, channels: int | None):
        check_choice("on_bad_image", on_bad_image, POLICIES)
        self.on_bad_image, self.image_column, self.channels = on_bad_image, image_column, channels

    def checked(self, item: dict[str, Any]) -> dict[str, Any]:
        """Return an item, where images are skipped with one that is read; raise UsageError if it can't be."""
        if self.on_bad_image == "skip" and self.image_column in item:
            image = item[self.image_column] = decoded(item[self.image_column], self.image_column)
            to_image_tensor(image, self.channels or 3, self.image_column)
        return item


class IndexedDataset(_Checks, Dataset):
    """A map-style data set whose items also hold ``"index"`` and ``"epoch"``.

    Indexed with an int (epoch 0) or with an ``(epoch, index)`` pair from `EpochSampler`. A column of the data set that
    is itself called ``index`` or ``epoch`` is replaced.

    Args:
        dataset: Anything with ``__getitem__`` and ``__len__``: a ``datasets.Dataset``, a torchvision data set, a list.
        on_bad_image: ``"raise"``, or ``"skip"``: in place of an item that can't be read, or whose image can't, comes
            one that is drawn from (epoch, index), with its own label but under this index, so that its views are others
            than where its own turn comes. Its entry ``"skipped"`` has the index and the reason of each bad one.
        image_column: Entry that is read to find out.
        channels: Channels of the images, as in the collator.

    Raises:
        UsageError: If the data set has no length or no ``__getitem__``; on access, if an item is a tuple but no pair,
            or its file cannot be read (the message names the index), where images are skipped a hundred in a row.

    Example:
        >>> dataset = IndexedDataset([{"image": "a", "label": 0}, {"image": "b", "label": 1}])
        >>> dataset[4, 1] == {"image": "b", "label": 1, "index": 1, "epoch": 4}
        True
        >>> dataset[-1]["index"], dataset[0]["epoch"]
        (1, 0)
    """

    @checked
    def __init__(
        self, dataset: Data, *, on_bad_image: OnBadImage = "raise", image_column: str = "image",
        channels: int | None = None,
    ):  # fmt: skip
        super().__init__(on_bad_image, image_column, channels)
        if (
            isinstance(dataset, type | Mapping | str | bytes | DataLoader)
            or getattr(dataset, "ndim", 1) == 0
            or not (isinstance(dataset, Sized) and hasattr(dataset, "__getitem__"))
        ):
            what = f"IndexedDataset wraps data sets with a length and indices, got a {type(dataset).__name__}"
            instead = what_to_pass(dataset) or "wrap a stream in hfproj.data.StreamDataset instead"
            raise UsageError(f"{what}; {instead}.")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = self._split(key)
        if self.on_bad_image == "raise":
            return self.item(index, epoch)
        skipped: list[tuple[int, str]] = []
        draws = np.random.default_rng([epoch % 2**64, index])
        while len(skipped) < _TRIES:
            at = index if not skipped else int(draws.integers(len(self)))
            try:
                item = self.item(at, epoch)
                return {**item, "index": index, SKIPPED: skipped} if skipped else item
            except UsageError as error:
                skipped.append((at, str(error)))
        why = skipped[-1][1].removesuffix(".").replace(BY_SKIPPING, "")
        raise UsageError(
            f"{_TRIES} items, drawn one after the other in place of item {index}, can't be read; on_bad_image='skip' "
            f"is for a few bad ones. The last of them: {why}."
        )

    def __getitems__(self, keys: Sequence[Key]) -> list[dict[str, Any]]:
        """Return the items of a whole batch, read at once where the data set can do that."""
        read = getattr(self.dataset, "__getitems__", None)
        if read is None or self.on_bad_image == "skip":
            return [self[key] for key in keys]
        pairs = [self._split(key) for key in keys]
        try:
            with bounded():
                values = read([index for _, index in pairs])
        except UNREADABLE:
            return [self[key] for key in keys]  # one by one, to name the item that fails
        return [{**as_item(value), "index": index, "epoch": epoch} for value, (epoch, index) in zip(values, pairs)]

    def item(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """Return this very item.

        Raises:
            UsageError: If it can't be read.
        """
        try:
            with bounded():
                value = self.dataset[index]
        except HfprojError:
            raise
        except UNREADABLE as error:
            raise unreadable(index, error) from error
        return self.checked({**as_item(value), "index": index, "epoch": epoch})

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

    @checked
    def __init__(self, length: int, *, seed: int = 0, shuffle: bool = True):
        if length < 1:
            raise UsageError(f"EpochSampler needs a data set with at least one item, got a length of {length}.")
        self.length, self.seed, self.shuffle, self.epoch = length, seed, shuffle, 0

    @checked
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


class StreamDataset(_Checks, IterableDataset):
    """A stream whose items also hold ``"index"``, their position in the stream, and ``"epoch"``.

    The position is that of the whole stream: accelerate either lets process 0 read for all, or lets every process read
    the whole stream and keep its part, so views do not depend on the number of processes. A stream that was already
    divided between processes or workers (``datasets.distributed.split_dataset_by_node``) counts within its own part.

    Args:
        iterable: A ``datasets.IterableDataset`` or any iterable of items; `set_epoch` is passed on to it if it has one.
        on_bad_image: ``"raise"``, or ``"skip"``: images that can't be read are left out; the next one lists them. Those
            on which the stream itself ends can't be: let it give them undecoded
            (``stream.cast_column("image", datasets.Image(decode=False))``).
        image_column, channels: As in `IndexedDataset`.

    Raises:
        UsageError: On iteration, if there are several ``DataLoader`` workers, which would each count from 0, or the
            stream ends on a file that can't be read.

    Example:
        >>> stream = StreamDataset([{"image": "a"}, {"image": "b"}])
        >>> stream.set_epoch(3)
        >>> [(item["epoch"], item["index"]) for item in stream]
        [(3, 0), (3, 1)]
    """

    ended = False  # whether iterators that are made from now on are empty

    @checked
    def __init__(
        self, iterable: Iterable, *, on_bad_image: OnBadImage = "raise", image_column: str = "image",
        channels: int | None = None,
    ):  # fmt: skip
        super().__init__(on_bad_image, image_column, channels)
        if not isinstance(iterable, Iterable):
            raise UsageError(f"Expected a stream to iterate over, got {type(iterable).__name__}; pass its items.")
        self.iterable = iterable
        # Shared memory, so that a persistent worker sees the epoch that the main process sets.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @checked
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
        epoch, skipped, position = int(self._epoch), [], -1
        if self.ended:
            return
        try:
            for position, value in enumerate(self.iterable):
                item = {**as_item(value), "index": position, "epoch": epoch}
                try:
                    item = self.checked(item)
                except UsageError as error:
                    skipped.append((position, str(error)))
                    continue
                yield {**item, SKIPPED: skipped} if skipped else item
                skipped = []
        except HfprojError:
            raise
        except UNREADABLE as error:
            what = f"Item {position + 1} of the stream cannot be read ({type(error).__name__}: {one_line(error)})"
            undecoded = "stream.cast_column('image', datasets.Image(decode=False)) and on_bad_image='skip'"
            raise UsageError(f"{what}. Repair the file, or give the images undecoded: {undecoded}.") from error
