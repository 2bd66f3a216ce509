"""What all callbacks that watch a training share: when they measure, and where it goes."""

import math
from typing import Any

from transformers import TrainerCallback

from hfproj.errors import UsageError
from hfproj.features.views import FixedViews
from hfproj.training.checks import is_stream

IMAGES = 256  # of the probe batch


class Watch(TrainerCallback):
    """Measures at the start, every so many steps and at the end of a training, and records it in `trainer.history`.

    A subclass gives `measure`. `ProjectionTrainer` calls `bind` with itself.

    Args:
        every: Optimizer steps between two measurements.

    Raises:
        UsageError: `every` is no positive number; on training, another trainer than `ProjectionTrainer`.
    """

    def __init__(self, every: int | None):
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise UsageError(f"every={every!r}: expected a number of steps, at least 1.")
        self.every = every
        self.trainer: Any = None
        self._measured_at = -1

    def bind(self, trainer: Any) -> None:
        """Join `trainer`; called when the callback is given to it."""
        self.trainer = trainer

    def measure(self) -> dict[str, float]:
        """Return what is recorded of the model as it is now."""
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure before the first step; a resumed training has done so before."""
        if self.trainer is None:
            raise UsageError(f"{type(self).__name__} works in hfproj.ProjectionTrainer(callbacks=[…]) only.")
        self._measured_at = -1
        if state.global_step == 0:
            self._record(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where it is time."""
        if self.is_due(state.global_step):
            self._record(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where training stopped."""
        if self._measured_at != state.global_step:
            self._record(state.global_step)

    def is_due(self, step: int) -> bool:
        """Whether to measure after `step` steps."""
        return step % self.steps_between == 0

    def _record(self, step: int) -> None:
        self._measured_at = step
        self.trainer.record(self.measure())

    @property
    def steps_between(self) -> int:
        """Optimizer steps between two measurements."""
        assert self.every is not None
        return self.every


class ProbeWatch(Watch):
    """A `Watch` of fixed views of a few images, in eval mode.

    Args:
        every: Optimizer steps between two measurements. None: as many as `PASSES` passes over the probe batch take, so
            that the measurements take less than a hundredth of the training: ⌈PASSES · images / joint batch⌉.
        images: Of the probe batch, evenly spaced over the data set.
        dataset: Where they come from; None: the trainer's `eval_dataset` (the first, of several), else its
            `train_dataset`. Labels are not used.

    Raises:
        UsageError: as `Watch`; fewer than two images; on training, no data set but a stream.
    """

    PASSES = 60  # a forward pass is a third of a step

    def __init__(self, *, every: int | None = None, images: int = IMAGES, dataset: Any = None):
        super().__init__(every)
        if images < 2:
            raise UsageError(f"images={images}: expected at least 2, whose spread can be measured.")
        self.images, self.dataset = images, dataset

    @property
    def views(self) -> FixedViews:
        """The probe batch, which callbacks with the same data set and number of images share."""
        dataset = self.dataset
        if dataset is None:
            found = self.trainer.eval_dataset
            found = next(iter(found.values())) if isinstance(found, dict) else found
            dataset = found if found is not None else self.trainer.train_dataset
        if dataset is None or is_stream(dataset):
            raise UsageError(
                f"{type(self).__name__} watches fixed images, and a stream has none: pass dataset=, for example "
                "list(itertools.islice(stream, 256))."
            )
        kept = self.trainer.probe_batches
        if (id(dataset), self.images) not in kept:
            args = self.trainer.args
            kept[id(dataset), self.images] = FixedViews(
                dataset, self.trainer.data_collator, images=self.images, batch_size=args.per_device_eval_batch_size
            )
        return kept[id(dataset), self.images]

    @property
    def steps_between(self) -> int:
        """Optimizer steps between two measurements."""
        if self.every is not None:
            return self.every
        args = self.trainer.args
        joint = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        return max(1, math.ceil(self.PASSES * self.images / joint))
