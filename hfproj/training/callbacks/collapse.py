"""`CollapseCallback`: says when h or z collapse while training, why that is likely, and stops or goes back."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hfproj import distributed
from hfproj.errors import CollapseWarning, UsageError
from hfproj.training.callbacks.causes import FLAT, Cause, flat_loss, likely_causes
from hfproj.training.callbacks.spectrum import SpectrumCallback
from hfproj.training.callbacks.updates import UpdateRatioCallback
from hfproj.training.checkpoints import complete_checkpoints
from hfproj.training.methods import active_modules

ACTIONS = ("warn", "stop", "restore")
SHARE_OF_START = {"rankme_h": 0.5, "std_h": 0.5}  # the backbone was pretrained: losing half of it is no adaptation
SPREAD = 0.1  # of z, against rows spread evenly
RANK = 2.0  # of z: on a line or in a plane


@dataclass(frozen=True)
class Alarm:
    """What a `CollapseCallback` saw.

    Attributes:
        step: After which it was seen.
        metric: Name of the number in the history that is out of its limits.
        value: Its value; None where it was not finite.
        limit: The limit, in words.
        causes: Likely causes, the likeliest first.
        restored: The checkpoint that was gone back to, or None.
    """

    step: int
    metric: str
    value: float | None
    limit: str
    causes: list[Cause]
    restored: str | None = None

    @property
    def message(self) -> str:
        """What happened and what to do, in words."""
        value = "not finite" if self.value is None else f"{self.value:.4g}"
        lines = [f"Collapse at step {self.step}: {self.metric} is {value}, {self.limit}."]
        lines += [f"Likely cause: {cause.name}. {cause.why}" for cause in self.causes[:1]]
        lines += [f"Or: {cause.name}. {cause.why}" for cause in self.causes[1:]]
        if self.restored is not None:
            lines.append(f"The adapter is that of {self.restored} again.")
        return " ".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON, for `hfproj.Results.geometry["collapse"]`."""
        causes = [cause._asdict() for cause in self.causes]
        return asdict(self) | {"causes": causes, "cause": self.causes[0].name, "what": self.message}


