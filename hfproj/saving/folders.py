"""The checkpoints in a folder: which are whole, which one a run goes on from, and how one gets there and goes away.

A checkpoint is written into a hidden folder and moved to its place when it is whole; one that is deleted moves out of
its place first. What a killed process leaves in such a folder is cleared away by the next run.
"""

import errno
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Literal

from hfproj.errors import SaveError, UsageError
from hfproj.files import sync
from hfproj.saving.manifest import MANIFEST, PREFIX, STATE, flaw, lacks_optimizer, read_state

LOG = logging.getLogger("hfproj.training")
STAGING = ".saving-"
AUTO = "auto"
_NAME = re.compile(rf"{PREFIX}-(0|[1-9]\d*)")
_TORCH = re.compile(r"PytorchStreamWriter|Parent directory|inline_container|iostream|os error \d+")


def checkpoints(folder: str | Path) -> dict[int, Path]:
    """Return step → folder of everything in `folder` that is called ``checkpoint-N``, the last step first."""
    found = {int(match[1]): path for path in Path(folder).glob(f"{PREFIX}-*") if (match := _NAME.fullmatch(path.name))}
    return {step: found[step] for step in sorted(found, reverse=True) if found[step].is_dir()}


def complete_checkpoints(folder: str | Path) -> dict[int, str]:
    """Return step → path of the checkpoints that have all their files, the last step first; they are not read."""
    return {step: str(path) for step, path in checkpoints(folder).items() if flaw(path, digests=False) is None}


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """Return the newest complete checkpoint in `folder`, or None."""
    return next(iter(complete_checkpoints(folder).values()), None)


def checkpoint_to_resume(wanted: str | os.PathLike | Literal[True], folder: str | Path) -> str | None:
    """Return the checkpoint that `wanted` names if it is whole.

    True and "auto" mean the newest whole one in `folder`; those that are newer and not whole are named in a warning.
    Without any, "auto" is None.

    Raises:
        UsageError: If the checkpoint is not whole or has no optimizer, or there is none for True.
    """
    if wanted is not True and not isinstance(wanted, str | os.PathLike):
        raise UsageError(f"Expected resume_from_checkpoint to be a folder, True or 'auto', got {wanted!r}.")
    if wanted is not True and wanted != AUTO:
        path = Path(wanted)
        if not os.path.isdir(path):  # of a name that no folder can have, too; `Path.is_dir` raises
            raise UsageError(f"{str(path)[:200]} can't be resumed from: there is no such folder.")
        if why := _unfit(path):
            hint = "Resume from another one; resume_from_checkpoint=True takes the newest whole one in output_dir"
            raise UsageError(f"{path} can't be resumed from: {why}. {hint}.")
        return str(path)
    passed: list[str] = []
    for path in checkpoints(folder).values():
        why = _unfit(path)
        if why is None:
            if passed:
                LOG.warning(f"Resuming from {path}. Passed over: {'; '.join(passed)}.")
            return str(path)
        passed.append(f"{path.name}: {why}")
    said = f" ({'; '.join(passed)})" if passed else ""
    if wanted is True:
        raise UsageError(f"{folder} holds no whole checkpoint{said}; start without resume_from_checkpoint.")
    LOG.warning(f"{folder} holds no whole checkpoint{said}: starting from the beginning.")
    return None


def _unfit(path: Path) -> str | None:
    if why := flaw(path):
        return why
    if why := _foreign_state(path):
        return why
    if lacks_optimizer(path):
        return (
            "it was saved with save_only_model=True, without optimizer, schedule and random states "
            f"(continue_from={str(path)!r} goes on from its adapter with new ones)"
        )
    return None


def _foreign_state(path: Path) -> str | None:
    """Return what transformers' trainer can't take up of a checkpoint's state: it is of another version, or damaged."""
    from transformers.trainer_callback import TrainerState

    state = read_state(path) or {}
    known = {field.name for field in fields(TrainerState)}
    if foreign := sorted(state.keys() - known):
        return f"{STATE} has {foreign[0]!r}, which this version of transformers does not know"
    log, epoch = state.get("log_history"), state.get("epoch")
    rows = isinstance(log, list | None) and all(isinstance(row, dict) for row in log or ())
    if not rows or isinstance(epoch, bool) or not isinstance(epoch, int | float | None):
        return f"{STATE} is damaged (its log_history or epoch)"
    return None


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Give an empty folder; the files written there move into `folder` once all of them are complete and on disk.

    An interrupted save leaves the files of the save before; files that the new save does not write stay.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".part-*"):  # by a process that was killed; PEFT would take it for a second adapter
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as name:
        part = Path(name)
        yield part
        files = sorted(p for p in part.rglob("*") if p.is_file())
        for file in files:
            sync(file)
        _move({file: folder / file.relative_to(part) for file in files}, part)
        sync(folder)


