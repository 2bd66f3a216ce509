"""Callbacks that measure while training: the parts that all share, `SpectrumCallback` and `UpdateRatioCallback`.

A `Watch` measures every so many steps and records in `trainer.history`; a `ProbeWatch` does so on fixed views of a few
images. `UpdateRatioCallback` compares how fast head and backbone move:

    update ratio     ‖θ_{t+1} − θ_t‖ / ‖θ_t‖                   what the optimizer did, of all parameters of a part
    gradient ratio   η ‖∇θ‖ / (‖θ‖ + 1e-7)                     what plain gradient descent would do, η the learning rate
    timescale ratio  gradient ratio of the head over that of the backbone

A healthy update ratio is of the order of 1e-3. Where the head moves much faster than the backbone, the backbone trains
against a head that has settled.

References:
    Chaudhry 2026, arXiv 2605.17180 (Table 3: the timescale ratio is 31 to 653 without BatchNorm, 0.41 to 2.7 with).
"""

import difflib
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hfproj import distributed
from hfproj.checking import checked
from hfproj.data.kinds import first_of, is_stream
from hfproj.diagnostics.by_name import MEASURES, OF_VIEWS
from hfproj.errors import UsageError, check_choice, unknown
from hfproj.features.reader import Reader
from hfproj.features.similarity import mutual_knn
from hfproj.features.views import FixedViews
from hfproj.heads.layers import chosen_layers, split_layers
from hfproj.training.optimizer import PART
from hfproj.training.setup import Args, Control, ProjectionTrainer, State
from hfproj.tuner.active import active_modules
from hfproj.typing import Data, OneOf

IMAGES = 256  # of the probe batch
_EPS = 1e-7


class Watch(TrainerCallback):
    """Measures at the start, after `every` optimizer steps and at the end of a training, into `trainer.history`.

    A subclass gives `measure`. `ProjectionTrainer` calls `bind` with itself, and `check_batch`, if a subclass has it,
    with each training batch; what it keeps of the last one is `trainer.last_batch`.

    Raises:
        UsageError: If `every` is no positive number; on training, in another trainer than `ProjectionTrainer`.
    """

    trainer: ProjectionTrainer

    def __init__(self, every: int | None):
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise UsageError(f"Expected every to be a number of steps, at least 1, got {every!r}.")
        self.every = every
        self._measured_at = -1

    def bind(self, trainer: ProjectionTrainer) -> None:
        """Join `trainer`; called when the callback is given to it."""
        self.trainer = trainer

    def measure(self) -> dict[str, float]:
        """Return what is recorded of the model in its present state."""
        raise NotImplementedError

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Measure before the first step; a resumed training has done so before."""
        check_bound(self)
        self._measured_at = -1
        if state.global_step == 0:
            self._record(0)

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Measure when it is due."""
        if self.is_due(state.global_step):
            self._record(state.global_step)

    def on_train_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
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


class ImageWatch(Watch):
    """A `Watch` of a few evenly spaced images of `dataset`, by default the trainer's `eval_dataset` (the first).

    Where `every` is None, ⌈PASSES · images / global batch⌉ steps: measuring takes less than a hundredth of the time.
    """

    PASSES = 60  # a forward pass is a third of a step

    def __init__(self, *, every: int | None, images: int, dataset: Data | None):
        super().__init__(every)
        self.images, self.dataset = images, dataset

    def find_dataset(self, default: Any = None) -> Any:
        """Return the data set whose images are watched, the trainer's `eval_dataset` before `default`; no stream."""
        candidates = (self.dataset, first_of(self.trainer.eval_dataset), default)
        dataset = next((found for found in candidates if found is not None), None)
        if dataset is not None and is_stream(dataset):
            hint = f"pass dataset=, for example list(itertools.islice(stream, {self.images}))"
            raise UsageError(f"{type(self).__name__} watches fixed images, and a stream has none: {hint}.")
        return dataset

    @property
    def steps_between(self) -> int:
        """Optimizer steps between two measurements."""
        if self.every is not None:
            return self.every
        args = self.trainer.args
        batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        return max(1, math.ceil(self.PASSES * self.images / batch))


class ProbeWatch(ImageWatch):
    """A `Watch` of fixed views of a few images, in eval mode.

    Args:
        every: Optimizer steps between two measurements; None: so many that these take less than 1 % of the time.
        images: Number of images of the probe batch, evenly spaced over the data set.
        dataset: Their source; None: the trainer's (first) `eval_dataset`, else `train_dataset`. Labels are not used.

    Raises:
        UsageError: As `Watch`; if there are fewer than two images; on training, if the data set is a stream.
    """

    def __init__(self, *, every: int | None = None, images: int = IMAGES, dataset: Data | None = None):
        super().__init__(every=every, images=images, dataset=dataset)
        if images < 2:
            raise UsageError(f"Expected images to be at least 2, whose spread can be measured, got {images}.")

    @property
    def views(self) -> FixedViews:
        """The probe batch, which callbacks with the same data set and number of images share."""
        trainer = self.trainer
        dataset = self.find_dataset(trainer.train_dataset)
        kept, key = trainer.probe_batches, (id(dataset), self.images)
        if key not in kept:
            size = trainer.args.per_device_eval_batch_size
            kept[key] = FixedViews(dataset, trainer.data_collator, images=self.images, batch_size=size)
        return kept[key]


