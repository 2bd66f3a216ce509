"""Rows of unit length, and the precision that losses compute in."""

import contextlib

import torch
from jaxtyping import Float
from torch import Tensor


def full_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which autocast leaves matrix products alone: similarities and covariances need float32.

    Example:
        >>> x = torch.randn(4, 4)
        >>> with torch.autocast("cpu", torch.bfloat16), full_precision(x):
        ...     (x @ x).dtype
        torch.float32
    """
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def unit_rows(x: Float[Tensor, "*rows dim"], *, eps: float = 1e-8) -> Float[Tensor, "*rows dim"]:
    """Divide each row by its Euclidean norm, in float32 or better.

    A row no longer than `eps` has no direction: it becomes zero, and so does its gradient (which 1/norm would blow up).

    Args:
        x: Rows in any floating-point type.
        eps: Norm up to which a row counts as zero.

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # Divided by a constant first, which changes neither value nor derivatives: squares of long rows overflow float32,
    # and the cube of their inverse norm, a factor of the gradient, underflows at a length of 1e13 already.
    scale = x.detach().abs().amax(-1, keepdim=True).clamp_min(eps)
    x, shortest = x / scale, (eps / scale) ** 2
    square = x.square().sum(-1, keepdim=True)  # unlike the norm it has all derivatives at zero
    return x * torch.where(square > shortest, square.clamp_min(shortest).rsqrt(), 0)
