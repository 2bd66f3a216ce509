"""Decoupled contrastive learning: NT-Xent without the positive below the logarithm, so that easy positives still pull.

With unit rows ẑ of V views of N images, S = ẐẐᵀ/τ and pos(i) the V − 1 other views of row i's image,

    L = mean_i [ −mean_{p ∈ pos(i)} w_ip S_ip + log Σ_{j of another image} exp S_ij ].

DCL has w = 1. DCLW weakens the pull of pairs that agree already; for row i of view a and its image in view b,

    w_ip = 2 − N softmax_i(⟨ẑ_a,i, ẑ_b,i⟩/σ),

without a gradient, the softmax over the N images: their mean is 1.

References:
    Yeh et al. 2021, "Decoupled Contrastive Learning", arXiv 2110.06848, eq. 6 and section 3.3; lightly-ai/lightly
    (e8d317fc) ``loss/dcl_loss.py``.

Deviations:
    Over processes the weights are those of the global batch (lightly: of the local one). With more than two views the
    positives are averaged and none is in the denominator.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.functional.rows import cosine_logits, positive_cosine, unit_rows
from hfproj.objectives.base import Objective, ObjectiveOutput, check_positive, check_temperature
from hfproj.typing import Scalar, Views


def dcl_weights(z: Views, *, concentration: float = 0.5) -> Float[Tensor, "views views batch"]:
    """Return DCLW's weights ``w[a, b, i]`` of image i in the pair of views (a, b) at σ, without a gradient.

    Example:
        >>> bool(dcl_weights(torch.randn(2, 6, 4)).mean(2).allclose(torch.ones(2, 2)))
        True
    """
    rows = unit_rows(z.detach())
    return 2 - z.shape[1] * ((rows[:, None] * rows).sum(-1) / concentration).softmax(-1)


def dcl_loss(z: Views, *, temperature: float = 0.1, weighted: bool = False, concentration: float = 0.5) -> Scalar:
    """Return DCL of one batch at temperature τ, or if `weighted` DCLW with the concentration σ.

    Example:
        >>> round(dcl_loss(torch.ones(2, 4, 8)).exp().item(), 2)  # collapsed: 6 rows of other images, each as good
        6.0
    """
    views, batch, _ = z.shape
    rows = z.flatten(0, 1)
    similarity = cosine_logits(rows, rows, temperature=temperature)
    image = torch.arange(batch, device=z.device).repeat(views)
    others = similarity.masked_fill(image[:, None] == image, -torch.inf).logsumexp(1)
    # [anchor view, its image, other view, its image] -> [anchor view, other view, image]
    same_image = similarity.unflatten(1, (views, batch)).unflatten(0, (views, batch)).diagonal(dim1=1, dim2=3)
    if weighted:
        same_image = same_image * dcl_weights(z, concentration=concentration)
    different_views = ~torch.eye(views, dtype=torch.bool, device=z.device)
    return others.mean() - same_image[different_views].mean()


class DCL(Objective):
    """DCL or DCLW over the global batch.

    When to use: in place of NT-Xent at small batches (some hundred images), where its gradient fades on easy positives.
    The whole similarity matrix is in memory, so that very large batches are for ``nt_xent``. The loss can be negative.

    Args:
        temperature: τ. 0.1: lightly's default (0.07 in its example).
        weighted: DCLW instead of DCL.
        concentration: σ of DCLW's weights. 0.5: lightly.
        gather: Whether images of other processes are negatives too; if not, the loss is that of the local batch.

    Raises:
        UsageError: If an option is out of range; in a call, with fewer than two views or images.

    Example:
        >>> round(DCL(temperature=1.0)(torch.eye(4).expand(2, 4, 4)).loss.item(), 3)  # ln 6 - 1
        0.792
    """

    def __init__(
        self, *, temperature: float = 0.1, weighted: bool = False, concentration: float = 0.5, gather: bool = True
    ):
        super().__init__()
        self.temperature, self.weighted, self.gather = check_temperature(temperature), weighted, gather
        self.concentration = check_positive("concentration", concentration, usual="0.5")

    def compute(self, z: Views, **given: object) -> ObjectiveOutput:
        """Return the loss and ``positive_cosine``, the mean cosine between views of an image."""
        z = self.global_batch(z, gather=self.gather)
        loss = dcl_loss(z, temperature=self.temperature, weighted=self.weighted, concentration=self.concentration)
        return ObjectiveOutput(loss, {"positive_cosine": positive_cosine(z)})
