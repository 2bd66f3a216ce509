"""Group-robust probe (DFR): a last layer retrained on group-balanced rows, and its accuracy on the worst group.

    W = mean over draws of the optimum of logistic regression on min_g n_g rows of each group g
    worst-group accuracy = min_g accuracy on the test rows of g,   average accuracy = that on all test rows

A group is a class together with an attribute that goes along with it in training ("a land bird on water"). A probe
that learned the attribute instead of the class is right on average and wrong on the groups where they part.

Features from `extract_features` are the same on all processes, and each process computes the same fit: no collectives.

References:
    Kirichenko, Izmailov, Wilson 2023, arXiv 2204.02937 (DFR on validation data: standardised features, the strength by
    worst-group accuracy, several balanced draws averaged); Xue et al. 2024, arXiv 2403.11391.

Deviations:
    The penalty is L2 as in `LinearProbe`, theirs L1. Groups are classes crossed with `groups`, so that every draw holds
    every class. Statistics of the columns are those of all rows given to `fit`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hfproj.errors import UsageError
from hfproj.probes._classifier import Scaling, check_numbers, check_queries, describe, hold_out, training_set
from hfproj.probes._labels import Labels, as_labels
from hfproj.probes._softmax_regression import SoftmaxRegression, predicted_codes
from hfproj.probes.linear import L2_PATH
from hfproj.typing import Features


def group_accuracies(correct: Bool[Tensor, " rows"], groups: Labels) -> dict[int, float]:
    """Return the accuracy of each group, by its number, in order; of any probe's `correct_`.

    Raises:
        UsageError: no rows, or groups that are no integers or do not match the rows.

    Example:
        >>> group_accuracies(torch.tensor([True, True, False, True]), [7, 7, 2, 2])
        {2: 0.5, 7: 1.0}
    """
    if not len(correct):
        raise UsageError("Expected at least one row, got none.")
    numbers, codes = torch.unique(as_labels(groups, len(correct)), return_inverse=True)
    sums = torch.zeros(len(numbers), dtype=torch.float64).scatter_add_(0, codes, correct.cpu().double())
    return dict(zip(numbers.tolist(), (sums / torch.bincount(codes)).tolist()))


class GroupRobustProbe:
    """Worst-group accuracy of logistic regression on group-balanced draws of the rows, averaged (DFR).

    Args:
        l2: λ > 0; None: the best of `l2_path` by worst-group accuracy (then by average accuracy, then the stronger) on
            half of each group, fitted on a balanced draw of the other half. A group of one row is not in the first.
        l2_path: Strengths to choose from.
        draws: Balanced draws whose optima are averaged; 10 is the paper's.
        standardize: As in `LinearProbe`.
        seed: Of the halves and the draws.

    Attributes:
        classes_: `[classes]` labels, sorted.
        l2_: λ of the fits.
        results_: After scoring: `{"value": worst-group accuracy, "values": {…}, "protocol": {…}}`; the values are
            "worst group", "average" and one for each group, as "class 0, group 1".
        correct_: After scoring: `[rows]` bool.

    Raises:
        UsageError: an option that is not positive, or an empty path.

    Example (the first column goes along with the class in nine of ten rows, the second always, but is smaller):
        >>> y = torch.arange(200) % 2
        >>> attribute = torch.where(torch.arange(200) < 180, y, 1 - y)
        >>> f = torch.stack([2.0 * attribute - 1, 0.2 * y - 0.1], 1)
        >>> GroupRobustProbe(draws=2).fit(f, y, attribute).score(f, y, attribute)
        1.0
    """

    name = "group_robust"
    unit = "worst-group accuracy"

    def __init__(
        self,
        *,
        l2: float | None = None,
        l2_path: Sequence[float] = L2_PATH,
        draws: int = 10,
        standardize: bool = True,
        seed: int = 0,
    ):
        if not l2_path:
            raise UsageError("l2_path is empty; give at least one strength.")
        check_numbers(draws=draws, l2=1.0 if l2 is None else float(l2))
        for strength in l2_path:
            check_numbers(**{"strength in l2_path": float(strength)})
        self.l2, self.l2_path, self.draws = l2, tuple(l2_path), draws
        self.standardize, self.seed = standardize, seed

    def __repr__(self) -> str:
        return describe(self)

    def fit(self, f: Features, y: Labels, groups: Labels) -> "GroupRobustProbe":
        """Fit on features `f`, labels `y` and the group (or attribute) of each row, any integers.

        Raises:
            UsageError: no rows, rows that are not finite, or labels or groups that are no integers or do not match the
                rows.
        """
        self.classes_, codes = training_set(f, y)
        cells = _cells(codes, as_labels(groups, len(f)))
        self._sizes = torch.bincount(cells)
        self._rows, self._dim = f.shape
        with torch.inference_mode(False), torch.no_grad():
            self._scaling = Scaling.of(f.detach(), scale=self.standardize)
            x = self._scaling.apply(f.detach())
            generator = torch.Generator().manual_seed(self.seed)
            if self.l2 is None:
                self.l2_, self._chosen_on = self._choose(x, codes, cells, generator)
            else:
                self.l2_, self._chosen_on = self.l2, 0
            theta = None
            total = torch.zeros(len(self.classes_), self._dim + 1, dtype=torch.float64, device=x.device)
            for _ in range(self.draws):
                rows = _balanced(cells, generator)
                problem = self._problem(x, codes, rows)
                theta = problem.minimise(self._penalty(self.l2_), problem.start() if theta is None else theta).theta
                total += theta
            self._theta = total / self.draws
        return self

    def predict(self, f: Features) -> Int[Tensor, " rows"]:
        """Return the predicted label of every row, on the CPU.

        Raises:
            UsageError: not fitted, no rows, another width than in `fit`, or rows that are not finite.
        """
        check_queries(self, f, self._dim if hasattr(self, "_theta") else None)
        with torch.no_grad():
            return self.classes_[predicted_codes(self._scaling.apply(f), self._theta).cpu()]

    def score(self, f: Features, y: Labels, groups: Labels) -> float:
        """Return the accuracy on the worst group of `f`, and keep all of them in `results_`.

        Raises:
            UsageError: as `predict`, or labels or groups that are no integers or do not match the rows.
        """
        predicted = self.predict(f)
        truth, groups = as_labels(y, len(f)), as_labels(groups, len(f))
        self.correct_ = predicted == truth
        cells = _cells(truth, groups)
        found = group_accuracies(self.correct_, cells)
        first = {cell: int((cells == cell).nonzero()[0]) for cell in found}
        value = min(found.values())
        values = {"worst group": value, "average": self.correct_.double().mean().item()}
        values |= {f"class {truth[row]}, group {groups[row]}": found[cell] for cell, row in first.items()}
        protocol: dict[str, Any] = {"draws": self.draws, "standardize": self.standardize, "probe_seed": self.seed}
        if self.l2 is None:
            protocol |= {"l2_path": list(self.l2_path), "chosen": {"l2": self.l2_, "on_rows": self._chosen_on}}
        else:
            protocol["l2"] = self.l2
        protocol |= {"train_rows": self._rows, "train_groups": len(self._sizes), "classes": len(self.classes_)}
        protocol |= {"rows_of_each_group": int(self._sizes.min()), "test_rows": len(f), "test_groups": len(found)}
        self.results_ = {"value": value, "values": values, "protocol": protocol}
        return value

    def _penalty(self, l2: float) -> float:
        return 2 * l2 if len(self.classes_) == 2 else l2  # as in LinearProbe

    def _problem(self, x: Tensor, codes: Tensor, rows: Tensor) -> SoftmaxRegression:
        rows, of_rows = rows.to(x.device), codes[rows].to(x.device)
        return SoftmaxRegression(x[rows], of_rows, len(self.classes_))

    def _choose(self, x: Tensor, codes: Tensor, cells: Tensor, generator: torch.Generator) -> tuple[float, int]:
        """Return the strength that is best for the worst group, and on how many rows it was chosen."""
        path = sorted(self.l2_path, reverse=True)
        kept, held = hold_out(cells, 0.5, generator)
        if not len(held):
            return path[len(path) // 2], 0
        problem = self._problem(x, codes, kept[_balanced(cells[kept], generator)])
        theta = problem.start()
        best: tuple[tuple[float, float], float] | None = None
        for l2 in path:
            theta = problem.minimise(self._penalty(l2), theta, tol=1e-5).theta
            correct = predicted_codes(x[held.to(x.device)], theta).cpu() == codes[held]
            rating = min(group_accuracies(correct, cells[held]).values()), correct.double().mean().item()
            if best is None or rating > best[0]:
                best = rating, l2
        assert best is not None  # the path is not empty
        return best[1], len(held)


def _cells(codes: Tensor, groups: Tensor) -> Tensor:
    """Return the number of each row's combination of class and group."""
    return torch.unique(torch.stack([codes, groups], 1), dim=0, return_inverse=True)[1]


def _balanced(cells: Tensor, generator: torch.Generator) -> Tensor:
    """Return as many rows of each cell as the smallest has, drawn without replacement, in random order."""
    order = torch.randperm(len(cells), generator=generator)
    parts = [order[cells[order] == cell] for cell in cells.unique()]
    smallest = min(map(len, parts))
    drawn = torch.cat([part[:smallest] for part in parts])
    return drawn[torch.randperm(len(drawn), generator=generator)]
