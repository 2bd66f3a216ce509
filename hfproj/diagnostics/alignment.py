"""Whether features spread out, and whether views of one input stay together.

    representation std   mean over dimensions of the std of the unit rows; 1/√dim when they spread evenly, 0 at collapse
    positive cosine      mean over samples and pairs of views a < b of cos(z_a, z_b)

References:
    Representation std: Chaudhry 2026, arXiv 2605.17180, and SimSiam (Chen & He 2021, arXiv 2011.10566, Fig. 2).
    Positive cosine: 1 − half the alignment (α = 2) of Wang & Isola 2020, arXiv 2005.10242.

Deviations:
    The std has 1/(rows − 1), as `torch.std`.
"""

import torch
from torch import Tensor

from hfproj.diagnostics._common import blocks, check_features, mean_row, unit_rows
from hfproj.errors import UsageError
from hfproj.typing import Features, Views


@torch.no_grad()
def representation_std(f: Features) -> float:
    """Return the mean over dimensions of the standard deviation of the L2-normalised rows.

    Centres (a standard deviation does), after the rows are normalised. Float64, no gradient.

    Raises:
        UsageError: fewer than two rows, or rows that are not finite.

    Example:
        >>> representation_std(torch.ones(4, 3))  # collapsed to one point
        0.0
    """
    check_features(f)
    mean = mean_row(f, normalize=True)
    squares = torch.stack([((block - mean) ** 2).sum(0) for block in blocks(f, normalize=True)]).sum(0)
    return (squares / (f.shape[0] - 1)).sqrt().mean().item()


@torch.no_grad()
def positive_cosine(z: Views) -> float:
    """Return the mean cosine of two views of the same sample, over samples and pairs of views.

    Does not centre. Float64, no gradient. High values say little alone: at collapse it is 1.

    Raises:
        UsageError: fewer than two views or two samples, or rows that are not finite.

    Example:
        >>> z = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [1.0, 0.0]]])
        >>> positive_cosine(z)  # cosines 1 and 0
        0.5
    """
    views = z.shape[0]
    if views < 2:
        raise UsageError(f"A positive pair needs two views, got shape {list(z.shape)}: expected [views, batch, dim].")
    for number, view in enumerate(z):
        check_features(view, what=f"features of view {number}")
    unit: Tensor = torch.stack([unit_rows(torch.cat(list(blocks(view)))) for view in z])
    cosines = (unit.sum(0) ** 2).sum(-1) - (unit**2).sum((0, 2))  # both orders of each pair
    return (cosines / (views * (views - 1))).mean().item()
