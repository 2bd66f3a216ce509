"""InfoNCE across views: each view of an image finds its other view among the rows of that view only.

With unit rows ẑ, for every pair of views (a, b) and N images,

    L_ab = mean_i [ −⟨ẑ_a,i, ẑ_b,i⟩/τ + log Σ_j exp(⟨ẑ_a,i, ẑ_b,j⟩/τ) ],

N terms below the logarithm where NT-Xent has 2N − 1. L is the mean over pairs in both orders, or in one (a < b).

References:
    van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", arXiv 1807.03748, eq. 4;
    Jing et al. 2021, arXiv 2110.09348, facebookresearch/directclr ``directclr/main.py`` (both directions, gathered);
    Chaudhry 2026, arXiv 2605.17180, code at 117231d (``symmetric=False, gather=False``, there called SimCLR).

Deviations:
    None for two views; more than two are averaged over pairs. DirectCLR's script adds a classifier that only monitors.
"""

from typing import Any

import torch
from torch import nn

from hfproj.functional.contrastive import check_images
from hfproj.functional.matching import match_rows, positive_cosine, view_pairs
from hfproj.functional.rows import gather_views
from hfproj.objectives.base import ObjectiveOutput, check_call
from hfproj.objectives.checks import check_temperature
from hfproj.typing import Scalar, Views


def info_nce_loss(z: Views, *, temperature: float = 0.1, symmetric: bool = True) -> Scalar:
    """Return InfoNCE of one batch.

    Args:
        z: Projections, in any floating-point type; computed in float32 or better.
        temperature: τ.
        symmetric: Whether both views of a pair are anchors, or the earlier one only.

    Example:
        >>> z = torch.ones(2, 4, 8)  # collapsed: each of the 4 rows of the other view is as good
        >>> bool(info_nce_loss(z).isclose(torch.tensor(4.0).log()))
        True
    """
    pairs = [(a, b) for a, b in view_pairs(len(z)) if symmetric or a < b]
    return torch.stack([match_rows(z[a], z[b], temperature=temperature) for a, b in pairs]).mean()


class InfoNCE(nn.Module):
    """InfoNCE over the joint batch of all processes.

    Args:
        temperature: τ. 0.1: DirectCLR.
        symmetric: Whether both views of a pair are anchors, or the earlier one only.
        gather: Whether images of other processes are negatives too; if not, the loss is that of the local batch.

    Raises:
        UsageError: an option that cannot work.

    Example:
        >>> loss, terms = InfoNCE()(torch.eye(4).expand(2, 4, 4))
        >>> terms["positive_cosine"].item()
        1.0
    """

    views = (2, None)
    needs: frozenset[str] = frozenset()

    def __init__(self, *, temperature: float = 0.1, symmetric: bool = True, gather: bool = True):
        super().__init__()
        self.temperature, self.symmetric, self.gather = check_temperature(temperature), symmetric, gather

    def forward(self, z: Views, **given: Any) -> ObjectiveOutput:
        """Return the loss and ``positive_cosine``, the mean cosine between views of an image.

        Args:
            z: Projections of at least two views; rows of a view in the same order. Processes may hold batches of
                different sizes.
            given: Unused.

        Raises:
            UsageError: fewer than two views, or one image over all processes.
        """
        check_call(self, z, **given)
        if self.gather:
            z = gather_views(z)
        check_images(z.shape[1], "InfoNCE")
        loss = info_nce_loss(z, temperature=self.temperature, symmetric=self.symmetric)
        return ObjectiveOutput(loss, {"positive_cosine": positive_cosine(z)})

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return f"temperature={self.temperature}, symmetric={self.symmetric}, gather={self.gather}"
