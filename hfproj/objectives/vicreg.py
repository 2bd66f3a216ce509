"""VICReg: views agree (invariance), each dimension varies (variance), and no two dimensions covary (covariance).

    L = λ·mean (z_a − z_b)² + μ·Var + ν·Cov,    Var = ½ (v(z_a) + v(z_b)),    Cov = c(z_a) + c(z_b),

with v the hinge of :func:`hfproj.functional.moments.variance_hinge` and c that of ``covariance_penalty``.

References:
    Bardes, Ponce, LeCun 2022, arXiv 2105.04906, eqs. 1 to 6; facebookresearch/vicreg ``main_vicreg.py``;
    lightly-ai/lightly (e8d317fc) ``loss/vicreg_loss.py``; vturrisi/solo-learn (9187ea3) ``losses/vicreg.py``. More than
    two views: facebookresearch/VICRegL ``main_vicregl.py``, ``global_loss``.

Deviations:
    The mean of the invariance term is that over all rows of all processes, also where shards differ in size. With more
    than two views Cov is twice the mean over the views, so that two views are no special case; VICRegL takes the mean.
"""

import torch

from hfproj.errors import check_choice
from hfproj.functional.moments import check_rows, hinge, joint_centred, joint_mean, off_diagonal_energy
from hfproj.functional.rows import at_least_float32
from hfproj.objectives.base import Objective, ObjectiveOutput, check_at_least, check_positive
from hfproj.typing import OneOf, Scalar, Views

_REDUCTIONS = {"mean": 1, "sum": 2}  # of two views


def invariance(z: Views) -> Scalar:
    """Return the mean squared difference of two or more views, over the global batch.

    Pairs are (i, v) with i one of the first two views and v any other, as in multi-crop training.

    Example:
        >>> invariance(torch.stack([torch.zeros(4, 8), torch.ones(4, 8)])).item()
        1.0
    """
    z = at_least_float32(z)
    targets = 1 if len(z) == 2 else 2  # of two views both pairs are the same
    pairs = [(i, v) for i in range(targets) for v in range(len(z)) if v != i]
    return joint_mean(torch.stack([(z[i] - z[v]).square().mean(-1) for i, v in pairs]))


class VICReg(Objective):
    """VICReg over the global batch of all processes, for two or more views.

    When to use: without negatives, predictor or teacher, with a wide head (2048 to 8192) and batches from 256 on; the
    two branches may differ. Three weights to tune; with too little variance weight it collapses, and its terms show
    which part. Time and memory grow with the smaller one of batch and projection. With more views, the first two are
    the large crops that all others are compared with; variance and covariance are of every view.

    Args:
        invariance_weight: λ.
        variance_weight: μ.
        covariance_weight: ν. All three as in the paper: 25, 25, 1.
        variance_reduction: ``"mean"``: Var is the mean over the views (paper, official code, lightly); ``"sum"``: the
            sum over two views (solo-learn), twice as much.
        eps: ε in the square root of the variance.

    Raises:
        UsageError: If an option is out of range; in a call, with fewer than two views or images.

    Example:
        >>> round(VICReg()(torch.ones(2, 16, 8)).loss.item(), 4)  # collapsed, only variance: 25·(1 - sqrt(1e-4))
        24.75
    """

    def __init__(
        self, *, invariance_weight: float = 25.0, variance_weight: float = 25.0, covariance_weight: float = 1.0,
        variance_reduction: OneOf["mean", "sum"] = "mean", eps: float = 1e-4,
    ):  # fmt: skip
        super().__init__()
        check_at_least(0, invariance_weight=invariance_weight, variance_weight=variance_weight)
        check_at_least(0, covariance_weight=covariance_weight)
        check_choice("variance_reduction", variance_reduction, _REDUCTIONS)
        self.invariance_weight, self.variance_weight = invariance_weight, variance_weight
        self.covariance_weight, self.variance_reduction = covariance_weight, variance_reduction
        self.eps = check_positive("eps", eps, usual="1e-4")

    def compute(self, z: Views, **given: object) -> ObjectiveOutput:
        """Return the loss, and its parts ``invariance``, ``variance`` and ``covariance`` before their weights."""
        z = at_least_float32(z)
        n, centred, variance = joint_centred(z)
        check_rows("The covariance of dimensions", z.shape[1], n)
        energy = torch.stack([off_diagonal_energy(view) for view in centred]).mean()
        terms = {
            "invariance": invariance(z),
            "variance": _REDUCTIONS[self.variance_reduction] * hinge(variance * (n / (n - 1)), eps=self.eps),
            "covariance": 2 * energy / ((n - 1).square() * z.shape[2]),
        }
        loss = self.invariance_weight * terms["invariance"] + self.variance_weight * terms["variance"]
        loss = loss + self.covariance_weight * terms["covariance"]
        return ObjectiveOutput(loss, {name: term.detach() for name, term in terms.items()})
