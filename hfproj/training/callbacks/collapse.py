"""`CollapseCallback`: says when h or z collapse while training, why that is likely, and stops or goes back.

Likely causes, in the order in which they are looked for, in the objective, the head and how the weights moved:

1. Learning rate: the optimizer moved head or backbone by more than `FAST` of their norm in one step.
2. Stop-gradient: an objective of predictions passes a gradient to the projections that it should hold still.
3. Predictor: an objective that is as low at collapse as anywhere rests on a predictor, and no predictor learns.
4. Temperature: collapsed rows cost hardly more than rows spread evenly, since similarities hardly count.
5. BatchNorm: an objective that is as low at collapse as anywhere, and neither head nor predictor has a norm.
6. Objective: nothing in it, and no regularizer, keeps rows apart.
"""

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hfproj import distributed
from hfproj.checking import checked
from hfproj.errors import CollapseWarning, UsageError
from hfproj.saving.folders import complete_checkpoints
from hfproj.saving.start import Start
from hfproj.training.callbacks.curvature import HeadLoss, mean_over_processes
from hfproj.training.callbacks.watching import (
    DEFAULT,
    MEASURED,
    OVERLAP,
    ProbeWatch,
    SpectrumCallback,
    UpdateRatioCallback,
    check_bound,
    check_measured,
    check_recorded,
)
from hfproj.training.setup import Args, Control, Limits, ProjectionTrainer, State
from hfproj.tuner.active import active_modules
from hfproj.typing import OneOf

FAST = 0.3  # of the norm, in a step; healthy runs stay below a tenth
ROUNDING = 1e-9
FLAT = 0.05  # of the loss at collapse: what rows spread evenly save


class Cause(NamedTuple):
    """A likely cause: its name, and what was seen with what to do."""

    name: str
    why: str


MOVED = Cause("neighbours", "Lower learning_rate, take fewer steps, or give another limit.")  # of an overlap's alarm


def likely_causes(trainer: ProjectionTrainer) -> list[Cause]:
    """Return the likely causes of a collapse, the likeliest first; "unknown" if nothing is conspicuous."""
    watch = next((c for c in trainer.callback_handler.callbacks if isinstance(c, ProbeWatch)), ProbeWatch())
    watch.bind(trainer)
    causes = [*_learning_rate(trainer), *_objective(trainer, HeadLoss(trainer, watch.views))]
    why = "Weights move slowly, and the objective keeps rows apart. Lower learning_rate, or add vicreg_terms."
    return causes or [Cause("unknown", why)]


def flat_loss(trainer: ProjectionTrainer) -> float | None:
    """Return the objective's value for equal rows of z if rows spread evenly cost hardly, but measurably, less."""
    objective = copy.deepcopy(trainer.objective).double().eval()
    last = trainer.last_batch.get("z")
    if set(getattr(objective, "needs", ())) & {"prediction", "target", "scores"} or not isinstance(last, Tensor):
        return None
    views, images, dim = last.shape
    own = torch.arange(images, device=last.device)
    given = {"labels": own, "index": own, "scales": dict(active_modules(trainer.bare_model()).scales) or None}
    like = last.double()
    try:
        with torch.no_grad():
            rows = (torch.ones_like(like), _directions(views, images, dim, like))
            collapsed, spread = (float(objective(z, **given, step=trainer.step())[0]) for z in rows)
    except UsageError:  # rows that can't be whitened, for example, have no value
        return None
    return collapsed if ROUNDING * max(1.0, abs(collapsed)) < collapsed - spread <= FLAT * abs(collapsed) else None


def _learning_rate(trainer: ProjectionTrainer) -> list[Cause]:
    rows, rate = trainer.history, trainer.args.learning_rate
    found = ((max((r.get(f"update_ratio_{p}") or 0.0 for r in rows), default=0.0), p) for p in ("head", "backbone"))
    ratio, part = max(found, key=lambda pair: pair[0])
    why = (
        f"The {part} moved by {ratio:.0%} of its norm in one step (update_ratio_{part}); lower learning_rate, {rate:g} "
        f"at its peak, to {rate / 10:g} or less, or raise warmup_steps."
    )
    return [Cause("learning rate", why)] if ratio > FAST else []


