"""MoCo: a query finds the EMA teacher's key of the same image among the keys of a queue.

With unit rows ẑ_q of a view, z̄_k of another view in the teacher (no gradient) and Q_1 … Q_K of the queue,

    L = mean_i [ −s_i/τ + log( exp(s_i/τ) + Σ_j exp(⟨ẑ_q,i, Q_j⟩/τ) ) ],    s_i = ⟨ẑ_q,i, z̄_k,i⟩.

The keys enter the queue after the loss. In one direction (v2) the second view has the keys; if symmetric, each of the
first two has its keys in turn, with a queue of its own. With more views all others are queries (mean of pairs).

References:
    He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning", arXiv 1911.05722, eq. 1;
    Chen et al. 2020 (v2), arXiv 2003.04297; facebookresearch/moco ``moco/builder.py``; symmetric:
    vturrisi/solo-learn (9187ea3) ``methods/mocov2plus.py``.

Deviations:
    Keys are not shuffled between processes: BatchNorm here has the statistics of the global batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hfproj import distributed
from hfproj.functional.moments import joint_cosine, joint_mean
from hfproj.functional.rows import full_precision, unit_rows
from hfproj.objectives.base import Objective, ObjectiveOutput, check_momentum, check_temperature
from hfproj.objectives.queue import Queue
from hfproj.typing import Views


def moco_losses(
    queries: Float[Tensor, "rows dim"], keys: Float[Tensor, "rows dim"], queue: Float[Tensor, "size dim"], *,
    temperature: float = 0.2,
) -> Float[Tensor, " rows"]:  # fmt: skip
    """Return the loss of each query with its key at temperature τ; the rows of the queue are of unit length.

    Example:
        >>> moco_losses(torch.ones(1, 4), torch.ones(1, 4), torch.full((7, 4), 0.5)).exp().round()  # one of 8 alike
        tensor([8.])
    """
    rows = unit_rows(queries)
    positive = (rows * unit_rows(keys).to(rows.dtype)).sum(1, keepdim=True) / temperature
    with full_precision(rows):
        negative = rows @ queue.to(rows.dtype).T / temperature
    return torch.cat([positive, negative], 1).logsumexp(1) - positive.squeeze(1)


class MoCo(Objective):
    """MoCo v2 over the global batch. Its queue, in its buffers, moves on in training only.

    When to use: negatives at small batches, since they come from the queue. It costs a teacher and K·k numbers. A queue
    of keys from a teacher that moves too fast is stale (keep the momentum near 0.999), and the batch must divide K.

    Args:
        temperature: τ. 0.2: MoCo v2; 0.07: v1.
        out_dim: Width of the projections. 128: MoCo.
        queue_size: K, a multiple of the batch over all processes. 65536: MoCo; 32768: solo-learn on CIFAR.
        symmetric: Whether both views are queries in turn, as in solo-learn, with two queues.
        ema_momentum: m of the teacher at the start and at the end. 0.999: MoCo; solo-learn: 0.99 to 0.999.

    Raises:
        UsageError: If an option is out of range; in a call, with fewer than two views, a target that is missing or of
            another shape, z of another width than `out_dim`, or a first batch that does not divide `queue_size`.

    Example:
        >>> objective = MoCo(out_dim=4, queue_size=8)
        >>> z = torch.eye(4).expand(2, 4, 4)
        >>> loss, terms = objective(z, target=z)
        >>> terms["positive_cosine"].item(), objective.queues[0].filled.item()
        (1.0, 4)
    """

    needs = frozenset({"target"})
    queues: Any  # an nn.ModuleList of Queue, for whose items mypy knows no methods

    def __init__(
        self, *, temperature: float = 0.2, out_dim: int = 128, queue_size: int = 65536, symmetric: bool = False,
        ema_momentum: Sequence[float] = (0.999, 0.999),
    ):  # fmt: skip
        super().__init__()
        self.temperature, self.symmetric = check_temperature(temperature), symmetric
        self.ema_momentum, self.out_dim, self.queue_size = check_momentum(ema_momentum), out_dim, queue_size
        self.key_views = (0, 1) if symmetric else (1,)
        self.queues = nn.ModuleList(Queue(queue_size, out_dim, seed=view) for view in self.key_views)

    def compute(self, z: Views, *, target: Tensor, **given: object) -> ObjectiveOutput:
        """Return the loss and ``positive_cosine`` of queries and their keys; `target` is z̄ of the first two views."""
        self.check_shape("target", target, z, views=2)
        self.queues[0].check(z)
        target, losses, cosines = unit_rows(target.detach()), [], []
        for key_view, queue in zip(self.key_views, self.queues):
            keys = target[key_view]
            queries = z[[view for view in range(len(z)) if view != key_view]]
            negatives = queue.rows.clone()  # the backward needs what is about to be overwritten
            losses += [moco_losses(view, keys, negatives, temperature=self.temperature) for view in queries]
            cosines.append(joint_cosine(queries, keys.expand_as(queries)))
            if self.training:
                queue.push(distributed.gather_rows(keys))
        return ObjectiveOutput(joint_mean(torch.stack(losses)), {"positive_cosine": torch.stack(cosines).mean()})
