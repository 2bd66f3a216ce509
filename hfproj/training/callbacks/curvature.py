"""`CurvatureCallback`: smallest and largest eigenvalue of the loss's Hessian, while training goes on.

The Hessian is that of the objective on the probe batch, with respect to the parameters of the head, or to the
representations h that the head reads (where a negative eigenvalue means that the head makes the point unstable: paper
1's claim, see docs/geometry.md), in float64.

References:
    Chaudhry 2026, arXiv 2605.17180 (Hessian tracking), which takes power iterations in float32; here Lanczos at both
    ends, with a bound on the error.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hfproj import distributed
from hfproj.checking import checked
from hfproj.errors import check_choice
from hfproj.features.views import FixedViews
from hfproj.functional.modes import evaluating
from hfproj.geometry.lanczos import extreme_eigenvalues
from hfproj.objectives.base import check_output
from hfproj.training.callbacks.watching import ProbeWatch
from hfproj.training.setup import ProjectionTrainer
from hfproj.tuner.active import active_modules
from hfproj.typing import Data, OneOf

OF = ("head", "h")
TOLERANCE = 1e-6  # of the larger of |λ_min| and |λ_max|


class HeadLoss:
    """Loss of a probe batch as a function of the head alone: h is held still, head and objective are copies.

    On several processes each holds its images; the value is that of the global batch, and gradients follow the
    convention of :mod:`hfproj.distributed` (their mean over processes is the gradient of the global batch). Second
    derivatives of small size need the default `dtype`.
    """

    def __init__(self, trainer: ProjectionTrainer, views: FixedViews, dtype: torch.dtype = torch.float64):
        device, model = trainer.args.device, trainer.bare_model()
        self.h = views.own_features(model, device)[0].to(dtype)
        # Copies in eval mode: a training step does not move them, and no gradient is left on the model.
        self.modules: Any = copy.deepcopy(active_modules(model)).to(dtype).eval()
        self.objective: Any = copy.deepcopy(trainer.objective).to(dtype).eval()
        for module in self.objective.modules():
            if hasattr(module, "tile_rows"):
                module.tile_rows = None  # in tiles NT-Xent has first derivatives only
        self.modules.requires_grad_(True)
        own, target = {name: views.own(name) for name in ("labels", "index")}, _targets(trainer, views)
        self.given: dict[str, Any] = {n: None if t is None else t.to(device) for n, t in own.items()}
        self.given["target"] = None if target is None else target.to(dtype)
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
            **self.given, "prediction": prediction, "scores": None if prototypes is None else prototypes(z),
            "prototypes": None if prototypes is None else prototypes.vectors().detach(),
            "scales": dict(self.modules.scales) or None,
            "step": self._step(*self._at),  # the same random choices at each call
        } | ({} if target is None else {"target": target})  # fmt: skip
        return check_output(self.objective, self.objective(z, **given)).loss

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters of head, predictor, prototypes and scales."""
        return list(self.modules.parameters())


def _targets(trainer: ProjectionTrainer, views: FixedViews) -> Tensor | None:
    if trainer.ema is None:
        return None
    with evaluating(trainer.ema.module):  # its BatchNorm must not see these images twice
        # Private to transformers, see `hfproj.training.evaluation`.
        parts = [trainer.targets(trainer._prepare_inputs(batch)["views"]) for batch in views.batches]
    return torch.cat(parts, 1)


def mean_over_processes(tensor: Tensor) -> Tensor:
    """Return the mean over processes, which turns each process's gradient into that of the global batch."""
    return distributed.all_reduce_sum(tensor) / distributed.world_size()


class CurvatureCallback(ProbeWatch):
    """Records ``lambda_min`` and ``lambda_max`` of the Hessian, with ``lambda_min_error`` and ``lambda_max_error``.

    The Hessian with respect to the head's parameters has negative eigenvalues for nearly every head of two layers, also
    linear ones; that says nothing of collapse. One product with it costs about two gradients of the head, the backbone
    runs once a measurement.

    Args:
        of: "head": its parameters, with predictor, prototypes and scales; "h": the representations.
        steps: Products with the Hessian, at most.
        every, images, dataset: As `hfproj.training.callbacks.ProbeWatch`.

    Raises:
        UsageError: If `of` is unknown, or as `SpectrumCallback`.
    """

    PASSES = 120  # products with the Hessian cost as much as the forward pass

    @checked
    def __init__(
        self, *, of: OneOf["head", "h"] = "head", steps: int = 64, every: int | None = None, images: int = 64,
        dataset: Data | None = None,
    ):  # fmt: skip
        super().__init__(every=every, images=images, dataset=dataset)
        check_choice("Hessian", of, OF)
        self.of, self.steps = of, steps

    def measure(self) -> dict[str, float]:
        """Return both ends of the spectrum with bounds on their errors."""
        loss = HeadLoss(self.trainer, self.views)
        found = extreme_eigenvalues(*_hessian(loss, self.of), steps=self.steps, tol=TOLERANCE, device=loss.h.device)
        errors = {"lambda_min_error": found.bounds[0], "lambda_max_error": found.bounds[1]}
        return {"lambda_min": found.min, "lambda_max": found.max, **errors}


def _hessian(loss: HeadLoss, of: str) -> tuple[Callable[[Tensor], Tensor], int]:
    """Return the product v → H v of the global batch's Hessian, the same on all processes, and its width."""
    world, rank, ranks = distributed.world_size(), distributed.rank(), []
    with torch.enable_grad():  # the graph of the gradient is made once, and run backwards in each product
        variables = list(loss.parameters) if of == "head" else [loss.h.requires_grad_()]
        gradients = torch.autograd.grad(loss(), variables, create_graph=True, allow_unused=True, materialize_grads=True)
        gradient = torch.cat([g.flatten() for g in gradients])
    if of == "h":
        ranks = distributed.row_counts(len(gradient), gradient.device)
    own = slice(sum(ranks[:rank]), sum(ranks[: rank + 1])) if ranks else slice(None)

    def product(v: Tensor) -> Tensor:
        options = {"allow_unused": True, "materialize_grads": True}
        parts = torch.autograd.grad(gradient, variables, v[own], retain_graph=True, **options)
        flat = torch.cat([p.flatten() for p in parts])
        # Collectives sum in the backward pass: the result is that of `world` times the loss.
        return distributed.gather_rows(flat / world, counts=ranks) if of == "h" else mean_over_processes(flat)

    return product, sum(ranks) if ranks else len(gradient)
