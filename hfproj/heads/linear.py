"""Heads that are linear or nearly so: none at all, one linear layer, two around a soft threshold."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hfproj.heads.parts import check_input, check_kept_width, check_positive, create_norm


class IdentityHead(nn.Module):
    """z = h, without parameters: the objective acts on the representation itself.

    Args:
        in_dim: Width of h.
        out_dim: Width of z; if given, it equals `in_dim`.

    Raises:
        UsageError: If `out_dim` differs from `in_dim`.

    Example:
        >>> h = torch.randn(8, 4)
        >>> IdentityHead(in_dim=4)(h) is h
        True
    """

    def __init__(self, *, in_dim: int, out_dim: int | None = None):
        super().__init__()
        self.in_dim = self.out_dim = check_kept_width("The identity head", in_dim, out_dim)

    def forward(self, h: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch in_dim"]:
        """Return h."""
        check_input(self, h, self.in_dim)
        return h


class LinearHead(nn.Module):
    """One linear layer: z = W h (+ b), optionally normalised.

    Args:
        in_dim: Width of h.
        out_dim: Width of z.
        bias: Whether the linear layer has a bias.
        norm: None, ``"batch"`` or ``"layer"``, after the linear layer.

    Raises:
        UsageError: If a width is below 1 or the norm is unknown.

    Example:
        >>> head = LinearHead(in_dim=4, out_dim=2)
        >>> h = torch.randn(8, 4)
        >>> torch.equal(head(h), h @ head.linear.weight.T)
        True

    References:
        Jing et al. 2021, arXiv 2110.09348 (facebookresearch/directclr, mode "single": no bias, no norm).
        Chen et al. 2020, arXiv 2002.05709, section 4.2 (google-research/simclr puts ``norm="batch"`` after it).
    """

    def __init__(self, *, in_dim: int, out_dim: int = 128, bias: bool = False, norm: str | None = None):
        super().__init__()
        self.in_dim, self.out_dim = check_positive("in_dim", in_dim), check_positive("out_dim", out_dim)
        self.linear = nn.Linear(in_dim, out_dim, bias=bias)
        self.norm = create_norm(norm, out_dim)

    def forward(self, h: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch out_dim"]:
        """Project h."""
        check_input(self, h, self.in_dim)
        z = self.linear(h)
        return z if self.norm is None else self.norm(z)


def symmetric_relu(a: Float[Tensor, "*shape"], threshold: Float[Tensor, ""]) -> Float[Tensor, "*shape"]:
    """Return relu(a − b) − relu(−a − b) with b the threshold.

    Example:
        >>> symmetric_relu(torch.tensor([-3.0, 0.5, 3.0]), torch.tensor(1.0)).tolist()
        [-2.0, 0.0, 2.0]
    """
    return torch.relu(a - threshold) - torch.relu(-a - threshold)


class SymmetricReLUHead(nn.Module):
    """Two linear layers around a symmetric ReLU with one learnable threshold, which start as the identity map.

        z = W₂ σ_b(W₁ h + b₁) + b₂,    σ_b(a) = relu(a − b) − relu(−a − b),    W₁ = W₂ = I, b₁ = b₂ = 0, b = 0 at first.

    For b > 0, σ_b is the soft threshold: it sets entries in [−b, b] to 0 and moves the others towards 0 by b.

    Args:
        in_dim: Width of h.
        out_dim: Width of z; if given, it equals `in_dim`.

    Raises:
        UsageError: If `out_dim` differs from `in_dim`.

    Example:
        >>> h = torch.randn(8, 4)
        >>> torch.equal(SymmetricReLUHead(in_dim=4)(h), h)
        True

    References:
        Xue, Gan, Ni, Joshi, Mirzasoleiman 2024, arXiv 2403.11391; jiayini1119/projection-head-experiments
        ``models/spuco_model.py``, class ``SymmetricReLU`` and ``identity_init``.
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
        """Project h."""
        check_input(self, h, self.in_dim)
        return self.second(symmetric_relu(self.first(h), self.threshold))