class CollapseCallback(TrainerCallback):
    """Raises an alarm when measurements of `trainer.history` leave their limits several times in a row.

    Limits, unless others are given: RankMe and std of h at half of what they were before training; std of z at a tenth
    of that of rows spread evenly over the sphere (0.1/√dim); RankMe of z at 2; an objective for which rows spread
    evenly cost hardly less than equal rows, at 5 % below what these cost (a softmax at a high temperature). z is not
    judged in the first steps, in which the running statistics of BatchNorm follow the head, nor the objective while the
    learning rate warms up. What it needs is measured by a `SpectrumCallback` and an `UpdateRatioCallback`; the trainer
    gets those that it lacks.

    The alarm is a `CollapseWarning`, once, and `alarm`. It names causes by what it sees: how far weights move in a
    step, whether the objective's value tells collapsed rows from spread ones, whether a gradient reaches the branch
    that is to be held still, whether there is a predictor and a norm.

    Args:
        limits: Name in the history → least value, or (least, largest) with None for none. They replace the default of
            the same name; None as the value drops it. "loss" and the objective's terms are names too.
        patience: Measurements in a row that have to be out of their limits.
        action: "warn"; "stop" ends the training, too; "restore" also goes back to the last checkpoint that was saved
            before the first of these measurements, if there is one.
        warmup: Steps before which z and the objective are not judged.
        every: Steps between measurements, for the callbacks that it adds; None: as `SpectrumCallback`.

    Attributes:
        alarm: The `Alarm`, or None.

    Raises:
        UsageError: an unknown action, no patience, or a limit that is no number.

    Example:
        >>> CollapseCallback(action="explode")
        Traceback (most recent call last):
        hfproj.errors.UsageError: action='explode': expected one of warn, stop, restore.
    """

    def __init__(
        self,
        *,
        limits: Mapping[str, Any] | None = None,
        patience: int = 2,
        action: str = "warn",
        warmup: int = 20,
        every: int | None = None,
    ):
        if action not in ACTIONS:
            raise UsageError(f"action={action!r}: expected one of {', '.join(ACTIONS)}.")
        if patience < 1 or warmup < 0:
            raise UsageError(f"patience={patience}, warmup={warmup}: expected at least 1 measurement and 0 steps.")
        self.given = {name: _as_limit(name, limit) for name, limit in (limits or {}).items()}
        self.patience, self.action, self.warmup, self.every = patience, action, warmup, every
        self.alarm: Alarm | None = None
        self.trainer: Any = None
        self._judged = -1

    def bind(self, trainer: Any) -> None:
        """Join `trainer`, and give it the callbacks that measure."""
        self.trainer = trainer
        there = trainer.callback_handler.callbacks
        spectra = [c for c in there if isinstance(c, SpectrumCallback) and {"rankme", "std"} <= set(c.metrics)]
        if not spectra:
            spectra = [SpectrumCallback(every=self.every)]
            trainer.add_callback(spectra[0])
        split = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if not split and not any(isinstance(c, UpdateRatioCallback) for c in there):
            if spectra[0].trainer is None:  # it comes later in the list
                spectra[0].bind(trainer)
            trainer.add_callback(UpdateRatioCallback(every=spectra[0].steps_between))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start anew."""
        if self.trainer is None:
            raise UsageError("CollapseCallback works in hfproj.ProjectionTrainer(callbacks=[…]) only.")
        self.alarm, self._judged = None, -1
        self._learned_from = max(self.warmup, args.get_warmup_steps(state.max_steps))
        self._flat_loss: float | None = None
        self._asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge what was measured since the last time."""
        if not self._asked:  # by now there was a batch, whose shape its value hangs on
            self._asked, self._flat_loss = True, flat_loss(self.trainer)
        names = self.limits().keys()
        rows = [row for row in self.trainer.history if names & row.keys()]
        if self.alarm is not None or not rows or rows[-1]["step"] == self._judged:
            return
        self._judged = rows[-1]["step"]
        found = self._violation()
        if found is None:
            return
        metric, rows, limit = found
        causes = likely_causes(self.trainer)
        restored = self._restore(rows[0]["step"]) if self.action == "restore" else None
        self.alarm = Alarm(state.global_step, metric, rows[-1][metric], limit, causes, restored)
        if self.action != "warn":
            control.should_training_stop = True
            control.should_save = False  # a checkpoint of the collapsed model, or one under a later step than its own
        if distributed.rank() == 0:
            warnings.warn(self.alarm.message, CollapseWarning, stacklevel=2)

    def limits(self) -> dict[str, tuple[float | None, float | None, str]]:
        """Return the limits in force, name → (least, largest, in words); shares of the start need a history."""
        limits: dict[str, tuple[float | None, float | None, str]] = {}
        for name, share in SHARE_OF_START.items():
            start = next((row[name] for row in self.trainer.history if row.get(name) is not None), None)
            if start is not None:
                limits[name] = (share * start, None, f"below {share * start:.4g}, {share:.0%} of what it was at first")
        modules: Any = active_modules(self.trainer.bare_model())
        dim = modules.head.out_dim
        spread = SPREAD * dim**-0.5
        limits["std_z"] = (spread, None, f"below {spread:.4g}, {SPREAD:.0%} of that of rows spread evenly")
        if dim >= 2 * RANK:
            limits["rankme_z"] = (RANK, None, f"below {RANK:g}")
        if self._flat_loss is not None:
            name = "objective" if self.trainer.regularizers else "loss"  # with regularizers, the loss is their sum
            least = self._flat_loss - FLAT * abs(self._flat_loss)
            words = f"above {least:.4g}, {FLAT:.0%} below what equal rows cost"
            limits[name] = (None, least, words)
        for name, limit in self.given.items():
            limits.pop(name, None)
            if limit is not None:
                limits[name] = (*limit, f"outside of {_shown(limit)}")
        return limits

    def _violation(self) -> tuple[str, list[dict], str] | None:
        """Return the first metric whose last `patience` values were out of its limits, their rows, and the limit."""
        for name, (least, largest, words) in self.limits().items():
            late = self.warmup if name.endswith("_z") else self._learned_from if name in ("loss", "objective") else 0
            late = 0 if name in self.given else late
            rows = [row for row in self.trainer.history if name in row and row["step"] >= late][-self.patience :]
            values = [row[name] for row in rows]
            if len(rows) == self.patience and all(
                v is None or (least is not None and v < least) or (largest is not None and v > largest) for v in values
            ):
                return name, rows, words
        return None

    def _restore(self, before: int) -> str | None:
        checkpoints = complete_checkpoints(self.trainer.args.output_dir)
        good = [step for step in checkpoints if step < before]
        if not good:
            return None
        checkpoint = checkpoints[max(good)]
        self.trainer.load_checkpoint(checkpoint)
        return str(Path(checkpoint).name)


def _as_limit(name: str, limit: Any) -> tuple[float | None, float | None] | None:
    if limit is None:
        return None
    pair = tuple(limit) if isinstance(limit, list | tuple) else (limit, None)
    numbers = [v for v in pair if v is not None]
    if len(pair) != 2 or not numbers or not all(isinstance(v, int | float) and math.isfinite(v) for v in numbers):
        raise UsageError(f"limits[{name!r}]={limit!r}: expected a least value, or (least, largest).")
    return pair[0], pair[1]


def _shown(limit: tuple[float | None, float | None]) -> str:
    return f"[{'-∞' if limit[0] is None else limit[0]}, {'∞' if limit[1] is None else limit[1]}]"
