"""SimSiam: the prediction from one view points where the same network, without a gradient, projects the other view.

    L = −mean over pairs (i, v) of cos(p_v, sg(z_i)),

with p = q(z), i one of the first two views and v any other; −½ of the two cosines if there are two views.

References:
    Chen, He 2021, "Exploring Simple Siamese Representation Learning", arXiv 2011.10566, eqs. 1 to 4;
    facebookresearch/simsiam ``simsiam/builder.py``, ``main_simsiam.py``; vturrisi/solo-learn (9187ea3)
    ``losses/simsiam.py``.

Deviations:
    None for two views. solo-learn sums over the pairs instead: twice the official loss with two views.
"""

import torch

from hfproj.functional.moments import joint_mean
from hfproj.functional.rows import cross_view_cosines
from hfproj.objectives.base import Objective, ObjectiveOutput
from hfproj.typing import Scalar, Views


def simsiam_loss(prediction: Views, z: Views) -> Scalar:
    """Return SimSiam over the global batch, from −1 (all pairs align) to 1; the gradient does not pass `z`.

    Example:
        >>> simsiam_loss(torch.ones(2, 4, 16), torch.ones(2, 4, 16)).item()
        -1.0
    """
    return -joint_mean(cross_view_cosines(prediction, z[:2].detach()))


class SimSiam(Objective):
    """SimSiam over the global batch; of three or more views the first two, the large crops, are targets of all others.

    When to use: the cheapest method without negatives (no teacher, no queue); its paper trains at batches from 64 to
    4096. Only the predictor and the stopped gradient keep it from collapse, where the loss is at its minimum, −1: watch
    the rank, not the loss.

    Raises:
        UsageError: In a call, with fewer than two views, or a prediction that is missing or of another shape.

    Example:
        >>> SimSiam()(torch.ones(2, 16, 4), prediction=torch.ones(2, 16, 4)).loss.item()
        -1.0
    """

    needs = frozenset({"prediction"})

    def compute(self, z: Views, *, prediction: torch.Tensor, **given: object) -> ObjectiveOutput:
        """Return the loss and ``positive_cosine``, the mean cosine of predictions (shaped as `z`) and projections."""
        self.check_shape("prediction", prediction, z)
        loss = simsiam_loss(prediction, z)
        return ObjectiveOutput(loss, {"positive_cosine": -loss.detach()})
