"""How far a matrix is from having orthonormal rows, or columns: ‖W Wᵀ − I‖_F or ‖Wᵀ W − I‖_F of W ``[out, fan_in]``.

The two squares differ by a constant, ‖Wᵀ W − I‖_F² = ‖W Wᵀ − I‖_F² + fan_in − out, so that the Gram matrix of the
shorter side serves both; its derivative 4 (W Wᵀ − I) W costs one product more.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.errors import unknown
from hfproj.functional.rows import full_precision
from hfproj.typing import Scalar

SIDES = ("auto", "WWt", "WtW")
_BLOCK = 512  # rows of a Gram block: large enough for full speed, small enough to skip most of the lower triangle


def orthogonality_gap(weight: Float[Tensor, "out fan_in"], *, side: str = "auto", squared: bool = True) -> Scalar:
    """Return ‖W Wᵀ − I‖_F² or ‖Wᵀ W − I‖_F², or its root; the root's gradient at 0 is 0.

    Args:
        weight: W, in any floating-point type; computed in float32 or better.
        side: ``"WWt"``, ``"WtW"``, or ``"auto"`` for the shorter side, whose minimum is 0. The other side's square
            can't fall below |out − fan_in|.
        squared: Whether to leave the root out.

    Raises:
        UsageError: an unknown side.

    Example:
        >>> orthogonality_gap(torch.eye(4, 3)).item(), orthogonality_gap(torch.eye(4, 3), side="WWt").item()
        (0.0, 1.0)
    """
    if side not in SIDES:
        raise unknown("side", side, SIDES)
    out, fan_in = weight.shape
    short = weight if out <= fan_in else weight.mT
    with full_precision(weight):
        residual = _GramMinusIdentity.apply(short.to(torch.promote_types(weight.dtype, torch.float32)))
        constant = 0 if side == "auto" else (out if side == "WWt" else fan_in) - len(short)
        if squared:
            return residual.square().sum() + constant
        if constant:
            return (residual.square().sum() + constant).sqrt()
        return torch.linalg.vector_norm(residual)


class _GramMinusIdentity(torch.autograd.Function):
    """A Aᵀ − I. Symmetric: only the upper blocks are multiplied, and the backward needs one product instead of two."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        rows = a.shape[0]
        gram = a.new_empty(rows, rows)
        for start in range(0, rows, _BLOCK):
            stop = start + _BLOCK
            gram[start:stop, start:] = a[start:stop] @ a[start:].mT
            gram[stop:, start:stop] = gram[start:stop, stop:].mT
        gram.diagonal().sub_(1)
        return gram

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        return (grad + grad.mT) @ a
