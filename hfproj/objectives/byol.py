"""BYOL: the prediction from one view points where a moving average of the network projects the other view.

With p = q(z) of view v and z̄ of view i ≠ v, from the moving-average copy and without a gradient,

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
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from hfproj.functional.matching import cross_view_cosines
from hfproj.functional.moments import joint_mean
from hfproj.objectives.base import ObjectiveOutput, check_call
from hfproj.objectives.checks import check_momentum, check_shape
from hfproj.typing import Scalar, Views


def byol_loss(prediction: Views, target: Float[Tensor, "target_views batch dim"]) -> Scalar:
    """Return BYOL over the joint batch: 0 where all pairs align, 4 where they are orthogonal, 8 where opposite.

    Args:
        prediction: p of all views, in any floating-point type; computed in float32 or better.
        target: z̄ of the first views; the gradient does not pass it.

    Example:
        >>> import torch
        >>> p = torch.randn(2, 4, 8)
        >>> bool(byol_loss(p, 3 * p.flip(0)).abs() < 1e-5)
        True
    """
    return 4 - 4 * joint_mean(cross_view_cosines(prediction, target.detach()))


class BYOL(nn.Module):
    """BYOL over the joint batch of all processes, for two or more views.

    With more views the moving-average copy sees the first two, the large crops, and predictions of all views are
    compared with it.

    Args:
        ema_momentum: Of the copy, at the start and at the end; a cosine joins them. 0.99 to 1: solo-learn; the paper
            starts at 0.996.

    Raises:
        UsageError: an option that cannot work.

    Example:
        >>> import torch
        >>> z = torch.randn(2, 16, 8)
        >>> loss, terms = BYOL()(z, prediction=z, target=z.flip(0))
        >>> round(terms["positive_cosine"].item(), 4)
        1.0
    """

    views = (2, None)
    needs = frozenset({"prediction", "target"})
    target_of = "projection"
    target_views = 2

    def __init__(self, *, ema_momentum: Sequence[float] = (0.99, 1.0)):
        super().__init__()
        self.ema_momentum = check_momentum(ema_momentum)

    def forward(
        self,
        z: Views,
        *,
        prediction: Tensor | None = None,
        target: Tensor | None = None,
        **given: Any,
    ) -> ObjectiveOutput:
        """Return the loss and ``positive_cosine``, the mean cosine between predictions and targets.

        Args:
            z: Projections of at least two views; only their shape matters.
            prediction: p, of the same shape.
            target: z̄ of the first two views.
            given: Unused.

        Raises:
            UsageError: fewer than two views, or no prediction or target or one of another shape.
        """
        check_call(self, z, prediction=prediction, target=target, **given)
        assert prediction is not None  # just checked
        assert target is not None
        check_shape(self, "prediction", prediction, z)
        check_shape(self, "target", target, z, views=self.target_views)
        loss = byol_loss(prediction, target[: self.target_views])
        return ObjectiveOutput(loss, {"positive_cosine": 1 - loss.detach() / 4})

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return f"ema_momentum={self.ema_momentum}"
