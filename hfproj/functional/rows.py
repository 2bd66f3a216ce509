"""Rows of unit length and the precision of losses; views of the global batch, and randomness that processes share."""

import contextlib

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hfproj import distributed
from hfproj.errors import UsageError
from hfproj.typing import HasGenerator, Views


def at_least_float32(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Return `x` itself if it is float32 or float64, and a copy in float32 if it is of 16 bits.

    Example:
        >>> half, double = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float64)
        >>> at_least_float32(half).dtype, at_least_float32(double).dtype
        (torch.float32, torch.float64)
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[None]:
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

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    x = at_least_float32(x)
    # Divided by a constant first, which changes neither value nor derivatives: squares of long rows overflow float32,
    # and the cube of their inverse norm, a factor of the gradient, underflows at a length of 1e13 already.
    scale = x.detach().abs().amax(-1, keepdim=True).clamp_min(eps)
    x, shortest = x / scale, (eps / scale) ** 2
    square = x.square().sum(-1, keepdim=True)  # unlike the norm it has all derivatives at zero
    return x * torch.where(square > shortest, square.clamp_min(shortest).rsqrt(), 0)


def gather_views(z: Views) -> Views:
    """Return ``[views, batch, dim]`` with the images of all processes, differentiable (`distributed.gather_rows`).

    Example:
        >>> gather_views(torch.zeros(2, 4, 8)).shape
        torch.Size([2, 4, 8])
    """
    if distributed.world_size() == 1:
        return z
    return distributed.gather_rows(z.transpose(0, 1).contiguous()).transpose(0, 1)


def generator_of(step: HasGenerator | None) -> torch.Generator | None:
    """Return the generator of a step, or None (torch's own) without a step on one process.

    Raises:
        UsageError: If there is no step but several processes, whose own generators would differ.
    """
    if step is None and distributed.world_size() > 1:
        raise UsageError(
            "Random choices must agree over processes: pass step=Step.at(seed, global_step, epoch), the same on all."
        )
    return None if step is None else step.generator
