"""DeepCluster-v2: each view of an image predicts the cluster that the image was in, in the epoch before.

A bank keeps ẑ of every image from its large views. At the start of an epoch spherical k-means clusters it, once per
"head" h with K_h clusters; centroids c_h and clusters a_h then stay for the epoch:

    L = mean_h mean_n mean_v [ −log softmax(ẑ_vn c_hᵀ/τ)_{a_hn} ],

over images n that have a cluster. The centroids are the prototypes: the adapter needs none.

References:
    Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", arXiv 2006.09882,
    appendix; facebookresearch/swav ``main_deepclusterv2.py``; vturrisi/solo-learn (9187ea3)
    ``methods/deepclusterv2.py``, ``losses/deepclusterv2.py``.

Deviations:
    The first epoch only fills the bank: its loss is 0 with a zero gradient, as in solo-learn (whose value is NaN
    there). The official code fills it in an additional pass before training. Clusters without rows are filled anew,
    see :mod:`hfproj.functional.assignments`. The mean over images is that of the global batch, not one of local means.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hfproj import distributed
from hfproj.errors import UsageError, check_choice
from hfproj.functional.assignments import INITS, Start, log_probabilities, nearest_centroids, spherical_kmeans
from hfproj.functional.rows import full_precision, gather_views, unit_rows
from hfproj.objectives.base import Objective, ObjectiveOutput, Step, check_at_least, check_temperature
from hfproj.typing import Views

UNASSIGNED = -1


def cluster_entropy(
    scores: Float[Tensor, "views batch clusters"], assignments: Int64[Tensor, " batch"], *, temperature: float = 0.1
) -> Float[Tensor, " batch"]:
    """Return the cross-entropy of each image with its cluster at temperature τ, a mean over views; 0 without one (-1).

    ``scores`` are cosines with the centroids, ``assignments`` the number of each image's cluster, or -1.

    Example:
        >>> cluster_entropy(torch.zeros(2, 3, 8), torch.tensor([5, -1, 0])).exp().round().tolist()
        [8.0, 1.0, 8.0]
    """
    log_p = log_probabilities(scores, temperature)
    chosen = assignments.clamp_min(0).expand(len(scores), -1).unsqueeze(-1)
    entropy = -log_p.gather(-1, chosen).squeeze(-1).mean(0)
    return torch.where(assignments == UNASSIGNED, 0 * entropy, entropy)  # NaN stays NaN


class DeepClusterV2(Objective):
    """DeepCluster-v2 over the global batch.

    When to use: clusters as targets, for small batches too, since the loss takes nothing from the other images. It
    keeps every image, hence no streams, and stops for k-means once an epoch. Buffers: ``bank [assigned_views,
    num_images, out_dim]`` of this epoch's ẑ, with ``filled [num_images]``; ``assignments [heads, num_images]`` and
    ``centroids [sum of prototypes, out_dim]`` of the last clustering, in ``epoch``.

    Args:
        num_images: Of the data set; `ProjectionTrainer` fills it in, as it does `out_dim`.
        out_dim: Width of z.
        prototypes: Number of clusters of each head, or one number for one head. (3000, 3000, 3000): ImageNet.
        temperature: τ.
        kmeans_iterations: Of spherical k-means.
        kmeans_init: ``"random"`` or ``"k-means++"``.
        assigned_views: Number of views, the first ones, that the bank keeps; head h clusters view h mod this.

    Raises:
        UsageError: If an option is out of range; in a call, if the index is missing or out of range, or z has another
            width than the bank.

    Example:
        >>> objective = DeepClusterV2(num_images=4, out_dim=2, prototypes=2)
        >>> z, index = torch.eye(2).repeat(2, 2, 1), torch.arange(4)  # two directions, and two views alike
        >>> objective(z, index=index).loss.item()  # no clusters yet
        0.0
        >>> objective.on_epoch_start(Step.at(seed=0, global_step=1, epoch=1.0))
        >>> objective(z, index=index).loss.item() < 1e-4
        True
    """

    needs = frozenset({"index"})
    bank: Tensor
    filled: Tensor
    assignments: Tensor
    centroids: Tensor
    epoch: Tensor

    def __init__(
        self, *, num_images: int, out_dim: int = 128, prototypes: int | Sequence[int] = (3000, 3000, 3000),
        temperature: float = 0.1, kmeans_iterations: int = 10, kmeans_init: Start = "random", assigned_views: int = 2,
    ):  # fmt: skip
        super().__init__()
        self.prototypes = [prototypes] if isinstance(prototypes, int) else list(prototypes)
        if not self.prototypes or not 2 <= min(self.prototypes) <= max(self.prototypes) <= num_images:
            raise UsageError(
                f"prototypes are numbers of clusters, each from 2 to that of images ({num_images}), got {prototypes}."
            )
        check_temperature(temperature)
        check_at_least(1, out_dim=out_dim, kmeans_iterations=kmeans_iterations, assigned_views=assigned_views)
        check_choice("kmeans_init", kmeans_init, INITS)
        self.temperature, self.assigned_views = temperature, assigned_views
        self.num_images, self.out_dim = num_images, out_dim
        self.kmeans_iterations, self.kmeans_init = kmeans_iterations, kmeans_init
        self.views = (assigned_views, None)
        self.register_buffer("bank", torch.zeros(assigned_views, num_images, out_dim))
        self.register_buffer("filled", torch.zeros(num_images, dtype=torch.bool))
        self.register_buffer("assignments", torch.full((len(self.prototypes), num_images), UNASSIGNED))
        self.register_buffer("centroids", torch.zeros(sum(self.prototypes), out_dim))
        self.register_buffer("epoch", torch.tensor(-1))

    @torch.no_grad()
    def on_epoch_start(self, step: Step) -> None:
        """Cluster the bank and empty it: the same on all processes, by the step's generator.

        Raises:
            UsageError: If the epoch before had fewer images than there are prototypes.
        """
        epoch = math.floor(step.epoch)
        if epoch == self.epoch:
            return  # training was resumed within this epoch: its clusters are there, its bank is not complete
        self.epoch.fill_(epoch)
        images = self.filled.nonzero().flatten()
        if not len(images):
            return
        self.assignments.fill_(UNASSIGNED)
        for head, centroids in enumerate(self.centroids.split(self.prototypes)):
            rows, count = self.bank[head % self.assigned_views, images], len(centroids)
            clusters = spherical_kmeans(
                rows, count, iterations=self.kmeans_iterations, init=self.kmeans_init, generator=step.generator
            )
            centroids.copy_(clusters.centroids)
            self.assignments[head, images] = clusters.assignments
        self.filled.zero_()

    def compute(self, z: Views, *, index: Tensor, **given: object) -> ObjectiveOutput:
        """Return the loss, ``assigned`` (fraction of images with a cluster) and ``accuracy`` (of their predictions).

        `index` is the number of each image in the data set. In training, ẑ of the assigned views are written into the
        bank; else, where images are not those of the bank, an image's cluster is the nearest to its assigned view.
        """
        self.check_per_image("index", index, z)
        if (width := z.shape[-1]) != self.out_dim:
            raise UsageError(f"The bank has rows of {self.out_dim} dimensions and z has {width}: pass out_dim={width}.")
        if self.training and len(index) and not 0 <= index.min() <= index.max() < self.num_images:
            raise UsageError(
                f"Expected index to be numbers of images from 0 to {self.num_images - 1}, got {index.min()} to "
                f"{index.max()}; pass num_images=… of the training data set."
            )
        u = unit_rows(z)
        centroids = self.centroids.to(u.dtype)
        with full_precision(u):
            scores = (u @ centroids.T).split(self.prototypes, -1)
        if self.training:
            clusters = self.assignments[:, index]
        else:
            heads = enumerate(centroids.split(self.prototypes))
            nearest = [nearest_centroids(u.detach()[h % self.assigned_views], c)[0] for h, c in heads]
            clusters = torch.stack(nearest)
        entropies, hits = [], []
        for head_scores, cluster in zip(scores, clusters):
            entropies.append(cluster_entropy(head_scores, cluster, temperature=self.temperature))
            hits.append((head_scores.detach().argmax(-1) == cluster).to(u.dtype).mean(0))
        known = (clusters[0] != UNASSIGNED).to(u.dtype)
        per_image = torch.stack([torch.stack(entropies).mean(0), torch.stack(hits).mean(0), known], 1)
        rows = distributed.gather_rows(per_image)
        loss, accuracy, _ = rows.sum(0) / rows[:, 2].sum().clamp_min(1)
        if self.training:
            self._remember(u, index)
        return ObjectiveOutput(loss, {"assigned": rows[:, 2].mean().detach(), "accuracy": accuracy.detach()})

    @torch.no_grad()
    def _remember(self, u: Tensor, index: Tensor) -> None:
        index, rows = distributed.gather_rows(index), gather_views(u[: self.assigned_views].detach())
        # Samplers fill up shards with images seen before; which of two writes to one place wins is not defined.
        images, place = index.unique(return_inverse=True)
        last = torch.zeros_like(images).scatter_reduce_(0, place, torch.arange(len(index), device=u.device), "amax")
        finite = rows.isfinite().all()
        self.bank[:, images] = torch.where(finite, rows[:, last].to(self.bank.dtype), self.bank[:, images])
        self.filled[images] |= finite
