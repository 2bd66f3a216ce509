"""Two linear layers around a symmetric ReLU, which start as the identity map.

    z = W₂ σ_b(W₁ h + b₁) + b₂,    σ_b(a) = relu(a − b) − relu(−a − b),    W₁ = W₂ = I, b₁ = b₂ = 0, b = 0 at first.

For b > 0, σ_b is the soft threshold: it sets entries in [−b, b] to 0 and moves the others towards 0 by b.

References:
    Xue, Gan, Ni, Joshi, Mirzasoleiman 2024, arXiv 2403.11391; jiayini1119/projection-head-experiments
    ``models/spuco_model.py``, class ``SymmetricReLU`` and ``identity_init``.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hfproj.heads.parts import check_input, check_kept_width


def symmetric_relu(a: Float[Tensor, "*shape"], threshold: Float[Tensor, ""]) -> Float[Tensor, "*shape"]:
    """Return relu(a − b) − relu(−a − b) with b the threshold.

    Example:
        >>> symmetric_relu(torch.tensor([-3.0, 0.5, 3.0]), torch.tensor(1.0)).tolist()
        [-2.0, 0.0, 2.0]
    """
    return torch.relu(a - threshold) - torch.relu(-a - threshold)


class SymmetricReLUHead(nn.Module):
    """Linear layer, symmetric ReLU with one learnable threshold, linear layer; the identity map at first.

    Args:
        in_dim: Width of h.
        out_dim: Width of z; if given, it equals `in_dim`.

    Raises:
        UsageError: If `out_dim` differs from `in_dim`.

    Example:
        >>> h = torch.randn(8, 4)
        >>> torch.equal(SymmetricReLUHead(in_dim=4)(h), h)
        True
    """

    def __init__(self, *, in_dim: int, out_dim: int | None = None):
        super().__init__()
        self.in_dim = self.out_dim = check_kept_width("The symmetric-ReLU head", in_dim, out_dim)
        self.first, self.second = nn.Linear(in_dim, in_dim), nn.Linear(in_dim, in_dim)
        self.threshold = nn.Parameter(torch.zeros(()))
        for layer in (self.first, self.second):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch in_dim"]:
        """Project h.

        Raises:
            UsageError: If h is no tensor, or neither `[batch, in_dim]` nor `[views, batch, in_dim]`.
        """
        check_input(self, h, self.in_dim)
        return self.second(symmetric_relu(self.first(h), self.threshold))
