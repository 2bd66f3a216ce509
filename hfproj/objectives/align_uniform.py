"""Alignment and uniformity: views of an image close together, images evenly over the sphere.

With unit rows ẑ of views a and b,

    L = mean_i ‖ẑ_a,i − ẑ_b,i‖^α + λ · ½ (U(ẑ_a) + U(ẑ_b)),    U(ẑ) = log mean_{i<j} exp(−t ‖ẑ_i − ẑ_j‖²).

References:
    Wang & Isola 2020, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere", arXiv 2005.10242, eq. 2 and 3; ssnl/align_uniform (α = 2, t = 2, λ = 1); lightly-ai/lightly
    (e8d317fc) ``loss/hypersphere_loss.py`` (t = 1).

Deviations:
    Over processes the pairs of U are those of the global batch; ``gather=False`` takes each process's own, as lightly
    does. With more than two views, means over pairs of views and over views.
"""

import torch

from hfproj.errors import UsageError
from hfproj.functional.distributions import uniformity
from hfproj.functional.rows import unit_rows, view_pairs
from hfproj.objectives.base import Objective, ObjectiveOutput, check_positive
from hfproj.typing import Scalar, Views


def alignment(z: Views, *, exponent: float = 2.0) -> Scalar:
    """Return the mean ‖ẑ_a,i − ẑ_b,i‖^α over images and pairs of views of the projections `z`.

    `exponent` is α, at least 1; below 2, equal rows have the gradient 0. Computed in float32 or better.

    Example:
        >>> alignment(torch.stack([torch.eye(3), -torch.eye(3)])).item()
        4.0
    """
    rows = unit_rows(z)
    squares = torch.stack([(rows[a] - rows[b]).square().sum(-1) for a, b in view_pairs(len(z), ordered=True)])
    if exponent == 2:
        return squares.mean()
    # The power has an infinite slope at 0 where α < 2, and inf · 0 would be NaN.
    apart = squares > 0
    return torch.where(apart, torch.where(apart, squares, 1) ** (exponent / 2), 0).mean()


class AlignUniform(Objective):
    """Alignment plus uniformity, over the global batch.

    When to use: to see the two forces of contrastive learning apart and to weigh them. Batches of some hundred images
    suffice. The balance is yours: with a small λ projections collapse, with a large one views hardly meet.

    Args:
        exponent: α, at least 1. 2: Wang & Isola, lightly.
        kernel_scale: t. 2: Wang & Isola; 1: lightly.
        uniformity_weight: λ. 1: Wang & Isola's code, lightly.
        gather: Whether rows of other processes count in the uniformity; if not, the loss is that of the local batch.

    Raises:
        UsageError: If an option is out of range; in a call, with fewer than two views or images.

    Example:
        >>> loss, terms = AlignUniform()(torch.eye(4).expand(2, 4, 4))
        >>> {name: value.item() for name, value in terms.items()}
        {'alignment': 0.0, 'uniformity': -4.0}
    """

    def __init__(
        self, *, exponent: float = 2.0, kernel_scale: float = 2.0, uniformity_weight: float = 1.0, gather: bool = True
    ):
        super().__init__()
        if check_positive("exponent", exponent, usual="2") < 1:
            wanted = "exponent to be at least 1 (below, near views pull without bound)"
            raise UsageError(f"Expected {wanted}, got {exponent}.")
        self.exponent, self.gather = exponent, gather
        self.kernel_scale = check_positive("kernel_scale", kernel_scale, usual="1 to 2")
        self.uniformity_weight = check_positive("uniformity_weight", uniformity_weight, usual="1")

    def compute(self, z: Views, **given: object) -> ObjectiveOutput:
        """Return the loss, ``alignment`` and ``uniformity``."""
        z = self.global_batch(z, gather=self.gather)
        align = alignment(z, exponent=self.exponent)
        uniform = torch.stack([uniformity(view, kernel_scale=self.kernel_scale) for view in z]).mean()
        terms = {"alignment": align.detach(), "uniformity": uniform.detach()}
        return ObjectiveOutput(align + self.uniformity_weight * uniform, terms)
