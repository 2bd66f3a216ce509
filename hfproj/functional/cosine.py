"""Cosines between views of an image, with the pairs of multi-crop training."""

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.functional.rows import full_precision, unit_rows
from hfproj.typing import Views


def cross_view_cosines(p: Views, target: Float[Tensor, "target_views batch dim"]) -> Float[Tensor, "pairs batch"]:
    """Return the cosine of each image's view v in `p` with its view i in `target`, for all pairs with v ≠ i.

    Zero rows have cosine zero with everything.

    Args:
        p: All views, in any floating-point type; computed in float32 or better.
        target: The first so many views, in the same order.

    Example:
        >>> p = torch.eye(4).view(2, 2, 4)
        >>> cross_view_cosines(p, p.flip(0)).tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    rows, others = unit_rows(p), unit_rows(target)
    dtype = torch.promote_types(rows.dtype, others.dtype)
    with full_precision(p):
        cosines = torch.einsum("vnk,tnk->vtn", rows.to(dtype), others.to(dtype))
    same = torch.eye(len(p), len(target), dtype=torch.bool, device=p.device)
    return cosines[~same]
