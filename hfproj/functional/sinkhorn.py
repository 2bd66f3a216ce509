"""Sinkhorn-Knopp: soft assignments of rows to prototypes under which all prototypes are used alike.

From exp(S/ε) with scores S ``[N, K]``, `iterations` times: scale the prototypes to equal mass, then the rows to 1,

    Q_nk = exp(S_nk/ε) · a_n · b_k,    Σ_k Q_nk = 1 exactly,    Σ_n Q_nk → N/K.

All scalings are sums of logarithms, so that no row and no prototype underflows, however small ε is.

References:
    Cuturi 2013, arXiv 1306.0895, algorithm 1; Caron et al. 2020, arXiv 2006.09882, section 3.1; facebookresearch/swav
    ``main_swav.py`` (``distributed_sinkhorn``).

Deviations:
    The official code scales exp(S/ε) itself, which is 0/0 for a prototype whose entries have all underflowed. The
    values are the same where it is finite; constant factors of its steps cancel.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj import distributed
from hfproj.errors import UsageError


@torch.no_grad()
def sinkhorn(
    scores: Float[Tensor, "rows prototypes"],
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    queue: Float[Tensor, "queued prototypes"] | None = None,
) -> Float[Tensor, "rows prototypes"]:
    """Return codes Q of the rows of this process, of the joint batch of all processes; without a gradient.

    Args:
        scores: S, in any floating-point type; computed in float32 or better. Processes may hold different numbers of
            rows, or none.
        epsilon: ε, the weight of the entropy: small makes hard assignments.
        iterations: Number of scalings of each side.
        queue: Scores of further rows, the same on all processes, that take part once and get no codes.

    Raises:
        UsageError: an option that cannot work.

    Example:
        >>> codes = sinkhorn(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        >>> codes.tolist()  # two rows alike: neither may have the first prototype alone
        [[0.5, 0.5], [0.5, 0.5]]
    """
    if not 0 < epsilon < float("inf") or iterations < 1:
        raise UsageError(
            f"Sinkhorn needs an epsilon above 0 (0.05 is usual) and at least 1 iteration, got epsilon={epsilon} and "
            f"iterations={iterations}."
        )
    dtype = torch.promote_types(scores.dtype, torch.float32)
    own = scores.to(dtype) / epsilon
    shared = None if queue is None else queue.to(dtype) / epsilon
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
