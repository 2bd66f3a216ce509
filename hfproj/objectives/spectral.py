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

from typing import Any

import torch
from torch import nn

from hfproj.functional.contrastive import check_images
from hfproj.functional.matching import positive_cosine, view_pairs
from hfproj.functional.rows import full_precision, gather_views
from hfproj.objectives.base import ObjectiveOutput, check_call
from hfproj.typing import Scalar, Views


def spectral_loss(z: Views) -> Scalar:
    """Return the spectral contrastive loss of one batch.

    Args:
        z: Projections, in any floating-point type; computed in float32 or better.

    Example:
        >>> spectral_loss(torch.eye(4).expand(2, 4, 4)).item()  # other images orthogonal
        -2.0
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    images = z.shape[1]
    itself = torch.eye(images, dtype=torch.bool, device=z.device)
    losses = []
    with full_precision(z):
        for a, b in view_pairs(len(z)):
            if a < b:
                products = z[a] @ z[b].T
                others = products.masked_fill(itself, 0).square().sum()
                losses.append(others / (images * (images - 1)) - 2 * products.diagonal().mean())
    return torch.stack(losses).mean()


class Spectral(nn.Module):
    """Spectral contrastive loss over the joint batch of all processes.

    Example:
        >>> loss, terms = Spectral()(torch.ones(2, 4, 1))  # collapsed to length 1: the same as orthogonal + 1
        >>> loss.item()
        -1.0
    """

    views = (2, None)
    needs: frozenset[str] = frozenset()

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
        z = gather_views(z)
        check_images(z.shape[1], "Spectral")
        return ObjectiveOutput(spectral_loss(z), {"positive_cosine": positive_cosine(z)})
