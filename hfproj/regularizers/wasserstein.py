"""Wasserstein uniformity: unit projections are pulled to a uniform distribution on the sphere, in all dimensions.

    L = W2(ẑ) = √( 2 − (2/√D) tr Σ^{1/2} ),    Σ the covariance of all views' unit rows together.

Unlike the pairwise uniformity of Wang and Isola it sees dimensional collapse, and does not see duplicates.

References:
    Fang et al. 2024, arXiv 2403.00642; statsle/WassersteinSSL ``code/BarlowTwins/metric.py``. Weights there: 1.0 with
    MoCo v2; 30.0 falling linearly to 0 with Barlow Twins (``schedule="linear"`` of the weight).

Deviations:
    Rows of all processes by default; see also `hfproj.functional.distributions`.
"""

from torch import nn

from hfproj.functional.distributions import wasserstein_to_uniform
from hfproj.functional.overflow import OverflowGuard
from hfproj.registry import ShowsOptions
from hfproj.regularizers.base import Layer, Projections, Representations, check_on, features
from hfproj.typing import Scalar


class Wasserstein(ShowsOptions, nn.Module):
    """W2 distance of the unit rows of all views of the global batch from uniform, between 0 and √2.

    Args:
        on: ``"z"`` (the paper) or ``"h"``.
        gather: Whether rows of other processes belong to the batch; if not, the value is that of the local batch.

    Raises:
        UsageError: If `on` is unknown.

    Example:
        >>> import torch
        >>> z = torch.stack([torch.eye(4), -torch.eye(4)])
        >>> Wasserstein()(nn.Identity(), z, z).item() < 1e-3  # evenly spread
        True
    """

    def __init__(self, *, on: Layer = "z", gather: bool = True):
        super().__init__()
        check_on(on)
        self.on, self.gather = on, gather

    def forward(self, model: object, h: Representations, z: Projections, *, step: object = None) -> Scalar:
        """Return W2.

        Raises:
            UsageError: If the features have another shape or type, or h carries no gradient while z does.
        """
        guard = OverflowGuard("Wasserstein")
        x = guard(features(self.on, h, z, gather=self.gather))
        return guard.loss(wasserstein_to_uniform(x.flatten(0, 1)))
