"""Barlow Twins: each dimension of one view agrees with itself in the other view, and with no other dimension.

With z standardised per view and dimension over the batch (biased variance, plus ε) and C = z_aᵀ z_b / N,

    L = scale · [ Σ_i (C_ii − 1)² + λ Σ_{i≠j} C_ij² ].

References:
    Zbontar et al. 2021, arXiv 2103.03230, eq. 1; facebookresearch/barlowtwins ``main.py``; vturrisi/solo-learn
    (9187ea3) ``losses/barlow.py``; lightly-ai/lightly (e8d317fc) ``loss/barlow_twins_loss.py``.

Deviations:
    Statistics and C are those of the global batch, and so is the gradient: the official in-place ``all_reduce`` gives
    1/world_size of it.
"""

from hfproj.distributed import all_reduce_sum
from hfproj.functional.moments import check_rows, joint_centred, off_diagonal_energy
from hfproj.functional.rows import at_least_float32
from hfproj.objectives.base import Objective, ObjectiveOutput, check_at_least, check_positive
from hfproj.typing import Scalar, Views


def barlow_twins_terms(z: Views, *, eps: float = 1e-5) -> tuple[Scalar, Scalar]:
    """Return Σ_i (C_ii − 1)² and Σ_{i≠j} C_ij² of two views over the global batch; `eps` is added to the variances.

    Raises:
        UsageError: If there are fewer than two images over all processes.

    Example:
        >>> import torch
        >>> [term.item() for term in barlow_twins_terms(torch.ones(2, 4, 8))]  # collapsed
        [8.0, 0.0]
    """
    z = at_least_float32(z)
    n, centred, variance = joint_centred(z)
    check_rows("The correlation of dimensions", z.shape[1], n)
    a, b = centred * ((variance + eps) * n).rsqrt().unsqueeze(1)
    diagonal = all_reduce_sum((a * b).sum(0))
    return (diagonal - 1).square().sum(), off_diagonal_energy(a, b)


class BarlowTwins(Objective):
    """Barlow Twins over the global batch, for two views.

    When to use: without negatives, predictor or teacher, and with a wide head (2048 to 8192), which it needs; batches
    from 256 on do. At collapse the loss is the number of dimensions. Time and memory grow with the smaller one of batch
    and projection: C itself is only made if the batch is larger.

    Args:
        off_diagonal_weight: λ. 0.0051: official code; 5e-3: lightly.
        scale: Factor of the whole loss. 1: official code; 0.1: solo-learn on CIFAR.
        eps: Added to the variances. 1e-5: BatchNorm's.

    Raises:
        UsageError: If an option is out of range; in a call, with other than two views or fewer than two images.

    Example:
        >>> import torch
        >>> BarlowTwins()(torch.ones(2, 16, 8)).loss.item()  # collapsed: C = 0
        8.0
    """

    views = (2, 2)

    def __init__(self, *, off_diagonal_weight: float = 0.0051, scale: float = 1.0, eps: float = 1e-5):
        super().__init__()
        check_at_least(0, off_diagonal_weight=off_diagonal_weight)
        self.off_diagonal_weight = off_diagonal_weight
        self.scale = check_positive("scale", scale, usual="1 or 0.1")
        self.eps = check_positive("eps", eps, usual="1e-5")

    def compute(self, z: Views, **given: object) -> ObjectiveOutput:
        """Return the loss, and its parts ``on_diagonal`` and ``off_diagonal`` before any factor."""
        on, off = barlow_twins_terms(z, eps=self.eps)
        loss = self.scale * (on + self.off_diagonal_weight * off)
        return ObjectiveOutput(loss, {"on_diagonal": on.detach(), "off_diagonal": off.detach()})
