"""Supervised contrastive learning: rows of the same class find each other among all other rows.

With unit rows ẑ of all views, S = ẐẐᵀ/τ and P(i) the other rows of row i's class,

    L = (τ/τ_base) · mean_i −(1/|P(i)|) Σ_{p ∈ P(i)} log( exp S_ip / Σ_{j≠i} exp S_ij ),

where a row without another of its class contributes 0. An image with a negative label has no class: its rows find its
other views alone, so that with one view it only is what others are compared with. Scores (floats) are refused.

References:
    Khosla et al. 2020, "Supervised Contrastive Learning", arXiv 2004.11362, eq. 2 (L_out); HobbitLong/SupContrast
    ``losses.py``; Xue et al. 2024, arXiv 2403.11391, jiayini1119/projection-head-experiments (a145e06)
    ``loss/supcon_loss.py`` (one view, temperature 0.5).

Deviations:
    No factor τ/τ_base unless asked for: SupContrast has τ_base = 0.07 whatever τ is. It adds 1e-9 below the logarithm,
    and its older versions divide by zero for a row that is alone in its class. A label of -1, which data sets give to
    what has no label, is a class like others there.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from hfproj import distributed
from hfproj.errors import UsageError, check_choice
from hfproj.functional.rows import cosine_logits
from hfproj.objectives.base import Objective, ObjectiveOutput, check_positive, check_temperature
from hfproj.typing import OneOf, Scalar, Views

REDUCTIONS = ("all", "valid")
Rows = OneOf["all", "valid"]  # that the mean is taken over


def supcon_loss(
    z: Views, labels: Int[Tensor, " batch"], *, temperature: float = 0.07, reduction: Rows = "all"
) -> tuple[Scalar, Scalar]:
    """Return the loss of one batch without the factor τ/τ_base, and the mean cosine of positives without a gradient.

    A negative label is no class; `reduction` is that of :class:`SupCon`.

    Example:
        >>> round(supcon_loss(torch.ones(1, 4, 8), torch.tensor([0, 0, 1, 1]))[0].exp().item(), 3)  # one of 3 others
        3.0
    """
    rows = z.flatten(0, 1)
    alone = -1 - torch.arange(len(labels), device=labels.device)
    label = torch.where(labels < 0, alone, labels).repeat(len(z))
    itself = torch.eye(len(rows), dtype=torch.bool, device=z.device)
    positive = (label[:, None] == label) & ~itself
    count = positive.sum(1)
    similarity = cosine_logits(rows, rows, temperature=temperature)
    lse = similarity.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    losses = ((lse - similarity) * positive).sum(1) / count.clamp(min=1)
    rows_counted = len(rows) if reduction == "all" else (count > 0).sum().clamp(min=1)
    cosine = (similarity.detach() * positive).sum() * temperature / count.sum().clamp(min=1)
    return losses.sum() / rows_counted, cosine


class SupCon(Objective):
    """Supervised contrastive loss over the global batch, for one view of each image or more.

    When to use: with labels (some may be missing), where the representation is to be reused, at batches that hold
    several images of each class. It pulls a class together: features that tell its images apart are lost (class
    collapse). With two views and all labels different it is NT-Xent.

    Args:
        temperature: τ. 0.07: SupContrast's code; 0.1: the paper; 0.5: Xue et al. 2024.
        base_temperature: τ_base. 0.07: SupContrast; None: equal to τ, no factor.
        reduction: Mean over ``"all"`` rows (SupContrast) or the ``"valid"`` ones, which have another of their class.

    Raises:
        UsageError: If an option is out of range; in a call, without one label for each image, with one image, or with
            one view of images without labels.

    Example:
        >>> z, labels = torch.eye(4).repeat(1, 2, 1), torch.arange(4).repeat(2)
        >>> round(SupCon(temperature=1.0)(z, labels=labels).loss.item(), 4)  # ln(e + 6) - 1
        1.1654
    """

    views = (1, None)
    needs = frozenset({"labels"})

    def __init__(self, *, temperature: float = 0.07, base_temperature: float | None = None, reduction: Rows = "all"):
        super().__init__()
        self.temperature = check_temperature(temperature)
        if base_temperature is not None:
            check_positive("base_temperature", base_temperature, usual="0.07")
        check_choice("reduction", reduction, REDUCTIONS)
        self.base_temperature, self.reduction = base_temperature, reduction

    def compute(self, z: Views, *, labels: Tensor, **given: object) -> ObjectiveOutput:
        """Return the loss and ``positive_cosine``, the mean cosine between rows of a class."""
        self.check_per_image("labels", labels, z)
        views = len(z)
        z, labels = self.global_batch(z), distributed.gather_rows(labels.to(z.device, torch.int64))
        if views == 1 and (labels < 0).all():
            raise UsageError(
                "SupCon with one view of each image learns from labels, and no image of this batch has one (all are "
                "negative): name the column of the labels (label_column=…), or take two views."
            )
        loss, cosine = supcon_loss(z, labels, temperature=self.temperature, reduction=self.reduction)
        if self.base_temperature is not None:
            loss = loss * (self.temperature / self.base_temperature)
        return ObjectiveOutput(loss, {"positive_cosine": cosine})
