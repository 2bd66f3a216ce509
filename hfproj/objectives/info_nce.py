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

import torch

from hfproj.functional.rows import match_rows, positive_cosine, view_pairs
from hfproj.objectives.base import Objective, ObjectiveOutput, check_temperature
from hfproj.typing import Scalar, Views


def info_nce_loss(z: Views, *, temperature: float = 0.1, symmetric: bool = True) -> Scalar:
    """Return InfoNCE of one batch at temperature τ, with both views of a pair as anchors or the earlier one only.

    Example:
        >>> round(info_nce_loss(torch.ones(2, 4, 8)).exp().item(), 3)  # collapsed: 4 rows of the other view alike
        4.0
    """
    pairs = view_pairs(len(z), ordered=not symmetric)
    return torch.stack([match_rows(z[a], z[b], temperature=temperature) for a, b in pairs]).mean()


class InfoNCE(Objective):
    """InfoNCE over the global batch.

    When to use: for views of different kinds (two modalities, two sensors), where rows of one's own kind are no
    negatives, and for heads without parameters (DirectCLR). It wants large batches, with half of NT-Xent's negatives.

    Args:
        temperature: τ. 0.1: DirectCLR.
        symmetric: Whether both views of a pair are anchors, or the earlier one only.
        gather: Whether images of other processes are negatives too; if not, the loss is that of the local batch.

    Raises:
        UsageError: If the temperature is not positive; in a call, with fewer than two views or images.

    Example:
        >>> InfoNCE()(torch.eye(4).expand(2, 4, 4)).terms["positive_cosine"].item()
        1.0
    """

    def __init__(self, *, temperature: float = 0.1, symmetric: bool = True, gather: bool = True):
        super().__init__()
        self.temperature, self.symmetric, self.gather = check_temperature(temperature), symmetric, gather

    def compute(self, z: Views, **given: object) -> ObjectiveOutput:
        """Return the loss and ``positive_cosine``, the mean cosine between views of an image."""
        z = self.global_batch(z, gather=self.gather)
        loss = info_nce_loss(z, temperature=self.temperature, symmetric=self.symmetric)
        return ObjectiveOutput(loss, {"positive_cosine": positive_cosine(z)})
