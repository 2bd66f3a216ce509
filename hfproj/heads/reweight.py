"""The fixed reweighting head: no parameters, each entry of h weighs less than the one before.

    z_i = κ^(−i) h_i,    i = 0 … in_dim − 1,

so that the Jacobian is diag(κ^(−i)). Which entry comes first is arbitrary; only training orders features by it. The
loss sees about as many entries as the effective dimension of the weights, (Σ w²)² / Σ w⁴: 100.5, 20.5, 5.5 and 2.6 for
κ = 1.01, 1.05, 1.2 and 1.5, however wide h is.

References:
    Xue, Gan, Ni, Joshi, Mirzasoleiman 2024, "Investigating the Benefits of Projection Head for Representation
    Learning", arXiv 2403.11391; jiayini1119/projection-head-experiments (a145e06), class ``ReweightProjectionHead``,
    whose ``pretrain.py`` has κ = 1.05.

Deviations:
    The weights are a buffer, not a frozen parameter that optimizers or averaging might touch.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hfproj.errors import UsageError
from hfproj.heads.parts import check_input, check_kept_width
from hfproj.registry import ShowsOptions


def decay_weights(dim: int, kappa: float) -> Float[Tensor, " dim"]:
    """Return κ^(−i) for i = 0 … dim − 1, in float32.

    Far entries underflow to 0: at κ = 1.2 all those from 571 on.

    Example:
        >>> decay_weights(4, 2.0).tolist()
        [1.0, 0.5, 0.25, 0.125]
    """
    # Powers with negative exponents: κ^i itself would overflow. In float64, since rounding κ would add up along i.
    return (kappa ** -torch.arange(dim, dtype=torch.float64)).float()


class ReweightHead(ShowsOptions, nn.Module):
    """z_i = κ^(−i) h_i, without parameters; z is float32 or better, under autocast too.

    Args:
        in_dim: Width of h.
        out_dim: Width of z; if given, it equals `in_dim`.
        kappa: κ, at least 1 (the identity). 1.05: the paper's script and its SimCLR on MNIST-on-CIFAR-10; 1.2 and 1.5:
            its supervised and SupCon runs on CIFAR-100.

    Raises:
        UsageError: If `kappa` is below 1 or not finite, or `out_dim` differs from `in_dim`.

    Example:
        >>> import torch
        >>> ReweightHead(in_dim=3, kappa=2.0)(torch.ones(1, 3)).tolist()
        [[1.0, 0.5, 0.25]]
    """

    weights: Tensor

    def __init__(self, *, in_dim: int, out_dim: int | None = None, kappa: float = 1.05):
        super().__init__()
        self.in_dim = self.out_dim = check_kept_width("The reweight head", in_dim, out_dim)
        if not 1 <= kappa < math.inf:
            raise UsageError(
                f"Expected kappa to be a number of at least 1 (1.01 to 1.5 is usual), got {kappa}; below 1 the weights "
                "would grow without bound, and which entry comes first is arbitrary anyway: take 1/kappa."
            )
        self.kappa = kappa
        self.register_buffer("weights", decay_weights(in_dim, kappa), persistent=False)  # kappa says it all

    @property
    def effective_dimension(self) -> float:
        """(Σ w²)² / Σ w⁴ of the weights: about how many entries of h the loss sees.

        Example:
            >>> ReweightHead(in_dim=512, kappa=1.0).effective_dimension
            512.0
        """
        square = self.weights.cpu().double().square()  # not every device has float64
        return (square.sum().square() / square.square().sum()).item()

    def forward(self, h: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch in_dim"]:
        """Weigh the entries of h.

        Raises:
            UsageError: If h is no tensor, or neither `[batch, in_dim]` nor `[views, batch, in_dim]`.
        """
        check_input(self, h, self.in_dim)
        weights = self.weights
        if torch.finfo(weights.dtype).bits < 32:  # a module cast to half precision: most weights would be lost in it
            weights = decay_weights(self.in_dim, self.kappa).to(weights.device)
        return h * weights.to(torch.promote_types(h.dtype, torch.float32))
