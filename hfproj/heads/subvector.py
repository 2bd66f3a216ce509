"""Heads that show the loss the first d0 entries of the representation only.

DirectCLR takes them, z = h[:d0], and evaluates the whole h. The other entries get no gradient from the loss themselves;
they learn through the backbone's layers below. The constant subvector keeps the width,

    z = [h_1, …, h_d0, c, …, c]    (in_dim entries).

With c = 0 a loss on cosines, and its gradient, are those of DirectCLR with the same d0; for any c the covariance of z
has rank d0 at most.

References:
    Jing et al. 2021, "Understanding Dimensional Collapse in Contrastive Self-Supervised Learning", arXiv 2110.09348,
    section 6; facebookresearch/directclr ``directclr/main.py``, mode "directclr" with ``--dim 360`` for a ResNet-50.
    Its mode "group", random disjoint groups of entries, is the objective ``grouped`` on the head ``identity``.
    Constant subvector: OpenReview PD532fs8b1 (first version), section 3.4 and table 1: c ∈ {0, 1/√in_dim, 1},
    d0 ∈ {200, 400, 480} of 512; c = 0 and d0 = 480 did best. No official code.

Deviations:
    None known. The second paper does not say whether its tables evaluate z or the whole h; see `evaluate`.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hfproj.errors import UsageError, check_choice, unknown
from hfproj.heads.parts import check_input, check_kept_width, check_positive
from hfproj.registry import ShowsOptions
from hfproj.typing import OneOf


class SubvectorHead(ShowsOptions, nn.Module):
    """z = h[:d0], without parameters.

    Args:
        in_dim: Width of h.
        d0: How many entries are kept, or which share of them, below 1; the paper keeps 360 of 2048.
        out_dim: Width of z, another name for `d0`: give either.

    Raises:
        UsageError: If neither `d0` nor `out_dim` is given, if they differ, or if h has fewer entries.

    Example:
        >>> SubvectorHead(in_dim=4, d0=2)(torch.arange(4.0).view(1, 4)).tolist()
        [[0.0, 1.0]]
    """

    def __init__(self, *, in_dim: int, d0: int | float | None = None, out_dim: int | None = None):
        super().__init__()
        given, kept = f"d0={d0}, out_dim={out_dim}", out_dim if d0 is None else d0
        if kept is not None:
            self.d0, self.in_dim = _check_d0(kept, in_dim)
        if kept is None or out_dim not in (None, self.d0):
            raise UsageError(
                f"The subvector head needs the number of entries to keep, as d0 or as out_dim; got {given}. "
                "The paper keeps 360 of 2048."
            )
        self.out_dim = self.d0

    def forward(self, h: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch d0"]:
        """Return the first d0 entries.

        Raises:
            UsageError: If h is no tensor, or neither `[batch, in_dim]` nor `[views, batch, in_dim]`.
        """
        check_input(self, h, self.in_dim)
        return h[..., : self.d0]


class ConstantSubvectorHead(ShowsOptions, nn.Module):
    """z = [h[:d0], c, …, c], without parameters.

    Args:
        in_dim: Width of h.
        d0: How many entries are kept, or which share of them, below 1.
        constant: c, a number or ``"inverse_sqrt"`` for 1/√in_dim.
        evaluate: What z is in eval mode. ``"constant"``: as in training, which is what the paper evaluates; probes then
            compare both vectors, since they run on h too. ``"full"``: h itself, for those who read z only and want
            DirectCLR's way; the loss of an evaluation is then that of h.
        out_dim: Width of z; if given, it equals `in_dim`.

    Raises:
        UsageError: If h has fewer entries than `d0`, `out_dim` differs from `in_dim`, `constant` is not finite, or a
            name is unknown.

    Example:
        >>> ConstantSubvectorHead(in_dim=4, d0=2, constant="inverse_sqrt")(torch.arange(4.0).view(1, 4)).tolist()
        [[0.0, 1.0, 0.5, 0.5]]
    """

    def __init__(
        self, *, in_dim: int, d0: int | float, constant: float | OneOf["inverse_sqrt"] = 0.0,
        evaluate: OneOf["constant", "full"] = "constant", out_dim: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.d0, self.in_dim = _check_d0(d0, in_dim)
        self.out_dim = check_kept_width("The constant-subvector head", in_dim, out_dim)
        check_choice("evaluate", evaluate, ("constant", "full"))
        if isinstance(constant, str):
            if constant != "inverse_sqrt":
                raise unknown("constant:", constant, ("inverse_sqrt", "a number"))
            constant = 1 / math.sqrt(in_dim)
        if not math.isfinite(constant):
            raise UsageError(f"Expected constant to be a finite number or 'inverse_sqrt' (1/√in_dim), got {constant}.")
        self.constant, self.evaluate = float(constant), evaluate

    def forward(self, h: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch in_dim"]:
        """Replace the entries after the first d0; in eval mode with ``evaluate="full"``, return h.

        Raises:
            UsageError: If h is no tensor, or neither `[batch, in_dim]` nor `[views, batch, in_dim]`.
        """
        check_input(self, h, self.in_dim)
        if self.evaluate == "full" and not self.training:
            return h
        tail = h.new_full((*h.shape[:-1], self.in_dim - self.d0), self.constant)
        return torch.cat([h[..., : self.d0], tail], dim=-1)


def _check_d0(d0: object, in_dim: object) -> tuple[int, int]:
    width = check_positive("in_dim", in_dim)
    if isinstance(d0, float) and 0 < d0 < 1:
        d0 = max(1, round(d0 * width))
    if isinstance(d0, float) and d0 >= 1:
        raise UsageError(f"Expected d0 as a whole number of entries, or as a share of them below 1, got {d0}.")
    kept = check_positive("d0", d0)
    if kept > width:
        hint = f"choose d0 from 1 to {width}, or a share below 1 (DirectCLR keeps 360 of 2048)"
        raise UsageError(f"d0={kept} entries can't be taken from a representation of {width}: {hint}.")
    return kept, width
