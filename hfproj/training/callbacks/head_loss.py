"""The objective as a function of the head alone, on fixed representations: what curvature is taken of."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hfproj import distributed
from hfproj.features.views import FixedViews
from hfproj.functional.modes import evaluating
from hfproj.training.methods import active_modules


class HeadLoss:
    """Loss of a probe batch with the representations held still; copies of head and objective, in eval mode.

    On several processes each holds its images; the value is that of the joint batch, and gradients follow the
    convention of :mod:`hfproj.distributed` (their mean over processes is the joint gradient).

    Args:
        trainer: The `ProjectionTrainer`.
        views: Its probe batch.
        dtype: Precision of everything. Second derivatives of small size need float64.
    """

    def __init__(self, trainer: Any, views: FixedViews, dtype: torch.dtype = torch.float64):
        device = trainer.args.device
        model = trainer.bare_model()
        self.h = views.own_features(model, device)[0].to(dtype)
        # Apart from training: its step does not move them, and what is done here leaves no gradient there.
        self.modules: Any = copy.deepcopy(active_modules(model)).to(dtype).eval()
        self.objective: Any = copy.deepcopy(trainer.objective).to(dtype).eval()
        for module in self.objective.modules():
            if hasattr(module, "tile_rows"):
                module.tile_rows = None  # in tiles NT-Xent has first derivatives only
        self.modules.requires_grad_(True)
        target = _targets(trainer, views)
        self.given: dict[str, Any] = {
            "labels": _on(views.own("labels"), device),
            "index": _on(views.own("index"), device),
            "target": None if target is None else target.to(dtype),
        }
        self._at = (trainer.args.seed, trainer.state.global_step, float(trainer.state.epoch or 0), device)
        self._step = type(trainer.step()).at

    def __call__(self, h: Tensor | None = None) -> Tensor:
        """Return the loss at representations `h` ``[views, own images, dim]``; None: those of the probe batch."""
        z = self.modules.head(self.h if h is None else h)
        return self.of_projections(z, self.modules.predictor(z) if self.modules.predictor is not None else None)

    def of_projections(self, z: Tensor, prediction: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        """Return the loss at projections `z` and, where the objective needs them, predictions and targets."""
        prototypes = self.modules.prototypes
        given = {
            **self.given,
            "prediction": prediction,
            "scores": None if prototypes is None else prototypes(z),
            "prototypes": None if prototypes is None else prototypes.vectors().detach(),
            "scales": dict(self.modules.scales) or None,
            "step": self._step(*self._at),  # the same random choices at each call
        }
        if target is not None:
            given["target"] = target
        return self.objective(z, **given)[0]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters of head, predictor, prototypes and scales."""
        return list(self.modules.parameters())


def joint(tensor: Tensor) -> Tensor:
    """Return the mean over processes, which makes the gradient of the joint loss of each process's own."""
    return distributed.all_reduce_sum(tensor) / distributed.world_size()


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _targets(trainer: Any, views: FixedViews) -> Tensor | None:
    if trainer.ema is None:
        return None
    with evaluating(trainer.ema.module):  # its BatchNorm must not see these images twice
        parts = [trainer.targets(trainer._prepare_inputs(batch)["views"]) for batch in views.batches]
    return torch.cat(parts, 1)
