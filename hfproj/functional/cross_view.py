"""Cross-entropy between what one view of an image is assigned to, and what its other views predict."""

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.functional.rows import full_precision


def log_probabilities(scores: Float[Tensor, "*rows classes"], temperature: float) -> Float[Tensor, "*rows classes"]:
    """Return log softmax(scores/τ), in float32 or better.

    Example:
        >>> log_probabilities(torch.tensor([0.0, 0.0], dtype=torch.float16), 0.1).exp().tolist()
        [0.5, 0.5]
    """
    return (scores.to(torch.promote_types(scores.dtype, torch.float32)) / temperature).log_softmax(-1)


def cross_view_entropy(
    assigned: Float[Tensor, "targets batch classes"], log_p: Float[Tensor, "views batch classes"]
) -> Float[Tensor, " batch"]:
    """Return −Σ_j assigned_ij log p_vj of each image, a mean over pairs of a target view i and another view v ≠ i.

    Args:
        assigned: Probabilities that the first views of each image are given as targets.
        log_p: Log-probabilities of all views, in float32 or better; at least two views.

    Example:
        >>> p = torch.full((3, 1, 4), 0.25)
        >>> cross_view_entropy(p[:2], p.log()).isclose(torch.tensor(4.0).log()).tolist()
        [True]
    """
    with full_precision(log_p):
        entropy = -torch.einsum("tnk,vnk->tvn", assigned.to(log_p.dtype), log_p)
    other = ~torch.eye(len(assigned), len(log_p), dtype=torch.bool, device=log_p.device)
    return entropy[other].mean(0)
