"""Where a run stands in its data, counted in images: what a resumed run skips, whatever its batch is.

transformers skips so many batches as there were steps. Under another batch that would be other images; here the step
is counted anew, in the steps of now, where it falls on one, and the resume is refused where it does not.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfproj.errors import UsageError
from hfproj.results.history import HISTORY_FILE, read_history, write_history
from hfproj.saving.folders import checkpoints
from hfproj.saving.manifest import STATE, read_manifest, read_state

LOG = logging.getLogger("hfproj.training")


@dataclass(frozen=True)
class Course:
    """How a run goes through its data.

    Attributes:
        length: Images of the data set.
        batch: Images that the objective sees at once, on all processes.
        images: Images of an optimizer step.
        steps: Optimizer steps of an epoch.
        seed: Of the order.
        shuffle: Whether the order is random.
        data: What some of the items hold, as a digest; None where that is not known.
    """

    length: int
    batch: int
    images: int
    steps: int
    seed: int
    shuffle: bool
    data: str | None = None

    def order(self) -> str:
        """Return in words what decides the order."""
        return f"{self.length} images in {f'the order of seed {self.seed}' if self.shuffle else 'their own order'}"

    def at(self, step: int, before: "Course") -> int:
        """Return the step of this course that stands where `step` of another one did.

        Raises:
            UsageError: If there is none: images would be skipped, or seen twice.
        """
        epoch, steps = divmod(step, before.steps)
        seen = steps * before.images
        if seen and self.data != before.data and None not in (self.data, before.data):
            raise UsageError(
                f"The checkpoint stands {seen} images into an epoch of other data: some of its {before.length} items "
                "differ from this run's. Give the same data set, or resume from a checkpoint at the end of an epoch; "
                "ignore_data_skip=True starts the epoch again."
            )
        same_order = (self.length, self.seed, self.shuffle) == (before.length, before.seed, before.shuffle)
        if seen and not same_order:
            raise UsageError(
                f"The checkpoint stands {seen} images into an epoch of {before.order()}; this run's has "
                f"{self.order()}. Give the same data set and data_seed, or resume from a checkpoint at the end of an "
                "epoch; ignore_data_skip=True starts the epoch again."
            )
        if seen % self.images:
            raise UsageError(
                f"The checkpoint stands {seen} images into an epoch, in steps of {before.images}; in this run's steps "
                f"of {self.images} images some would be skipped or seen twice. {_same(before)} (or a divisor of "
                f"{seen}), or resume from a checkpoint at the end of an epoch."
            )
        return epoch * self.steps + seen // self.images


def counted(checkpoint: Path, own: Course | None, processes: int, hidden: Path) -> Path:
    """Return the checkpoint; where its steps are not this run's, a copy of it in `hidden`, whose step is counted anew.

    Raises:
        UsageError: If the run can't stand where the checkpoint does, or has checkpoints of later steps in its folder.
    """
    manifest = read_manifest(checkpoint)
    if manifest is None:
        LOG.warning(f"{checkpoint} has no manifest (hfproj 0.1.0 wrote none): its files can't be verified.")
    if manifest is None or manifest["course"] is None or own is None:
        return checkpoint
    try:
        before, step = Course(**manifest["course"]), manifest["step"]
    except TypeError as error:
        raise UsageError(
            f"{checkpoint} says otherwise where it stands in its data than this version of hfproj reads ({error}): "
            "resume with the version that wrote it, or pass ignore_data_skip=True."
        ) from error
    new = own.at(step, before)
    if manifest["processes"] != processes:
        LOG.warning(f"{checkpoint} is of {manifest['processes']} processes, this run has {processes}: dropout differs.")
    if before.batch != own.batch:
        LOG.warning(f"The objective saw {before.batch} images at once, and sees {own.batch} from now on.")
    if new == step:
        return checkpoint
    if later := [n for n in checkpoints(hidden.parent) if n > new]:
        raise UsageError(
            f"Step {step} of {before.images} images is step {new} of this run's {own.images}, but {hidden.parent} "
            f"holds checkpoints of later steps ({max(later)}). {_same(before)}, or give another output_dir with "
            f"resume_from_checkpoint={str(checkpoint)!r}."
        )
    LOG.warning(f"Steps had {before.images} images and have {own.images} now: step {step} is counted as {new}.")
    return _converted(checkpoint, step, new, hidden)


def _same(before: Course) -> str:
    return f"Make per_device_train_batch_size × gradient_accumulation_steps × processes {before.images}"


def _converted(checkpoint: Path, step: int, new: int, folder: Path) -> Path:
    """Return a copy, made of links, whose step is `new`."""
    import torch

    target = folder / checkpoint.name
    target.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.name not in (STATE, "scheduler.pt", HISTORY_FILE):
            os.symlink(path.resolve(), target / path.name)
    state = read_state(checkpoint) or {}
    state["global_step"] = new
    state["best_global_step"] = None  # counted in other steps; best_model_checkpoint says which it is
    state["log_history"] = [_scaled(row, step, new) for row in state.get("log_history", ())]
    (target / STATE).write_text(json.dumps(state))
    if (checkpoint / HISTORY_FILE).exists():
        write_history([_scaled(row, step, new) for row in read_history(checkpoint)], target / HISTORY_FILE)
    file = checkpoint / "scheduler.pt"  # DeepSpeed has none
    schedule = torch.load(file, weights_only=True) if file.exists() else {}
    if "lr_lambdas" in schedule:
        schedule |= {"last_epoch": new, "_step_count": new + 1}
    elif "num_bad_epochs" not in schedule:  # which counts evaluations, not steps
        raise UsageError(
            f"{checkpoint} is of another batch or data set, and its schedule can't be counted in other steps; resume "
            "with the batch and the data set that it was written with."
        )
    torch.save(schedule, target / "scheduler.pt")
    return target


def _scaled(row: Mapping[str, Any], step: int, new: int) -> dict[str, Any]:
    return {**row, "step": round(row["step"] * new / step)} if step and "step" in row else dict(row)
