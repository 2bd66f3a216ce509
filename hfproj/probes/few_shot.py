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
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hfproj.errors import UsageError
from hfproj.probes._classifier import check_numbers, check_queries, describe, training_set
from hfproj.probes._labels import Labels, as_labels
from hfproj.probes.linear import LinearProbe
from hfproj.typing import Features


class FewShotProbe:
    """Mean accuracy over draws of `n` rows a class.

    Args:
        n: Rows of each class; a class with fewer gives all it has.
        draws: How often rows are drawn and a probe is fitted.
        probe: What is fitted; default `LinearProbe(l2=0.01)`. It is copied for each draw.
        seed: Of the draws.

    Attributes:
        probes_: The fitted copies, one a draw.
        results_: After scoring: `{"value": mean, "values": {"std": …}, "draws": accuracy of each, "protocol": {…}}`.
        correct_draws_: After scoring: `[draws, rows]` bool, which `paired_interval` takes as it takes seeds.

    Raises:
        UsageError: n or draws below 1, or a probe without `fit`, `predict` and `score`.

    Example:
        >>> f, y = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]), [0, 0, 1, 1]
        >>> FewShotProbe(n=1, draws=3).fit(f, y).score(f, y)
        1.0
    """

    name = "few_shot"
    unit = "accuracy"

    def __init__(self, *, n: int = 5, draws: int = 10, probe: Any = None, seed: int = 0):
        check_numbers(n=n, draws=draws)
        probe = LinearProbe(l2=0.01) if probe is None else probe
        if not all(callable(getattr(probe, method, None)) for method in ("fit", "predict", "score")):
            raise UsageError(f"Expected a probe with fit, predict and score, got {probe!r}.")
        self.n, self.draws, self.probe, self.seed = n, draws, probe, seed

    def __repr__(self) -> str:
        return describe(self)

    def fit(self, f: Features, y: Labels) -> "FewShotProbe":
        """Fit a copy of the probe on each draw of rows of `f`, with labels `y` (any integers).

        Raises:
            UsageError: no rows, rows that are not finite, labels that are no integers or do not match the rows, or what
                the probe raises.
        """
        self.classes_, codes = training_set(f, y)
        self._rows, self._dim = f.shape
        sizes = torch.bincount(codes)
        self._short = int((sizes < self.n).sum())
        generator = torch.Generator().manual_seed(self.seed)
        self.probes_ = []
        for _ in range(self.draws):
            order = torch.randperm(len(codes), generator=generator)
            order = order[codes[order].argsort(stable=True)]
            place = torch.arange(len(codes)) - (sizes.cumsum(0) - sizes)[codes[order]]  # in its class
            rows = order[place < self.n].sort().values
            fitted = copy.deepcopy(self.probe).fit(f[rows.to(f.device)], self.classes_[codes[rows]])
            self.probes_.append(fitted)
        return self

    def predict(self, f: Features) -> Int[Tensor, " rows"]:
        """Return the label that most draws give each row, of several the smallest, on the CPU.

        Raises:
            UsageError: not fitted, no rows, another width than in `fit`, or rows that are not finite.
        """
        self._check(f)
        # torch's mode gives the smallest of several.
        return torch.stack([probe.predict(f) for probe in self.probes_]).mode(0).values

    def score(self, f: Features, y: Labels) -> float:
        """Return the mean accuracy over draws on `f`, and keep it with its protocol in `results_`.

        Raises:
            UsageError: as `predict`, or labels that are no integers or do not match the rows.
        """
        self._check(f)
        truth = as_labels(y, len(f))
        self.correct_draws_ = torch.stack([probe.predict(f) == truth for probe in self.probes_])
        accuracies = self.correct_draws_.double().mean(1)
        value = accuracies.mean().item()
        std = accuracies.std().item() if self.draws > 1 else 0.0
        protocol = {
            "n": self.n,
            "draws": self.draws,
            "probe": repr(self.probe),
            "probe_seed": self.seed,
            "classes": len(self.classes_),
            "classes_with_fewer_rows": self._short,
            "train_rows": self._rows,
            "test_rows": len(f),
        }
        self.results_ = {"value": value, "values": {"std": std}, "draws": accuracies.tolist(), "protocol": protocol}
        return value

    def _check(self, f: Tensor) -> None:
        check_queries(self, f, self._dim if hasattr(self, "probes_") else None)
