"""SIGReg beside another objective: features are pulled to N(0, I), as seen along random directions.

    L = mean_v SIGReg(z_v),    each view by itself; see `hfproj.functional.distributions` for the statistic.

References:
    Balestriero, LeCun 2025, "LeJEPA", arXiv 2511.08544; rbalestr-lab/lejepa ``MINIMAL.md``.

Deviations:
    None. LeJEPA itself, with its invariance term, is an objective.
"""

import torch
from torch import nn

from hfproj.errors import UsageError
from hfproj.functional.distributions import random_directions, sigreg
from hfproj.functional.overflow import OverflowGuard
from hfproj.functional.rows import full_precision, generator_of
from hfproj.registry import ShowsOptions
from hfproj.regularizers.base import Layer, Projections, Representations, check_on, features
from hfproj.typing import HasGenerator, Scalar


class SIGReg(ShowsOptions, nn.Module):
    """SIGReg of each view of the global batch, averaged over views.

    Features are not normalised: about 1.05 under N(0, I), 0.402 times the number of images if all are zero.

    Args:
        on: ``"z"`` or ``"h"``.
        slices: Number of random directions, drawn anew in each step. 1024: LeJEPA's README, lightly; 256: its minimal
            example.
        knots: Number of frequencies. 17: LeJEPA.
        t_max: Highest frequency. 3: LeJEPA.

    Raises:
        UsageError: If `on` is unknown, a count is too small or `t_max` is not positive and finite; on call, if there is
            no step on several processes.

    Example:
        >>> z = torch.zeros(2, 10, 4)
        >>> round(SIGReg()(nn.Identity(), z, z).item(), 2)
        4.02
    """

    def __init__(self, *, on: Layer = "z", slices: int = 1024, knots: int = 17, t_max: float = 3.0):
        super().__init__()
        check_on(on)
        if slices < 1 or knots < 2 or not 0 < t_max < float("inf"):
            got = f"slices={slices}, knots={knots}, t_max={t_max}"
            raise UsageError(f"SIGReg needs at least 1 slice, 2 knots and a positive t_max, got {got}.")
        self.on, self.slices, self.knots, self.t_max = on, slices, knots, t_max

    def forward(self, model: object, h: Representations, z: Projections, *, step: HasGenerator | None = None) -> Scalar:
        """Return the mean over views.

        Raises:
            UsageError: If the features have another shape or type, or h carries no gradient while z does.
        """
        guard = OverflowGuard("SIGReg")
        x = guard(features(self.on, h, z))
        directions = random_directions(x[0], self.slices, generator=generator_of(step))
        with full_precision(x):
            views = [sigreg(view, directions=directions, knots=self.knots, t_max=self.t_max) for view in x]
        return guard.loss(torch.stack(views).mean())
