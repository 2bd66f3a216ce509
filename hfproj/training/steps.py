"""What happens around each optimizer step: frozen parts, fixed learning rates, moving average, proximal steps."""

from typing import Any

from transformers import TrainerCallback

from hfproj.tuner.layer import CHILD

FIXED_RATE = "fixed_learning_rate"  # key of a parameter group that the schedule leaves alone
PART = "part"  # key of a parameter group: "backbone", "head" or "predictor"


class AroundSteps(TrainerCallback):
    """Calls what the objective, the regularizers and the moving average do before and after an optimizer step.

    Args:
        trainer: The `ProjectionTrainer` that it belongs to.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the gradients of frozen parts, and put back the learning rates that are fixed."""
        objective = self.trainer.objective
        frozen = objective.frozen(self.trainer.step()) if hasattr(objective, "frozen") else ()
        if frozen:
            for name, parameter in self.trainer.bare_model().named_parameters():
                # base_model.model.hfproj.projection_head_modules.<adapter>.<part>.…
                path = name.split(".")
                if CHILD in path and path[path.index(CHILD) + 3] in frozen:
                    parameter.grad = None
        for group in kwargs["optimizer"].param_groups:
            if group.get(FIXED_RATE):
                group["lr"] = group["initial_lr"]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the moving average follow, and the regularizers take their own steps."""
        trainer = self.trainer
        if trainer.accelerator.optimizer_step_was_skipped:
            return
        progress = trainer.progress()
        for regularizer in trainer.regularizers.values():
            if hasattr(regularizer.module, "after_step"):
                groups = kwargs["optimizer"].param_groups
                rate = next((g["lr"] for g in groups if g.get(PART) == "head"), groups[0]["lr"])
                regularizer.module.after_step(trainer.bare_model(), rate, regularizer.at(progress))
        if trainer.ema is not None:
            trainer.ema.update(trainer.bare_model(), progress)
