"""Barlow Twins: each dimension of one view agrees with itself in the other view, and with no other dimension.

With z standardised per view and dimension over the batch (biased variance, plus ε) and C = z_aᵀ z_b / N,

    L = scale · [ Σ_i (C_ii − 1)² + λ Σ_{i≠j} C_ij² ].

References:
    Zbontar et al. 2021, arXiv 2103.03230, eq. 1; facebookresearch/barlowtwins ``main.py``; vturrisi/solo-learn
    (9187ea3) ``losses/barlow.py``; lightly-ai/lightly (e8d317fc) ``loss/barlow_twins_loss.py``.

Deviations:
    Statistics and C are those of the joint batch, and so is the gradient: the official in-place ``all_reduce`` gives
    1/world_size of it.
"""

from typing import Any

import torch
from torch import nn

from hfproj.distributed import all_reduce_sum
from hfproj.errors import UsageError
from hfproj.functional.covariance import off_diagonal_energy
from hfproj.functional.moments import check_rows, joint_centred
from hfproj.objectives.base import ObjectiveOutput, check_call
from hfproj.objectives.checks import check_positive
from hfproj.typing import Scalar, Views


def barlow_twins_terms(z: Views, *, eps: float = 1e-5) -> tuple[Scalar, Scalar]:
    """Return Σ_i (C_ii − 1)² and Σ_{i≠j} C_ij² over the joint batch.

    Args:
        z: Projections of two views, in any floating-point type; computed in float32 or better.
        eps: Added to the variances.

    Raises:
        UsageError: fewer than two images over all processes.

    Example:
        >>> [term.item() for term in barlow_twins_terms(torch.ones(2, 4, 8))]  # collapsed
        [8.0, 0.0]
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    n, centred, variance = joint_centred(z)
    check_rows("The correlation of dimensions", z.shape[1], n)
    a, b = centred * ((variance + eps) * n).rsqrt().unsqueeze(1)
    diagonal = all_reduce_sum((a * b).sum(0))
    return (diagonal - 1).square().sum(), off_diagonal_energy(a, b)


class BarlowTwins(nn.Module):
    """Barlow Twins over the joint batch of all processes, for two views.

    Time and memory grow with the smaller one of batch and projection: C itself is only made if the batch is larger.

    Args:
        off_diagonal_weight: λ. 0.0051: official code; 5e-3: lightly.
        scale: Factor of the whole loss. 1: official code; 0.1: solo-learn on CIFAR.
        eps: Added to the variances. 1e-5: BatchNorm's.

    Raises:
        UsageError: an option that cannot work.

    Example:
        >>> z = torch.ones(2, 16, 8)  # collapsed: C = 0
        >>> BarlowTwins()(z).loss.item()
        8.0
    """

    views = (2, 2)
    needs: frozenset[str] = frozenset()

    def __init__(self, *, off_diagonal_weight: float = 0.0051, scale: float = 1.0, eps: float = 1e-5):
        super().__init__()
        if not 0 <= off_diagonal_weight < float("inf"):
            raise UsageError(f"off_diagonal_weight must be 0 or a positive number, got {off_diagonal_weight}.")
        self.off_diagonal_weight = off_diagonal_weight
        self.scale = check_positive("scale", scale, usual="1 or 0.1")
        self.eps = check_positive("eps", eps, usual="1e-5")

    def forward(self, z: Views, **given: Any) -> ObjectiveOutput:
        """Return the loss, and its parts ``on_diagonal`` and ``off_diagonal`` before any factor.

        Args:
            z: Projections of two views. Processes may hold batches of different sizes.
            given: Unused.

        Raises:
            UsageError: not two views, or fewer than two images over all processes.
        """
        check_call(self, z, **given)
        on, off = barlow_twins_terms(z, eps=self.eps)
        loss = self.scale * (on + self.off_diagonal_weight * off)
        return ObjectiveOutput(loss, {"on_diagonal": on.detach(), "off_diagonal": off.detach()})

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return f"off_diagonal_weight={self.off_diagonal_weight}, scale={self.scale}, eps={self.eps}"
