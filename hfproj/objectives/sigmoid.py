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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.functional.contrastive import check_images
from hfproj.functional.matching import cosine_logits, positive_cosine, view_pairs
from hfproj.functional.rows import gather_views
from hfproj.objectives.base import ObjectiveOutput, check_call
from hfproj.typing import Scalar, Views


def sigmoid_loss(z: Views, log_inverse_temperature: Tensor, bias: Tensor) -> Scalar:
    """Return the sigmoid contrastive loss of one batch.

    Args:
        z: Projections, in any floating-point type; computed in float32 or better.
        log_inverse_temperature: t, a scalar.
        bias: b, a scalar.

    Example:
        >>> loss = sigmoid_loss(torch.zeros(2, 4, 8), torch.tensor(0.0), torch.tensor(0.0))  # every guess is even
        >>> bool(loss.isclose(4 * torch.tensor(2.0).log()))
        True
    """
    same_image = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    losses = []
    for a, b in view_pairs(len(z)):
        if a < b:
            cosines = cosine_logits(z[a], z[b], temperature=1.0)
            logits = log_inverse_temperature.to(cosines.dtype).exp() * cosines + bias.to(cosines.dtype)
            losses.append(F.softplus(torch.where(same_image, -logits, logits)).sum(1).mean())
    return torch.stack(losses).mean()


class SigmoidContrastive(nn.Module):
    """Sigmoid contrastive loss over the joint batch of all processes.

    Its two learnable scalars belong to the adapter; ``scales`` has their start values. Keep them in float32 and out of
    weight decay.

    Example:
        >>> scales = {name: torch.tensor(value) for name, value in SigmoidContrastive.scales.items()}
        >>> loss, terms = SigmoidContrastive()(torch.zeros(2, 4, 8), scales=scales)
        >>> bool(loss.isclose(F.softplus(torch.tensor(10.0)) + 3 * F.softplus(torch.tensor(-10.0))))
        True
    """

    views = (2, None)
    needs = frozenset({"scales"})
    scales = {"log_inverse_temperature": math.log(10), "bias": -10.0}  # open_clip; big_vision's LiT example: -2.71

    def forward(self, z: Views, *, scales: Mapping[str, Tensor] | None = None, **given: Any) -> ObjectiveOutput:
        """Return the loss, ``positive_cosine`` (mean cosine between views of an image) and the two scales.

        Args:
            z: Projections of at least two views; rows of a view in the same order. Processes may hold batches of
                different sizes.
            scales: ``log_inverse_temperature`` and ``bias``.
            given: Unused.

        Raises:
            UsageError: fewer than two views, one image over all processes, or a scale is missing.
        """
        check_call(self, z, scales=scales, **given)
        assert scales is not None  # just checked
        missing = [name for name in sorted(self.scales) if not isinstance(scales.get(name), Tensor)]
        if missing:
            raise UsageError(
                f"SigmoidContrastive needs the scales {sorted(self.scales)}, and {missing} are no tensors: give "
                f"the config ProjectionHeadConfig(scales={self.scales})."
            )
        z = gather_views(z)
        check_images(z.shape[1], "SigmoidContrastive")
        used = {name: scales[name] for name in self.scales}
        terms = {"positive_cosine": positive_cosine(z), **{name: value.detach() for name, value in used.items()}}
        return ObjectiveOutput(sigmoid_loss(z, **used), terms)
