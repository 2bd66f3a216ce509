"""The spectral contrastive loss: a low-rank factorisation of which views belong to the same image.

For every pair of views (a, b) of N images,

    L_ab = −(2/N) Σ_i ⟨z_a,i, z_b,i⟩ + 1/(N(N−1)) Σ_{i≠j} ⟨z_a,i, z_b,j⟩²,

an unbiased estimate of −2 E⟨z, z⁺⟩ + E⟨z, z'⟩² for another view z⁺ of the same image and an independent one z'. Rows
keep their lengths: these carry the eigenvalues. L is the mean over pairs.

References:
    HaoChen et al. 2021, "Provable Guarantees for Self-Supervised Deep Learning with Spectral Contrastive Loss",
    arXiv 2106.04156, eq. 6; jhaochenz/spectral_contrastive_learning ``models/spectral.py``; Xue et al. 2024,
    arXiv 2403.11391 (theory).

Deviations:
    The official code shortens rows longer than √μ to that length and divides the loss by μ; here rows are used as they
    are (``l2_normalise=True`` of the head makes them unit). More than two views are averaged over pairs.
"""

import torch

from hfproj.functional.rows import at_least_float32, full_precision, positive_cosine, view_pairs
from hfproj.objectives.base import Objective, ObjectiveOutput
from hfproj.typing import Scalar, Views


def spectral_loss(z: Views) -> Scalar:
    """Return the spectral contrastive loss of one batch.

    Example:
        >>> spectral_loss(torch.eye(4).expand(2, 4, 4)).item()  # other images orthogonal
        -2.0
    """
    z = at_least_float32(z)
    images = z.shape[1]
    itself = torch.eye(images, dtype=torch.bool, device=z.device)
    losses = []
    with full_precision(z):
        for a, b in view_pairs(len(z), ordered=True):
            products = z[a] @ z[b].T
            others = products.masked_fill(itself, 0).square().sum()
            losses.append(others / (images * (images - 1)) - 2 * products.diagonal().mean())
    return torch.stack(losses).mean()


class Spectral(Objective):
    """Spectral contrastive loss over the global batch.

    When to use: to compare with theory, which knows its minimum in closed form for linear networks. There is no
    temperature to tune, but rows keep their lengths, which a large learning rate makes diverge. Some hundred images do.

    Raises:
        UsageError: In a call, with fewer than two views or images.

    Example:
        >>> Spectral()(torch.ones(2, 4, 1)).loss.item()  # collapsed to length 1: the same as orthogonal + 1
        -1.0
    """

    def compute(self, z: Views, **given: object) -> ObjectiveOutput:
        """Return the loss and ``positive_cosine``, the mean cosine between views of an image."""
        z = self.global_batch(z)
        return ObjectiveOutput(spectral_loss(z), {"positive_cosine": positive_cosine(z)})
