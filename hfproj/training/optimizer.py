"""Groups of parameters, LARS on them, and what happens around epochs and optimizer steps."""

import math
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hfproj.data.indexing import StreamDataset
from hfproj.errors import UsageError
from hfproj.training.gradients import Statistics, frozen_parts, part_of, why_not_asked
from hfproj.training.setup import Args, Control, ProjectionTrainer, State
from hfproj.tuner.layer import CHILD

FIXED_RATE = "fixed_learning_rate"  # key of a parameter group that the schedule leaves alone
PART = "part"  # key of a parameter group: "backbone", "head" or "predictor"
_KEPT = "regularizers"  # where transformers keeps what callbacks leave in a checkpoint
_MATRIX = 2  # biases, norms and scales have fewer dimensions …
# … except for these: DoRA's magnitude and IA3's scales may be kept as matrices, tokens and positions are no maps.
_NO_DECAY = ("lora_magnitude_vector", "ia3_l", "cls_token", "mask_token", "reg_token", "register_tokens", "pos_embed",
             "position_embeddings")  # fmt: skip


def parameter_groups(
    model: nn.Module, *, weight_decay: float, head_learning_rate: float | None = None,
    fixed_predictor_rate: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the trainable parameters of `model` in up to six groups: backbone, head and predictor, with and without.

    Only matrices have a `weight_decay`; biases, norms, scales and tokens have none. The options are those of
    `ProjectionTrainingArguments`.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        path = name.split(".")
        place = "head" if CHILD in path else "backbone"
        if fixed_predictor_rate and place == "head" and "predictor" in path:
            place = "predictor"
        decays = parameter.ndim >= _MATRIX and not any(part in name for part in _NO_DECAY)
        if (place, decays) not in groups:
            group: dict[str, Any] = {"params": [], "weight_decay": weight_decay if decays else 0.0, PART: place}
            if place != "backbone" and head_learning_rate is not None:
                group["lr"] = head_learning_rate
            if place == "predictor":
                group[FIXED_RATE] = True
            groups[place, decays] = group
        groups[place, decays]["params"].append(parameter)
    if not groups:
        raise UsageError(
            "No parameter is trainable. Either the adapter was loaded frozen: load it with is_trainable=True. Or its "
            "head has no parameters and the backbone is frozen: give the config a backbone_adapter or trainable='full'."
        )
    return list(groups.values())


def lars(
    groups: list[dict[str, Any]], learning_rate: float, trust_coefficient: float, *, clip: bool
) -> torch.optim.Optimizer:
    """Return timm's LARS with momentum 0.9; only matrices are adapted (and decay), as in SimCLR and solo-learn.

    References:
        You, Gitman, Ginsburg 2017, arXiv 1708.03888; `clip`, at most the learning rate itself: NVIDIA's LARC.
    """
    from timm.optim import Lars

    for group in groups:
        group["always_adapt"] = any(p.ndim >= _MATRIX for p in group["params"])
    return Lars(groups, lr=learning_rate, momentum=0.9, trust_coeff=trust_coefficient, trust_clip=clip)


def make_optimizer(trainer: ProjectionTrainer, model: nn.Module) -> torch.optim.Optimizer | None:
    """Return the optimizer that the arguments name on our groups; None for one that has to make its own groups."""
    args = trainer.args
    groups = parameter_groups(
        model, weight_decay=args.weight_decay, head_learning_rate=args.head_learning_rate,
        fixed_predictor_rate=args.fixed_predictor_rate,
    )  # fmt: skip
    if args.lars:
        return lars(groups, args.learning_rate, args.lars_trust_coefficient, clip=args.lars_clip)
    cls, kwargs = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    is_class = isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    own_groups = not is_class or {"params", "model", "optimizer_dict"} & set(kwargs)
    wanted = [n for n in ("head_learning_rate", "fixed_predictor_rate") if getattr(args, n)]
    if own_groups and wanted:
        raise UsageError(f"{', '.join(wanted)} would have no effect: {args.optim} makes its own groups; leave it out.")
    return None if own_groups else cls(groups, **kwargs)


def head_warmup(model: nn.Module, steps: float | int, max_steps: int) -> int:
    """Return how many steps the head trains alone; refuse those that change nothing, or leave nothing that learns."""
    if not steps:
        return 0
    trained = {part_of(name) is None for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trained == {False}:
        raise UsageError("head_warmup_steps would have no effect: only the head is trained; leave it out.")
    if trained == {True}:
        raise UsageError("In head_warmup_steps only the head learns, and this one has no parameters; leave it out.")
    if steps >= max_steps:
        raise UsageError(
            f"Expected head_warmup_steps below the {max_steps} steps of this training, got {steps}: the backbone would "
            "never learn; lower it, or use trainable='head'."
        )
    return math.ceil(steps * max_steps) if steps < 1 else int(steps)


class AroundSteps(TrainerCallback):
    """Sets the epoch of the data, and does what objective, regularizers and EMA teacher do around optimizer steps."""

    def __init__(self, trainer: ProjectionTrainer):
        self.trainer = trainer
        self._head_alone = 0  # steps
        self._rates: dict[int, float] = {}  # of the backbone's groups, while theirs are lower

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Begin with the epoch that a checkpoint stands in; a stream is read from its beginning."""
        if args.head_warmup_steps and (why := why_not_asked(self.trainer)):
            raise UsageError(f"head_warmup_steps would have no effect: {why}; leave it out.")
        self._head_alone = head_warmup(self.trainer.bare_model(), args.head_warmup_steps, state.max_steps)
        for name, regularizer in self.trainer.regularizers.items():
            regularizer.take_up(state.stateful_callbacks.get(_KEPT, {}).get(name))
        stream = isinstance(self.trainer.train_dataset, StreamDataset)
        self.trainer.epoch = (0 if stream else int(state.epoch or 0)) - 1

    def on_epoch_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Set the epoch before its iterator is made: accelerate does not reach sharded samplers or resumed epochs."""
        trainer = self.trainer
        trainer.epoch += 1
        trainer.between_epochs = False
        trainer.set_epoch(trainer.epoch)
        # Where a run is resumed from its last step, transformers would take one more.
        trainer.end_data(state.global_step >= state.max_steps)
        if isinstance(trainer.train_dataset, StreamDataset):
            kwargs["model"].zero_grad()  # batches at the end of the stream that were too few for a step
        if hasattr(trainer.objective, "on_epoch_start"):
            trainer.objective.on_epoch_start(trainer.step())

    def on_epoch_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Refuse a stream that is too short; end a training that was resumed from its last step."""
        self.trainer.between_epochs = True
        control.should_training_stop |= state.global_step >= state.max_steps
        if state.global_step == 0:
            hint = "lower per_device_train_batch_size or gradient_accumulation_steps"
            raise UsageError(f"train_dataset is a stream with too few images for one step; {hint}.")

    def on_step_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Keep the running statistics, in case the step ends in NaN."""
        self.trainer.statistics = Statistics(self.trainer)

    def on_pre_optimizer_step(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Drop the gradients of frozen parts, and put back the learning rates that are fixed."""
        trainer = self.trainer
        if not hasattr(Trainer, "_get_grad_norm"):  # transformers before it had the method that the trainer overrides
            gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            trainer.check_gradient(torch.nn.utils.get_total_norm(gradients))
        frozen = set(frozen_parts(trainer))
        if self._head_alone:
            warmup = args.get_warmup_steps(state.max_steps)
            since = state.global_step - self._head_alone  # what part_of names None is the backbone's
            frozen |= {None} if since < 0 else set()
            for number, group in enumerate(kwargs["optimizer"].param_groups):
                if group.get(PART) == "backbone" and 0 <= since < warmup:
                    self._rates[number] = group["lr"]
                    group["lr"] *= (since + 1) / (warmup + 1)
        if frozen:
            for name, parameter in trainer.bare_model().named_parameters():
                if part_of(name) in frozen:
                    parameter.grad = None
        for group in kwargs["optimizer"].param_groups:
            if group.get(FIXED_RATE):
                group["lr"] = group["initial_lr"]

    def on_optimizer_step(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Let the EMA teacher follow, and the regularizers take their own steps."""
        trainer = self.trainer
        for number, rate in self._rates.items():  # for schedules that go on from it
            kwargs["optimizer"].param_groups[number]["lr"] = rate
        self._rates = {}
        if trainer.accelerator.optimizer_step_was_skipped:
            return
        progress, done = trainer.progress(), (state.global_step + 1) / max(state.max_steps, 1)
        groups = kwargs["optimizer"].param_groups
        rate = next((g["lr"] for g in groups if g.get(PART) == "head"), groups[0]["lr"])
        for regularizer in trainer.regularizers.values():
            regularizer.after_step(trainer.bare_model(), rate, progress, done)
        if kept := {name: r.state() for name, r in trainer.regularizers.items() if r.state() is not None}:
            state.stateful_callbacks[_KEPT] = kept
        if trainer.ema is not None:
            trainer.ema.update(trainer.bare_model(), progress)
