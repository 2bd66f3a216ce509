"""The constant subvector: all entries of the representation after the first d0 are replaced by a constant.

    z = [h_1, …, h_d0, c, …, c]    (in_dim entries).

With c = 0 a loss on cosines, and its gradient, are those of DirectCLR (the head ``subvector``) with the same d0; for
any c the covariance of z has rank d0 at most.

References:
    OpenReview PD532fs8b1 (first version), section 3.4 and table 1: c ∈ {0, 1/√in_dim, 1}, d0 ∈ {200, 400, 480} of 512;
    c = 0 and d0 = 480 did best. No official code.

Deviations:
    None known. The paper does not say whether its tables evaluate z or the whole h; see `evaluate`.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hfproj.errors import UsageError, unknown
from hfproj.heads.checks import check_choice, check_d0, check_input, check_kept_width


class ConstantSubvectorHead(nn.Module):
    """z = [h[:d0], c, …, c], without parameters.

    Args:
        in_dim: Width of h.
        d0: How many entries are kept.
        constant: c, a number or ``"inverse_sqrt"`` for 1/√in_dim.
        evaluate: What z is in eval mode. ``"constant"``: as in training, which is what the paper evaluates; probes then
            compare both vectors, since they run on h too. ``"full"``: h itself, for those who read z only and want
            DirectCLR's way; the loss of an evaluation is then that of h.
        out_dim: Width of z; if given, it equals `in_dim`.

    Raises:
        UsageError: an option that cannot work.

    Example:
        >>> ConstantSubvectorHead(in_dim=4, d0=2, constant="inverse_sqrt")(torch.arange(4.0).view(1, 4)).tolist()
        [[0.0, 1.0, 0.5, 0.5]]
    """

    def __init__(
        self,
        *,
        in_dim: int,
        d0: int,
        constant: float | str = 0.0,
        evaluate: str = "constant",
        out_dim: int | None = None,
    ):
        super().__init__()
        self.d0, self.in_dim = check_d0(d0, in_dim)
        self.out_dim = check_kept_width("The constant-subvector head", in_dim, out_dim)
        check_choice("evaluate", evaluate, ("constant", "full"))
        if isinstance(constant, str):
            if constant != "inverse_sqrt":
                raise unknown("constant:", constant, ("inverse_sqrt", "a number"))
            constant = 1 / math.sqrt(in_dim)
        if not math.isfinite(constant):
            raise UsageError(f"constant must be a finite number or 'inverse_sqrt' (1/√in_dim), got {constant}.")
        self.constant, self.evaluate = float(constant), evaluate

    def forward(self, h: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch in_dim"]:
        """Replace the entries after the first d0; in eval mode with ``evaluate="full"``, return h.

        Raises:
            UsageError: h has another shape than ``[batch, in_dim]`` or ``[views, batch, in_dim]``.
        """
        check_input("The constant-subvector head", h, self.in_dim)
        if self.evaluate == "full" and not self.training:
            return h
        tail = h.new_full((*h.shape[:-1], self.in_dim - self.d0), self.constant)
        return torch.cat([h[..., : self.d0], tail], dim=-1)

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return f"{self.in_dim}, d0={self.d0}, constant={self.constant}, evaluate={self.evaluate!r}"
