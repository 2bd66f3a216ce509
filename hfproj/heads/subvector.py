"""DirectCLR: the loss sees the first d0 entries of the representation, z = h[:d0]; evaluate the whole h.

The other entries get no gradient from the loss themselves; they learn through the backbone's layers below.

References:
    Jing et al. 2021, "Understanding Dimensional Collapse in Contrastive Self-Supervised Learning", arXiv 2110.09348,
    section 6; facebookresearch/directclr ``directclr/main.py``, mode "directclr" with ``--dim 360`` for a ResNet-50.
    Its mode "group", random disjoint groups of entries, is the objective ``grouped`` on the head ``identity``.

Deviations:
    None.
"""

from jaxtyping import Float
from torch import Tensor, nn

from hfproj.errors import UsageError
from hfproj.heads.checks import check_d0, check_input


class SubvectorHead(nn.Module):
    """z = h[:d0], without parameters.

    Args:
        in_dim: Width of h.
        d0: How many entries are kept; the paper keeps 360 of 2048.
        out_dim: Width of z, another name for `d0`: give either.

    Raises:
        UsageError: neither `d0` nor `out_dim` is given, they differ, or h has fewer entries.

    Example:
        >>> import torch
        >>> SubvectorHead(in_dim=4, d0=2)(torch.arange(4.0).view(1, 4)).tolist()
        [[0.0, 1.0]]
    """

    def __init__(self, *, in_dim: int, d0: int | None = None, out_dim: int | None = None):
        super().__init__()
        if d0 is None:
            d0 = out_dim
        if d0 is None or out_dim not in (None, d0):
            raise UsageError(
                f"The subvector head needs the number of entries to keep, as d0 or as out_dim; got d0={d0}, "
                f"out_dim={out_dim}. The paper keeps 360 of 2048."
            )
        self.out_dim, self.in_dim = check_d0(d0, in_dim)

    def forward(self, h: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch d0"]:
        """Return the first d0 entries.

        Raises:
            UsageError: h has another shape than ``[batch, in_dim]`` or ``[views, batch, in_dim]``.
        """
        check_input("The subvector head", h, self.in_dim)
        return h[..., : self.out_dim]

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return f"{self.in_dim}, d0={self.out_dim}"
