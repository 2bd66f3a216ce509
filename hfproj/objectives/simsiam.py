"""SimSiam: the prediction from one view points where the same network, held still, projects the other view.

    L = −mean over pairs (i, v) of cos(p_v, sg(z_i)),

with p = q(z), i one of the first two views and v any other; −½ of the two cosines if there are two views.

References:
    Chen, He 2021, "Exploring Simple Siamese Representation Learning", arXiv 2011.10566, eqs. 1 to 4;
    facebookresearch/simsiam ``simsiam/builder.py``, ``main_simsiam.py``; vturrisi/solo-learn (9187ea3)
    ``losses/simsiam.py``.

Deviations:
    None for two views. solo-learn sums over the pairs instead: twice the official loss with two views.
"""

from typing import Any

from torch import Tensor, nn

from hfproj.functional.matching import cross_view_cosines
from hfproj.functional.moments import joint_mean
from hfproj.objectives.base import ObjectiveOutput, check_call
from hfproj.objectives.checks import check_shape
from hfproj.typing import Scalar, Views


def simsiam_loss(prediction: Views, z: Views) -> Scalar:
    """Return SimSiam over the joint batch, from −1 (all pairs align) to 1.

    Args:
        prediction: p of all views, in any floating-point type; computed in float32 or better.
        z: Projections of all views; the gradient does not pass them.

    Example:
        >>> import torch
        >>> z = torch.ones(2, 4, 16)
        >>> simsiam_loss(z, z).item()
        -1.0
    """
    return -joint_mean(cross_view_cosines(prediction, z[:2].detach()))


class SimSiam(nn.Module):
    """SimSiam over the joint batch of all processes, for two or more views.

    With more views the first two, the large crops, are the targets of all others.

    Example:
        >>> import torch
        >>> z = torch.ones(2, 16, 4)
        >>> SimSiam()(z, prediction=z).loss.item()
        -1.0
    """

    views = (2, None)
    needs = frozenset({"prediction"})

    def __init__(self):
        super().__init__()

    def forward(self, z: Views, *, prediction: Tensor | None = None, **given: Any) -> ObjectiveOutput:
        """Return the loss and ``positive_cosine``, the mean cosine between predictions and projections.

        Args:
            z: Projections of at least two views.
            prediction: p, of the same shape.
            given: Unused.

        Raises:
            UsageError: fewer than two views, or no prediction or one of another shape.
        """
        check_call(self, z, prediction=prediction, **given)
        assert prediction is not None  # just checked
        check_shape(self, "prediction", prediction, z)
        loss = simsiam_loss(prediction, z)
        return ObjectiveOutput(loss, {"positive_cosine": -loss.detach()})
