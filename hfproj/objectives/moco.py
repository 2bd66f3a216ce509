"""MoCo: a query finds the moving-average copy's key of the same image among the keys of a queue.

With unit rows ẑ_q of a view, z̄_k of another view in the copy (no gradient) and Q_1 … Q_K of the queue,

    L = mean_i [ −s_i/τ + log( exp(s_i/τ) + Σ_j exp(⟨ẑ_q,i, Q_j⟩/τ) ) ],    s_i = ⟨ẑ_q,i, z̄_k,i⟩.

The keys enter the queue after the loss. In one direction (v2) the second view has the keys; if symmetric, each of the
first two has its keys in turn, with a queue of its own. With more views (small crops) all others are queries:
the mean over pairs.

References:
    He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning", arXiv 1911.05722, eq. 1;
    Chen et al. 2020 (v2), arXiv 2003.04297; facebookresearch/moco ``moco/builder.py``; symmetric:
    vturrisi/solo-learn (9187ea3) ``methods/mocov2plus.py``.

Deviations:
    Keys are not shuffled between processes: BatchNorm here has the statistics of the joint batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hfproj import distributed
from hfproj.functional.matching import joint_cosine
from hfproj.functional.moments import joint_mean
from hfproj.functional.rows import full_precision, unit_rows
from hfproj.objectives.base import ObjectiveOutput, check_call
from hfproj.objectives.checks import check_momentum, check_shape, check_temperature
from hfproj.objectives.queue import Queue
from hfproj.typing import Views


def moco_losses(
    queries: Float[Tensor, "rows dim"],
    keys: Float[Tensor, "rows dim"],
    queue: Float[Tensor, "size dim"],
    *,
    temperature: float = 0.2,
) -> Float[Tensor, " rows"]:
    """Return the loss of each query.

    Args:
        queries: Of any length, in any floating-point type; computed in float32 or better.
        keys: Key of each query.
        queue: The negatives, of unit length, the same for all.
        temperature: τ.

    Example:
        >>> losses = moco_losses(torch.ones(2, 4), torch.ones(2, 4), torch.full((7, 4), 0.5))  # collapsed: one of 8
        >>> torch.allclose(losses, torch.tensor(8.0).log())
        True
    """
    rows = unit_rows(queries)
    positive = (rows * unit_rows(keys).to(rows.dtype)).sum(1, keepdim=True) / temperature
    with full_precision(rows):
        negative = rows @ queue.to(rows.dtype).T / temperature
    return torch.cat([positive, negative], 1).logsumexp(1) - positive.squeeze(1)


class MoCo(nn.Module):
    """MoCo v2 over the joint batch of all processes. Its queue, in its buffers, moves on in training only.

    Args:
        temperature: τ. 0.2: MoCo v2; 0.07: v1.
        out_dim: Width of the projections. 128: MoCo.
        queue_size: K, a multiple of the batch over all processes. 65536: MoCo; 32768: solo-learn on CIFAR.
        symmetric: Whether both views are queries in turn, as in solo-learn, with two queues.
        ema_momentum: m of the moving average at the start and at the end. 0.999: MoCo; solo-learn: 0.99 to 0.999.

    Raises:
        UsageError: an option that cannot work.

    Example:
        >>> objective = MoCo(out_dim=4, queue_size=8)
        >>> z = torch.eye(4).expand(2, 4, 4)
        >>> loss, terms = objective(z, target=z)
        >>> terms["positive_cosine"].item(), objective.queues[0].filled.item()
        (1.0, 4)
    """

    views = (2, None)
    needs = frozenset({"target"})
    target_of = "projection"
    target_views = 2
    queues: Any  # an nn.ModuleList of Queue, one for each view that has keys

    def __init__(
        self,
        *,
        temperature: float = 0.2,
        out_dim: int = 128,
        queue_size: int = 65536,
        symmetric: bool = False,
        ema_momentum: Sequence[float] = (0.999, 0.999),
    ):
        super().__init__()
        self.temperature, self.symmetric = check_temperature(temperature), symmetric
        self.ema_momentum = check_momentum(ema_momentum)
        self.key_views = (0, 1) if symmetric else (1,)
        self.queues = nn.ModuleList(Queue(queue_size, out_dim, seed=view) for view in self.key_views)

    def forward(self, z: Views, *, target: Tensor | None = None, **given: Any) -> ObjectiveOutput:
        """Return the loss and ``positive_cosine``, the mean cosine of queries and their keys.

        Args:
            z: Projections of at least two views; rows of a view in the same order. Processes may hold batches of
                different sizes.
            target: z̄ of the first two views.
            given: Unused.

        Raises:
            UsageError: fewer than two views, no target or one of another shape, another width than `out_dim`, or a
                first batch that does not divide `queue_size`.
        """
        check_call(self, z, target=target, **given)
        assert target is not None  # just checked
        check_shape(self, "target", target, z, views=2)
        # Nothing is enqueued in evaluation, where a batch may have any size: as if it were 1.
        batch = sum(distributed.row_counts(z.shape[1], z.device)) if self.training else 1
        target, losses, cosines = unit_rows(target.detach()), [], []
        for key_view, queue in zip(self.key_views, self.queues):
            queue.check(batch, z.shape[2])
            keys = target[key_view]
            queries = z[[view for view in range(len(z)) if view != key_view]]
            negatives = queue.rows.clone()  # the backward needs what is about to be overwritten
            losses += [moco_losses(view, keys, negatives, temperature=self.temperature) for view in queries]
            cosines.append(joint_cosine(queries, keys.expand_as(queries)))
            if self.training:
                queue.push(distributed.gather_rows(keys))
        return ObjectiveOutput(joint_mean(torch.stack(losses)), {"positive_cosine": torch.stack(cosines).mean()})

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        size, dim = self.queues[0].rows.shape
        return f"temperature={self.temperature}, out_dim={dim}, queue_size={size}, symmetric={self.symmetric}"
