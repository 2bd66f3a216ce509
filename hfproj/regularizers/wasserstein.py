"""Wasserstein uniformity: unit projections are pulled to a uniform distribution on the sphere, in all dimensions.

    L = W2(ẑ) = √( 2 − (2/√D) tr Σ^{1/2} ),    Σ the covariance of all views' unit rows together.

Unlike the pairwise uniformity of Wang and Isola it sees dimensional collapse, and does not see duplicates.

References:
    Fang et al. 2024, arXiv 2403.00642; statsle/WassersteinSSL ``code/BarlowTwins/metric.py``. Weights there: 1.0 with
    MoCo v2; 30.0 falling linearly to 0 with Barlow Twins (``schedule="linear"`` of the weight).

Deviations:
    Rows of all processes by default; see also `hfproj.functional.distributions`.
"""

from typing import Any

from torch import nn

from hfproj.functional.distributions import wasserstein_to_uniform
from hfproj.regularizers.base import Projections, Representations, check_on, features, joint
from hfproj.typing import Scalar


class Wasserstein(nn.Module):
    """W2 distance of the unit rows of all views of the joint batch from uniform, between 0 and √2.

    Args:
        on: ``"z"`` (the paper) or ``"h"``.
        gather: Whether rows of other processes belong to the batch; if not, the value is that of the local batch.

    Raises:
        UsageError: an unknown `on`.

    Example:
        >>> import torch
        >>> z = torch.stack([torch.eye(4), -torch.eye(4)])
        >>> Wasserstein()(nn.Identity(), z, z).item() < 1e-3  # evenly spread
        True
    """

    def __init__(self, *, on: str = "z", gather: bool = True):
        super().__init__()
        check_on(on)
        self.on, self.gather = on, gather

    def forward(self, model: Any, h: Representations, z: Projections, *, step: Any = None) -> Scalar:
        """Return W2.

        Args:
            model: Unused.
            h: Representations.
            z: Projections.
            step: Unused.

        Raises:
            UsageError: features of another shape, or h of a frozen backbone with ``on="h"``.
        """
        return wasserstein_to_uniform(joint(features(self.on, h, z), self.gather).flatten(0, 1))

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return f"on={self.on!r}, gather={self.gather}"
