"""NT-Xent, the objective of SimCLR: each view of an image finds its other views among all other rows of the batch.

With unit rows ẑ and n = V·N of them (V views of N images), S = ẐẐᵀ/τ and pos(i) the V − 1 other views of row i's image,

    L = mean_i mean_{p ∈ pos(i)} [ −S_ip + log Σ_{j≠i} exp S_ij ].

Over processes `tiled_nt_xent` (`hfproj/functional/contrastive.py`) gathers rows and log-sums and makes the gradient of
its own rows in the forward; with ``tile_rows=None`` `gather_views` gathers, and its backward sums over processes.

References:
    Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", arXiv 2002.05709, eq. 1;
    vturrisi/solo-learn (9187ea3) ``losses/simclr.py``, lightly-ai/lightly (e8d317fc) ``loss/ntx_ent_loss.py``.

Deviations:
    None for two views. With more views log-probabilities of the positives are averaged (SupCon's "out" form);
    solo-learn puts their sum inside the logarithm.
"""

import torch

from hfproj.errors import UsageError
from hfproj.functional.contrastive import tiled_nt_xent
from hfproj.functional.rows import full_precision, positive_cosine, unit_rows
from hfproj.objectives.base import Objective, ObjectiveOutput, check_temperature
from hfproj.typing import OneOf, Scalar, Views


def nt_xent_loss(z: Views, *, temperature: float = 0.2) -> Scalar:
    """Return NT-Xent of one batch at temperature τ, by the whole similarity matrix; differentiable any number of times.

    Example:
        >>> round(nt_xent_loss(torch.ones(2, 4, 8)).exp().item(), 3)  # collapsed: every other row is as good
        7.0
    """
    views, batch, _ = z.shape
    image = torch.arange(batch, device=z.device).repeat(views)
    itself = torch.eye(views * batch, dtype=torch.bool, device=z.device)
    positive = (image[:, None] == image) & ~itself
    with full_precision(z):
        rows = unit_rows(z).flatten(0, 1)
        similarity = (rows @ rows.T / temperature).masked_fill(itself, -torch.inf)
        log_p = similarity - similarity.logsumexp(1, keepdim=True)
    return -log_p[positive].mean()  # every row has V - 1 positives: one mean over all


class NTXent(Objective):
    """NT-Xent over the global batch.

    When to use: the first choice where batches can be large (512 images and more, over all processes), since all other
    rows are negatives; complete collapse is never its minimum, and tiles keep its memory small. At small batches try
    ``dcl`` or ``moco``. Images of one class in a batch push each other away, too.

    Args:
        temperature: τ. 0.2: solo-learn on CIFAR; 0.5: lightly; 0.1: solo-learn's function, SimCLR on ImageNet.
        gather: Whether images of other processes are negatives too; if not, the loss is that of the local batch.
        tile_rows: Edge of the tiles that similarities are computed in: memory O(tile_rows²), not O((views·batch)²).
            "auto" suits the device, see `hfproj.functional.contrastive`. None: all at once, twice differentiable.

    Raises:
        UsageError: If an option is out of range; in a call, with fewer than two views or images.

    Example:
        >>> NTXent()(torch.eye(4).expand(2, 4, 4)).terms["positive_cosine"].item()
        1.0
    """

    def __init__(
        self, *, temperature: float = 0.2, gather: bool = True, tile_rows: int | OneOf["auto"] | None = "auto"
    ):
        super().__init__()
        whole = isinstance(tile_rows, int) and not isinstance(tile_rows, bool) and tile_rows >= 1
        if not (whole or tile_rows is None or tile_rows == "auto"):
            wanted = "tile_rows to be a number from 1, 'auto', or None for no tiles"
            raise UsageError(f"Expected {wanted}, got {tile_rows!r}.")
        self.temperature, self.gather, self.tile_rows = check_temperature(temperature), gather, tile_rows

    def compute(self, z: Views, **given: object) -> ObjectiveOutput:
        """Return the loss and ``positive_cosine``, the mean cosine between views of an image."""
        if self.tile_rows is None:
            z = self.global_batch(z, gather=self.gather)
            loss, cosine = nt_xent_loss(z, temperature=self.temperature), positive_cosine(z)
        else:
            edge = self.tile_rows if isinstance(self.tile_rows, int) else None
            loss, cosine = tiled_nt_xent(unit_rows(z), temperature=self.temperature, tile_rows=edge, gather=self.gather)
        return ObjectiveOutput(loss, {"positive_cosine": cosine})
