"""VICReg's variance and covariance terms beside another objective, on projections or on the representation.

    L = μ · mean_v v(z_v) + ν · Σ_v c(z_v),

v the hinge on each feature's standard deviation, c the squared covariances between features; see
`hfproj.functional.moments`.

References:
    Bardes, Ponce, LeCun 2022, "VICReg", arXiv 2105.04906, eqs. 1 to 4, 6; facebookresearch/vicreg ``main_vicreg.py``,
    lightly-ai/lightly (e8d317fc) ``loss/vicreg_loss.py``.

Deviations:
    Without the invariance term: the objective beside it brings views together. ``variance_reduction="sum"`` is
    solo-learn's, whose variance term is twice as large for two views.
"""

import math

import torch
from torch import nn

from hfproj.errors import UsageError, check_choice
from hfproj.functional.moments import covariance_penalty, variance_hinge
from hfproj.functional.overflow import OverflowGuard
from hfproj.registry import ShowsOptions
from hfproj.regularizers.base import Layer, Projections, Representations, check_on, features
from hfproj.typing import OneOf, Scalar


class VICRegTerms(ShowsOptions, nn.Module):
    """Variance and covariance of each view of the global batch.

    Args:
        on: ``"z"`` or ``"h"``.
        variance_weight: μ. 25: VICReg.
        covariance_weight: ν. 1: VICReg.
        variance_reduction: ``"mean"`` over views (official, lightly) or ``"sum"`` (solo-learn).
        target: Standard deviation from which on a feature adds nothing. 1: VICReg.
        eps: Added to the variance. 1e-4: VICReg.

    Raises:
        UsageError: If `on` or the reduction is unknown, a weight is negative or not finite, or `target` or `eps` is not
            positive; on call, if the batch has one image.

    Example:
        >>> z = torch.ones(2, 4, 8)  # collapsed: 25·(1 − √1e-4), no covariance
        >>> round(VICRegTerms()(nn.Identity(), z, z).item(), 4)
        24.75
    """

    def __init__(
        self, *, on: Layer = "z", variance_weight: float = 25.0, covariance_weight: float = 1.0,
        variance_reduction: OneOf["mean", "sum"] = "mean", target: float = 1.0, eps: float = 1e-4,
    ):  # fmt: skip
        super().__init__()
        check_on(on)
        check_choice("variance_reduction", variance_reduction, ("mean", "sum"))
        if not (0 <= variance_weight < math.inf and 0 <= covariance_weight < math.inf and target > 0 and eps > 0):
            raise UsageError(
                "VICReg's terms need weights of 0 or more and positive target and eps, got "
                f"variance_weight={variance_weight}, covariance_weight={covariance_weight}, target={target}, eps={eps}."
            )
        self.on, self.variance_weight, self.covariance_weight = on, variance_weight, covariance_weight
        self.variance_reduction, self.target, self.eps = variance_reduction, target, eps

    def forward(self, model: object, h: Representations, z: Projections, *, step: object = None) -> Scalar:
        """Return the weighted sum of both terms.

        Raises:
            UsageError: If the features have another shape or type, or h carries no gradient while z does.
        """
        guard = OverflowGuard("VICRegTerms")
        x = guard(features(self.on, h, z))
        variance = torch.stack([variance_hinge(view, eps=self.eps, target=self.target) for view in x])
        covariance = torch.stack([covariance_penalty(view) for view in x])
        variance = variance.mean() if self.variance_reduction == "mean" else variance.sum()
        return guard.loss(self.variance_weight * variance + self.covariance_weight * covariance.sum())
