"""Weighted k-nearest-neighbour probe: how well neighbours in the feature space share a label, with nothing to train.

    q̂, b̂ unit rows,  w_j = exp(⟨q̂, b̂_j⟩/T) for the k nearest rows j of the bank,  class = argmax_c Σ_j w_j [y_j = c]

References:
    Wu et al. 2018, arXiv 1805.01978; DINO (Caron et al. 2021, arXiv 2104.14294), facebookresearch/dino ``eval_knn.py``:
    T = 0.07, k = 10, 20, 100, 200. lightly's ``knn_predict`` has k = 200, T = 0.1.

Deviations:
    The neighbours are exact in float64: a float32 scan proposes candidates, float64 ranks them, and a query whose
    candidates cannot be proven complete is searched again in float64. Equal cosines go by the lowest row of the bank,
    equal votes by the smallest label. Weights are taken relative to the nearest neighbour, which changes no vote and
    cannot overflow.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hfproj.diagnostics._common import check_features, unit_rows
from hfproj.errors import UsageError, unknown
from hfproj.typing import Features

Labels = Int[Tensor, " rows"] | Int[np.ndarray, " rows"] | Sequence[int]

_SCAN_ELEMENTS = 2**24  # float32 similarities held at a time: 64 MiB
_BANK_ROWS = 2**16
_RESCORE_ELEMENTS = 2**21  # float64 products held at a time: 16 MiB, and what stays in cache is faster


class KNNProbe:
    """Weighted k-NN accuracy on features, in scikit-learn's manners: `fit`, `predict`, `score`, `results_`.

    Memory beside the bank (held once as given and once as float32 unit rows) does not grow with the number of queries.

    Args:
        k: Neighbours that vote; capped at the rows of the bank. 20 is DINO's best for ViT-S.
        temperature: T; lower lets the nearest decide. 0.07 as in DINO.
        metric: Only "cosine".

    Attributes:
        results_: After scoring: `{"value": accuracy, "protocol": {k, temperature, metric, bank, queries, …}}`.
        correct_: After scoring: `[queries]` bool, for `paired_interval`.

    Raises:
        UsageError: k < 1, temperature ≤ 0 or another metric.

    Example:
        >>> bank, labels = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), [3, 3, 7]
        >>> KNNProbe(k=2).fit(bank, labels).predict(torch.tensor([[1.0, 0.2], [0.1, 1.0]])).tolist()
        [3, 7]
    """

    name = "knn"
    unit = "accuracy"

    def __init__(self, *, k: int = 20, temperature: float = 0.07, metric: str = "cosine"):
        if k < 1 or not temperature > 0:
            raise UsageError(f"Expected k ≥ 1 and temperature > 0, got k={k} and temperature={temperature}.")
        if metric != "cosine":
            raise unknown("metric", metric, ["cosine"])
        self.k, self.temperature, self.metric = k, temperature, metric

    def __repr__(self) -> str:
        return f"KNNProbe(k={self.k}, temperature={self.temperature}, metric={self.metric!r})"

    @torch.no_grad()
    def fit(self, f: Features, y: Labels) -> "KNNProbe":
        """Take `f` and its labels (any integers) as the bank.

        Raises:
            UsageError: no rows, rows that are not finite, or labels that are no integers or do not match the rows.
        """
        check_features(f, minimum=1, what="bank")
        self.classes_, self._codes = torch.unique(_as_labels(y, len(f)), return_inverse=True)
        self._bank = f.detach() if f.dtype in (torch.float32, torch.float64) else f.detach().float()
        self._scale = torch.empty(len(f), dtype=torch.float64, device=f.device)
        self._unit = torch.empty(f.shape, dtype=torch.float32, device=f.device)
        for start in range(0, len(f), _BANK_ROWS):
            rows = self._bank[start : start + _BANK_ROWS].double()
            norm = torch.linalg.vector_norm(rows, dim=1)
            self._scale[start : start + _BANK_ROWS] = torch.where(norm > 0, 1 / norm, 0.0)
            self._unit[start : start + _BANK_ROWS] = unit_rows(rows).float()
        self._distinct: tuple[Tensor, Tensor] | None = None
        return self

    def predict(self, f: Features) -> Int[Tensor, " rows"]:
        """Return the predicted label of every row, on the CPU.

        Raises:
            UsageError: not fitted, no rows, another width than the bank's, or rows that are not finite.
        """
        self._check(f)
        return self._predict(f, leave_one_out=False)

    def score(self, f: Features, y: Labels) -> float:
        """Return the accuracy on `f`, and keep it with its protocol in `results_` and row by row in `correct_`.

        Raises:
            UsageError: as `predict`, or labels that are no integers or do not match the rows.
        """
        self._check(f)
        truth = _as_labels(y, len(f))
        return self._keep(self._predict(f, leave_one_out=False) == truth, leave_one_out=False)

    def score_leave_one_out(self) -> float:
        """Return the accuracy on the bank itself, each row classified by the other rows.

        Raises:
            UsageError: not fitted, or a bank of one row.
        """
        self._check(None)
        if len(self._bank) < 2:
            raise UsageError("Leaving one out needs a bank of at least 2 rows, got 1.")
        correct = self._predict(self._bank, leave_one_out=True) == self.classes_[self._codes]
        return self._keep(correct, leave_one_out=True)

    def _keep(self, correct: Tensor, *, leave_one_out: bool) -> float:
        self.correct_ = correct
        value = correct.double().mean().item()
        k = min(self.k, len(self._bank) - leave_one_out)
        protocol: dict[str, Any] = {"k": k, "temperature": self.temperature, "metric": self.metric}
        protocol |= {"bank": len(self._bank), "queries": len(correct), "classes": len(self.classes_)}
        self.results_ = {"value": value, "protocol": protocol | ({"leave_one_out": True} if leave_one_out else {})}
        return value

    def _check(self, f: Tensor | None) -> None:
        if not hasattr(self, "_bank"):
            raise UsageError("This probe has no bank yet: call fit(features, labels) first.")
        if f is None:
            return
        check_features(f, minimum=1, what="queries")
        if f.shape[1] != self._bank.shape[1]:
            raise UsageError(f"The bank has {self._bank.shape[1]} columns, the queries have {f.shape[1]}.")

    @torch.no_grad()
    def _predict(self, f: Tensor, *, leave_one_out: bool) -> Tensor:
        labels = []
        for start, queries in self._chunks(f):
            k = min(self.k + leave_one_out, len(self._bank))
            cosine, index = self._nearest(queries, k)
            if leave_one_out:
                cosine, index = _drop(cosine, index, torch.arange(start, start + len(queries), device=index.device))
            cosine, index = cosine.cpu(), index.cpu()
            weight = ((cosine - cosine[:, :1]) / self.temperature).exp()
            votes = torch.zeros(len(weight), len(self.classes_), dtype=torch.float64)
            votes.scatter_add_(1, self._codes[index], weight)
            labels.append(self.classes_[votes.argmax(1)])
        return torch.cat(labels)

    def _chunks(self, f: Tensor) -> Iterator[tuple[int, Tensor]]:
        rows = max(1, min(1024, _SCAN_ELEMENTS // max(min(len(self._bank), _BANK_ROWS), len(self.classes_))))
        for start in range(0, len(f), rows):
            yield start, unit_rows(f[start : start + rows].detach().to(self._bank.device).double())

    def _nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return float64 cosines and bank rows `[queries, k]` of the nearest: by cosine, then by the lowest row."""
        wanted = min(k + 8 + k // 8, len(self._bank))
        scanned, index = self._scan(queries.float(), wanted)
        index, order = index.sort(1)
        scanned = scanned.gather(1, order)
        cosine = self._rescore(queries, index)
        # Rounding of unit rows to float32 and of a float32 dot product, at worst. More than that means that the user
        # allows TF32 or bfloat16 in matrix products: then the bound is bfloat16's.
        bound = (queries.shape[1] + 4) * 2.0**-24
        if (cosine - scanned).abs().max() > bound:
            bound = 2.0**-7
        floor = scanned.min(1).values
        order = cosine.argsort(dim=1, descending=True, stable=True)[:, :k]
        cosine, index = cosine.gather(1, order), index.gather(1, order)
        if wanted < len(self._bank):
            unsure = (cosine[:, -1] <= floor + bound).nonzero().flatten()
            for part in unsure.split(max(1, _SCAN_ELEMENTS // 2 // len(self._bank))):
                cosine[part], index[part] = self._nearest_exact(queries[part], k)
        return cosine, index

    def _scan(self, queries: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        values, index = queries.new_empty(len(queries), 0), self._codes.new_empty(len(queries), 0).to(queries.device)
        for start in range(0, len(self._unit), _BANK_ROWS):
            similarity = queries @ self._unit[start : start + _BANK_ROWS].T
            best, where = similarity.topk(min(wanted, similarity.shape[1]), sorted=False)
            values, index = torch.cat([values, best], 1), torch.cat([index, where + start], 1)
            if values.shape[1] > wanted:
                values, order = values.topk(wanted, sorted=False)
                index = index.gather(1, order)
        return values, index

    def _rescore(self, queries: Tensor, index: Tensor) -> Tensor:
        """Return `[queries, candidates]` float64 cosines; a sum per row, so that equal bank rows give equal bits."""
        out = torch.empty(index.shape, dtype=torch.float64, device=index.device)
        step = max(1, _RESCORE_ELEMENTS // (index.shape[1] * queries.shape[1]))
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            rows = self._bank[index[part]].double()
            out[part] = rows.mul_(queries[part, None]).sum(-1) * self._scale[index[part]]
        return out

    def _nearest_exact(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search the whole bank in float64: for the ties and near-ties of collapsed or repeated features."""
        if self._distinct is None:
            self._distinct = _equal_rows(self._bank).unique(return_inverse=True)
        first, group = self._distinct  # each distinct row once; for each row of the bank, which of them it is
        parts = first.split(_BANK_ROWS // 8)
        rough = torch.cat([queries @ self._bank[part].double().T * self._scale[part] for part in parts], 1)
        # A float64 product orders rows up to its own rounding; what lies within it of the k-th is summed row by row.
        bound = 2 * (queries.shape[1] + 4) * 2.0**-53
        floor = rough.topk(min(k, len(first))).values[:, -1:] - bound
        cosine = rough.new_empty(len(queries), k)
        index = first.new_empty(len(queries), k)
        for number, (query, near) in enumerate(zip(queries, rough >= floor)):
            chosen = near.nonzero().flatten()
            step = max(1, _RESCORE_ELEMENTS // len(query))
            exact = rough[number].index_copy_(
                0, chosen, torch.cat([self._rescore(query[None], first[part][None])[0] for part in chosen.split(step)])
            )
            members = near[group].nonzero().flatten()
            values = exact[group[members]]
            least = values.topk(k).values[-1]  # no sort of all members: at collapse that is the whole bank
            above, tied = (values > least).nonzero().flatten(), (values == least).nonzero().flatten()
            kept = torch.cat([above, tied[: k - len(above)]]).sort().values
            order = kept[values[kept].argsort(dim=0, descending=True, stable=True)]
            cosine[number], index[number] = values[order], members[order]
        return cosine, index


def _drop(cosine: Tensor, index: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Remove each query's own row of the bank, or the last neighbour where it is not among them."""
    mine = index == own[:, None]
    mine[:, -1] |= ~mine.any(1)
    shape = (len(index), index.shape[1] - 1)
    return cosine[~mine].view(shape), index[~mine].view(shape)


def _equal_rows(f: Tensor) -> Tensor:
    """Return for each row the first row that is bitwise equal to it, as far as one random projection tells."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(f.shape[1], dtype=torch.float64, generator=generator).to(f.device)
    key = torch.cat([(rows.double() * direction).sum(1) for rows in f.split(_BANK_ROWS // 8)])
    _, inverse = key.unique(return_inverse=True)
    own = torch.arange(len(f), device=f.device)
    first = own.new_full((len(f),), len(f)).scatter_reduce(0, inverse, own, "amin")[inverse]
    equal = torch.cat([(f[part] == f[first[part]]).all(1) for part in own.split(_BANK_ROWS // 8)])
    return torch.where(equal, first, own)


def _as_labels(y: Any, rows: int) -> Tensor:
    labels = torch.as_tensor(y).detach().cpu()
    if labels.dtype == torch.bool:
        labels = labels.long()
    if labels.is_floating_point() or labels.is_complex() or labels.shape != (rows,):
        raise UsageError(
            f"Expected one integer label for each of {rows} rows, got {labels.dtype} of shape {list(labels.shape)}."
        )
    return labels.long()
