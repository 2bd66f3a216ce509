"""CLID: how well a nearest-neighbour classifier learns clusters of the features, and how many dimensions they have.

Cluster learnability: k-means with √n clusters on unit features; the accuracy of a 1-NN classifier (cosine) of these.

Intrinsic dimension: TwoNN. With r1 < r2 the distances of a row to its two nearest neighbours and μ = r2/r1, in d
dimensions P(μ ≤ x) = 1 − x^{−d}. d is the slope through 0 of −log(1 − F(μ)) against log μ, F the fraction of rows up
to μ (``fit``), or (n − 1)/Σ log μ (``likelihood``). CLID adds both parts, each standardised over the models compared.

References:
    Lu et al. 2022, Expressiveness and learnability: a unifying view for evaluating self-supervised learning, arXiv
    2206.01251; SirNader/SSL_representation_assessment ``metrics.py`` (the split). Facco et al. 2017, Estimating the
    intrinsic dimension of datasets by a minimal neighborhood information (TwoNN).

Deviations:
    The port uses a 50/50 split, the paper speaks of the speed of learning: hence prequential by default. Rows come in
    a random order, from a seed. Rows that are equal count once in TwoNN, whose r1 would be 0.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hfproj.checking import checked
from hfproj.diagnostics._factors import largest_entry
from hfproj.errors import UsageError, check_choice
from hfproj.functional.assignments import spherical_kmeans
from hfproj.functional.feature_rows import check_features, double_rows
from hfproj.typing import Features, OneOf

Scoring = OneOf["prequential", "split"]
Estimator = OneOf["fit", "likelihood"]

_TILE = 2**22  # similarities held at once: 32 MiB in float64
_CANDIDATES = 8  # neighbours by products of rows, whose distances are then computed anew without cancellation
_KEPT = 0.9  # fraction of the rows in the fit: Facco et al.


class Clid(NamedTuple):
    """The parts of CLID.

    Attributes:
        cluster_learnability: An accuracy, from 0 to 1.
        intrinsic_dimension: From 0 to infinity.
    """

    cluster_learnability: float
    intrinsic_dimension: float


@checked
def clid(
    f: Features, *, clusters: int | None = None, protocol: Scoring = "prequential", estimator: Estimator = "fit",
    seed: int = 0,
) -> Clid:  # fmt: skip
    """Return cluster learnability and intrinsic dimension of one model; `clid_scores` compares several.

    The cost is rows² · dim.

    Args:
        f: Features `[rows, dim]`.
        clusters: Number of clusters; None: √rows, rounded.
        protocol: ``"prequential"`` or ``"split"``, see `cluster_learnability`.
        estimator: ``"fit"`` or ``"likelihood"``, see `intrinsic_dimension`.
        seed: Seed of the clusters' first centroids and of the order of the rows.

    Raises:
        UsageError: If `cluster_learnability` or `intrinsic_dimension` refuses the features or an option.

    Example:
        >>> f = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
        >>> found = clid(f)
        >>> found.cluster_learnability > 0.8, 1.7 < found.intrinsic_dimension < 2.3
        (True, True)
    """
    learnability = cluster_learnability(f, clusters=clusters, protocol=protocol, seed=seed)
    return Clid(learnability, intrinsic_dimension(f, estimator=estimator))


@torch.no_grad()
@checked
def cluster_learnability(
    f: Features, *, clusters: int | None = None, protocol: Scoring = "prequential", seed: int = 0
) -> float:
    """Return the accuracy of a 1-NN classifier of k-means clusters, in [0, 1].

    Does not centre; rows are normalised. Features that are all parallel are one cluster and give 1. Of neighbours that
    are equally near the first counts. There are `clusters` clusters (None: √rows, rounded). By the protocol
    ``"prequential"`` each row is classified by those before, by ``"split"`` one half by the other. `seed` is that of
    the clusters' first centroids and of the order of the rows.

    Raises:
        UsageError: If `f` has fewer than four or non-finite rows, more clusters than rows, or an unknown protocol.

    Example:
        >>> cluster_learnability(torch.eye(2).repeat(50, 1), clusters=2)  # but for the first of each kind, 1 at best
        0.98...
    """
    check_choice("protocol of cluster learnability", protocol, ("prequential", "split"))
    check_features(f, minimum=4)
    rows, prequential = len(f), protocol == "prequential"
    generator = torch.Generator().manual_seed(seed)
    unit = double_rows(f, normalize=True)
    count = round(math.sqrt(rows)) if clusters is None else clusters
    found = spherical_kmeans(unit, count, iterations=100, init="k-means++", generator=generator)
    order = torch.randperm(rows, generator=generator).to(unit.device)
    unit, labels = unit[order], found.assignments[order]
    first = 1 if prequential else rows // 2  # of the rows that are classified
    right = 0
    for block in torch.arange(first, rows, device=unit.device).split(max(1, _TILE // rows)):
        known = int(block[-1]) if prequential else first
        cosines = unit[block] @ unit[:known].T
        if prequential:
            cosines = cosines.masked_fill(torch.arange(known, device=unit.device) >= block[:, None], -torch.inf)
        right += int((labels[cosines.argmax(1)] == labels[block]).sum())
    return right / (rows - first)


@torch.no_grad()
@checked
def intrinsic_dimension(f: Features, *, estimator: Estimator = "fit") -> float:
    """Return the intrinsic dimension by TwoNN, from 0; invariant to rotations, offsets and scales.

    Rows that are equal count once; fewer than three different rows are points and give 0. Infinite if every row's two
    nearest neighbours are equally far. `estimator` is ``"fit"`` (without the largest tenth of μ) or ``"likelihood"``.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite, or the estimator is unknown.

    Example:
        >>> line = torch.rand(500, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(1, 10)
        >>> 0.8 < intrinsic_dimension(line) < 1.2
        True
    """
    check_choice("estimator of the intrinsic dimension", estimator, ("fit", "likelihood"))
    check_features(f)
    distinct = torch.unique(double_rows(f), dim=0)
    count = len(distinct)
    if count < 3:
        return 0.0
    nearest = _two_nearest(distinct - distinct.mean(0))
    log_ratio = (nearest[:, 1] / nearest[:, 0]).log().sort().values
    if estimator == "likelihood":
        total = log_ratio.sum().item()
        return (count - 1) / total if total > 0 else math.inf
    kept = max(2, int(_KEPT * count))
    x = log_ratio[:kept]
    y = -torch.log1p(-torch.arange(1, kept + 1, dtype=x.dtype, device=x.device) / count)
    square = x.square().sum()
    return ((x * y).sum() / square).item() if square > 0 else math.inf


@checked
def clid_scores(models: Mapping[str, Clid]) -> dict[str, float]:
    """Return CLID of each model: cluster learnability plus intrinsic dimension, each standardised over the models.

    `models` are what `clid` returned, by name, at least two. Scores have mean 0 and mean something only within one
    comparison: the same data, number of rows and settings. A part that is the same for all models adds 0.

    Raises:
        UsageError: If there are fewer than two models, or parts that are not finite.

    Example:
        >>> scores = clid_scores({"a": Clid(0.9, 12.0), "b": Clid(0.7, 10.0)})
        >>> {name: round(score, 6) for name, score in scores.items()}
        {'a': 2.0, 'b': -2.0}
    """
    if len(models) < 2:
        raise UsageError(f"CLID standardises over the models it compares and needs at least two, got {list(models)}.")
    if bad := [name for name, parts in models.items() if not all(map(math.isfinite, parts))]:
        raise UsageError(f"CLID can't compare models with parts that are not finite: {', '.join(bad)}.")
    totals = dict.fromkeys(models, 0.0)
    for part in range(2):
        values = [parts[part] for parts in models.values()]
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        if deviation > 1e-12 * abs(mean):
            for name, value in zip(models, values):
                totals[name] += (value - mean) / deviation
    return totals


def _two_nearest(rows: Tensor) -> Tensor:
    """Return the distances `[rows, 2]` of each row to the nearest and the second nearest of the others."""
    rows = rows / (largest_entry(rows) or 1.0)
    square, count, parts = rows.square().sum(1), len(rows), []
    for block in torch.arange(count, device=rows.device).split(max(1, _TILE // count)):
        near = square - 2 * rows[block] @ rows.T  # the squared distance but for the row's own square
        near[torch.arange(len(block), device=rows.device), block] = torch.inf
        index = near.topk(min(_CANDIDATES, count - 1), largest=False).indices
        exact = torch.linalg.vector_norm(rows[index] - rows[block][:, None], dim=2)
        parts.append(exact.sort(1).values[:, :2])
    return torch.cat(parts)
