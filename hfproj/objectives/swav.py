"""SwAV: each view of an image predicts the code, an assignment to prototypes, that another view of it got.

With prototype logits S of all V views (cosines) and codes Q_i of the first A of them, by Sinkhorn over the
global batch so that all prototypes are used alike (:mod:`hfproj.functional.assignments`),

    L = 1/A Σ_{i≤A} 1/(V−1) Σ_{v≠i} mean_n [ −Σ_j Q_inj log softmax(S_vn/τ)_j ].

For a batch with few rows per prototype, a queue of ẑ of past batches for each of the A views takes part in Sinkhorn,
scored with the prototypes of now; its rows get no loss.

References:
    Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", arXiv 2006.09882,
    eqs. 1 to 4; facebookresearch/swav ``main_swav.py``; vturrisi/solo-learn (9187ea3) ``losses/swav.py``.

Deviations:
    One queue for all processes, where the official code has one on each; processes count by their rows.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hfproj import distributed
from hfproj.errors import UsageError
from hfproj.functional.assignments import cross_view_entropy, log_probabilities, sinkhorn
from hfproj.functional.rows import at_least_float32, full_precision, gather_views, unit_rows
from hfproj.objectives.base import Objective, ObjectiveOutput, Step, check_at_least, check_positive, check_temperature
from hfproj.objectives.queue import Queue
from hfproj.typing import Scalar, Views


def swav_loss(
    scores: Float[Tensor, "views batch prototypes"], codes: Float[Tensor, "assigned batch prototypes"], *,
    temperature: float = 0.1,
) -> Scalar:  # fmt: skip
    """Return SwAV's loss of one batch at temperature τ, from S of all views and the codes Q of the first ones.

    Example:
        >>> round(swav_loss(torch.zeros(3, 4, 4), sinkhorn(torch.eye(4)).repeat(2, 1, 1)).exp().item(), 3)
        4.0
    """
    return cross_view_entropy(codes, log_probabilities(scores, temperature)).mean()


class SwAV(Objective):
    """SwAV over the global batch.

    When to use: multi-crop views without a teacher; large batches, or small ones with a queue, since codes must be
    balanced over more rows than there are prototypes. If all images get one code distribution, ``code_entropy`` stays
    near ln K.

    Args:
        temperature: τ.
        epsilon: ε of Sinkhorn.
        sinkhorn_iterations: Its iterations.
        assigned_views: Number of views, the first ones, that get codes: the large ones of a multi-crop batch.
        queue_size: Rows of the queue of each assigned view, over all processes; a multiple of the global batch. 0: no
            queue, as official runs at a batch of 4096; 3840 is theirs at 256, and solo-learn's.
        queue_start_epoch: Epoch in which the queue begins to fill; it is used once full. 15: official; 50: solo-learn.
        out_dim: Width of z, for the queue; `ProjectionTrainer` fills it in.
        freeze_prototypes_epochs: Epochs at the beginning in which the prototypes are not trained. 1: solo-learn's
            default, and about the official 313 steps at a batch of 4096; 2 in solo-learn's CIFAR runs.

    Raises:
        UsageError: If an option is out of range; in a call, if something is missing or of another shape, or the queue
            holds no whole number of batches.

    Example:
        >>> terms = SwAV()(torch.randn(2, 16, 3), scores=torch.ones(2, 16, 6)).terms  # all codes alike
        >>> round(terms["code_entropy"].exp().item(), 3)
        6.0
    """

    queues: Any  # a ModuleList, for whose items mypy knows no methods

    def __init__(
        self, *, temperature: float = 0.1, epsilon: float = 0.05, sinkhorn_iterations: int = 3,
        assigned_views: int = 2, queue_size: int = 0, queue_start_epoch: float = 15.0, out_dim: int = 128,
        freeze_prototypes_epochs: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        check_temperature(temperature)
        check_positive("epsilon", epsilon, usual="0.05")
        check_at_least(1, sinkhorn_iterations=sinkhorn_iterations, assigned_views=assigned_views)
        check_at_least(0, queue_size=queue_size, queue_start_epoch=queue_start_epoch)
        check_at_least(0, freeze_prototypes_epochs=freeze_prototypes_epochs)
        self.temperature, self.epsilon, self.sinkhorn_iterations = temperature, epsilon, sinkhorn_iterations
        self.assigned_views, self.queue_size, self.queue_start_epoch = assigned_views, queue_size, queue_start_epoch
        self.freeze_prototypes_epochs, self.out_dim = freeze_prototypes_epochs, out_dim
        self.views = (max(2, assigned_views), None)
        self.needs = frozenset({"scores", "prototypes", "step"} if queue_size else {"scores"})
        count = assigned_views if queue_size else 0
        self.queues = nn.ModuleList(Queue(queue_size, out_dim, seed=view) for view in range(count))

    def frozen(self, step: Step) -> set[str]:
        """Return the parts of the adapter that get no gradient in this step."""
        return {"prototypes"} if step.epoch < self.freeze_prototypes_epochs else set()

    def compute(
        self, z: Views, *, scores: Tensor, prototypes: Tensor | None = None, step: Step | None = None, **given: object
    ) -> ObjectiveOutput:
        """Return the loss, ``code_entropy`` in nats and ``kl``, the loss minus it; in training, fill the queue.

        `scores` are S of all views. The queue uses `z`, `step` and `prototypes`, whose products with unit z are scores.
        """
        self.check_shape("scores", scores, z, dim=scores.shape[-1])
        if prototypes is not None and prototypes.shape != (scores.shape[-1], z.shape[-1]):
            raise UsageError(
                f"The scores {list(scores.shape)} of z {list(z.shape)} are not those of prototypes "
                f"{list(prototypes.shape)}: pass prototypes of shape {[scores.shape[-1], z.shape[-1]]}."
            )
        codes = torch.stack([self._codes(view, scores[view], prototypes) for view in range(self.assigned_views)])
        if self.queue_size and self.training and step is not None and step.epoch >= self.queue_start_epoch:
            self.queues[0].check(z)
            for queue, rows in zip(self.queues, gather_views(unit_rows(z.detach()[: self.assigned_views]))):
                queue.push(rows)
        loss = cross_view_entropy(codes, log_probabilities(scores, self.temperature))
        entropy = torch.special.entr(codes).sum(-1).mean(0)
        loss, entropy = distributed.gather_rows(torch.stack([loss, entropy], 1)).mean(0)
        return ObjectiveOutput(loss, {"code_entropy": entropy.detach(), "kl": (loss - entropy).detach()})

    def _codes(self, view: int, scores: Tensor, prototypes: Tensor | None) -> Tensor:
        queued = None
        if prototypes is not None and self.queue_size and self.queues[view].filled == self.queue_size:
            prototypes = at_least_float32(prototypes.detach())
            with full_precision(prototypes):
                queued = self.queues[view].rows.to(prototypes.dtype) @ prototypes.T
        return sinkhorn(scores, epsilon=self.epsilon, iterations=self.sinkhorn_iterations, queue=queued)
