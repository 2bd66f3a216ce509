"""Which images of a run could not be read and were skipped (``on_bad_image="skip"``): counted, listed, resumed.

Batches bring them from the workers (`hfproj.data.indexing`); whenever something is logged or saved the processes tell
each other, and the trainer's state keeps them in each checkpoint.
"""

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hfproj import distributed
from hfproj.data.indexing import SKIPPED, IndexedDataset, StreamDataset
from hfproj.errors import UsageError
from hfproj.results import Results

LOG = logging.getLogger("hfproj.training")
_LISTED = 1000  # in results.json, with their reasons
RULES = {
    IndexedDataset: "in place of each comes an image that is drawn from (epoch, index)",
    StreamDataset: "they are left out, and the next ones move up",
}


def skipping(dataset: Any, policy: str, collator: Any) -> Any:
    """Return a data set that skips images which the collator could not read, where the policy is ``"skip"``.

    Raises:
        UsageError: If the collator reads no images.
    """
    if policy == "raise" or dataset is None:
        return dataset
    if not hasattr(collator, "image_column"):
        what = f"on_bad_image='skip' needs a collator of images with an image_column, got {type(collator).__name__}"
        raise UsageError(f"{what}. Take hfproj.ImageViews, or IndexedDataset(dataset, on_bad_image='skip').")
    dataset = copy.copy(dataset)
    dataset.on_bad_image, dataset.image_column = policy, collator.image_column
    dataset.channels = len(collator.mean) if hasattr(collator, "mean") else None
    return dataset


class SkippedImages(TrainerCallback, ExportableState):
    """Keeps index → reason of the skipped images of all processes, from the beginning of the run."""

    def __init__(self, dataset: Any = None, images: Iterable[tuple[int, str]] = ()):
        self.kind = StreamDataset if isinstance(dataset, StreamDataset) else IndexedDataset
        self.images, self.said = dict(images), 0

    @classmethod
    def of(cls, dataset: Any) -> "list[SkippedImages]":
        """Return the callback for a data set that skips images, none for another."""
        return [cls(dataset)] if getattr(dataset, "on_bad_image", "raise") == "skip" else []

    def check_batch(self, inputs: Mapping[str, Any]) -> None:
        """Note what a training batch stands for."""
        self.images |= dict(inputs.get(SKIPPED) or ())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up what a checkpoint says, of which transformers restores nothing by default."""
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]["images"]
        self.images = dict(map(tuple, kept)) if state.global_step else {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the other processes, where something is to be logged or saved."""
        if control.should_log or control.should_save:
            self._gather()

    on_epoch_end = on_step_end

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the other processes, and the log."""
        self._gather()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the count to the line."""
        if self.images and state.log_history and logs is not None and "loss" in logs:
            logs["skipped_images"] = state.log_history[-1]["skipped_images"] = len(self.images)

    def state(self) -> dict[str, Any]:
        """Return what the trainer's state keeps in a checkpoint."""
        return {"args": {}, "attributes": {"images": [list(pair) for pair in sorted(self.images.items())]}}

    def note(self, results: Results) -> None:
        """Write into `results` how many images were skipped, by which rule, which and why."""
        if not self.images or "skipped_images" in results.config:
            return
        rule, images = RULES[self.kind], sorted(self.images.items())
        listed = [list(pair) for pair in images[:_LISTED]]
        results.config["skipped_images"] = {"count": len(images), "rule": rule, "images": listed}
        results.notes.append(f"{_count(images)} of training could not be read; {rule}.")

    def _gather(self) -> None:
        for images in distributed.gather_objects(self.images):
            self.images |= images
        if len(self.images) > self.said and distributed.rank() == 0:
            first = min(self.images)
            LOG.warning(f"{_count(self.images)} can't be read; {RULES[self.kind]}. Image {first}: {self.images[first]}")
        self.said = len(self.images)


def _count(images: Any) -> str:
    return f"{len(images)} image{'s' * (len(images) > 1)}"
