"""Spherical k-means: clusters of directions, by the cosine with their mean direction.

With unit rows x̂ and centroids c of unit length, in turn

    a_n = argmax_k ⟨x̂_n, c_k⟩,    c_k = m_k/‖m_k‖,  m_k = Σ_{n: a_n = k} x̂_n,

and Σ_n ⟨x̂_n, c_{a_n}⟩ never falls. A cluster without rows takes the row that fits its own centroid worst.

References:
    Dhillon, Modha 2001, "Concept Decompositions for Large Sparse Text Data Using Clustering"; Arthur, Vassilvitskii
    2007, "k-means++"; facebookresearch/swav ``main_deepclusterv2.py`` (``cluster_memory``).

Deviations:
    The official code keeps the old centroid of an empty cluster.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hfproj.errors import UsageError, unknown
from hfproj.functional.rows import full_precision, unit_rows
from hfproj.typing import Features

INITS = ("random", "k-means++")
_ENTRIES = 2**24  # of a tile of similarities: 64 MiB in float32


class Clusters(NamedTuple):
    """Unit centroids, the number of each row's nearest one (of equal ones the first), and the cosine with it."""

    centroids: Float[Tensor, "count dim"]
    assignments: Int64[Tensor, " rows"]
    cosines: Float[Tensor, " rows"]


@torch.no_grad()
def spherical_kmeans(
    x: Features, count: int, *, iterations: int = 10, init: str = "random", generator: torch.Generator | None = None
) -> Clusters:
    """Return clusters of the rows of `x` by direction, without a gradient.

    Args:
        x: Rows of any length; a zero row has a cosine of 0 with everything.
        count: Number of clusters.
        iterations: Most updates of the centroids; it stops once no row changes its cluster.
        init: First centroids: ``"random"`` rows, or ``"k-means++"``, each drawn in proportion to its distance 1 − cos
            from those before.
        generator: Source of the draws; with the same rows and generator all processes find the same clusters.

    Raises:
        UsageError: If there are more clusters than rows, no iterations, or `init` is unknown.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [5.0, 0.1], [0.0, 1.0], [0.1, 5.0]])
        >>> a = spherical_kmeans(x, 2, init="k-means++", generator=torch.Generator().manual_seed(0)).assignments
        >>> bool(a[0] == a[1] != a[2] == a[3])
        True
    """
    if not 1 <= count <= len(x):
        raise UsageError(f"k-means can't make {count} clusters of {len(x)} rows; ask for 1 to {len(x)} (prototypes=…).")
    if iterations < 1:
        raise UsageError(f"k-means needs at least 1 iteration, got iterations={iterations}.")
    if init not in INITS:
        raise unknown("init of k-means", init, INITS)
    u = unit_rows(x)
    with full_precision(u):
        centroids = (_random if init == "random" else _plus_plus)(u, count, generator)
        assignments, cosines = nearest_centroids(u, centroids)
        for _ in range(iterations):
            centroids = _mean_directions(u, assignments, cosines, count)
            before = assignments
            assignments, cosines = nearest_centroids(u, centroids)
            if torch.equal(assignments, before):
                break
    return Clusters(centroids, assignments, cosines)


def nearest_centroids(
    u: Float[Tensor, "rows dim"], centroids: Float[Tensor, "count dim"]
) -> tuple[Int64[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Return the number of the centroid with the largest cosine, and that cosine; both arguments are unit rows.

    Example:
        >>> [found.item() for found in nearest_centroids(torch.eye(3)[2:], torch.eye(3))]
        [2, 1.0]
    """
    with full_precision(u):
        tiles = [(tile @ centroids.T).max(1) for tile in u.split(_rows_of_a_tile(len(centroids)))]
    cosines, assignments = (torch.cat(parts) for parts in zip(*tiles))
    return assignments, cosines


def _rows_of_a_tile(count: int) -> int:
    return max(1, _ENTRIES // count)


def _mean_directions(u: Tensor, assignments: Tensor, cosines: Tensor, count: int) -> Tensor:
    sums = u.new_zeros(count, u.shape[1])
    sizes = u.new_zeros(count)
    rows = _rows_of_a_tile(count)
    for tile, clusters in zip(u.split(rows), assignments.split(rows)):
        # A product and no index_add_, whose order of summation on a GPU, and so the result, differs between processes.
        members = torch.nn.functional.one_hot(clusters, count).to(u.dtype)
        sums.addmm_(members.T, tile)
        sizes += members.sum(0)
    centroids = unit_rows(sums)
    empty = (sizes == 0).nonzero().flatten()
    worst = cosines.topk(len(empty), largest=False).indices
    centroids[empty] = u[worst]
    return centroids


def _random(u: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    device = u.device if generator is None else generator.device
    return u[torch.randperm(len(u), generator=generator, device=device)[:count].to(u.device)]


def _plus_plus(u: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    device = u.device if generator is None else generator.device
    chosen = [torch.randint(len(u), (1,), generator=generator, device=device).to(u.device)]
    distance = torch.full((len(u),), torch.inf, dtype=u.dtype, device=u.device)
    for _ in range(count - 1):
        distance = torch.minimum(distance, 1 - u @ u[chosen[-1][0]])
        # Rounding makes some a little negative; where all rows are alike, each is as good as any other.
        weights = distance.clamp_min(torch.finfo(u.dtype).tiny)
        chosen.append(torch.multinomial(weights.to(device), 1, generator=generator).to(u.device))
    return u[torch.cat(chosen)]
