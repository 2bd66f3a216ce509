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
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from hfproj.checking import check_types, checked, explained
from hfproj.errors import UsageError
from hfproj.functional.labels import labelled_rows
from hfproj.probes.base import Classifier, Labels, Scaling, as_labels, check_numbers, check_path, hold_out
from hfproj.probes.linear import L2_PATH, SoftmaxRegression, middle, predicted_codes
from hfproj.typing import Features


@checked
def group_accuracies(correct: Bool[Tensor, " rows"], groups: Labels) -> dict[int, float]:
    """Return the accuracy of each group, by its number, in order; of any probe's `correct_`.

    Raises:
        UsageError: If there are no rows, or if groups are no integers or do not match the rows.

    Example:
        >>> group_accuracies(torch.tensor([True, True, False, True]), [7, 7, 2, 2])
        {2: 0.5, 7: 1.0}
    """
    if not len(correct):
        raise UsageError("Expected at least one row, got none.")
    numbers, codes = torch.unique(_group_numbers(groups, len(correct)), return_inverse=True)
    sums = torch.zeros(len(numbers), dtype=torch.float64).scatter_add_(0, codes, correct.cpu().double())
    return dict(zip(numbers.tolist(), (sums / torch.bincount(codes)).tolist()))


@explained
@dataclass(kw_only=True, repr=False, eq=False)
class GroupRobustProbe(Classifier):
    """Worst-group accuracy of logistic regression on group-balanced draws of the rows, averaged (DFR).

    Args:
        l2: λ > 0; None: the best of `l2_path` by worst-group accuracy (then by average accuracy, then the stronger) on
            half of each group, fitted on a balanced draw of the other half. A group of one row is not in the first.
        l2_path: Strengths to choose from.
        draws: Balanced draws whose optima are averaged; 10 is the paper's.
        standardize: As in `LinearProbe`.
        seed: Seed of the halves and the draws.

    Attributes:
        classes_: `[classes]` labels, sorted.
        l2_: λ of the fits.
        results_: After scoring: `{"value": worst-group accuracy, "values": {…}, "protocol": {…}}`; the values are
            "worst group", "average" and one for each group, as "class 0, group 1".
        correct_: After scoring: `[rows]` bool.

    Raises:
        UsageError: If an option is not positive, or if the path is empty.

    Example (the first column goes along with the class in nine of ten rows, the second always, but is smaller):
        >>> y = torch.arange(200) % 2
        >>> attribute = torch.where(torch.arange(200) < 180, y, 1 - y)
        >>> f = torch.stack([2.0 * attribute - 1, 0.2 * y - 0.1], 1)
        >>> GroupRobustProbe(draws=2).fit(f, y, attribute).score(f, y, attribute)
        1.0
    """

    name = "group_robust"
    unit = "worst-group accuracy"

    l2: float | None = None
    l2_path: Sequence[float] = L2_PATH
    draws: int = 10
    standardize: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(type(self).__name__, type(self).__init__, vars(self))
        check_numbers(draws=self.draws, l2=1.0 if self.l2 is None else float(self.l2))
        self.l2_path = check_path("l2_path", self.l2_path)

    def fit(self, f: Features, y: Labels, groups: Labels) -> "GroupRobustProbe":  # type: ignore[override]
        """Fit on features, labels as in `Classifier.fit`, and the group (or attribute) of each row, any integer.

        Raises:
            UsageError: If there are no rows, if rows are not finite, or if labels or groups are no integers or do not
                match the rows.
        """
        known = labelled_rows(as_labels(y, len(f)), "training")
        self._groups = _group_numbers(groups, len(f))[known]
        return super().fit(f, y)

    def _fit(self, f: Tensor, codes: Tensor) -> None:
        cells = _cells(codes, self._groups)
        self._sizes = torch.bincount(cells)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.inference_mode(False), torch.no_grad():
            self._scaling = Scaling.of(f.detach(), scale=self.standardize)
            x = self._scaling.apply(f.detach())
            chosen = self._choose(x, codes, cells, generator) if self.l2 is None else (self.l2, 0)
            self.l2_, self._chosen_on = chosen
            theta = None
            total = torch.zeros(len(self.classes_), x.shape[1] + 1, dtype=torch.float64, device=x.device)
            for _ in range(self.draws):
                problem = self._problem(x, codes, _balanced(cells, generator))
                theta = problem.minimise(self.l2_, problem.start() if theta is None else theta).theta
                total += theta
            self._theta = total / self.draws

    @torch.no_grad()
    def _codes(self, f: Tensor) -> Tensor:
        return predicted_codes(self._scaling.apply(f), self._theta)

    def score(self, f: Features, y: Labels, groups: Labels) -> float:  # type: ignore[override]
        """Return the accuracy on the worst group of `f`, and keep all of them in `results_`.

        Raises:
            UsageError: As `predict`, or if labels or groups are no integers or do not match the rows.
        """
        self._check(f)
        groups = _group_numbers(groups, len(f))[labelled_rows(as_labels(y, len(f)), "test")]
        f, truth, left_out = self._scored(f, y)
        predicted = self.predict(f)
        self.correct_ = predicted == truth
        cells = _cells(truth, groups)
        found = group_accuracies(self.correct_, cells)
        first = {cell: int((cells == cell).nonzero()[0]) for cell in found}
        values = {"worst group": min(found.values()), "average": self.correct_.double().mean().item()}
        values |= {f"class {truth[row]}, group {groups[row]}": found[cell] for cell, row in first.items()}
        protocol = self._settings()
        protocol.pop("l2" if self.l2 is None else "l2_path")
        if self.l2 is None:
            protocol["chosen"] = {"l2": self.l2_, "on_rows": self._chosen_on}
        protocol |= {"train_rows": self._rows, "train_groups": len(self._sizes), "classes": len(self.classes_)}
        protocol |= {
            "rows_of_each_group": int(self._sizes.min()),
            "test_rows": len(f),
            "test_groups": len(found),
            **left_out,
        }
        self.results_ = {"value": values["worst group"], "values": values, "protocol": protocol}
        return values["worst group"]

    def _problem(self, x: Tensor, codes: Tensor, rows: Tensor) -> SoftmaxRegression:
        return SoftmaxRegression(x[rows.to(x.device)], codes[rows].to(x.device), len(self.classes_))

    def _choose(self, x: Tensor, codes: Tensor, cells: Tensor, generator: torch.Generator) -> tuple[float, int]:
        """Return the strength that is best for the worst group, and on how many rows it was chosen."""
        kept, held = hold_out(cells, 0.5, generator)
        if not len(held):
            return middle(self.l2_path), 0

        def rating(theta: Tensor) -> tuple[float, float]:
            correct = predicted_codes(x[held.to(x.device)], theta).cpu() == codes[held]
            return min(group_accuracies(correct, cells[held]).values()), correct.double().mean().item()

        problem = self._problem(x, codes, kept[_balanced(cells[kept], generator)])
        return problem.best(self.l2_path, rating)[0], len(held)


def _group_numbers(groups: Labels, rows: int) -> Tensor:
    """Return the group of each row, any integer; every row has one."""
    if isinstance(groups, str | bytes | type) or not hasattr(groups, "__iter__") or getattr(groups, "ndim", 1) != 1:
        raise UsageError(f"Expected a group for each of {rows} rows, whole numbers, got {type(groups).__name__}.")
    if (missing := sum(group is None or group != group for group in groups)) > 0:
        raise UsageError(f"Expected a group for each of {rows} rows, got none for {missing}; leave these rows out.")
    return as_labels(groups, rows)


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
