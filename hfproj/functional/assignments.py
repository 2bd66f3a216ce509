"""Assignments of rows to prototypes (Sinkhorn-Knopp) and clusters (spherical k-means), and cross-entropy across views.

**Sinkhorn-Knopp**: from exp(S/ε) with prototype logits S ``[N, K]``, `iterations` times: scale the prototypes to equal
mass, then the rows to 1,

    Q_nk = exp(S_nk/ε) · a_n · b_k,    Σ_k Q_nk = 1 exactly,    Σ_n Q_nk → N/K.

All scalings are sums of logarithms, so that no row and no prototype underflows, however small ε is.

**Spherical k-means** clusters directions. With unit rows x̂ and centroids c of unit length, in turn

    a_n = argmax_k ⟨x̂_n, c_k⟩,    c_k = m_k/‖m_k‖,  m_k = Σ_{n: a_n = k} x̂_n,

and Σ_n ⟨x̂_n, c_{a_n}⟩ never falls. A cluster without rows takes the row that fits its own centroid worst. scikit-learn
has no spherical k-means, runs on the CPU only, and its result on a GPU's rows would have to be sent to all processes.

References:
    Cuturi 2013, arXiv 1306.0895, algorithm 1; Caron et al. 2020, arXiv 2006.09882, section 3.1; facebookresearch/swav
    ``main_swav.py`` (``distributed_sinkhorn``). k-means: Dhillon, Modha 2001, "Concept Decompositions for Large Sparse
    Text Data Using Clustering"; Arthur, Vassilvitskii 2007, "k-means++"; facebookresearch/swav
    ``main_deepclusterv2.py``.

Deviations:
    The official code scales exp(S/ε) itself, which is 0/0 for a prototype whose entries have all underflowed. The
    values are the same where it is finite; constant factors of its steps cancel. Of k-means: it keeps the old centroid
    of an empty cluster.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hfproj import distributed
from hfproj.errors import UsageError, check_choice
from hfproj.functional.rows import at_least_float32, full_precision, unit_rows
from hfproj.typing import Features, OneOf

INITS = ("random", "k-means++")
Start = OneOf["random", "k-means++"]
_ENTRIES = 2**24  # of a tile of similarities: 64 MiB in float32


@torch.no_grad()
def sinkhorn(
    scores: Float[Tensor, "rows prototypes"], *, epsilon: float = 0.05, iterations: int = 3,
    queue: Float[Tensor, "queued prototypes"] | None = None,
) -> Float[Tensor, "rows prototypes"]:  # fmt: skip
    """Return the codes Q of this process's rows within the global batch, without a gradient.

    Args:
        scores: S. Processes may hold different numbers of rows, or none.
        epsilon: ε, the weight of the entropy: a small one makes hard assignments.
        iterations: Number of scalings of each side.
        queue: S of further rows, the same on all processes, that take part once and get no codes.

    Raises:
        UsageError: If `epsilon` is not a positive number or `iterations` is below 1.

    Example:
        >>> sinkhorn(torch.tensor([[1.0, 0.0], [1.0, 0.0]])).tolist()  # alike: neither has the first prototype alone
        [[0.5, 0.5], [0.5, 0.5]]
    """
    if not 0 < epsilon < math.inf or iterations < 1:
        got = f"{epsilon=} and {iterations=}"
        raise UsageError(f"Sinkhorn needs an epsilon above 0 (0.05 is usual) and at least 1 iteration, got {got}.")
    own = at_least_float32(scores) / epsilon
    queued = None if queue is None else queue.to(own.dtype) / epsilon
    for _ in range(iterations):
        here = own.logsumexp(0)
        largest = distributed.all_reduce_max(here)
        mass = largest + distributed.all_reduce_sum((here - largest).exp()).log()
        if queued is not None:
            mass = torch.logaddexp(mass, queued.logsumexp(0))
            queued = queued - mass
            queued = queued - queued.logsumexp(1, keepdim=True)
        own = own - mass
        own = own - own.logsumexp(1, keepdim=True)
    return own.exp()


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

    ``assigned`` are the target probabilities of the first views, ``log_p`` log-probabilities of all, at least float32.

    Example:
        >>> cross_view_entropy(torch.full((2, 1, 4), 0.25), torch.full((3, 1, 4), 0.25).log()).exp()
        tensor([4.])
    """
    with full_precision(log_p):
        entropy = -torch.einsum("tnk,vnk->tvn", assigned.to(log_p.dtype), log_p)
    other = ~torch.eye(len(assigned), len(log_p), dtype=torch.bool, device=log_p.device)
    return entropy[other].mean(0)


class Clusters(NamedTuple):
    """Unit centroids, of each row the number of the nearest (`assignments`; of equal ones the first), and `cosines`."""

    centroids: Float[Tensor, "count dim"]
    assignments: Int64[Tensor, " rows"]
    cosines: Float[Tensor, " rows"]


@torch.no_grad()
def spherical_kmeans(
    x: Features, count: int, *, iterations: int = 10, init: Start = "random", generator: torch.Generator | None = None
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
    check_choice("init of k-means", init, INITS)
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
        tiles = [(tile @ centroids.T).max(1) for tile in u.split(max(1, _ENTRIES // len(centroids)))]
    cosines, assignments = (torch.cat(parts) for parts in zip(*tiles))
    return assignments, cosines


def _mean_directions(u: Tensor, assignments: Tensor, cosines: Tensor, count: int) -> Tensor:
    sums = u.new_zeros(count, u.shape[1])
    sizes = u.new_zeros(count)
    rows = max(1, _ENTRIES // count)
    for tile, clusters in zip(u.split(rows), assignments.split(rows)):
        # A product and no index_add_, whose order of summation on a GPU, and so the result, differs between processes.
        members = torch.nn.functional.one_hot(clusters, count).to(u.dtype)
        sums.addmm_(members.T, tile)
        sizes += members.sum(0)
    centroids = unit_rows(sums)
    empty = (sizes == 0).nonzero().flatten()
    centroids[empty] = u[cosines.topk(len(empty), largest=False).indices]
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