def _objective(trainer: ProjectionTrainer, loss: HeadLoss) -> list[Cause]:
    needs: frozenset[str] = getattr(loss.objective, "needs", frozenset())
    name = type(loss.objective).__name__
    causes: list[Cause] = []
    if "prediction" in needs and _gradient_of_projections(loss) > 0:
        why = f"{name} passes a gradient to the projections that the predictions are compared with; detach them."
        causes.append(Cause("stop-gradient", why))
    (views, images, _), dim = loss.h.shape, loss.modules.head.out_dim
    rows = (loss.h.new_ones(views, images, dim), _directions(views, images, dim, loss.h))
    collapsed, spread = (_value(loss, z) for z in rows)
    if collapsed is None or spread is None:
        return causes
    saved = collapsed - spread
    if saved > ROUNDING * max(1.0, abs(collapsed), abs(spread)):
        temperature = getattr(loss.objective, "temperature", None)
        if saved <= FLAT * abs(collapsed) and temperature is not None:
            why = (
                f"At temperature {temperature:g} similarities hardly count: collapsed rows cost {collapsed:.4g}, rows "
                f"spread evenly {spread:.4g}. Lower it, to 0.1 or 0.2."
            )
            causes.append(Cause("temperature", why))
        return causes
    predictor = loss.modules.predictor
    if "prediction" in needs and (predictor is None or not any(True for _ in predictor.parameters())):
        why = (
            f"{name} is as low at collapse as anywhere, and only a predictor that learns keeps it away: "
            "ProjectionHeadConfig(predictor={'head': 'mlp'})."
        )
        causes.append(Cause("predictor", why))
    held = "prediction" in needs or "target" in needs
    if held and not any("Norm" in type(m).__name__ for m in loss.modules.modules()):
        causes.append(Cause("BatchNorm", f"{name} has no negatives, and the head no norm; make it with norm='batch'."))
    if not held and not trainer.regularizers:
        why = f"Nothing in {name} keeps rows apart; add a regularizer, for example vicreg_terms."
        causes.append(Cause("objective", why))
    return causes


def _gradient_of_projections(loss: HeadLoss) -> float:
    """Return the norm of ∂L/∂z with the predictions held still: 0 where z is detached, as it should be."""
    with torch.no_grad():
        z = loss.modules.head(loss.h)
        prediction = z if loss.modules.predictor is None else loss.modules.predictor(z)
    prediction = prediction.clone().requires_grad_()  # before z gets a gradient: an identity returns z itself
    value = loss.of_projections(z.requires_grad_(), prediction)
    (gradient,) = torch.autograd.grad(value, z, allow_unused=True, materialize_grads=True)
    return float(mean_over_processes(gradient.detach().norm()))


def _value(loss: HeadLoss, z: Tensor) -> float | None:
    """Return the loss where predictions and targets are the projections; None where it is not defined."""
    copies, target = loss.given["target"], None
    try:
        with torch.no_grad():
            if copies is not None:  # targets of another width are prototype logits
                rows = z[: len(copies)]
                target = rows if copies.shape[-1] == z.shape[-1] else loss.modules.prototypes(rows)
            return float(loss.of_projections(z, z, target))
    except UsageError:
        return None


def _directions(views: int, images: int, dim: int, like: Tensor) -> Tensor:
    """Return independent directions for the images, the same in all views."""
    generator = torch.Generator().manual_seed(distributed.rank())
    rows = torch.randn(images, dim, generator=generator, dtype=torch.float64)
    return nn.functional.normalize(rows, dim=-1).to(like).expand(views, -1, -1).contiguous()


ACTIONS = ("warn", "stop", "restore")
FRACTION_OF_START = {"rankme_h": 0.5, "std_h": 0.5}  # the backbone was pretrained: losing half of it is no adaptation
SPREAD = 0.1  # of z, against rows spread evenly
RANK = 2.0  # of z: on a line or in a plane


class Limit(NamedTuple):
    """Least and largest value that are no alarm (None: no limit), and how a value outside is described."""

    least: float | None
    largest: float | None
    words: str

    def excludes(self, value: float | None) -> bool:
        """Whether `value` is outside, or not finite."""
        low, high = self.least, self.largest
        return value is None or (low is not None and value < low) or (high is not None and value > high)


