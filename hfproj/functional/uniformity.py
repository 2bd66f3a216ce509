"""Uniformity: how evenly unit rows cover the sphere.

    U = log mean_{i<j} exp(−t ‖ẑ_i − ẑ_j‖²),

0 at collapse to a point, its largest value; −2t where all rows are orthogonal to each other, near −t·2 + 2t²/D for
rows spread evenly over a sphere in many dimensions D.

References:
    Wang & Isola 2020, arXiv 2005.10242, eq. 3; lightly-ai/lightly (e8d317fc) ``loss/hypersphere_loss.py``; Fang et al.
    2024, arXiv 2403.00642, statsle/WassersteinSSL ``metric.py``.

Deviations:
    None. Distances come from products of rows, in blocks, instead of ``torch.pdist``.
"""

import math

import torch

from hfproj.errors import UsageError
from hfproj.functional.rows import full_precision, unit_rows
from hfproj.typing import Features, Scalar


def uniformity(f: Features, *, kernel_scale: float = 2.0, block_rows: int = 1024) -> Scalar:
    """Return U, differentiable; computed in float32, or better if `f` is.

    Args:
        f: At least two rows of any length, which it normalises; a zero row stays zero.
        kernel_scale: t. 2: Wang & Isola, and the usual metric; 1: lightly's loss.
        block_rows: Rows whose distances to all others are held at once; memory O(block_rows · rows) without a gradient.

    Raises:
        UsageError: fewer than two rows.

    Example:
        >>> uniformity(torch.eye(8)).item()
        -4.0
    """
    count = len(f)
    if count < 2:
        raise UsageError(f"Uniformity compares rows with each other and needs at least 2, got {count}.")
    rows = unit_rows(f)
    square = rows.square().sum(1)
    with full_precision(rows):
        blocks = []
        for start in range(0, count - 1, block_rows):
            block, later = slice(start, min(start + block_rows, count - 1)), slice(start + 1, None)
            distance = square[block, None] + square[later] - 2 * rows[block] @ rows[later].T
            pairs = torch.ones_like(distance, dtype=torch.bool).triu()  # each pair once, no row with itself
            blocks.append((-kernel_scale * distance[pairs]).logsumexp(0))
    return torch.stack(blocks).logsumexp(0) - math.log(count * (count - 1) / 2)
