"""Supervised cross-entropy: the class of each image from logits, as an objective beside the self-supervised ones.

With logits a = p where the adapter has a predictor, which then is the classifier, else a = z, over all views v and the
images i with a class y_i ≥ 0,

    L = mean_{v, i} ( log Σ_c exp a_vic − a_vi,y_i ).

A head between encoder and classifier is a projection head as any other: what of the input do h and z still have?

References:
    Xue et al. 2024, arXiv 2403.11391, section 5 (supervised learning with a head in front of the classifier);
    jiayini1119/projection-head-experiments (a145e06).

Deviations:
    None known.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from hfproj import distributed
from hfproj.errors import UsageError
from hfproj.functional.rows import full_precision
from hfproj.objectives.base import Objective, ObjectiveOutput
from hfproj.typing import Scalar, Views


def cross_entropy_loss(logits: Views, labels: Int[Tensor, " batch"]) -> tuple[Scalar, Scalar]:
    """Return the loss over views and images with a class (label ≥ 0), and the share of right answers.

    Example:
        >>> loss, accuracy = cross_entropy_loss(torch.zeros(1, 3, 4), torch.tensor([0, 0, 3]))
        >>> round(loss.exp().item(), 4), round(accuracy.item(), 4)  # of four classes the first is guessed
        (4.0, 0.6667)
    """
    rows, label = logits.flatten(0, 1), labels.repeat(len(logits))
    rows, label = rows[label >= 0], label[label >= 0]
    with full_precision(rows):
        loss = F.cross_entropy(rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows, label)
    return loss, (rows.detach().argmax(1) == label).to(loss.dtype).mean()


class CrossEntropy(Objective):
    """Cross-entropy of classes, for one view of each image or more.

    When to use: with labels, as the supervised end of a comparison, or to train a head in front of a classifier. The
    classifier is the predictor, ``ProjectionHeadConfig(predictor={"head": "linear", "out_dim": n, "bias": True})``;
    without one, z are the logits and `out_dim` is the number of classes. Images with a negative label are left out.

    Raises:
        UsageError: In a call, without one label for each image, with a label beyond the logits, or without any label.

    Example:
        >>> round(CrossEntropy()(torch.zeros(1, 8, 4), labels=torch.arange(8) % 4).loss.exp().item(), 4)
        4.0
    """

    views = (1, None)
    needs = frozenset({"labels"})

    def compute(
        self, z: Views, *, labels: Tensor, prediction: Tensor | None = None, **given: object
    ) -> ObjectiveOutput:
        """Return the loss and ``train_accuracy``, the share of right answers."""
        self.check_per_image("labels", labels, z)
        logits = z if prediction is None else prediction
        logits = self.global_batch(logits)
        labels = distributed.gather_rows(labels.to(z.device, torch.int64))
        if labels.max() >= logits.shape[2]:
            what = "the predictor's out_dim" if prediction is not None else "out_dim"
            raise UsageError(
                f"Expected labels below {logits.shape[2]}, the number of logits, got {labels.max().item()}; set {what} "
                "to the number of classes."
            )
        if (labels < 0).all():
            raise UsageError(
                "Cross-entropy learns from labels, and no image of this batch has one (all are negative): name the "
                "column of the labels (label_column=…)."
            )
        loss, accuracy = cross_entropy_loss(logits, labels)
        return ObjectiveOutput(loss, {"train_accuracy": accuracy})
