"""The first backward pass of a training: every trained tensor must get a gradient from it, and views must differ.

A tensor without one would be saved and pushed as if it had been trained, and on several processes torch would wait for
its gradient. Zero is a gradient: that of a LoRA's first factor is, at first. An expert of a
mixture may go without where the batch went to others of its layer.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hfproj import distributed
from hfproj.errors import NonFiniteLossError, UsageError
from hfproj.functional.feature_rows import double
from hfproj.saving.folders import last_complete_checkpoint
from hfproj.training.setup import ProjectionTrainer
from hfproj.tuner.layer import CHILD

# Newer versions of transformers have renamed the argument.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
_EXPERT = re.compile(r"(?<=\.experts)\.(expert_)?\d+\.")  # of a mixture whose experts are modules of their own
_SHOWN = 4  # names in a message
_LAYERWISE = ("lomo", "adalomo", "layerwise")  # in the names of optimizers that step inside the backward pass


def part_of(name: str) -> str | None:
    """Return "head", "predictor", "prototypes" or "scales" for the name of such a parameter, else None.

    Example:
        >>> part_of("base_model.model.hfproj.projection_head_modules.default.predictor.0.weight")
        'predictor'
    """
    path = name.split(".")  # base_model.model.hfproj.projection_head_modules.<adapter>.<part>.…
    return path[path.index(CHILD) + 3] if CHILD in path else None


def frozen_parts(trainer: ProjectionTrainer) -> Any:
    """Return the parts of the adapter that the objective freezes at the present step."""
    return trainer.objective.frozen(trainer.step()) if hasattr(trainer.objective, "frozen") else ()


def outside_parameters(objective: nn.Module, regularizers: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of the objective and of regularizers, which belong to no adapter, by name."""
    modules = {"objective": objective, **{name: regularizer.module for name, regularizer in regularizers.items()}}
    found = {f"{name}.{n}": p for name, module in modules.items() for n, p in module.named_parameters()}
    return {name: p for name, p in found.items() if p.requires_grad}


def why_not_asked(trainer: ProjectionTrainer) -> str | None:
    """Return why gradients can't be looked at after the backward pass, or None."""
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed keeps the gradients itself"
    if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        return "FSDP 1 keeps flat shards of them (FSDP 2 does not)"
    if any(word in str(getattr(trainer.args.optim, "value", trainer.args.optim)) for word in _LAYERWISE):
        return f"{trainer.args.optim} uses them up within the backward pass"
    return None


