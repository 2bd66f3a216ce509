"""Information bottleneck: the head is trained to carry less of the representation, by its matrix mutual information.

    L = I_α(h; z) = S_α(K_h) + S_α(K_z) − S_α(K_h ∘ K_z)

with K_h, K_z the cosine similarities of all n = V·N rows; a positive weight *minimises* it, and its gradient reaches
encoder and head. It lies below the smaller of the two entropies and, unless α = 1, may be negative.

References:
    Ouyang et al. 2025, arXiv 2503.00507, section 4; PKU-ML/Projector_Theory (5c2e7d1) ``methods/simclr.py``: α = 2 in
    all its configurations; weights are not published.

Deviations:
    Rows of all processes by default, ``gather=False`` for those of each process as in the official code; float32 or
    better, where it trains in 16 bits; no NaN at α = 1, see `hfproj.functional.distributions`.
"""

from torch import nn

from hfproj.functional.distributions import check_alpha, matrix_mutual_information
from hfproj.functional.overflow import OverflowGuard
from hfproj.functional.rows import gather_views
from hfproj.registry import ShowsOptions
from hfproj.regularizers.base import Projections, Representations, check_views
from hfproj.typing import Scalar


class Bottleneck(ShowsOptions, nn.Module):
    """Matrix mutual information of h and z over all views of the global batch, in nats.

    Memory is O(rows²), rows = views · batch of all processes.

    Args:
        alpha: α, order of the entropies. 2 (the paper) needs no eigenvalues.
        gather: Whether rows of other processes belong to the batch; if not, the value is that of the local batch.

    Raises:
        UsageError: If alpha is not a positive finite number; on call, if h and z have different numbers of rows.

    Example:
        >>> import torch
        >>> h = torch.eye(8).view(2, 4, 8)
        >>> round(Bottleneck()(nn.Identity(), h, h).exp().item(), 4)  # z tells 8 orthogonal rows apart
        8.0
    """

    def __init__(self, *, alpha: float = 2.0, gather: bool = True):
        super().__init__()
        check_alpha(alpha)
        self.alpha, self.gather = alpha, gather

    def forward(self, model: object, h: Representations, z: Projections, *, step: object = None) -> Scalar:
        """Return I_α(h; z).

        Raises:
            UsageError: If h or z has another shape or type.
        """
        guard = OverflowGuard("Bottleneck")
        h, z = guard(check_views("h", h)), guard(check_views("z", z))
        if self.gather:
            h, z = gather_views(h), gather_views(z)
        h, z = h.flatten(0, 1), z.flatten(0, 1)
        return guard.loss(matrix_mutual_information(h, z, alpha=self.alpha))
