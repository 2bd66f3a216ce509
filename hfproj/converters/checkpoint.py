"""Reading a training checkpoint without running anything that is in it.

A ``.pth`` file is a pickle, which can name any function to be called. ``torch.load(weights_only=True)`` refuses all but
tensors and plain containers. What official training scripts put beside the tensors and what only holds values is
allowed in addition: ``argparse.Namespace`` (their arguments) and numpy's scalars (learning rates of a schedule).

References:
    facebookresearch/dino ``main_dino.py`` (04c0ad9) saves ``args`` and, in the optimizer, rates of a numpy schedule.
"""

import argparse
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hfproj.converters.pickles import check_pickles
from hfproj.errors import AdapterFileError, UsageError, one_line
from hfproj.hub.untrusted import read_header

_SCALAR = np.float64(0).__reduce__()[0]  # type: ignore[index]  # numpy's own function for making a scalar
_HARMLESS: list[Any] = [
    argparse.Namespace, np.dtype, *{type(np.dtype(kind)) for kind in ("?", "i4", "i8", "u1", "f2", "f4", "f8")},
    (_SCALAR, "numpy.core.multiarray.scalar"),  # its name in files of numpy 1 …
    (_SCALAR, "numpy._core.multiarray.scalar"),  # … and of numpy 2
]  # fmt: skip


def read_file(path: str | os.PathLike) -> Mapping[str, Any]:
    """Return what a checkpoint holds, a ``.safetensors`` file or one that ``torch.save`` wrote, on the CPU.

    Raises:
        UsageError: If there is no such file.
        AdapterFileError: If the file is damaged, holds anything but data, or no dictionary.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"epoch": 3, "args": argparse.Namespace(lr=0.1)}, f"{folder}/a.pth")
        ...     read_file(f"{folder}/a.pth")["args"].lr
        0.1
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"There is no checkpoint {str(path)!r}; expected a .pth or .safetensors file on this machine.")
    try:
        if path.suffix == ".safetensors":
            read_header(path, "This checkpoint")
        content = load_file(path) if path.suffix == ".safetensors" else _pickled(path)
    except SafetensorError as error:
        raise _damaged(path, error) from error
    if not isinstance(content, Mapping):
        what = f"{path.name} holds a {type(content).__name__}"
        raise AdapterFileError(f"{what}; expected a dictionary with the state dict of a network.")
    return content


def _pickled(path: Path) -> Any:
    try:
        check_pickles(path)
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle protocol that torch.save does not write: it fails or not
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)|(?:type|class|function) <?'?([\w.]+)", str(error))
        if found is None and "weights_only" not in str(error):
            raise _damaged(path, error) from error
        what = f"{found.group(1) or found.group(2)}" if found else "something else"
        raise AdapterFileError(
            f"{path.name} holds more than data: {what}, which may run code when it is loaded and was not. If you trust "
            "whoever made it, load it in the program that wrote it and save the tensors alone: "
            "torch.save({'state_dict': model.state_dict()}, path)."
        ) from error
    except Exception as error:  # whatever the bytes of a third party do to zip, pickle and torch
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> AdapterFileError:
    what = f"{path.name} is no checkpoint of torch.save or safetensors, or damaged or cut short"
    return AdapterFileError(f"{what} ({one_line(error)}); download it again.")
