"""An objective's buffers as a file of its own: queues, centres, and where training stood when they were like this.

The position is kept as tensors beside the buffers (``position.step``, ``position.epoch``): safetensors writes several
entries of its metadata in an order that changes, and equal contents would not be equal files.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hfproj.errors import AdapterFileError
from hfproj.filenames import OBJECTIVE


class Position(NamedTuple):
    """Steps taken and epochs done since the adapter was new, over all the runs that trained it."""

    step: int = 0
    epoch: float = 0.0


START = Position()
NOW, BEFORE = "position", "before"  # of the buffers, and at which their run began


def save_buffers(objective: nn.Module, folder: Path, *, before: Position = START) -> None:
    """Write buffers and position (its attribute, by the trainer) if it has either; `before` is where the run began."""
    tensors = {n: b.detach().to("cpu", copy=True).contiguous() for n, b in objective.state_dict().items()}
    for kind, position in ((NOW, getattr(objective, "position", START)), (BEFORE, before)):
        if position != START:
            tensors[f"{kind}.step"] = torch.tensor(position.step)
            tensors[f"{kind}.epoch"] = torch.tensor(position.epoch, dtype=torch.float64)
    if tensors:
        save_file(tensors, folder / OBJECTIVE, metadata={"format": "pt"})


def load_buffers(objective: nn.Module, folder: Path, *, hint: str) -> None:
    """Read the objective's buffers, if it has any.

    Raises:
        AdapterFileError: If the file has none, or those of another objective; `hint` says in the message what to do.
    """
    own = objective.state_dict()
    if not own:
        return
    begin = f"{folder} holds no buffers of {type(objective).__name__} in {OBJECTIVE}"
    try:
        saved = load_file(folder / OBJECTIVE)
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{begin} ({error}); {hint}.") from error
    saved = {name: tensor for name, tensor in saved.items() if name.split(".")[0] not in (NOW, BEFORE)}
    there, here = ({n: list(t.shape) for n, t in tensors.items()} for tensors in (saved, own))
    different = [n for n in sorted(there | here) if there.get(n) != here.get(n)]
    if different:
        listed = ", ".join(f"{n} is {there.get(n)} there and {here.get(n)} here" for n in different)
        raise AdapterFileError(f"{begin}: {listed}; {hint}.")
    objective.load_state_dict(saved)


def read_position(folder: Path, kind: str = NOW) -> Position:
    """Return the position now, or that at which the run began; AdapterFileError if the file is damaged."""
    if not (folder / OBJECTIVE).is_file():
        return START
    try:
        with safe_open(folder / OBJECTIVE, "pt") as file:
            if f"{kind}.step" not in file.keys():  # noqa: SIM118  no dict
                return START
            step, epoch = (file.get_tensor(f"{kind}.{part}").item() for part in Position._fields)
        if not (isinstance(step, int) and 0 <= step < 2**53 and 0 <= epoch < 2**53):
            raise ValueError(f"step {step}, epoch {epoch}")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise AdapterFileError(f"{folder / OBJECTIVE} is damaged ({error}); download or save it again.") from error
    return Position(step, float(epoch))
