"""Soft assignments to prototypes: Sinkhorn-Knopp, and the cross-entropy between the assignments of different views.

From exp(S/ε) with prototype logits S ``[N, K]``, `iterations` times: scale the prototypes to equal mass, then the rows
to 1,

    Q_nk = exp(S_nk/ε) · a_n · b_k,    Σ_k Q_nk = 1 exactly,    Σ_n Q_nk → N/K.

All scalings are sums of logarithms, so that no row and no prototype underflows, however small ε is.

References:
    Cuturi 2013, arXiv 1306.0895, algorithm 1; Caron et al. 2020, arXiv 2006.09882, section 3.1; facebookresearch/swav
    ``main_swav.py`` (``distributed_sinkhorn``).

Deviations:
    The official code scales exp(S/ε) itself, which is 0/0 for a prototype whose entries have all underflowed. The
    values are the same where it is finite; constant factors of its steps cancel.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj import distributed
from hfproj.errors import UsageError
from hfproj.functional.rows import at_least_float32, full_precision


@torch.no_grad()
def sinkhorn(
    scores: Float[Tensor, "rows prototypes"],
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    queue: Float[Tensor, "queued prototypes"] | None = None,
) -> Float[Tensor, "rows prototypes"]:
    """Return the codes Q of this process's rows within the global batch, without a gradient.

    Args:
        scores: S. Processes may hold different numbers of rows, or none.
        epsilon: ε, the weight of the entropy: a small one makes hard assignments.
        iterations: Number of scalings of each side.
        queue: S of further rows, the same on all processes, that take part once and get no codes.

    Raises:
        UsageError: If `epsilon` is not a positive number or `iterations` is below 1.

    Example:
        >>> codes = sinkhorn(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        >>> codes.tolist()  # two rows alike: neither may have the first prototype alone
        [[0.5, 0.5], [0.5, 0.5]]
    """
    if not 0 < epsilon < math.inf or iterations < 1:
        raise UsageError(
            f"Sinkhorn needs an epsilon above 0 (0.05 is usual) and at least 1 iteration, got epsilon={epsilon} and "
            f"iterations={iterations}."
        )
    own = at_least_float32(scores) / epsilon
    shared = None if queue is None else queue.to(own.dtype) / epsilon
    for _ in range(iterations):
        mass = _joint_logsumexp(own)
        if shared is not None:
            mass = torch.logaddexp(mass, shared.logsumexp(0))
            shared = _unit_mass(shared - mass)
        own = _unit_mass(own - mass)
    return own.exp()


def _unit_mass(log_q: Tensor) -> Tensor:
    return log_q - log_q.logsumexp(1, keepdim=True)


def _joint_logsumexp(x: Tensor) -> Tensor:
    """Return the logarithm of each column's sum over the rows of all processes."""
    here = x.logsumexp(0)
    largest = distributed.all_reduce_max(here)
    return largest + distributed.all_reduce_sum((here - largest).exp()).log()


def log_probabilities(scores: Float[Tensor, "*rows classes"], temperature: float) -> Float[Tensor, "*rows classes"]:
    """Return log softmax(scores/τ) of prototype logits, in float32 or better.

    Example:
        >>> log_probabilities(torch.tensor([0.0, 0.0], dtype=torch.float16), 0.1).exp().tolist()
        [0.5, 0.5]
    """
    return (at_least_float32(scores) / temperature).log_softmax(-1)


def cross_view_entropy(
    assigned: Float[Tensor, "targets batch classes"], log_p: Float[Tensor, "views batch classes"]
) -> Float[Tensor, " batch"]:
    """Return −Σ_j assigned_ij log p_vj of each image: the mean over pairs of a target view i and another view v ≠ i.

    ``assigned`` are the probabilities that the first views of each image have as targets, ``log_p`` the
    log-probabilities of all views (two or more), in float32 or better.

    Example:
        >>> p = torch.full((3, 1, 4), 0.25)
        >>> cross_view_entropy(p[:2], p.log()).isclose(torch.tensor(4.0).log()).tolist()
        [True]
    """
    with full_precision(log_p):
        entropy = -torch.einsum("tnk,vnk->tvn", assigned.to(log_p.dtype), log_p)
    other = ~torch.eye(len(assigned), len(log_p), dtype=torch.bool, device=log_p.device)
    return entropy[other].mean(0)
