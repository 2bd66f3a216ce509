"""NNCLR: the prediction of one view finds the nearest neighbour, in a queue, of another view's projection.

With unit rows ẑ of projections, p̂ of predictions, Q_1 … Q_K of the queue and nn(ẑ) = Q_argmax_j ⟨ẑ, Q_j⟩,

    L = ½ ( ℓ(nn(ẑ_a), p̂_b) + ℓ(nn(ẑ_b), p̂_a) ),    ℓ(n, p) = mean_i [ −⟨n_i, p_i⟩/τ + log Σ_j exp(⟨n_i, p_j⟩/τ) ].

Neighbours have no gradient. The first view's projections enter the queue after the loss; at the start its rows are
random and the neighbours mean nothing.

References:
    Dwibedi et al. 2021, "With a Little Help from My Friends: Nearest-Neighbor Contrastive Learning of Visual
    Representations", arXiv 2104.14548, eq. 3 and algorithm 1; vturrisi/solo-learn (9187ea3) ``losses/nnclr.py``,
    ``methods/nnclr.py``.

Deviations:
    None for two views. With more (small crops), neighbours are those of the first two views and every other view
    predicts each of them: the mean over pairs.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj import distributed
from hfproj.functional.contrastive import check_images
from hfproj.functional.moments import joint_cosine, joint_mean
from hfproj.functional.rows import full_precision, match_rows, unit_rows, unit_rows_own_first, view_pairs
from hfproj.objectives.base import Objective, ObjectiveOutput, check_temperature
from hfproj.objectives.queue import Queue
from hfproj.typing import Scalar, Views


@torch.no_grad()
def nearest_rows(z: Float[Tensor, "rows dim"], bank: Float[Tensor, "size dim"]) -> Float[Tensor, "rows dim"]:
    """Return for each row the row of the bank, of unit length, with the largest cosine, without a gradient.

    Example:
        >>> nearest_rows(torch.tensor([[1.0, 3.0]]), torch.eye(2))
        tensor([[0., 1.]])
    """
    rows = unit_rows(z)
    with full_precision(rows):
        return bank[(rows @ bank.to(rows.dtype).T).argmax(1)]


def nnclr_loss(neighbours: Float[Tensor, "keys batch dim"], prediction: Views, *, temperature: float = 0.2) -> Scalar:
    """Return NNCLR's loss at τ over the global batch, from neighbours of the first views (no gradient) and p of all.

    Example:
        >>> round(nnclr_loss(torch.ones(2, 4, 8), torch.ones(2, 4, 8)).exp().item(), 3)  # collapsed
        4.0
    """
    candidates = [unit_rows_own_first(view) for view in prediction]
    check_images(len(candidates[0]), "NNCLR")
    pairs = view_pairs(len(prediction), len(neighbours))
    losses = [match_rows(neighbours[n].detach(), candidates[p], temperature=temperature) for p, n in pairs]
    return joint_mean(torch.stack(losses))


class NNCLR(Objective):
    """NNCLR over the global batch. Its queue, in its buffers, moves on in training only.

    When to use: where augmentations alone give too little variety, since positives are other images; it depends less on
    them than SimCLR. It wants large batches and a long queue, whose first neighbours are random.

    Args:
        temperature: τ. 0.2: solo-learn on CIFAR; 0.1: the paper.
        out_dim: Width of the projections. 256: solo-learn, the paper.
        queue_size: K, a multiple of the batch over all processes. 65536: solo-learn; 98304: the paper.

    Raises:
        UsageError: If an option is out of range; in a call, with fewer than two views or images, a prediction that is
            missing or of another shape, z of another width than `out_dim`, or a first batch that does not divide
            `queue_size`.

    Example:
        >>> objective = NNCLR(out_dim=4, queue_size=8)
        >>> z = torch.eye(4).expand(2, 4, 4)
        >>> [objective(z, prediction=z).terms["neighbour_cosine"].item() for _ in range(2)][1]  # z is in the queue
        1.0
    """

    needs = frozenset({"prediction"})

    def __init__(self, *, temperature: float = 0.2, out_dim: int = 256, queue_size: int = 65536):
        super().__init__()
        self.temperature, self.out_dim, self.queue_size = check_temperature(temperature), out_dim, queue_size
        self.queue = Queue(queue_size, out_dim)

    def compute(self, z: Views, *, prediction: Tensor, **given: object) -> ObjectiveOutput:
        """Return the loss, and the mean cosines ``positive_cosine`` of neighbours with the predictions (shaped as `z`)
        that are to find them, and ``neighbour_cosine`` with the projections that they are nearest to.
        """
        self.check_shape("prediction", prediction, z)
        self.queue.check(z)
        neighbours = torch.stack([nearest_rows(view, self.queue.rows) for view in z[:2]])
        loss = nnclr_loss(neighbours, prediction, temperature=self.temperature)
        predictions, nearest = (list(views) for views in zip(*view_pairs(len(z), 2)))
        terms = {
            "positive_cosine": joint_cosine(prediction[predictions], neighbours[nearest]),
            "neighbour_cosine": joint_cosine(z[:2], neighbours),
        }
        if self.training:
            self.queue.push(distributed.gather_rows(unit_rows(z[0].detach())))
        return ObjectiveOutput(loss, terms)
