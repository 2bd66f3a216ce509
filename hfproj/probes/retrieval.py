"""Retrieval probe: how early the rows of a query's class come when the gallery is ordered by cosine.

With the gallery in descending order of ⟨q̂, ĝ⟩, r_1 < r_2 < … < r_P the places (from 1) of the query's P positives (the
rows of its class),

    recall@k = fraction of queries with r_1 ≤ k,    AP = (1/P) Σ_i i/r_i,    mAP = mean of AP over queries.

References:
    Song et al. 2016, arXiv 1511.06452 (recall@k of metric learning). AP as the area under the precision-recall curve
    without interpolation over the whole gallery: Manning, Raghavan, Schütze 2008, "Introduction to Information
    Retrieval", 8.4, and scikit-learn's ``average_precision_score``.

Deviations:
    Equal cosines go by the lowest row of the gallery. The order is that of float64 cosines; for AP these come from
    matrix products and are rounded to 12 decimals, so that what ties but for rounding ties. The evaluation of Oxford
    and Paris buildings, which DINO uses, takes the trapezoid rule and ignores "junk"; this is not it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hfproj.checking import check_types, explained
from hfproj.errors import NotMeasurableError, UsageError
from hfproj.features.neighbours import NeighbourBank, Neighbours, check_ks
from hfproj.functional.feature_rows import check_features, double_rows
from hfproj.functional.rows import full_precision
from hfproj.probes.base import Labels, Named, labelled, left_out
from hfproj.typing import Features

_ELEMENTS = 2**21  # float64 cosines held at a time: 16 MiB, and as much again for their order
_DECIMALS = 12


@explained
@dataclass(kw_only=True, repr=False, eq=False)
class RetrievalProbe(Named):
    """Mean average precision and recall@k by class, of queries against a gallery or within one set.

    Queries without a positive in the gallery have no average precision: they are left out of all numbers and counted.
    The cost is queries · gallery · (dim + log gallery); memory does not grow with the number of queries.

    Args:
        k: The k of recall@k, one or several.

    Attributes:
        results_: After scoring: `{"value": mAP, "values": {"mAP": …, "recall@1": …}, "protocol": {…}}`; `left_out` of
            the protocol counts the queries without a positive.
        average_precision_: `[labelled queries]` float64, NaN where a query was left out.
        correct_: `[labelled queries]` bool: the nearest row is of the query's class; False where a query was left out.

    Raises:
        UsageError: If k < 1, or if there is no k or one twice.

    Example:
        >>> gallery, classes = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), [0, 1, 0]
        >>> probe = RetrievalProbe(k=(1, 2)).fit(gallery, classes)
        >>> round(probe.score(torch.tensor([[1.0, 0.1]]), [0]), 4)  # places 1 and 3: (1/1 + 2/3)/2
        0.8333
        >>> probe.results_["values"]["recall@1"]
        1.0
    """

    name = "retrieval"
    unit = "mAP"

    k: int | Sequence[int] = (1, 5, 10)

    def __post_init__(self) -> None:
        check_types(type(self).__name__, type(self).__init__, vars(self))
        self.k = check_ks(self.k)
        self._ks = self.k if isinstance(self.k, tuple) else (self.k,)

    def fit(self, f: Features, y: Labels) -> "RetrievalProbe":
        """Take the rows of `f` that have a label as the gallery: `y` as in `Classifier.fit`.

        Raises:
            UsageError: If there are no rows, if rows are not finite, or if labels are no integers or do not match them.
            NotMeasurableError: If no row has a label.
        """
        check_features(f, minimum=1, what="bank")
        f, self._labels, self._train_unlabelled = labelled(f, y, "gallery")
        self._gallery = NeighbourBank(f)
        self._f = f.detach()
        return self

    def predict(self, f: Features) -> Int[Tensor, " rows"]:
        """Return the label of the nearest row of the gallery for every query, on the CPU.

        Raises:
            UsageError: If the probe is not fitted, if there are no rows or their width is not the gallery's, or if rows
                are not finite.
        """
        return self._labels[self._fitted().search(f, 1).rows[:, 0]]

    def score(self, f: Features, y: Labels) -> float:
        """Return mAP of the queries `f` against the gallery, and keep all numbers in `results_`.

        Raises:
            UsageError: As `predict`, or if labels are no integers or do not match the rows.
            NotMeasurableError: If no query has a label or a positive.
        """
        gallery = self._fitted()
        gallery.check(f)
        f, truth, unlabelled = labelled(f, y, "test")
        found = gallery.chunks(f, max(self._ks))
        return self._keep(found, f, truth, leave_one_out=False, unlabelled=unlabelled)

    def score_leave_one_out(self) -> float:
        """Return mAP of each row of the gallery as a query against the others.

        Raises:
            UsageError: If the probe is not fitted.
            NotMeasurableError: If the gallery has one row, or no class has two rows.
        """
        found = self._fitted().chunks_within(max(self._ks))
        return self._keep(found, self._f, self._labels, leave_one_out=True)

    def _fitted(self) -> NeighbourBank:
        if not hasattr(self, "_gallery"):
            raise UsageError("This probe has no gallery yet: call fit(features, labels) first.")
        return self._gallery

    def _keep(
        self, found: Iterator[tuple[int, Neighbours]], f: Tensor, truth: Tensor, *, leave_one_out: bool,
        unlabelled: int = 0,
    ) -> float:  # fmt: skip
        classes, sizes = self._labels.unique(return_counts=True)
        place = torch.searchsorted(classes, truth).clamp_max(len(classes) - 1)
        counted = torch.where(classes[place] == truth, sizes[place] - int(leave_one_out), 0) > 0
        if not counted.any():
            none = f"None of {len(truth)} queries has a row of its class in the gallery of {self._gallery.rows} rows"
            raise NotMeasurableError(f"{none}. Were the labels of queries and gallery made in the same way?")
        hits = torch.cat([self._labels[near.rows] for _, near in found]) == truth[:, None]
        self.correct_ = hits[:, 0]
        self.average_precision_ = self._average_precision(f, truth, leave_one_out)
        values = {"mAP": self.average_precision_[counted].mean().item()}
        values |= {f"recall@{k}": hits[counted, :k].any(1).double().mean().item() for k in self._ks}
        protocol: dict[str, Any] = {"k": list(self._ks), "metric": "cosine", "gallery": self._gallery.rows}
        protocol |= {"queries": len(truth), "left_out": int((~counted).sum()), "classes": len(classes)}
        protocol |= {"leave_one_out": True} if leave_one_out else {}
        protocol |= left_out(self._train_unlabelled, unlabelled)
        self.results_ = {"value": values["mAP"], "values": values, "protocol": protocol}
        return values["mAP"]

    @torch.no_grad()
    def _average_precision(self, f: Tensor, truth: Tensor, leave_one_out: bool) -> Tensor:
        """Return AP `[queries]`, NaN without positives."""
        gallery = self._f
        unit = double_rows(gallery, normalize=True)
        labels = self._labels.to(unit.device)
        rows = len(unit) - leave_one_out
        places = torch.arange(1, rows + 1, dtype=torch.float64, device=unit.device)
        parts = []
        step = max(1, _ELEMENTS // len(unit))
        for start in range(0, len(f), step):
            queries = double_rows(f[start : start + step].detach().to(unit.device), normalize=True)
            with full_precision(queries):
                cosines = (queries @ unit.T).round_(decimals=_DECIMALS)
            if leave_one_out:  # a query's own row comes last, and is cut off
                own = torch.arange(start, start + len(queries), device=unit.device)
                cosines[own - start, own] = -torch.inf
            order = cosines.argsort(dim=1, descending=True, stable=True)[:, :rows]
            right = (labels[order] == truth[start : start + step, None].to(unit.device)).double()
            precision = right.cumsum(1) / places
            parts.append(((precision * right).sum(1) / right.sum(1)).cpu())  # 0/0 is NaN
        return torch.cat(parts)
