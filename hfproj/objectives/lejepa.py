"""LeJEPA: views of an image meet at their mean while the projections of each view become standard Gaussian.

    L = (1 − λ) · mean (z_v − centre)² + λ · mean_v SIGReg(z_v),

with the mean of an image's views as its centre; :mod:`hfproj.functional.distributions` has the second term. There is no
target network, stop-gradient or normalisation.

References:
    Balestriero, LeCun 2025, "LeJEPA", arXiv 2511.08544; rbalestr-lab/lejepa ``MINIMAL.md``; lightly-ai/lightly
    (e8d317fc) ``loss/lejepa_loss.py``.

Deviations:
    Means, and N in SIGReg, are those of the joint batch.
"""

from typing import Any

import torch
from torch import nn

from hfproj.errors import UsageError
from hfproj.functional.distributions import random_directions, sigreg
from hfproj.functional.moments import joint_mean
from hfproj.functional.rows import generator_of
from hfproj.objectives.base import ObjectiveOutput, Step, check_call
from hfproj.typing import Scalar, Views


def distance_to_centre(z: Views, *, global_views: int | None = None) -> Scalar:
    """Return the mean square of z_v − centre over entries, views and the joint batch.

    Args:
        z: Projections, in any floating-point type; computed in float32 or better.
        global_views: How many views, the first ones, make up the centre; None: all.

    Example:
        >>> distance_to_centre(torch.tensor([[[0.0]], [[2.0]]])).item()
        1.0
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return joint_mean((z - z[:global_views].mean(0)).square())


class LeJEPA(nn.Module):
    """LeJEPA over the joint batch of all processes, for two or more views.

    Args:
        sigreg_weight: λ, from 0 to 1. 0.05: lightly; 0.02: the authors' minimal example.
        slices: Random directions per step. 1024: the authors' README and lightly; 256: the minimal example.
        knots: Frequencies of SIGReg, from 0 to `t_max`.
        t_max: The highest of them.
        global_views: How many views, the first ones, make up the centre (lightly: the global views); None: all (the
            minimal example).

    Raises:
        UsageError: an option that cannot work.

    Example:
        >>> loss, terms = LeJEPA(slices=64)(torch.zeros(2, 100, 8))  # collapsed
        >>> round(terms["sigreg"].item(), 2), terms["invariance"].item()
        (40.2, 0.0)
    """

    views = (2, None)
    needs: frozenset[str] = frozenset()

    def __init__(
        self,
        *,
        sigreg_weight: float = 0.05,
        slices: int = 1024,
        knots: int = 17,
        t_max: float = 3.0,
        global_views: int | None = None,
    ):
        super().__init__()
        if not 0 <= sigreg_weight <= 1:
            raise UsageError(f"sigreg_weight must be from 0 to 1 (0.02 to 0.05 is usual), got {sigreg_weight}.")
        if slices < 1:
            raise UsageError(f"slices must be at least 1 (256 to 1024 is usual), got {slices}.")
        if knots < 2 or not 0 < t_max < float("inf"):
            raise UsageError(f"SIGReg needs at least 2 knots and a positive t_max, got knots={knots}, t_max={t_max}.")
        if global_views is not None and global_views < 1:
            raise UsageError(f"global_views must be at least 1, or None for all views, got {global_views}.")
        self.sigreg_weight, self.slices, self.knots, self.t_max = sigreg_weight, slices, knots, t_max
        self.global_views = global_views

    def forward(self, z: Views, *, step: Step | None = None, **given: Any) -> ObjectiveOutput:
        """Return the loss, and its parts ``invariance`` and ``sigreg`` before their weights.

        Args:
            z: Projections of at least two views. Processes may hold batches of different sizes.
            step: Source of the random directions; may be absent on one process.
            given: Unused.

        Raises:
            UsageError: fewer than two views or than `global_views`, or no step on several processes.
        """
        check_call(self, z, step=step, **given)
        if self.global_views is not None and self.global_views > len(z):
            raise UsageError(f"The centre is the mean of global_views={self.global_views} views, and z has {len(z)}.")
        invariance = distance_to_centre(z, global_views=self.global_views)
        directions = random_directions(z[0], self.slices, generator=generator_of(step))
        gaussianity = torch.stack(
            [sigreg(view, directions=directions, knots=self.knots, t_max=self.t_max) for view in z]
        ).mean()
        loss = (1 - self.sigreg_weight) * invariance + self.sigreg_weight * gaussianity
        return ObjectiveOutput(loss, {"invariance": invariance.detach(), "sigreg": gaussianity.detach()})

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return (
            f"sigreg_weight={self.sigreg_weight}, slices={self.slices}, knots={self.knots}, t_max={self.t_max}, "
            f"global_views={self.global_views}"
        )
