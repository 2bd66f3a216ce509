"""Shapes that many signatures share (letters as in the papers: h representation, z projection)."""

from jaxtyping import Float
from torch import Tensor

Features = Float[Tensor, "rows dim"]
Views = Float[Tensor, "views batch dim"]
Scalar = Float[Tensor, ""]
