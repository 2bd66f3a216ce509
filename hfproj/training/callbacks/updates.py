"""`UpdateRatioCallback`: how fast head and backbone move, against their own size and against each other.

    update ratio     ‖θ_{t+1} − θ_t‖ / ‖θ_t‖                   what the optimizer did, of all parameters of a part
    gradient ratio   η ‖∇θ‖ / (‖θ‖ + 1e-7)                     what plain gradient descent would do, η the learning rate
    timescale ratio  gradient ratio of the head over that of the backbone

A healthy update ratio is of the order of 1e-3; with a head that moves much faster than the backbone, the backbone sees
a head that has settled.

References:
    Chaudhry 2026, arXiv 2605.17180 (Table 3: the timescale ratio is 31 to 653 without BatchNorm, 0.41 to 2.7 with).
"""

from typing import Any

import torch
from torch import Tensor

from hfproj.errors import UsageError
from hfproj.training.callbacks.base import Watch
from hfproj.training.steps import PART

_EPS = 1e-7


class UpdateRatioCallback(Watch):
    """Records ``update_ratio_head``, ``update_ratio_backbone``, ``gradient_ratio_…`` and ``timescale_ratio``.

    Only parameters that are trained count: of a LoRA, its factors.

    Args:
        every: Steps between two measurements. Each keeps a copy of the trained parameters for one step.

    Raises:
        UsageError: as `Watch`; under FSDP and DeepSpeed, which split parameters.
    """

    def __init__(self, *, every: int = 50):
        super().__init__(every)
        self._before: list[list[Tensor]] | None = None
        self._gradients: dict[str, float] = {}

    def bind(self, trainer: Any) -> None:
        """Join `trainer`."""
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise UsageError(
                "UpdateRatioCallback needs whole parameters, which FSDP and DeepSpeed split; leave it out."
            )
        super().bind(trainer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure nothing yet: no step was taken."""
        if self.trainer is None:
            super().on_train_begin(args, state, control, **kwargs)
        self._before = None

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
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
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
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

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure nothing: there is no step to measure."""


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(tensors)) if tensors else 0.0


def _by_part(groups: list[dict[str, Any]], norms: list[float]) -> dict[str, float]:
    """Join the norms of parameter groups to those of backbone and head; a predictor belongs to the head."""
    squares: dict[str, float] = {}
    for group, norm in zip(groups, norms):
        part = "backbone" if group.get(PART) == "backbone" else "head"
        squares[part] = squares.get(part, 0.0) + norm**2
    return {part: square**0.5 for part, square in squares.items()}