def check_gradients(trainer: ProjectionTrainer) -> bool:
    """Refuse to train on where the backward pass gave a trained tensor no gradient; return whether that is known.

    Each process looks at its own tensors: a collective here could meet one of an unfinished DDP reduction.
    """
    reason = why_not_asked(trainer)
    if reason is not None:
        trainer.say_once(f"Whether every trained tensor gets a gradient is not checked: {reason}.")
        return True
    if trainer.is_fsdp_enabled and not trainer.accelerator.sync_gradients:
        return False  # shards get theirs when processes exchange them
    frozen, model = frozen_parts(trainer), trainer.bare_model()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and part_of(n) not in frozen}
    trained |= outside_parameters(trainer.objective, trainer.regularizers)
    missing = [name for name, p in trained.items() if p.grad is None]
    reached = {_EXPERT.sub(".*.", name) for name, p in trained.items() if p.grad is not None}
    if idle := [n for n in missing if _EXPERT.search(n) and _EXPERT.sub(".*.", n) in reached]:
        said = f"{len(idle)} of {len(trained)} trained tensors are of experts to which the first batch sent nothing"
        trainer.say_once(f"{said}, and got no gradient yet: {_listed(idle)}.")
        missing = [name for name in missing if name not in set(idle)]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(trained)} trained tensors got no gradient from the first backward pass, so they "
            f"would never learn: {_listed(missing)}. {' '.join(_cures(model, missing))}"
        )
    optimizer: Any = trainer.optimizer
    if trainer.has_own_optimizer and not trainer.is_fsdp_enabled:
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        left = [name for name, p in trained.items() if id(p) not in known]
        if left:
            raise UsageError(
                f"The optimizer that was passed does not have {len(left)} of {len(trained)} trained tensors, so they "
                f"would never learn: {_listed(left)}. Make it after the adapter, of all parameters that require a "
                "gradient, or freeze these (requires_grad_(False)) before the trainer is made."
            )
    return True


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(name.removeprefix("base_model.model.") for name in names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def _cures(model: nn.Module, missing: Sequence[str]) -> Iterator[str]:
    """Yield what to do about tensors without a gradient."""
    parts = {part_of(name) for name in missing}
    if None in parts and is_reentrant(model):
        yield (
            "Gradient checkpointing runs with use_reentrant=True, which drops the gradients of what is trained behind "
            f"a frozen input: use {CHECKPOINTING}_kwargs={{'use_reentrant': False}}."
        )
    elif None in parts:
        yield (
            "The representation does not depend on those of the backbone, or the modules that hold them did not run: "
            "leave a PEFT method's out of its target_modules, and freeze others (requires_grad_(False)). A backbone "
            "that skips blocks at random (layerdrop) needs that switched off."
        )
    used = sorted(part for part in parts if part is not None)
    if used:
        yield (
            f"The objective does not use the adapter's {' and '.join(used)}: leave it out of the config, freeze it, or "
            "name it in the objective's frozen(step)."
        )


def is_reentrant(model: nn.Module) -> bool:
    """Whether a module of `transformers` checkpoints its activations in torch's reentrant way."""
    on = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    calls = [getattr(m, "_gradient_checkpointing_func", None) for m in on]
    return any(getattr(call, "keywords", {}).get("use_reentrant", True) for call in calls if call is not None)


class Statistics:
    """Running statistics of a model and its EMA teacher as they were before a step, in which NaN may come into them."""

    def __init__(self, trainer: ProjectionTrainer):
        networks = [trainer.model, *([trainer.ema.module] if trainer.ema is not None else [])]
        modules = [m for network in networks for m in network.modules() if m.training]
        names = ("running_mean", "running_var", "num_batches_tracked")
        found = [getattr(module, name, None) for module in modules for name in names]
        self.kept = [(buffer, buffer.clone()) for buffer in found if isinstance(buffer, Tensor)]

    def restore(self) -> None:
        """Give all statistics their values of then."""
        for buffer, value in self.kept:
            buffer.copy_(value)


def non_finite(trainer: ProjectionTrainer, what: str, value: float) -> NonFiniteLossError:
    """Return the error for a loss or gradient (`what`) that is not finite; running statistics go back before it."""
    if trainer.model.training and trainer.statistics is not None:
        trainer.statistics.restore()
    last = last_complete_checkpoint(trainer.args.output_dir)
    kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been written yet"
    return NonFiniteLossError(
        f"The {what} became {value} at step {trainer.state.global_step + 1}; training stopped, {kept}. Lower "
        "learning_rate, raise warmup_steps or the temperature, or set max_grad_norm."
    )


def warn_of_equal_views(trainer: ProjectionTrainer, views: Any) -> None:
    """Warn if the first two views of a batch went in equal and h came out equal."""
    h = trainer.last_batch.get("h")
    if h is None or len(h) < 2 or h[0].shape != h[1].shape or not _equal(views[0], views[1]):
        return
    if distributed.rank() == 0 and same_rows(h[0], h[1]):
        warnings.warn(
            "The first two views of every image of this batch are equal, and so are their h: there is nothing to be "
            "invariant to. Give the collator augmentations or pairs, or the backbone dropout.",
            stacklevel=2,
        )


def same_rows(a: Tensor, b: Tensor) -> bool:
    """Whether two sets of features are equal up to rounding."""
    a, b, rounding = double(a.detach()), double(b.detach()), max(1e-5, 4 * torch.finfo(a.dtype).eps)
    return bool((a - b).norm() <= rounding * a.norm())


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
