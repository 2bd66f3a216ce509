"""No head: the objective acts on the representation itself, z = h."""

from jaxtyping import Float
from torch import Tensor, nn

from hfproj.heads.checks import check_input, check_kept_width


class IdentityHead(nn.Module):
    """z = h, without parameters.

    Args:
        in_dim: Width of h.
        out_dim: Width of z; if given, it equals `in_dim`.

    Raises:
        UsageError: `out_dim` differs from `in_dim`.

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
            UsageError: h has another shape than ``[batch, in_dim]`` or ``[views, batch, in_dim]``.
        """
        check_input("The identity head", h, self.in_dim)
        return h
