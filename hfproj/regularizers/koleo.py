"""KoLeo: each row is pushed from its nearest neighbour, by the Kozachenko-Leonenko estimate of differential entropy.

    L = Σ_v −mean_i log( ‖f̂_i − f̂_{nn(i)} + ε‖ + ε ),    nn(i) = argmax_{j≠i} ⟨f̂_i, f̂_j⟩,

within each view v, never between views of an image, and without a gradient through the choice of the neighbour.

References:
    Sablayrolles et al. 2018, "Spreading vectors for similarity search", arXiv 1806.03198, eq. 2.
    facebookresearch/dinov2 ``dinov2/loss/koleo_loss.py``, ``train/ssl_meta_arch.py`` (the representation of each global
    crop, weight 0.1).

Deviations:
    Neighbours are searched in the global batch of all processes by default; ``gather=False`` is DINOv2's, per process.
    Rows that coincide exactly get no gradient from each other. Where three or more do, the official code has one of up
    to 1e7, which comes from ε alone.

Notes:
    Orthonormal rows give −½ log 2 per view; all rows alike −log(ε(√D + 1)). Gradients of near duplicates are large (of
    order 1e5 at a distance of 1e-6): clip them (``max_grad_norm``).
"""

import torch
from torch import nn

from hfproj.errors import UsageError
from hfproj.functional.overflow import OverflowGuard
from hfproj.functional.rows import full_precision, unit_rows
from hfproj.registry import ShowsOptions
from hfproj.regularizers.base import Layer, Projections, Representations, check_on, features
from hfproj.typing import Features, Scalar


def koleo_loss(f: Features, *, eps: float = 1e-8) -> Scalar:
    """Return KoLeo of the rows of one view, at least two, in float32 or better; a norm up to ε counts as zero.

    Raises:
        UsageError: If there are fewer than two rows.

    Example:
        >>> bool(koleo_loss(torch.eye(4)).isclose(-torch.tensor(2.0).log() / 2))
        True
    """
    if len(f) < 2:
        raise UsageError(f"KoLeo needs at least 2 rows to find a neighbour among, got {len(f)}; use a larger batch.")
    with full_precision(f):
        u = unit_rows(f, eps=eps)
        with torch.no_grad():
            similarity = u @ u.mT
            nearest = similarity.fill_diagonal_(-torch.inf).argmax(1)
        difference = u - u[nearest]
        # The gradient of ‖0 + ε‖ would point along (1, …, 1), with a length of up to 1/ε.
        difference = torch.where((difference == 0).all(1, keepdim=True), 0, difference)
        distance = torch.linalg.vector_norm(difference + eps, dim=1)
        return -(distance + eps).log().mean()


class KoLeo(ShowsOptions, nn.Module):
    """KoLeo of each view of the global batch, summed over views.

    Args:
        on: ``"h"`` (DINOv2) or ``"z"``.
        gather: Whether neighbours are searched among rows of other processes, too.
        eps: ε. 1e-8: DINOv2.

    Raises:
        UsageError: If `on` is unknown or `eps` is not in (0, 1); on call, if the batch has one image.

    Example:
        >>> h = torch.eye(4).expand(2, 4, 4)
        >>> round(KoLeo()(nn.Identity(), h, h).item(), 4)  # −log 2, half from each view
        -0.6931
    """

    def __init__(self, *, on: Layer = "h", gather: bool = True, eps: float = 1e-8):
        super().__init__()
        check_on(on)
        if not 0 < eps < 1:
            raise UsageError(f"Expected eps to be a small positive number (1e-8 is usual), got {eps}.")
        self.on, self.gather, self.eps = on, gather, eps

    def forward(self, model: object, h: Representations, z: Projections, *, step: object = None) -> Scalar:
        """Return the sum over views.

        Raises:
            UsageError: If the features have another shape or type, or h carries no gradient while z does.
        """
        guard = OverflowGuard("KoLeo")
        x = guard(features(self.on, h, z, gather=self.gather))
        return guard.loss(torch.stack([koleo_loss(view, eps=self.eps) for view in x]).sum())