def _move(targets: Mapping[Path, Path], part: Path) -> None:
    """Move files to their targets, all or, if the system refuses one, none; `part` is an empty folder beside them."""
    moved: dict[Path, Path | None] = {}  # target → its file of before, if there was one
    try:
        for number, (file, target) in enumerate(targets.items()):
            target.parent.mkdir(parents=True, exist_ok=True)
            before = part / f"before-{number}" if target.is_file() else None
            if before is not None:
                try:
                    os.link(target, before)
                except OSError:  # a file system without links
                    shutil.copy2(target, before)
            os.replace(file, target)
            moved[target] = before
    except OSError:
        for target, before in moved.items():
            with suppress(OSError):
                target.unlink() if before is None else os.replace(before, target)
        raise


def put_in_place(staged: Path, folder: Path) -> None:
    """Move a whole checkpoint out of its hidden folder, over one of the same step."""
    target, old = folder / staged.name, staged.parent / f"old-{staged.name}"
    sync(staged.parent)
    if os.path.lexists(target):
        os.rename(target, old)
    try:
        os.rename(staged, target)
    except OSError:
        if os.path.lexists(old):
            os.rename(old, target)
        raise
    sync(folder)
    if os.path.lexists(old):
        _remove(old)


def rotate(folder: Path, limit: int | None, keep: set[str]) -> None:
    """Delete the checkpoints of the earliest steps until `limit` whole ones are left.

    The newest whole one stays in any case, and so do those named in `keep`: the one of now and the best. Of those that
    are not whole, the ones before all that stay go, too; a folder that no trainer wrote stays.
    """
    if not limit or limit < 1:
        return
    found = {step: path for step, path in sorted(checkpoints(folder).items()) if _is_ours(path)}
    whole = [step for step, path in found.items() if flaw(path, digests=False) is None]
    kept = {step for step, path in found.items() if path.name in keep} | set(whole[-1:])
    free = [step for step in whole if step not in kept]
    kept |= set(free[max(len({*whole, *kept}) - limit, 0) :])
    for path in [path for step, path in found.items() if step not in kept and (step in whole or step < min(kept))]:
        LOG.info(f"Deleting {path}: save_total_limit is {limit}.")
        try:
            os.rename(path, hidden := folder / f"{STAGING}{path.name}")
            _remove(hidden)
        except OSError as error:
            LOG.warning(f"{path} could not be deleted, though save_total_limit is {limit} ({error.strerror}).")


def _is_ours(path: Path) -> bool:
    return (path / MANIFEST).exists() or (path / STATE).exists()


def _remove(path: Path) -> None:
    """Delete a folder, as far as that goes, or a link to one."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def recover(folder: Path) -> None:
    """Clear away what a killed process left; a checkpoint that was whole but not in its place yet is put there."""
    for staging in sorted(folder.glob(f"{STAGING}*")):
        for path in sorted(staging.glob(f"*{PREFIX}-*")):
            target = folder / path.name.removeprefix("old-")
            if not target.exists() and (path / MANIFEST).exists() and flaw(path) is None:
                os.rename(path, target)
    clear(folder)


def clear(folder: Path, hidden: str = f"{STAGING}*") -> None:
    """Delete the hidden folders of such names, as far as that goes."""
    for path in folder.glob(hidden):
        _remove(path)


def why_unwritten(error: BaseException) -> str | None:
    """Return what the file system said, if `error`, or what it comes from, is about writing a file; else None."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and not isinstance(seen, SaveError | ConnectionError | TimeoutError):
            return seen.strerror or str(seen)
        if not isinstance(seen, SaveError) and _TORCH.search(str(seen)):  # in words of torch's or safetensors' own
            return f"it was cut short, as where a disk is full: {str(seen).splitlines()[0]}"
        seen = seen.__cause__ or seen.__context__
    return None


def unwritten(what: str, where: str | Path, why: str, folder: str | Path) -> SaveError:
    """Return the error for a save that failed; `folder` is where checkpoints lie."""
    last = last_complete_checkpoint(folder)
    good = f"the last good checkpoint is {last}" if last else f"no checkpoint lies in {folder}"
    return SaveError(f"{what} can't be written to {where} ({why}); nothing half-written was left, {good}.")


def check_there(folder: Path) -> None:
    """Raise the system's error if a folder has gone."""
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "The folder has vanished", str(folder))
