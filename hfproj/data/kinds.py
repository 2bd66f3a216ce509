"""Kinds of data sets: which are streams, which are none, and what to pass instead of those that are none."""

import reprlib
from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from hfproj.data.indexing import IndexedDataset, StreamDataset, what_to_pass
from hfproj.errors import UsageError


def is_stream(dataset: Any) -> bool:
    """Whether `dataset` can only be read from its beginning."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")


def indexed(dataset: Any) -> Any:
    """Return `dataset` with an index and an epoch in every item; None stays None."""
    if dataset is None or isinstance(dataset, IndexedDataset | StreamDataset):
        return dataset
    return StreamDataset(dataset) if is_stream(dataset) else IndexedDataset(dataset)


def first_of(dataset: Any) -> Any:
    """Return the first of several data sets by name, or the only one."""
    return next(iter(dataset.values())) if isinstance(dataset, dict) else dataset


def check_data_set(name: str, dataset: Any) -> None:
    """Refuse what is no data set: a name, a path, several splits, a loader; None is let pass.

    Raises:
        UsageError: If it is none; the message says what to pass.

    Example:
        >>> check_data_set("train_dataset", "digits")
        Traceback (most recent call last):
        hfproj.errors.UsageError: Expected train_dataset to be a data set: ...
    """
    readable = dataset is None or hasattr(dataset, "__getitem__") or hasattr(dataset, "__iter__")
    wrong = isinstance(dataset, str | bytes | Mapping | type | DataLoader)
    if wrong or not readable or getattr(dataset, "ndim", 1) == 0:
        what = f"Expected {name} to be a data set: items by index or, where it is a stream, by iteration"
        shown = "" if isinstance(dataset, Mapping | DataLoader) else f" {reprlib.repr(dataset)}"
        split = "test" if name.startswith("eval") else "train"
        hint = what_to_pass(dataset, split) or "load it, or pass one split"
        raise UsageError(f"{what}, got {type(dataset).__name__}{shown}; {hint}.")


def check_eval_dataset(dataset: Any, name: str = "eval_dataset", *, several: bool = True) -> None:
    """Refuse what is no data set, and a stream: k-NN and RankMe need all rows, in the same order each time."""
    for part in dataset.values() if isinstance(dataset, dict) and several else [dataset]:
        check_data_set(name, part)
        if part is not None and is_stream(part):
            raise UsageError(
                f"The {name} is a stream ({type(part).__name__}); evaluation needs a length. Take its first "
                "items with list(itertools.islice(stream, 1000))."
            )


def check_collator(name: str, collator: Any) -> None:
    """Refuse a class of collators, what can't be called, and the default one of transformers; None passes.

    Raises:
        UsageError: If it is one.
    """
    if isinstance(collator, type):
        how = f"{collator.__name__}.for_model(model)" if hasattr(collator, "for_model") else f"{collator.__name__}(…)"
        raise UsageError(f"Expected {name} to be a collator, got the class {collator.__name__}; write {how}.")
    if name == "data_collator" and getattr(collator, "__name__", "") == "default_data_collator":
        what = "Expected data_collator to make views of images or texts, got transformers' default_data_collator"
        raise UsageError(f"{what}; use hfproj.ImageViews.for_model(model), or TextViews.")
    if collator is not None and not callable(collator):
        hint = "give a function of a list of items, such as hfproj.ImageViews.for_model(model)"
        raise UsageError(f"Expected {name} to be a collator, got {type(collator).__name__}; {hint}.")
