"""k-means probe: do the clusters that k-means finds in the features agree with the classes?

With clusters a and labels y of the scored rows, H the entropy and I the mutual information of their joint counts,

    NMI = 2 I(a; y)/(H(a) + H(y)),    ARI = (RI − E RI)/(max RI − E RI),    accuracy = (1/n) Σ_i [π(a_i) = y_i],

RI the fraction of pairs of rows on which clusters and labels agree (together or apart), E its expectation over random
clusterings of the same sizes, π the one-to-one map of clusters to classes that is right most often.

References:
    k-means++ and Lloyd's iterations, NMI (arithmetic mean) and ARI: scikit-learn. π by the Hungarian method: Kuhn 1955,
    ``scipy.optimize.linear_sum_assignment``; usual since Xie et al. 2016, arXiv 1511.06335 (clustering accuracy).

Deviations:
    The usual clustering accuracy takes π from the labels of the rows that it scores (`matching="scored"`). Here π comes
    from the rows that were clustered, as for every other probe whose test labels choose nothing; where the same rows
    are clustered and scored, both are one.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hfproj.checking import check_types, explained
from hfproj.errors import UsageError, unknown
from hfproj.functional.feature_rows import double_rows
from hfproj.probes.base import Classifier, Inputs, Labels, check_numbers
from hfproj.typing import OneOf

MATCHINGS = ("fitted", "scored")


@explained
@dataclass(kw_only=True, repr=False, eq=False)
class KMeansProbe(Classifier):
    """NMI, ARI and matched accuracy of k-means clusters; the labels only say how many there are, and name them.

    Clusters are found on the rows of `fit`; those of `score` go to the nearest centroid. One thread computes in
    float64, so that the same rows and seed give the same clusters on any number of cores.

    Args:
        clusters: Number of clusters; that of the classes in `fit` by default. With more than classes, each class takes
            one, and rows of the others count as wrong.
        normalize: Cluster unit rows (Euclidean distance then orders as the cosine does); False: rows as they are.
        n_init: Starts; the one with the lowest inertia is kept.
        max_iter: Maximum number of Lloyd's iterations of each.
        matching: Whose labels map clusters to classes for the accuracy: ``"fitted"`` or ``"scored"``.
        seed: Seed of the starts.

    Attributes:
        results_: After scoring: `{"value": accuracy, "values": {"accuracy", "NMI", "ARI"}, "protocol": {…}}`.
        correct_: After scoring: `[rows]` bool, by the matched clusters.

    Raises:
        UsageError: If clusters, n_init or max_iter is below 1, or if the matching is unknown; on `fit`, if there are
            more clusters than rows.

    Example:
        >>> f, y = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), [4, 4, 9, 9]
        >>> probe = KMeansProbe().fit(f, y)
        >>> probe.score(f, y), probe.predict(f).tolist()
        (1.0, [4, 4, 9, 9])
    """

    name = "kmeans"

    clusters: int | None = None
    normalize: bool = True
    n_init: int = 10
    max_iter: int = 300
    matching: OneOf["fitted", "scored"] = "fitted"
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(type(self).__name__, type(self).__init__, vars(self))
        clusters = 1 if self.clusters is None else self.clusters
        check_numbers(clusters=clusters, n_init=self.n_init, max_iter=self.max_iter)
        if self.matching not in MATCHINGS:
            raise unknown("matching of clusters and classes", self.matching, MATCHINGS)

    def _fit(self, f: Tensor, codes: Tensor) -> None:
        count = len(self.classes_) if self.clusters is None else self.clusters
        if count > len(f):
            raise UsageError(f"k-means can't make {count} clusters of {len(f)} rows; ask for at most {len(f)}.")
        options = {"n_clusters": count, "n_init": self.n_init, "max_iter": self.max_iter, "random_state": self.seed}
        self._kmeans, assigned = _kmeans(self._points(f), **options)
        self._names = self._match(assigned, self.classes_[codes], self.classes_)

    def predict(self, f: Inputs) -> Int[Tensor, " rows"]:
        """Return the class that was matched with each row's cluster, on the CPU.

        Rows of a cluster without a class have a label that is none of the classes: −1, or one below a smaller label.

        Raises:
            UsageError: If the probe is not fitted, if there are no rows or their width is not that of `fit`, or if rows
                are not finite.
        """
        assigned = self._assign(f)  # refuses, before there are names
        return self._names[assigned]

    def score(self, f: Inputs, y: Labels) -> float:
        """Return the accuracy of matched clusters on `f`, and keep it with NMI and ARI in `results_`.

        Raises:
            UsageError: As `predict`, or if labels are no integers or do not match the rows.
            NotMeasurableError: As `Classifier.score`.
        """
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

        self._check(f)
        f, truth, left_out = self._scored(f, y)
        assigned = self._assign(f)
        names = self._names if self.matching == "fitted" else self._match(assigned, truth, truth.unique())
        self.correct_ = names[assigned] == truth
        with warnings.catch_warnings():
            # scikit-learn takes labels with nearly as many values as rows for a mistake; here each may have its own.
            warnings.simplefilter("ignore", UserWarning)
            nmi, ari = (score(truth, assigned) for score in (normalized_mutual_info_score, adjusted_rand_score))
        values = {"accuracy": self.correct_.double().mean().item(), "NMI": float(nmi), "ARI": float(ari)}
        found = {"clusters": self._kmeans.n_clusters, "clusters_found": len(np.unique(self._kmeans.labels_))}
        sizes = {"train": self._rows, "test": len(f), "classes": len(self.classes_)}
        protocol = {**self._settings("seed"), **found, **sizes, **left_out}
        self.results_ = {"value": values["accuracy"], "values": values, "protocol": protocol}
        return values["accuracy"]

    def _points(self, f: Tensor) -> np.ndarray:
        # In float64 no square of a float32 number overflows, where rows are taken as they are.
        return double_rows(f.detach().cpu(), normalize=self.normalize).numpy()

    def _assign(self, f: Any) -> Tensor:
        self._check(f)
        with _one_thread():
            return torch.from_numpy(self._kmeans.predict(self._points(f))).long()

    def _match(self, assigned: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
        """Return the class of each cluster; of matchings that are right equally often, the Hungarian method's."""
        from scipy.optimize import linear_sum_assignment

        count = self._kmeans.n_clusters
        pairs = torch.searchsorted(classes, labels) * count + assigned
        counts = pairs.bincount(minlength=len(classes) * count).view(len(classes), count)
        rows, columns = map(torch.from_numpy, linear_sum_assignment(counts.numpy(), maximize=True))
        nothing = min(0, int(classes.min())) - 1
        names = torch.full((count,), nothing, dtype=torch.long)
        names[columns] = classes[rows]
        return names


def _one_thread() -> Any:
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)  # sums of several threads come in any order


def _kmeans(points: np.ndarray, **options: int) -> tuple[Any, Tensor]:
    """Return scikit-learn's fitted k-means and the assignments."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with _one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # collapsed features have fewer distinct rows than clusters
        kmeans = KMeans(**options).fit(points)
    return kmeans, torch.from_numpy(kmeans.labels_).long()
