"""Views of the joint batch, and randomness that all processes share."""

from typing import Any

import torch

from hfproj import distributed
from hfproj.errors import UsageError
from hfproj.typing import Views


def gather_views(z: Views) -> Views:
    """Return ``[views, batch, dim]`` with the images of all processes, differentiable; see `distributed.gather_rows`.

    Example:
        >>> gather_views(torch.zeros(2, 4, 8)).shape
        torch.Size([2, 4, 8])
    """
    if distributed.world_size() == 1:
        return z
    return distributed.gather_rows(z.transpose(0, 1).contiguous()).transpose(0, 1)


def generator_of(step: Any) -> torch.Generator | None:
    """Return the generator of a step, or None (torch's own) without a step on one process.

    Raises:
        UsageError: there is no step on several processes, whose own generators would differ.
    """
    if step is None and distributed.world_size() > 1:
        raise UsageError(
            "Random choices must agree over processes: pass step=Step.at(seed, global_step, epoch), the same on all."
        )
    return None if step is None else step.generator
