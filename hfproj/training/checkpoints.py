"""Checkpoints: which are complete, and how they are written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hfproj.errors import UsageError


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the trainer's state comes last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True


def complete_checkpoints(folder: str | Path) -> dict[int, str]:
    """Return the complete checkpoints in `folder` by their step."""
    found = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.rpartition("-")[2]
        if step.isdigit() and is_complete(path):
            found[int(step)] = str(path)
    return found


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """Return the newest complete checkpoint in `folder`, or None."""
    found = complete_checkpoints(folder)
    return found[max(found)] if found else None


def checkpoint_to_resume(wanted: str | Path | bool, folder: str | Path) -> str:
    """Return the checkpoint that `wanted` names; True means the newest complete one in `folder`.

    Raises:
        UsageError: there is none, or it is not complete.
    """
    if wanted is not True:
        if not is_complete(Path(str(wanted))):
            raise UsageError(
                f"{wanted} is no complete checkpoint: it has no readable {TRAINER_STATE_NAME}. Resume from another "
                "one, or with resume_from_checkpoint=True from the last complete one."
            )
        return str(wanted)
    last = last_complete_checkpoint(folder)
    if last is None:
        raise UsageError(f"{folder} holds no complete checkpoint to resume from; start without resume_from_checkpoint.")
    return last


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Give an empty folder; the files written there move into `folder` once all of them are complete.

    An interrupted save thus leaves the files of the save before. Files that the new save does not write stay.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".part-*"):  # by a process that was killed; PEFT would take it for a second adapter
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as name:
        part = Path(name)
        yield part
        for file in sorted(p for p in part.rglob("*") if p.is_file()):
            target = folder / file.relative_to(part)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
