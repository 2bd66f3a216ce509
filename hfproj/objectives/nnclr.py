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

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hfproj import distributed
from hfproj.functional.contrastive import check_images
from hfproj.functional.matching import joint_cosine, match_rows, unit_rows_own_first, view_pairs
from hfproj.functional.moments import joint_mean
from hfproj.functional.rows import full_precision, unit_rows
from hfproj.objectives.base import ObjectiveOutput, check_call
from hfproj.objectives.checks import check_shape, check_temperature
from hfproj.objectives.queue import Queue
from hfproj.typing import Scalar, Views


@torch.no_grad()
def nearest_rows(z: Float[Tensor, "rows dim"], bank: Float[Tensor, "size dim"]) -> Float[Tensor, "rows dim"]:
    """Return for each row the row of the bank with the largest cosine, without a gradient.

    Args:
        z: Rows of any length.
        bank: Rows of unit length.

    Example:
        >>> nearest_rows(torch.tensor([[1.0, 3.0]]), torch.eye(2))
        tensor([[0., 1.]])
    """
    rows = unit_rows(z)
    with full_precision(rows):
        return bank[(rows @ bank.to(rows.dtype).T).argmax(1)]


def nnclr_loss(neighbours: Float[Tensor, "keys batch dim"], prediction: Views, *, temperature: float = 0.2) -> Scalar:
    """Return NNCLR's loss over the joint batch of all processes, with a gradient for the predictions alone.

    Args:
        neighbours: Nearest neighbours of the first views' projections, as many as these are.
        prediction: p of all views, in any floating-point type; computed in float32 or better.
        temperature: τ.

    Example:
        >>> bool(nnclr_loss(torch.ones(2, 4, 8), torch.ones(2, 4, 8)).isclose(torch.tensor(4.0).log()))  # collapsed
        True
    """
    candidates = [unit_rows_own_first(view) for view in prediction]
    check_images(len(candidates[0]), "NNCLR")
    pairs = view_pairs(len(prediction), len(neighbours))
    losses = [match_rows(neighbours[n].detach(), candidates[p], temperature=temperature) for p, n in pairs]
    return joint_mean(torch.stack(losses))


class NNCLR(nn.Module):
    """NNCLR over the joint batch of all processes. Its queue, in its buffers, moves on in training only.

    Args:
        temperature: τ. 0.2: solo-learn on CIFAR; 0.1: the paper.
        out_dim: Width of the projections. 256: solo-learn, the paper.
        queue_size: K, a multiple of the batch over all processes. 65536: solo-learn; 98304: the paper.

    Raises:
        UsageError: an option that cannot work.

    Example:
        >>> objective = NNCLR(out_dim=4, queue_size=8)
        >>> z = torch.eye(4).expand(2, 4, 4)
        >>> objective(z, prediction=z).loss.requires_grad, objective.queue.filled.item()
        (False, 4)
        >>> objective(z, prediction=z).terms["neighbour_cosine"].item()  # now that z itself is in the queue
        1.0
    """

    views = (2, None)
    needs = frozenset({"prediction"})

    def __init__(self, *, temperature: float = 0.2, out_dim: int = 256, queue_size: int = 65536):
        super().__init__()
        self.temperature = check_temperature(temperature)
        self.queue = Queue(queue_size, out_dim)

    def forward(self, z: Views, *, prediction: Tensor | None = None, **given: Any) -> ObjectiveOutput:
        """Return the loss, ``positive_cosine`` and ``neighbour_cosine``.

        They are the mean cosines of neighbours with the predictions that are to find them, and with the projections
        that they are nearest to.

        Args:
            z: Projections of at least two views; rows of a view in the same order. Processes may hold batches of
                different sizes.
            prediction: p of the same views.
            given: Unused.

        Raises:
            UsageError: fewer than two views, no prediction or one of another shape, one image over all processes,
                another width than `out_dim`, or a first batch that does not divide `queue_size`.
        """
        check_call(self, z, prediction=prediction, **given)
        assert prediction is not None  # just checked
        check_shape(self, "prediction", prediction, z)
        # Nothing is enqueued in evaluation, where a batch may have any size: as if it were 1.
        batch = sum(distributed.row_counts(z.shape[1], z.device)) if self.training else 1
        self.queue.check(batch, z.shape[2])
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

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        size, dim = self.queue.rows.shape
        return f"temperature={self.temperature}, out_dim={dim}, queue_size={size}"
