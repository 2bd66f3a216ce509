"""SIGReg: how far rows are from N(0, I), measured along random directions by their characteristic functions.

With unit directions a_j, y_ij = ⟨z_i, a_j⟩, φ(t) = exp(−t²/2) and frequencies t_l on [0, t_max],

    T_j = N Σ_l w_l φ(t_l) [ (mean_i cos(t_l y_ij) − φ(t_l))² + (mean_i sin(t_l y_ij))² ],    SIGReg(z) = mean_j T_j,

the Epps-Pulley statistic by the trapezoid rule, weights w_l doubled for the negative frequencies. Its expectation under
N(0, I) is Σ_l w_l φ(t_l) (1 − φ(t_l)²), whatever N. At z = 0 the gradient is zero, but the point is a saddle.

References:
    Balestriero, LeCun 2025, "LeJEPA", arXiv 2511.08544; rbalestr-lab/lejepa ``lejepa/univariate/epps_pulley.py``,
    ``lejepa/multivariate/slicing.py``, ``MINIMAL.md``.

Deviations:
    Over processes N and the means are those of the joint batch also where shards differ in size.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.distributed import all_reduce_sum
from hfproj.errors import UsageError
from hfproj.functional.rows import full_precision, unit_rows
from hfproj.typing import Features, Scalar


def sigreg(
    z: Features,
    *,
    directions: Float[Tensor, "dim slices"],
    knots: int = 17,
    t_max: float = 3.0,
) -> Scalar:
    """Return SIGReg of the rows of all processes: about 1.05 under N(0, I), 0.402·N if all rows are zero.

    Args:
        z: Rows of this process, in any floating-point type; computed in float32 or better.
        directions: Unit columns, the same on all processes: :func:`random_directions`, drawn anew in each step.
        knots: Number of frequencies, with both ends.
        t_max: Highest frequency.

    Raises:
        UsageError: fewer than two knots, or `t_max` is not positive.

    Example:
        >>> round(sigreg(torch.zeros(10, 4), directions=torch.eye(4)).item(), 2)
        4.02
    """
    if knots < 2 or not 0 < t_max < float("inf"):
        raise UsageError(f"SIGReg needs at least 2 knots and a positive t_max, got knots={knots}, t_max={t_max}.")
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    t = torch.linspace(0, t_max, knots, dtype=z.dtype, device=z.device)
    gaussian = (-t.square() / 2).exp()
    weight = torch.full_like(t, 2 * t_max / (knots - 1))
    weight[[0, -1]] /= 2
    with full_precision(z):
        angle = (z @ directions.to(z)).unsqueeze(-1) * t
    sums = torch.stack([angle.cos().sum(0), angle.sin().sum(0)]).flatten()
    *sums, n = all_reduce_sum(torch.cat([sums, sums.new_full((1,), len(z))])).split([sums.numel(), 1])
    cosine, sine = (sums[0] / n).view(2, -1, knots)
    distance = (cosine - gaussian).square() + sine.square()
    return (n * (distance * (weight * gaussian)).sum(-1).mean()).squeeze()  # no product that autocast would round


def random_directions(
    z: Features, slices: int, *, generator: torch.Generator | None = None
) -> Float[Tensor, "dim slices"]:
    """Draw unit columns, uniform on the sphere, for rows like those of `z`.

    Args:
        z: Rows that will be projected; only width, device and type matter.
        slices: Number of directions.
        generator: Source of randomness, in the same state on all processes; None: torch's own.

    Raises:
        UsageError: no direction is asked for.

    Example:
        >>> directions = random_directions(torch.zeros(2, 8), 5)
        >>> torch.allclose(directions.norm(dim=0), torch.ones(5))
        True
    """
    if slices < 1:
        raise UsageError(f"SIGReg needs at least 1 slice (256 to 1024 are usual), got {slices}.")
    device = z.device if generator is None else generator.device
    normal = torch.randn(slices, z.shape[-1], generator=generator, device=device)
    return unit_rows(normal.to(z.device, torch.promote_types(z.dtype, torch.float32))).T
