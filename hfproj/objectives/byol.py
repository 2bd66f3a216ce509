"""BYOL: the prediction from one view points where an EMA target network projects the other view.

With p = q(z) of view v and z̄ of view i ≠ v, from the target network and without a gradient,

    L = 2 · mean over pairs (i, v) of [2 − 2 cos(p_v, z̄_i)],

the sum of the two directions if there are two views.

References:
    Grill et al. 2020, "Bootstrap your own latent", arXiv 2006.07733, eq. 2; vturrisi/solo-learn (9187ea3)
    ``losses/byol.py``, ``methods/byol.py``.

Deviations:
    None for two views. With more, solo-learn sums over all pairs; here twice their mean, so that the scale of the loss
    does not depend on the number of crops.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float

from hfproj.functional.moments import joint_mean
from hfproj.functional.rows import cross_view_cosines
from hfproj.objectives.base import Objective, ObjectiveOutput, check_momentum
from hfproj.typing import Scalar, Views


def byol_loss(prediction: Views, target: Float[torch.Tensor, "target_views batch dim"]) -> Scalar:
    """Return BYOL over the global batch: 0 where all pairs align, 4 where they are orthogonal, 8 where opposite.

    ``prediction`` is p of all views, ``target`` z̄ of the first views, which gets no gradient.

    Example:
        >>> byol_loss(torch.eye(2).expand(2, 2, 2), 3 * torch.eye(2).expand(2, 2, 2)).item()
        0.0
    """
    return 4 - 4 * joint_mean(cross_view_cosines(prediction, target.detach()))


class BYOL(Objective):
    """BYOL over the global batch; of three or more views the target network sees the first two, the large crops.

    When to use: without negatives, so that small batches do; it costs a second copy of the model and a forward pass.
    What keeps it from collapse are predictor, target network and BatchNorm, not the loss: watch the rank.

    Args:
        ema_momentum: Of the target network, at the start and at the end; a cosine joins them. 0.99 to 1: solo-learn;
            the paper starts at 0.996.

    Raises:
        UsageError: If the momentum is not two numbers from 0 to 1; in a call, with fewer than two views, or a
            prediction or target that is missing or of another shape.

    Example:
        >>> z = torch.eye(2).expand(2, 2, 2)
        >>> BYOL()(z, prediction=z, target=-z).loss.item()  # opposite
        8.0
    """

    needs = frozenset({"prediction", "target"})

    def __init__(self, *, ema_momentum: Sequence[float] = (0.99, 1.0)):
        super().__init__()
        self.ema_momentum = check_momentum(ema_momentum)

    def compute(self, z: Views, *, prediction: torch.Tensor, target: torch.Tensor, **given: object) -> ObjectiveOutput:
        """Return the loss and ``positive_cosine`` of predictions (shaped as `z`) and targets (of two views)."""
        self.check_shape("prediction", prediction, z)
        self.check_shape("target", target, z, views=2)
        loss = byol_loss(prediction, target[:2])
        return ObjectiveOutput(loss, {"positive_cosine": 1 - loss.detach() / 4})