def check_bound(callback: TrainerCallback) -> None:
    """Refuse a callback that was not given to a `ProjectionTrainer`."""
    if getattr(callback, "trainer", None) is None:
        raise UsageError(f"{type(callback).__name__} works in hfproj.ProjectionTrainer(callbacks=[…]) only.")


OVERLAP, _NEIGHBOURS = "knn_overlap", 20  # with h of the backbone without its adapter; of the first view
MEASURED = (*MEASURES, OVERLAP)
Metric = OneOf[
    "rankme", "std", "effective_rank", "stable_rank", "participation_ratio", "nesum", "alpha_req", "condition_number",
    "uniformity", "wasserstein_uniformity", "offdiag_energy", "whiteness", "matrix_entropy", "self_cluster",
    "positive_cosine", "alignment", "lidar", "knn_overlap",
]  # fmt: skip
_OTHERS = ("online_", "update_ratio_", "gradient_ratio_", "timescale_ratio", "lambda_")  # by other callbacks, later
DEFAULT: tuple[Metric, ...] = ("rankme", "std", "positive_cosine")


def check_recorded(name: str) -> None:
    """Refuse a name of the history that is misspelt, or lacks the ``_h`` or ``_z`` behind the metric."""
    if name in MEASURED:
        raise UsageError(f"Expected a name in the history in limits, got {name!r}; write '{name}_h' or '{name}_z'.")
    stem, _, layer = name.rpartition("_")
    if layer in ("h", "z") and stem not in MEASURED and difflib.get_close_matches(stem, MEASURED, n=1, cutoff=0.8):
        raise unknown("measure in limits", name, [f"{metric}_{layer}" for metric in MEASURED])


def check_measured(trainer: ProjectionTrainer, names: Iterable[str]) -> None:
    """Refuse, after the first step, names that no callback of `trainer` measures; one of somebody's own may yet do."""
    callbacks = trainer.callback_handler.callbacks
    known = {f"{metric}_{layer}" for c in callbacks for metric in getattr(c, "metrics", ()) for layer in "hz"}
    known |= {"loss", "objective", "grad_norm", "learning_rate", *(f"{n}_grad_share" for n in trainer.regularizers)}
    known |= {*trainer._terms, *(name for row in trainer.history for name in row)} - {"step", "epoch"}
    own = any(hasattr(c, "bind") and not type(c).__module__.startswith("hfproj.") for c in callbacks)
    for name in () if own else names:
        if name not in known and not name.startswith(_OTHERS):
            raise unknown("measure in limits, which no callback of this training measures:", name, known)


class SpectrumCallback(ProbeWatch):
    """Records diagnostics of h and z: `trainer.history` gets ``rankme_h``, ``rankme_z``, ``std_h`` …, one row a step.

    They are those of `hfproj.diagnostics` over all views of the probe batch, whose images and augmentations stay the
    same, on any number of processes; the model is in eval mode. The log has them as ``probe_rankme_h`` …;
    ``batch_rankme_h`` there is that of the training batch. The history is written beside each saved adapter
    (``history.parquet``), and resumed from there.

    Args:
        metrics: Names of diagnostics: "rankme", "std" (of unit rows), "effective_rank", "stable_rank",
            "participation_ratio", "nesum", "alpha_req", "condition_number" (of the covariance, on its support),
            "uniformity", "wasserstein_uniformity", "offdiag_energy", "whiteness", "matrix_entropy", "self_cluster";
            with two or more views "positive_cosine", "alignment", "lidar"; "knn_overlap" (fraction of the 20
            nearest images, of few images a quarter, that are those of h without the adapter). For their cost see
            docs/diagnostics.md.
        every, images, dataset: As `ProbeWatch`.
        layers: Layers beside h and z: of the head, "head" for all, ``["head.0"]``: ``rankme_head.0`` …; of the
            backbone, as in `hfproj.extract_features`, which takes a second forward pass: ``rankme_layers.3`` …

    Raises:
        UsageError: If a metric is unknown, or as `ProbeWatch`; in a trainer, if its model does not have a layer.

    Example:
        >>> SpectrumCallback(metrics=["rankmee"])
        Traceback (most recent call last):
        hfproj.errors.UsageError: Unknown metric 'rankmee'. Did you mean 'rankme'? ...
    """

    @checked
    def __init__(
        self, *, metrics: Sequence[Metric] = DEFAULT, every: int | None = None, images: int = IMAGES,
        dataset: Data | None = None, layers: Sequence[int | str] | OneOf["all", "head"] = (),
    ):  # fmt: skip
        super().__init__(every=every, images=images, dataset=dataset)
        self.layers, (self._inside, self._blocks) = layers, split_layers(layers)
        if isinstance(metrics, str):
            raise UsageError(
                f"Expected metrics as a list of names, got {metrics!r}; write metrics={metrics.split(',')}."
            )
        for name in metrics:
            check_choice("metric", name, MEASURED)
        self.metrics = tuple(metrics)
        self._bare: Tensor | None = None

    def bind(self, trainer: ProjectionTrainer) -> None:
        """Join `trainer`."""
        super().bind(trainer)
        if self.layers:
            Reader(trainer.bare_model(), trainer.args.device, layers=self.layers)  # refuses one that is not there

    def measure(self) -> dict[str, float]:
        """Return each metric of h and z; NaN where features are not finite, or where the metric is not defined."""
        with self.trainer.accelerator.autocast():
            bare, device = self.trainer.bare_model(), self.trainer.args.device
            head = active_modules(bare).head if self._inside else None
            found = self.views.layers(self.trainer.model, device, head=head)
            if self._blocks:
                found = self.views.read(bare, device, layers=self._blocks) | found
            if OVERLAP in self.metrics and self._bare is None:
                self._bare = self.views.bare(bare, device)[0]
        values: dict[str, float] = {}
        if distributed.rank() == 0:
            names = [name for name in self.metrics if name not in OF_VIEWS or found["h"].shape[0] > 1]
            for layer, f in chosen_layers(found, self._inside).items():
                values |= {f"{name}_{layer}": _value(name, f, self._bare) for name in names}
        return distributed.broadcast_object(values)  # the same on all processes, to the last bit


