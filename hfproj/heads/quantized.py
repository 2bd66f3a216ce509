"""The discretised projector: each entry of a head's output is rounded to one of a few levels before the loss.

With u the output of an inner head, L levels, half = (L − 1)(1 − 10⁻³)/2, off = ½ if L is even, else 0, and
shift = tan(off / half),

    b(u) = tanh(u + shift) · half − off,    z = round(b(u)) / ⌊L/2⌋,    ∂z/∂u := b'(u) / ⌊L/2⌋

(the rounding has a straight-through gradient). z takes exactly L values: an odd L spans [−1, 1], an even one
[−1, 1 − 2/L]; u = 0 gives 0. The variant ``"atanh"`` has half = (L − 1)(1 + 10⁻³)/2 and shift = atanh(off / half),
which makes b(0) = 0 exactly; its values are the same.

References:
    Ouyang, Hu, Zhang, Wang, Wang 2025, "Projection Head is Secretly an Information Bottleneck", arXiv 2503.00507;
    PKU-ML/Projector_Theory (5c2e7d1), function ``quantize``.
    Mentzer et al. 2023, "Finite Scalar Quantization", arXiv 2309.15505, whose function it is; the variant: ports
    of it to PyTorch.

Deviations:
    No level count that switches it off (0 there): use the inner head itself.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hfproj.errors import UsageError, check_choice
from hfproj.heads.parts import check_input, check_positive, create_inner
from hfproj.registry import ShowsOptions
from hfproj.typing import OneOf

# (L − 1)(1 ± 10⁻³)/2 has to round to the outermost level
_MOST_LEVELS = 1000
Variant = OneOf["tan", "atanh"]


def quantize(u: Float[Tensor, "*shape"], *, levels: int, variant: Variant = "tan") -> Float[Tensor, "*shape"]:
    """Round tanh(u + shift) to `levels` values, in float32 or better, with a straight-through gradient.

    Raises:
        UsageError: If there are fewer than 2 or more than 1000 levels, or the variant is unknown.

    Example:
        >>> quantize(torch.tensor([-9.0, -0.5, 0.0, 0.5, 9.0]), levels=3).tolist()
        [-1.0, 0.0, 0.0, 0.0, 1.0]
    """
    _check_quantizer(levels, variant)
    off = 0.0 if levels % 2 else 0.5
    if variant == "tan":
        half = (levels - 1) * (1 - 1e-3) / 2
        shift = math.tan(off / half)
    else:
        half = (levels - 1) * (1 + 1e-3) / 2
        shift = math.atanh(off / half)
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    bounded = (u + shift).tanh() * half - off
    return (bounded + (bounded.round() - bounded).detach()) / (levels // 2)


def _check_quantizer(levels: object, variant: object) -> None:
    """Raise `UsageError` for options that `quantize` has no use for."""
    check_choice("variant", variant, ("tan", "atanh"))
    if not 2 <= check_positive("levels", levels) <= _MOST_LEVELS:
        wanted = f"levels to be 2 to {_MOST_LEVELS} (the paper has 30 for SimCLR, 3 for Barlow Twins)"
        raise UsageError(f"Expected {wanted}, got {levels}; to leave z as it is use the inner head itself.")


class QuantizedHead(ShowsOptions, nn.Module):
    """An inner head whose output is rounded to a few levels; z is float32 or better, under autocast too.

    Args:
        in_dim: Width of h.
        out_dim: Width of z, passed to the inner head; None: its own default.
        head: Name of the inner head. The paper's SimCLR has solo-learn's.
        head_options: Its options.
        levels: L, 2 to 1000. 30: the paper's SimCLR; 3: its Barlow Twins.
        variant: ``"tan"``, as in the official code, or ``"atanh"``.

    Raises:
        UsageError: If an option is refused by `quantize` or by the inner head, or the width is given twice.

    Example:
        >>> head = QuantizedHead(in_dim=4, out_dim=2, head="linear", levels=3)
        >>> set(head(torch.randn(64, 4)).flatten().tolist()) <= {-1.0, 0.0, 1.0}
        True
    """

    def __init__(
        self, *, in_dim: int, out_dim: int | None = None, head: str = "simclr_solo",
        head_options: dict[str, Any] | None = None, levels: int = 30, variant: Variant = "tan",
    ):  # fmt: skip
        super().__init__()
        _check_quantizer(levels, variant)
        self.inner = create_inner(head, in_dim=in_dim, options=head_options, out_dim=out_dim)
        self.in_dim = check_positive("in_dim", in_dim)
        self.out_dim = check_positive("out_dim", self.inner.out_dim)
        self.levels, self.variant = levels, variant

    def forward(self, h: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch out_dim"]:
        """Project h and round.

        Raises:
            UsageError: If h is no tensor, or neither `[batch, in_dim]` nor `[views, batch, in_dim]`.
        """
        check_input(self, h, self.in_dim)
        return quantize(self.inner(h), levels=self.levels, variant=self.variant)