@dataclass(frozen=True)
class Alarm:
    """What a `CollapseCallback` saw.

    Attributes:
        step: The optimizer step after which it was seen.
        metric: Name of the number in the history that is out of its limits.
        value: Its value; None where it was not finite.
        limit: The limit, in words.
        causes: Likely causes, the likeliest first.
        restored: The checkpoint or step that training went back to, or None.
    """

    step: int
    metric: str
    value: float | None
    limit: str
    causes: list[Cause]
    restored: str | None = None

    @property
    def what(self) -> str:
        """What it is about: a collapse, or h that has left the neighbours of the bare backbone, which is none."""
        return "More neighbours than the limit allows had changed" if self.causes == [MOVED] else "Collapse"

    @property
    def message(self) -> str:
        """What happened and what to do, in words."""
        value = "not finite" if self.value is None else f"{self.value:.4g}"
        lines = [f"{self.what} at step {self.step}: {self.metric} is {value}, {self.limit}."]
        named = [(f"{'Or' if i else 'Likely cause'}: {c.name}. ", c) for i, c in enumerate(self.causes)]
        lines += [c.why if c == MOVED else f"{head}{c.why}" for head, c in named]
        if self.restored is not None:
            lines.append(f"The adapter is that of {self.restored} again.")
        return " ".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON, for `hfproj.Results.geometry["collapse"]`."""
        causes = [cause._asdict() for cause in self.causes]
        return asdict(self) | {"causes": causes, "cause": self.causes[0].name, "what": self.message}


class CollapseCallback(TrainerCallback):
    """Raises an alarm when measurements of `trainer.history` leave their limits several times in a row.

    Default limits: RankMe and std of h at half of what they were before training; std of z at a tenth of that of rows
    spread evenly over the sphere (0.1/√dim); RankMe of z at 2; an objective for which rows spread evenly cost hardly
    less than equal rows, at 5 % below what these cost (a softmax at a high temperature). z is not judged in the first
    steps, in which the running statistics of BatchNorm follow the head, nor the objective while the learning rate warms
    up. The measurements come from a `SpectrumCallback` and an `UpdateRatioCallback`, which are added to the trainer
    where it has none.

    The alarm is a `CollapseWarning`, once, `alarm`, and an alert in trackio where it is reported to. It names causes by
    what it sees: how far weights move in a step, whether the objective's value tells collapsed rows from spread ones,
    whether a gradient reaches the branch that is to be held still, whether there is a predictor and a norm.

    Args:
        limits: Name in the history → least value, or (least, largest) with None for no limit. They replace the default
            of the same name; None as the value drops it. "loss" and the objective's terms are names too.
        patience: Number of measurements in a row outside of their limits that raise the alarm.
        action: "warn"; "stop" ends the training, too; "restore" also goes back to the last checkpoint that was saved
            before the first of these measurements, or to where the training began (not with FSDP or DeepSpeed).
        warmup: Steps before which z and the objective are not judged.
        every: Steps between measurements, for the callbacks that it adds; None: as `SpectrumCallback`.

    Attributes:
        alarm: The `Alarm`, or None.

    Raises:
        UsageError: If the action is unknown, `patience` is below 1, a limit is no number, or its name is misspelt;
            after the first step of a training, if nothing in it measures what has a limit.

    Example:
        >>> CollapseCallback(action="explode")
        Traceback (most recent call last):
        hfproj.errors.UsageError: Expected action to be one of warn, stop, restore, got 'explode'.
    """

    trainer: ProjectionTrainer

    @checked
    def __init__(
        self, *, limits: Limits | None = None, patience: int = 2, action: OneOf["warn", "stop", "restore"] = "warn",
        warmup: int = 20, every: int | None = None,
    ):  # fmt: skip
        if action not in ACTIONS:
            raise UsageError(f"Expected action to be one of {', '.join(ACTIONS)}, got {action!r}.")
        if patience < 1 or warmup < 0:
            raise UsageError(f"Expected patience ≥ 1 measurement and warmup ≥ 0 steps, got {patience} and {warmup}.")
        if not isinstance(limits, Mapping | None):
            example = "{'rankme_h': 5.0}"
            raise UsageError(f"Expected limits as a dict, name → least value, got {type(limits).__name__}: {example}.")
        self.given = {name: None if v is None else _as_limit(name, v) for name, v in (limits or {}).items()}
        self.patience, self.action, self.warmup, self.every = patience, action, warmup, every
        self.alarm: Alarm | None = None
        self._flat_loss: float | None = None
        self._judged = -1
        self._start: tuple[Start, int] | None = None

    def bind(self, trainer: ProjectionTrainer) -> None:
        """Join `trainer`, and give it the callbacks that measure."""
        self.trainer = trainer
        there = trainer.callback_handler.callbacks
        watches = [c for c in there if isinstance(c, SpectrumCallback)]
        spectra = [c for c in watches if {"rankme", "std"} <= set(c.metrics)]
        limited = {name.rpartition("_")[0] for name, limit in self.given.items() if limit is not None}
        wanted: Any = limited & set(MEASURED) - {metric for c in watches for metric in c.metrics}
        if not spectra:
            spectra = [SpectrumCallback(metrics=[*DEFAULT, *sorted(wanted - set(DEFAULT))], every=self.every)]
            trainer.add_callback(spectra[0])
        elif wanted:
            first = spectra[0]
            more = SpectrumCallback(
                metrics=sorted(wanted), every=first.every, images=first.images, dataset=first.dataset
            )
            trainer.add_callback(more)
        split = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if not split and not any(isinstance(c, UpdateRatioCallback) for c in there):
            spectra[0].bind(trainer)  # it may come later in the list
            trainer.add_callback(UpdateRatioCallback(every=spectra[0].steps_between))

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Start anew."""
        check_bound(self)
        self.alarm, self._judged, run = None, -1, self.trainer
        whole = self.action == "restore" and not (run.is_fsdp_enabled or run.is_deepspeed_enabled)
        modules = (run.bare_model(), run.objective, *([run.ema.module] if run.ema is not None else []))
        self._start = (Start(modules), state.global_step) if whole else None
        self._learned_from = max(self.warmup, args.get_warmup_steps(state.max_steps))
        self._flat_loss, self._asked = None, False

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Judge what was measured since the last time."""
        if not self._asked:  # the value depends on the shape of a batch, and now there was one
            self._asked, self._flat_loss = True, flat_loss(self.trainer)
            check_measured(self.trainer, self.given)
        names = self.limits().keys()
        rows = [row for row in self.trainer.history if names & row.keys()]
        if self.alarm is not None or not rows or rows[-1]["step"] == self._judged:
            return
        self._judged = rows[-1]["step"]
        found = self._violation()
        if found is None:
            return
        metric, rows, limit = found
        value, lost = rows[-1][metric], metric.startswith(OVERLAP)
        lost = lost and value is not None and value < (self.limits()[metric].least or 0)
        causes = [MOVED] if lost else likely_causes(self.trainer)
        restored = self._restore(rows[0]["step"]) if self.action == "restore" else None
        self.alarm = Alarm(state.global_step, metric, value, limit, causes, restored)
        if self.action != "warn":
            control.should_training_stop = True
            control.should_save = False  # a checkpoint of the collapsed model, or one under a later step than its own
        if distributed.rank() == 0:
            warnings.warn(self.alarm.message, CollapseWarning, stacklevel=2)
            if any(type(c).__name__ == "TrackioCallback" for c in self.trainer.callback_handler.callbacks):
                import trackio

                title = f"{self.alarm.what} at step {self.alarm.step}: {self.alarm.metric}"
                trackio.alert(title=title, text=self.alarm.message, level=trackio.AlertLevel.ERROR)

    def limits(self) -> dict[str, Limit]:
        """Return the limits in force by name; fractions of the start need a history."""
        limits: dict[str, Limit] = {}
        for name, fraction in FRACTION_OF_START.items():
            start = next((row[name] for row in self.trainer.history if row.get(name) is not None), None)
            if start is not None:
                least = fraction * start
                limits[name] = Limit(least, None, f"below {least:.4g}, {fraction:.0%} of what it was at first")
        dim = active_modules(self.trainer.bare_model()).head.out_dim
        spread = SPREAD * dim**-0.5
        limits["std_z"] = Limit(spread, None, f"below {spread:.4g}, {SPREAD:.0%} of that of rows spread evenly")
        if dim >= 2 * RANK:
            limits["rankme_z"] = Limit(RANK, None, f"below {RANK:g}")
        if self._flat_loss is not None:
            name = "objective" if self.trainer.regularizers else "loss"  # with regularizers, the loss is their sum
            most = self._flat_loss - FLAT * abs(self._flat_loss)
            limits[name] = Limit(None, most, f"above {most:.4g}, {FLAT:.0%} below what equal rows cost")
        limits = {name: limit for name, limit in limits.items() if name not in self.given}
        return limits | {name: limit for name, limit in self.given.items() if limit is not None}

    def _violation(self) -> tuple[str, list[dict], str] | None:
        """Return the first metric whose last `patience` values were out of its limits, their rows, and the limit."""
        for name, limit in self.limits().items():
            late = self.warmup if name.endswith("_z") else self._learned_from if name in ("loss", "objective") else 0
            late = 0 if name in self.given else late
            rows = [row for row in self.trainer.history if name in row and row["step"] >= late][-self.patience :]
            if len(rows) == self.patience and all(limit.excludes(row[name]) for row in rows):
                return name, rows, limit.words
        return None

    def _restore(self, before: int) -> str | None:
        good = {n: path for n, path in complete_checkpoints(self.trainer.args.output_dir).items() if n < before}
        if not good and self._start is not None:
            self._start[0].put_back()
            return f"step {self._start[1]}"
        if not good:
            return None
        self.trainer.load_checkpoint(good[max(good)])
        return Path(good[max(good)]).name


def _as_limit(name: str, limit: Any) -> Limit:
    check_recorded(name)
    pair = tuple(limit) if isinstance(limit, list | tuple) else (limit, None)
    numbers = [v for v in pair if v is not None]
    if len(pair) != 2 or not numbers or not all(isinstance(v, int | float) and math.isfinite(v) for v in numbers):
        raise UsageError(f"Expected limits[{name!r}] to be a least value, or (least, largest), got {limit!r}.")
    least, largest = pair
    words = f"outside of [{'-∞' if least is None else least}, {'∞' if largest is None else largest}]"
    return Limit(least, largest, words)
