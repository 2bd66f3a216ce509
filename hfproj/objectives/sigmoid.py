"""The sigmoid contrastive loss of SigLIP: each pair of rows across views is judged alone, same image or not.

With unit rows ẑ, learnable t (log of the inverse temperature) and b (bias), and N images,

    logit_ij = exp(t) ⟨ẑ_a,i, ẑ_b,j⟩ + b,    L = (1/N) Σ_i Σ_j log(1 + exp(−y_ij logit_ij)),

y_ij = +1 for i = j and −1 elsewhere. One term covers both directions. At the start, with all cosines 0,
L = softplus(10) + (N − 1) softplus(−10).

References:
    Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343, eq. 1 and algorithm 1;
    google-research/big_vision ``trainers/proj/image_text/siglip.py``; start values as in mlfoundations/open_clip.

Deviations:
    Views of an image stand for the image and its text. More than two are averaged over pairs.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.functional.rows import cosine_logits, positive_cosine, view_pairs
from hfproj.objectives.base import Objective, ObjectiveOutput
from hfproj.typing import Scalar, Views


def sigmoid_loss(z: Views, log_inverse_temperature: Tensor, bias: Tensor) -> Scalar:
    """Return the sigmoid contrastive loss of one batch, with the scalars t (the logit scale is exp t) and b.

    Example:
        >>> round(sigmoid_loss(torch.zeros(2, 4, 8), torch.tensor(0.0), torch.tensor(0.0)).exp().item(), 3)  # 2 ** 4
        16.0
    """
    same_image = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    losses = []
    for a, b in view_pairs(len(z), ordered=True):
        cosines = cosine_logits(z[a], z[b], temperature=1.0)
        logits = log_inverse_temperature.to(cosines.dtype).exp() * cosines + bias.to(cosines.dtype)
        losses.append(F.softplus(torch.where(same_image, -logits, logits)).sum(1).mean())
    return torch.stack(losses).mean()


class SigmoidContrastive(Objective):
    """Sigmoid contrastive loss over the global batch.

    When to use: contrastive training at batches of any size, since no softmax couples the pairs and the temperature is
    learned. It was made for image and text; nearly all pairs are negative, so the bias must start low. Two learnable
    scalars belong to the adapter (``scales`` has their start values): keep them in float32 and out of weight decay.

    Raises:
        UsageError: In a call, with fewer than two views or images, or without one of the scales.

    Example:
        >>> scales = {name: torch.tensor(value) for name, value in SigmoidContrastive.scales.items()}
        >>> round(SigmoidContrastive()(torch.zeros(2, 4, 8), scales=scales).loss.item(), 4)  # all cosines 0
        10.0002
    """

    needs = frozenset({"scales"})
    scales = {"log_inverse_temperature": math.log(10), "bias": -10.0}  # open_clip; big_vision's LiT example: -2.71

    def compute(self, z: Views, *, scales: Mapping[str, Tensor], **given: object) -> ObjectiveOutput:
        """Return the loss, ``positive_cosine`` (mean cosine between views of an image) and the two scales."""
        z = self.global_batch(z)
        used = {name: scales[name] for name in self.scales if name in scales}
        missing = [name for name in sorted(self.scales) if not isinstance(used.get(name), Tensor)]
        if missing:
            raise UsageError(
                f"SigmoidContrastive needs tensors for the scales {sorted(self.scales)}, and {missing} are missing: "
                f"give the config ProjectionHeadConfig(scales={self.scales})."
            )
        terms = {"positive_cosine": positive_cosine(z), **{name: value.detach() for name, value in used.items()}}
        return ObjectiveOutput(sigmoid_loss(z, **used), terms)