def _value(name: str, f: Tensor, bare: Tensor | None) -> float:
    try:
        finite = bool(torch.isfinite(f).all())
        if name == OVERLAP and bare is not None:
            return mutual_knn(f[0], bare, k=max(1, min(_NEIGHBOURS, len(bare) // 4))) if finite else math.nan
        return MEASURES[name](f if name in OF_VIEWS else f.flatten(0, 1)) if finite else math.nan
    except UsageError as error:  # too few dimensions for α, for example: no reason to end a training
        warnings.warn(f"{name} is not measured: {error}", stacklevel=2)
        return math.nan


class UpdateRatioCallback(Watch):
    """Records ``update_ratio_head``, ``update_ratio_backbone``, ``gradient_ratio_…`` and ``timescale_ratio``.

    Only parameters that are trained count: of a LoRA, its factors.

    Args:
        every: Steps between two measurements. Each keeps a copy of the trained parameters for one step.

    Raises:
        UsageError: As `Watch`; under FSDP and DeepSpeed, which split parameters.
    """

    @checked
    def __init__(self, *, every: int = 50):
        super().__init__(every)
        self._before: list[list[Tensor]] | None = None
        self._gradients: dict[str, float] = {}

    def bind(self, trainer: ProjectionTrainer) -> None:
        """Join `trainer`."""
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise UsageError("UpdateRatioCallback needs whole parameters: FSDP and DeepSpeed split them; leave it out.")
        super().bind(trainer)

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Measure nothing yet: no step was taken."""
        check_bound(self)
        self._before = None

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Keep the parameters of a step that will be measured, and take the ratios of its gradients."""
        self._before = None
        if not self.is_due(state.global_step + 1):
            return
        groups = kwargs["optimizer"].param_groups
        self._before = [[p.detach().clone() for p in group["params"]] for group in groups]
        sizes = _by_part(groups, [_norm(group["params"]) for group in groups])
        gradients = [[p.grad for p in group["params"] if p.grad is not None] for group in groups]
        steps = _by_part(groups, [float(g["lr"]) * _norm(grads) for g, grads in zip(groups, gradients)])
        self._gradients = {part: steps[part] / (sizes[part] + _EPS) for part in sizes}

    @torch.no_grad()
    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Record the ratios of the step that was just taken, unless it was skipped."""
        before, self._before = self._before, None
        if before is None or self.trainer.accelerator.optimizer_step_was_skipped:
            return
        groups = kwargs["optimizer"].param_groups
        sizes = _by_part(groups, [_norm(tensors) for tensors in before])
        differences = [[p - was for p, was in zip(g["params"], tensors)] for g, tensors in zip(groups, before)]
        moved = _by_part(groups, [_norm(tensors) for tensors in differences])
        values = {f"update_ratio_{part}": moved[part] / (sizes[part] + _EPS) for part in moved}
        values |= {f"gradient_ratio_{part}": ratio for part, ratio in self._gradients.items()}
        if self._gradients.get("backbone"):
            values["timescale_ratio"] = self._gradients["head"] / self._gradients["backbone"]
        self.trainer.record(values)

    def on_train_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Measure nothing: there is no step to measure."""


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(tensors)) if tensors else 0.0


def _by_part(groups: list[dict[str, Any]], norms: list[float]) -> dict[str, float]:
    """Return the norms of backbone and head from those of parameter groups; a predictor belongs to the head."""
    squares: dict[str, float] = {}
    for group, norm in zip(groups, norms):
        part = "backbone" if group.get(PART) == "backbone" else "head"
        squares[part] = squares.get(part, 0.0) + norm**2
    return {part: square**0.5 for part, square in squares.items()}
