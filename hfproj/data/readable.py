"""Items of data sets that can't be read end in words, with their number and what to do."""

import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch.utils.data import Dataset

from hfproj.data.pixels import BOMBS, cure
from hfproj.errors import HfprojError, UsageError, one_line

# What Pillow raises for missing, truncated and broken files, and for those beyond its limit of pixels.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error, *BOMBS)


def unreadable(index: Any, error: Exception) -> UsageError:
    """Return the error of an item of a data set that can't be read, with what to do."""
    what = f"Item {index} of the data set cannot be read ({type(error).__name__}: {one_line(error)})"
    return UsageError(f"{what}. {cure(error)}.")


class ReadableDataset(Dataset):
    """A data set as it is, whose items that can't be read end in a `UsageError` that names them."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except HfprojError:
            raise
        except UNREADABLE as error:
            raise unreadable(index, error) from error

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """Return the items of a whole batch, read at once where the data set can do that."""
        if (read := getattr(self.dataset, "__getitems__", None)) is not None:
            with suppress(*UNREADABLE):  # else one by one, to name the item that fails
                return read(indices)
        return [self[index] for index in indices]
