"""`CurvatureCallback`: smallest and largest eigenvalue of the loss's Hessian, while training goes on.

The Hessian is that of the objective on the probe batch, with respect to the parameters of the head, or to the
representations h that the head reads (where a negative eigenvalue means that the head makes the point unstable: paper
1's claim, see docs/geometry.md), in float64.

References:
    Chaudhry 2026, arXiv 2605.17180 (Hessian tracking), which takes power iterations in float32; here Lanczos at both
    ends, with a bound on the error.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hfproj import distributed
from hfproj.errors import unknown
from hfproj.geometry.lanczos import extreme_eigenvalues
from hfproj.training.callbacks.base import ProbeWatch
from hfproj.training.callbacks.head_loss import HeadLoss, joint

OF = ("head", "h")
TOLERANCE = 1e-6  # of the larger of |λ_min| and |λ_max|


class CurvatureCallback(ProbeWatch):
    """Records ``lambda_min`` and ``lambda_max`` of the Hessian, with ``lambda_min_error`` and ``lambda_max_error``.

    The Hessian with respect to the head's parameters has negative eigenvalues for nearly every head of two layers, also
    linear ones; that says nothing of collapse. One product with it costs about two gradients of the head, the backbone
    runs once a measurement.

    Args:
        of: "head": its parameters, with predictor, prototypes and scales; "h": the representations.
        steps: Products with the Hessian, at most.
        every: Steps between two measurements; None: so rarely that they take less than a hundredth of the time.
        images: Of the probe batch.
        dataset: Where its images come from; None: the trainer's `eval_dataset`, else its `train_dataset`.

    Raises:
        UsageError: an unknown `of`, or as `SpectrumCallback`.
    """

    PASSES = 120  # products with the Hessian cost as much as the forward pass

    def __init__(
        self, *, of: str = "head", steps: int = 64, every: int | None = None, images: int = 64, dataset: Any = None
    ):
        super().__init__(every=every, images=images, dataset=dataset)
        if of not in OF:
            raise unknown("Hessian", of, OF)
        self.of, self.steps = of, steps

    def measure(self) -> dict[str, float]:
        """Return both ends of the spectrum with bounds on their errors."""
        loss = HeadLoss(self.trainer, self.views)
        found = extreme_eigenvalues(*_hessian(loss, self.of), steps=self.steps, tol=TOLERANCE, device=loss.h.device)
        return {
            "lambda_min": found.min,
            "lambda_max": found.max,
            "lambda_min_error": found.bounds[0],
            "lambda_max_error": found.bounds[1],
        }


def _hessian(loss: HeadLoss, of: str) -> tuple[Callable[[Tensor], Tensor], int]:
    """Return the product v → H v of the joint loss's Hessian, the same on all processes, and its width."""
    world, ranks = distributed.world_size(), []
    with torch.enable_grad():  # the graph of the gradient is made once, and run backwards in each product
        variables = list(loss.parameters) if of == "head" else [loss.h.requires_grad_()]
        gradients = torch.autograd.grad(loss(), variables, create_graph=True, allow_unused=True, materialize_grads=True)
        gradient = torch.cat([g.flatten() for g in gradients])
    if of == "h":
        ranks = distributed.row_counts(len(gradient), gradient.device)
    own = slice(sum(ranks[: distributed.rank()]), sum(ranks[: distributed.rank() + 1])) if ranks else slice(None)

    def product(v: Tensor) -> Tensor:
        parts = torch.autograd.grad(
            gradient, variables, v[own], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        # Collectives sum in the backward: the result is that of `world` times the joint loss.
        flat = torch.cat([p.flatten() for p in parts])
        return distributed.gather_rows(flat / world, counts=ranks) if of == "h" else joint(flat)

    return product, sum(ranks) if ranks else len(gradient)
