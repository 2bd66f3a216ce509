"""MoCo v3: a prediction finds the EMA teacher's projection of the same image among those of the batch.

With unit rows p̂ of predictions, z̄ of the teacher's projections (no gradient), and views a and b,

    L = 2τ · ( ℓ(p̂_a, z̄_b) + ℓ(p̂_b, z̄_a) ),    ℓ(q, k) = mean_i [ −⟨q_i, k_i⟩/τ + log Σ_j exp(⟨q_i, k_j⟩/τ) ].

The factor 2τ keeps the size of the gradient when τ changes. At collapse L = 4τ log N.

References:
    Chen, Xie, He 2021, "An Empirical Study of Training Self-Supervised Vision Transformers", arXiv 2104.02057,
    algorithm 1; facebookresearch/moco-v3 (0c5d00a) ``moco/builder.py``, ``CONFIG.md``.

Deviations:
    The teacher moves after each optimizer step, in the official code before its next forward pass. With more views
    (small crops) every other view is a query against each of the first two: twice the mean over pairs.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.functional.contrastive import check_images
from hfproj.functional.moments import joint_cosine, joint_mean
from hfproj.functional.rows import match_rows, unit_rows_own_first, view_pairs
from hfproj.objectives.base import Objective, ObjectiveOutput, check_momentum, check_temperature
from hfproj.typing import Scalar, Views


def moco_v3_loss(prediction: Views, target: Float[Tensor, "keys batch dim"], *, temperature: float = 0.2) -> Scalar:
    """Return MoCo v3's loss at τ over the global batch, from p of all views and z̄ of the first, which get no gradient.

    Example:
        >>> round(moco_v3_loss(torch.ones(2, 4, 8), torch.ones(2, 4, 8), temperature=0.25).exp().item(), 3)  # collapsed
        4.0
    """
    keys = [unit_rows_own_first(view.detach()) for view in target]
    check_images(len(keys[0]), "MoCoV3")
    pairs = view_pairs(len(prediction), len(keys))
    losses = torch.stack([match_rows(prediction[q], keys[k], temperature=temperature) for q, k in pairs])
    return 2 * temperature * 2 * joint_mean(losses)


class MoCoV3(Objective):
    """MoCo v3 over the global batch.

    When to use: to train vision transformers with negatives at large batches (1024 and more), without a queue. It costs
    a teacher. ViTs are unstable here: warm up, and freeze the patch embedding as the authors do.

    Args:
        temperature: τ. 0.2: all ViT recipes; 1.0: the code's default, used for ResNet-50.
        ema_momentum: m of the teacher at the start and at the end. 0.99 to 1: the code (0.996 for 1000 epochs).

    Raises:
        UsageError: If an option is out of range; in a call, with fewer than two views or images, or a prediction or
            target that is missing or of another shape.

    Example:
        >>> z = torch.eye(4).expand(2, 4, 4)
        >>> MoCoV3()(z, prediction=z, target=z).terms["positive_cosine"].item()
        1.0
    """

    needs = frozenset({"prediction", "target"})

    def __init__(self, *, temperature: float = 0.2, ema_momentum: Sequence[float] = (0.99, 1.0)):
        super().__init__()
        self.temperature, self.ema_momentum = check_temperature(temperature), check_momentum(ema_momentum)

    def compute(self, z: Views, *, prediction: Tensor, target: Tensor, **given: object) -> ObjectiveOutput:
        """Return the loss and ``positive_cosine`` of predictions (shaped as `z`) and keys (`target` of two views)."""
        self.check_shape("prediction", prediction, z)
        self.check_shape("target", target, z, views=2)
        loss = moco_v3_loss(prediction, target[:2], temperature=self.temperature)
        queries, keys = (list(views) for views in zip(*view_pairs(len(z), 2)))
        return ObjectiveOutput(loss, {"positive_cosine": joint_cosine(prediction[queries], target[keys])})
