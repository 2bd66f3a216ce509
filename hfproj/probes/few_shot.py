"""Few-shot accuracy: a probe fitted on n rows of each class, over several draws of them.

    value = mean over draws of the accuracy on all test rows,   std = their standard deviation over draws (ddof 1)

Features from `extract_features` are the same on all processes, and each process makes the same draws: no collectives.

References:
    Chen et al. 2019, A Closer Look at Few-shot Classification, arXiv 1904.04232 (a linear classifier on frozen features
    of n rows a class).

Deviations:
    All classes at once and all test rows, not episodes of 5 classes. A class with fewer than n rows gives all it has;
    the protocol says how many such classes there are.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hfproj.checking import check_types, explained
from hfproj.errors import UsageError
from hfproj.probes.base import Classifier, Inputs, Labels, check_numbers, shuffled_classes
from hfproj.probes.linear import LinearProbe
from hfproj.probes.registry import ProbeLike, make_probe


@explained
@dataclass(kw_only=True, repr=False, eq=False)
class FewShotProbe(Classifier):
    """Mean accuracy over draws of `n` rows of each class.

    Args:
        n: Rows of each class; a class with fewer gives all it has.
        draws: How often rows are drawn and a probe is fitted.
        probe: What is fitted: a name, (name, options) mapping or object; default `LinearProbe(l2=0.01)`. It is copied
            for each draw.
        seed: Seed of the draws.

    Attributes:
        probes_: The fitted copies, one per draw.
        results_: After scoring: `{"value": mean, "values": {"std": …}, "draws": accuracy of each, "protocol": {…}}`.
        correct_draws_: After scoring: `[draws, rows]` bool, which `paired_interval` takes as it takes seeds.

    Raises:
        UsageError: If n or draws is below 1, or if the probe has no `fit`, `predict` or `score`.

    Example:
        >>> f, y = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]), [0, 0, 1, 1]
        >>> FewShotProbe(n=1, draws=3).fit(f, y).score(f, y)
        1.0
    """

    name = "few_shot"

    n: int = 5
    draws: int = 10
    probe: ProbeLike | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(type(self).__name__, type(self).__init__, vars(self))
        check_numbers(n=self.n, draws=self.draws)
        self.probe = LinearProbe(l2=0.01) if self.probe is None else make_probe(self.probe)
        if not callable(getattr(self.probe, "predict", None)):
            raise UsageError(f"Expected a probe with fit, predict and score, got {self.probe!r}.")

    def _fit(self, f: Tensor, codes: Tensor) -> None:
        self._short = int((torch.bincount(codes) < self.n).sum())
        generator = torch.Generator().manual_seed(self.seed)
        self.probes_ = []
        for _ in range(self.draws):
            rows = (shuffled_classes(codes, generator)[1] < self.n).nonzero().flatten()
            probe: Any = copy.deepcopy(self.probe)
            self.probes_.append(probe.fit(f[rows.to(f.device)], self.classes_[codes[rows]]))

    def predict(self, f: Inputs) -> Int[Tensor, " rows"]:
        """Return the label that most draws give each row, of several the smallest, on the CPU.

        Raises:
            UsageError: As `Classifier.predict`.
        """
        self._check(f)
        # torch's mode gives the smallest of several.
        return torch.stack([probe.predict(f) for probe in self.probes_]).mode(0).values

    def score(self, f: Inputs, y: Labels) -> float:
        """Return the mean accuracy over draws on `f`, and keep it with its protocol in `results_`.

        Raises:
            UsageError: As `predict`, or if labels are no integers or do not match the rows.
            NotMeasurableError: As `Classifier.score`.
        """
        self._check(f)
        f, truth, left_out = self._scored(f, y)
        self.correct_draws_ = torch.stack([probe.predict(f) == truth for probe in self.probes_])
        accuracies = self.correct_draws_.double().mean(1)
        value = accuracies.mean().item()
        std = accuracies.std().item() if self.draws > 1 else 0.0
        sizes = {"classes": len(self.classes_), "classes_with_fewer_rows": self._short}
        sizes |= {"train_rows": self._rows, "test_rows": len(f), **left_out}
        protocol = {**self._settings(), "probe": repr(self.probe), **sizes}
        self.results_ = {"value": value, "values": {"std": std}, "draws": accuracies.tolist(), "protocol": protocol}
        return value
