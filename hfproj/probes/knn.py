"""Weighted k-nearest-neighbour probe: how well neighbours in the feature space share a label, with nothing to train.

    q̂, b̂ unit rows,  w_j = exp(⟨q̂, b̂_j⟩/T) for the k nearest rows j of the bank,  class = argmax_c Σ_j w_j [y_j = c]

References:
    Wu et al. 2018, arXiv 1805.01978; DINO (Caron et al. 2021, arXiv 2104.14294), facebookresearch/dino ``eval_knn.py``:
    T = 0.07, k = 10, 20, 100, 200. lightly's ``knn_predict`` has k = 200, T = 0.1.

Deviations:
    The neighbours are exact in float64 (`hfproj.features.neighbours`). Equal cosines go by the lowest row of the bank,
    equal votes by the smallest label. Weights are taken relative to the nearest neighbour, which changes no vote and
    cannot overflow.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hfproj import distributed
from hfproj.checking import check_types, checked, explained
from hfproj.errors import UsageError
from hfproj.features.neighbours import NeighbourBank, Neighbours, check_ks, together
from hfproj.functional.feature_rows import check_features
from hfproj.functional.labels import UNLABELLED, labelled_rows
from hfproj.probes.base import Labels, Named, as_labels, left_out
from hfproj.typing import Features

_VOTES = 2**22  # float64 votes held at a time: 32 MiB


@explained
@dataclass(kw_only=True, repr=False, eq=False)
class KNNProbe(Named):
    """Weighted k-NN accuracy on features, as an estimator of scikit-learn: `fit`, `predict`, `score`, `results_`.

    Memory beside the bank (held once as given and once as float32 unit rows) does not grow with the number of queries.
    On several processes the bank may be sharded, `fit(f, y, sharded=True)`: no process then holds more than its own
    rows, and labels and scores are those of one process with the global bank.

    Args:
        k: Neighbours that vote; capped at the rows of the bank. 20 is DINO's best for ViT-S. Several numbers, such as
            DINO's `(10, 20, 100, 200)`, share one search; the first is the main one, which decides `value`, `correct_`
            and `predict`, so that no test label chooses.
        temperature: T; lower lets the nearest decide. 0.07 as in DINO.

    Attributes:
        classes_: `[classes]` labels, sorted.
        results_: After scoring: `{"value": accuracy, "protocol": {k, temperature, metric, bank, queries, …}}`; with
            several k also `"values"`, the accuracy of each: `{"k=10": …}`.
        correct_: After scoring: `[labelled queries]` bool, for `paired_interval`.

    Raises:
        UsageError: If k < 1, if there is no k or one twice, or if temperature ≤ 0.

    Example:
        >>> bank, labels = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), [3, 3, 7]
        >>> KNNProbe(k=2).fit(bank, labels).predict(torch.tensor([[1.0, 0.2], [0.1, 1.0]])).tolist()
        [3, 7]
    """

    name = "knn"

    k: int | Sequence[int] = 20
    temperature: float = 0.07

    def __post_init__(self) -> None:
        check_types(type(self).__name__, type(self).__init__, vars(self))
        if not self.temperature > 0:
            raise UsageError(f"Expected temperature > 0, got {self.temperature}.")
        self.k = check_ks(self.k)
        self._ks = self.k if isinstance(self.k, tuple) else (self.k,)

    def __repr__(self) -> str:  # results.json holds it, as the probe of FewShotProbe
        return f"KNNProbe(k={self.k}, temperature={self.temperature})"

    @checked
    @torch.no_grad()
    def fit(self, f: Features, y: Labels, *, sharded: bool = False) -> "KNNProbe":
        """Take the rows of `f` that have a label as the bank: `y` as in `Classifier.fit`.

        Args:
            f: Rows of the bank.
            y: Their labels.
            sharded: `f` and `y` are this process's part of a global bank, whose rows are those of all processes in rank
                order; a part may be empty. All processes then fit, predict and score together.

        Raises:
            UsageError: If there are no rows, if rows are not finite, or if labels are no integers or do not match them;
                of a sharded bank on every process, also if parts have different widths.
            NotMeasurableError: If no row has a label.
        """
        together(lambda: check_features(f, minimum=0 if sharded else 1, what="features of the bank"), sharded)
        f, labels, self._train_unlabelled = self._labelled(f, y, "bank", sharded)
        bank = NeighbourBank(f, sharded=sharded)
        self.classes_ = labels.unique()
        if bank.sharded:
            self.classes_ = torch.cat(distributed.gather_objects(self.classes_)).unique()
            labels = distributed.gather_rows(labels.to(bank.device), counts=bank.counts).cpu()
        self._codes = torch.searchsorted(self.classes_, labels)
        self._bank = bank
        return self

    def predict(self, f: Features, *, sharded: bool = False) -> Int[Tensor, " rows"]:
        """Return the predicted label of every row, on the CPU.

        Args:
            f: Queries; with a sharded bank the same on every process.
            sharded: `f` are queries of this process alone; it may have none.

        Raises:
            UsageError: If the probe is not fitted, if there are no rows or their width is not the bank's, if rows are
                not finite, or if queries that should be the same on all processes are not.
        """
        self._fitted().check(f, sharded=sharded)
        return self._vote(self._bank.chunks(f, max(self._ks), sharded=sharded))[0]

    def score(self, f: Features, y: Labels, *, sharded: bool = False) -> float:
        """Return the accuracy on `f`, and keep it with its protocol in `results_` and row by row in `correct_`.

        Args:
            f: Queries; with a sharded bank the same on every process.
            y: Their labels.
            sharded: `f` and `y` are this process's part of the queries. `results_` and `correct_` are those of the
                queries of all processes in rank order, on every process.

        Raises:
            UsageError: As `predict`, or if labels are no integers or do not match the rows.
            NotMeasurableError: If no query has a label.
        """
        self._fitted().check(f, sharded=sharded)
        f, truth, unlabelled = self._labelled(f, y, "test", sharded, or_bank=self._bank.sharded)
        predicted = self._vote(self._bank.chunks(f, max(self._ks), sharded=sharded))
        return self._keep(predicted == truth, sharded=sharded, unlabelled=unlabelled)

    def score_leave_one_out(self) -> float:
        """Return the accuracy on the bank itself, each row classified by the other rows.

        Raises:
            UsageError: If the probe is not fitted.
            NotMeasurableError: If the bank has one row.
        """
        bank = self._fitted()
        predicted = self._vote(bank.chunks_within(max(self._ks)))
        truth = self.classes_[self._codes[bank.start : bank.start + predicted.shape[1]]]
        return self._keep(predicted == truth, sharded=bank.sharded, leave_one_out=True)

    def neighbours(self, f: Features, k: int | None = None, *, sharded: bool = False) -> Neighbours:
        """Return float64 cosines and bank rows `[queries, k]` of the nearest neighbours, nearest first, on the CPU.

        Args:
            f: Queries, as in `predict`.
            k: How many; the largest that the probe was made with by default, capped at the rows of the bank.
            sharded: As in `predict`.

        Raises:
            UsageError: As `predict`, or if k < 1.

        Example:
            >>> probe = KNNProbe().fit(torch.eye(3), [0, 1, 2])
            >>> probe.neighbours(torch.tensor([[0.0, 4.0, 3.0]]), 2)
            Neighbours(cosines=tensor([[0.8000, 0.6000]], dtype=torch.float64), rows=tensor([[1, 2]]))
        """
        return self._fitted().search(f, max(self._ks) if k is None else k, sharded=sharded)

    def _fitted(self) -> NeighbourBank:
        if not hasattr(self, "_bank"):
            raise UsageError("This probe has no bank yet: call fit(features, labels) first.")
        return self._bank

    def _labelled(
        self, f: Tensor, y: Labels, what: str, sharded: bool, *, or_bank: bool = False
    ) -> tuple[Tensor, Tensor, int]:
        """Return the rows that have a label, their labels, and how many have none; `sharded`: on all processes."""
        labels = together(lambda: as_labels(y, len(f)), sharded or or_bank)
        kept = labels != UNLABELLED
        counts = [(int(kept.sum()), len(labels))]
        if sharded and distributed.world_size() > 1:
            counts = distributed.gather_objects(counts[0])
        known, rows = map(sum, zip(*counts))
        if rows and not known:
            labelled_rows(torch.full((rows,), UNLABELLED), what)  # raises
        return (f, labels, 0) if known == rows else (f[kept.to(f.device)], labels[kept], rows - known)

    def _keep(self, correct: Tensor, *, sharded: bool, leave_one_out: bool = False, unlabelled: int = 0) -> float:
        """Keep accuracies of `[ks, queries]`, with `sharded` over the queries of all processes."""
        if sharded and distributed.world_size() > 1:
            by_row = correct.T.to(self._bank.device, torch.uint8).contiguous()
            correct = distributed.gather_rows(by_row).T.bool().cpu()
        self.correct_ = correct[0].clone()
        accuracies = correct.double().mean(1).tolist()
        rows = self._bank.rows
        ks = [min(k, rows - leave_one_out) for k in self._ks]
        protocol: dict[str, Any] = {"k": ks[0], "temperature": self.temperature, "metric": "cosine"}
        protocol |= {"bank": rows, "queries": correct.shape[1], "classes": len(self.classes_)}
        protocol |= {"leave_one_out": True} if leave_one_out else {}
        protocol |= left_out(self._train_unlabelled, unlabelled)
        self.results_ = {"value": accuracies[0], "protocol": protocol}
        if isinstance(self.k, tuple):
            protocol["k_list"] = ks
            self.results_["values"] = {f"k={k}": value for k, value in zip(self.k, accuracies)}
        return accuracies[0]

    def _vote(self, found: Iterable[tuple[int, Neighbours]]) -> Tensor:
        """Return the predicted labels `[ks, queries]`, those of the main k first."""
        step = max(1, _VOTES // len(self.classes_))
        few = (pair for _, near in found for pair in zip(near.cosines.split(step), near.rows.split(step)))
        parts = [self._labels(cosines, rows) for cosines, rows in few]
        return torch.cat(parts, 1) if parts else torch.empty(len(self._ks), 0, dtype=torch.long)

    def _labels(self, cosines: Tensor, rows: Tensor) -> Tensor:
        weight = ((cosines - cosines[:, :1]) / self.temperature).exp()
        code = self._codes[rows]
        votes = torch.zeros(len(weight), len(self.classes_), dtype=torch.float64)
        labels, counted = {}, 0
        for k in sorted(self._ks):  # each goes on from the votes of the one before
            votes.scatter_add_(1, code[:, counted:k], weight[:, counted:k])
            labels[k] = self.classes_[votes.argmax(1)]
            counted = k
        return torch.stack([labels[k] for k in self._ks])
