"""The heads without a hidden layer: none at all, z = h, and the linear head, z = W h (+ b), optionally normalised.

References:
    Jing et al. 2021, arXiv 2110.09348 (facebookresearch/directclr, mode "single": no bias, no norm).
    Chen et al. 2020, arXiv 2002.05709, section 4.2 (google-research/simclr puts ``norm="batch"`` after it).
"""

from jaxtyping import Float
from torch import Tensor, nn

from hfproj.heads.norm import Norm, create_norm
from hfproj.heads.parts import check_input, check_kept_width, check_positive


class IdentityHead(nn.Module):
    """z = h, without parameters: the objective acts on the representation itself.

    Args:
        in_dim: Width of h.
        out_dim: Width of z; if given, it equals `in_dim`.

    Raises:
        UsageError: If `out_dim` differs from `in_dim`.

    Example:
        >>> import torch
        >>> h = torch.randn(8, 4)
        >>> IdentityHead(in_dim=4)(h) is h
        True
    """

    def __init__(self, *, in_dim: int, out_dim: int | None = None):
        super().__init__()
        self.in_dim = self.out_dim = check_kept_width("The identity head", in_dim, out_dim)

    def forward(self, h: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch in_dim"]:
        """Return h.

        Raises:
            UsageError: If h is no tensor, or neither `[batch, in_dim]` nor `[views, batch, in_dim]`.
        """
        check_input(self, h, self.in_dim)
        return h


class LinearHead(nn.Module):
    """One linear layer.

    Args:
        in_dim: Width of h.
        out_dim: Width of z.
        bias: Whether the linear layer has a bias.
        norm: None, ``"batch"`` or ``"layer"``, after the linear layer.

    Raises:
        UsageError: If a width is below 1 or the norm is unknown.

    Example:
        >>> import torch
        >>> head = LinearHead(in_dim=4, out_dim=2)
        >>> h = torch.randn(8, 4)
        >>> torch.equal(head(h), h @ head.linear.weight.T)
        True
    """

    def __init__(self, *, in_dim: int, out_dim: int = 128, bias: bool = False, norm: Norm | None = None):
        super().__init__()
        self.in_dim, self.out_dim = check_positive("in_dim", in_dim), check_positive("out_dim", out_dim)
        self.linear = nn.Linear(in_dim, out_dim, bias=bias)
        self.norm = create_norm(norm, out_dim)

    def forward(self, h: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch out_dim"]:
        """Project h.

        Raises:
            UsageError: If h is no tensor, or neither `[batch, in_dim]` nor `[views, batch, in_dim]`.
        """
        check_input(self, h, self.in_dim)
        z = self.linear(h)
        return z if self.norm is None else self.norm(z)
