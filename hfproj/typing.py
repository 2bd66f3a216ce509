"""Types that many signatures share; the letters are those of the papers (h representation, z projection)."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Features = Float[Tensor, "rows dim"]
Views = Float[Tensor, "views batch dim"]
Scalar = Float[Tensor, ""]


@runtime_checkable
class HasGenerator(Protocol):
    """What draws at random in a step of training: :class:`hfproj.objectives.base.Step`."""

    generator: torch.Generator
