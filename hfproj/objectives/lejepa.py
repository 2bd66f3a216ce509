"""LeJEPA: views of an image meet at their mean while the projections of each view become standard Gaussian.

    L = (1 − λ) · mean (z_v − centre)² + λ · mean_v SIGReg(z_v),

with the mean of an image's views as its centre; :mod:`hfproj.functional.distributions` has the second term. There is no
target network, stop-gradient or normalisation.

References:
    Balestriero, LeCun 2025, "LeJEPA", arXiv 2511.08544; rbalestr-lab/lejepa ``MINIMAL.md``; lightly-ai/lightly
    (e8d317fc) ``loss/lejepa_loss.py``.

Deviations:
    Means, and N in SIGReg, are those of the global batch.
"""

import torch

from hfproj.errors import UsageError
from hfproj.functional.distributions import check_knots, random_directions, sigreg
from hfproj.functional.moments import joint_mean
from hfproj.functional.rows import at_least_float32, generator_of
from hfproj.objectives.base import Objective, ObjectiveOutput, Step, check_at_least, check_between
from hfproj.typing import Scalar, Views


def distance_to_centre(z: Views, *, global_views: int | None = None) -> Scalar:
    """Return the mean square of z_v − centre, the mean of the first `global_views` views (None: all), over all entries.

    Example:
        >>> distance_to_centre(torch.tensor([[[0.0]], [[2.0]]])).item()
        1.0
    """
    z = at_least_float32(z)
    return joint_mean((z - z[:global_views].mean(0)).square())


class LeJEPA(Objective):
    """LeJEPA over the global batch, for two or more views.

    When to use: one weight to tune, no teacher, predictor or queue; its authors find that the loss follows the quality,
    so that runs can be compared without labels. SIGReg takes ``slices · knots`` numbers per row, and small batches make
    it noisy.

    Args:
        sigreg_weight: λ, from 0 to 1. 0.05: lightly; 0.02: the authors' minimal example.
        slices: Random directions per step. 1024: the authors' README and lightly; 256: the minimal example.
        knots: Frequencies of SIGReg, from 0 to `t_max`.
        t_max: The highest of them.
        global_views: How many views, the first ones, make up the centre (lightly: the global views); None: all (the
            minimal example).

    Raises:
        UsageError: If an option is out of range; in a call, with fewer than two views or than `global_views`, or
            without a step on several processes.

    Example:
        >>> round(LeJEPA(slices=64)(torch.zeros(2, 100, 8)).terms["sigreg"].item(), 2)  # collapsed
        40.2
    """

    def __init__(
        self, *, sigreg_weight: float = 0.05, slices: int = 1024, knots: int = 17, t_max: float = 3.0,
        global_views: int | None = None,
    ):  # fmt: skip
        super().__init__()
        check_between(0, 1, sigreg_weight=sigreg_weight)
        check_at_least(1, slices=slices, global_views=global_views)
        check_knots(knots, t_max)
        self.sigreg_weight, self.slices, self.knots, self.t_max = sigreg_weight, slices, knots, t_max
        self.global_views = global_views

    def compute(self, z: Views, *, step: Step | None = None, **given: object) -> ObjectiveOutput:
        """Return the loss, and ``invariance`` and ``sigreg`` before their weights; `step` draws the directions."""
        if self.global_views is not None and self.global_views > len(z):
            raise UsageError(f"The centre is the mean of global_views={self.global_views} views, and z has {len(z)}.")
        invariance = distance_to_centre(z, global_views=self.global_views)
        directions = random_directions(z[0], self.slices, generator=generator_of(step))
        statistics = [sigreg(view, directions=directions, knots=self.knots, t_max=self.t_max) for view in z]
        gaussianity = torch.stack(statistics).mean()
        loss = (1 - self.sigreg_weight) * invariance + self.sigreg_weight * gaussianity
        return ObjectiveOutput(loss, {"invariance": invariance.detach(), "sigreg": gaussianity.detach()})
