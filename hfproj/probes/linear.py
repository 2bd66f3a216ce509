"""Linear probe: multinomial logistic regression to the optimum, its L2 strength given or chosen on held-out rows.

    x = (f − mean)/std,   minimise  1/n Σ_i −log softmax(W x_i + b)_{y_i} + λ/2 ‖W‖_F²

The penalty is on W, for standardised columns; b is free. With two classes the penalty is λ/2 ‖w₁ − w₀‖², on the one
vector that decides. Both are scikit-learn's ``LogisticRegression(C=1/(n·λ))`` behind a ``StandardScaler``.

Features from `extract_features` are the same on all processes, and each process computes the same fit: no collectives.

References:
    Kornblith, Shlens, Le 2019, arXiv 1805.08974 (logistic regression by L-BFGS, the strength from a logarithmic grid on
    held-out rows, then refitted on all); scikit-learn, ``LogisticRegression``.

Deviations:
    16 strengths instead of 45. The fits of the path stop at a relative 1e-5 of their objective, only the last one goes
    to the optimum. Rows are held out after standardising with all training rows (no label is used for that).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hfproj.probes._softmax_regression import SoftmaxRegression, class_scores, middle, predicted_codes
from hfproj.probes.base import Classifier, Scaling, check_fraction, check_numbers, check_path, hold_out

L2_PATH = tuple(float(f"{10.0 ** (1 - 7 * i / 15):.2g}") for i in range(16))  # 10 to 1e-6


@dataclass(kw_only=True, repr=False, eq=False)
class LinearProbe(Classifier):
    """Accuracy of logistic regression on features, as an estimator of scikit-learn: `fit`, `predict`, `score`.

    Args:
        l2: λ > 0; None: the best of `l2_path` by accuracy on held-out rows (then by their loss), refitted on all rows.
        l2_path: Strengths to choose from.
        holdout: Fraction of each class held out for the choice. A class of one row gives none; where no class has two,
            the middle of the path is taken.
        standardize: Divide columns by their standard deviation; constant columns are ignored. False: the penalty is for
            the features as they are.
        max_iter: Maximum number of L-BFGS steps of a fit; one that ends there warns.
        seed: Seed of the held-out part.

    Attributes:
        coef_: `[classes, dim]` float64, for features as given: logits are `f @ coef_.T + intercept_`.
        intercept_: `[classes]` float64.
        l2_: λ of the fit.
        objective_: Its objective, in nats.

    Raises:
        UsageError: If an option is not positive, if the path is empty, or if the fraction is outside (0, 1).

    Example (features that do not depend on the class leave its frequencies):
        >>> f, y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), [5, 5, 8, 8]
        >>> probe = LinearProbe(l2=0.1).fit(f, y)
        >>> round(probe.objective_, 6), probe.coef_.abs().max().item()  # ln 2
        (0.693147, 0.0)
    """

    name = "linear"

    l2: float | None = None
    l2_path: Sequence[float] = L2_PATH
    holdout: float = 0.1
    standardize: bool = True
    max_iter: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(max_iter=self.max_iter, l2=1.0 if self.l2 is None else float(self.l2))
        check_fraction(holdout=self.holdout)
        self.l2_path = check_path("l2_path", self.l2_path)

    def _options(self) -> dict[str, Any]:
        without_effect = () if self.l2 is None else ("l2_path", "holdout")
        return {name: value for name, value in super()._options().items() if name not in without_effect}

    def _fit(self, f: Tensor, codes: Tensor) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        with torch.inference_mode(False), torch.no_grad():
            f = f.detach()
            self._scaling = Scaling.of(f, scale=self.standardize)
            if self.l2 is None:
                kept, held = hold_out(codes, self.holdout, generator)
            else:
                kept, held = torch.randperm(len(f), generator=generator), codes[:0]
            order = torch.cat([kept, held])
            x = self._scaling.apply(f, order)
            codes = codes[order].to(x.device)
            self.l2_, theta = self._choose(x, codes, len(kept)) if self.l2 is None else (self.l2, None)
            self._chosen = {"l2": self.l2_, "on_rows": len(held)}
            problem = SoftmaxRegression(x, codes, len(self.classes_))
            found = problem.minimise(self.l2_, problem.start() if theta is None else theta, max_iter=self.max_iter)
        if not found.converged:
            warnings.warn(
                f"The linear probe did not reach its optimum in {found.iterations} steps (l2={self.l2_:.3g}). Raise "
                "max_iter, or l2: with a tiny l2, separable classes have no optimum in reach.",
                stacklevel=3,
            )
        self.objective_, self.iterations_, self.converged_ = found.objective, found.iterations, found.converged
        self._theta = found.theta
        self.coef_ = (found.theta[:, :-1] * self._scaling.factor).cpu()
        self.intercept_ = found.theta[:, -1].cpu() - self.coef_ @ self._scaling.mean.cpu()

    @torch.no_grad()
    def _codes(self, f: Tensor) -> Tensor:
        return predicted_codes(self._scaling.apply(f), self._theta)

    def _protocol(self) -> dict[str, Any]:
        settings = self._settings()
        if self.l2 is None:
            return {n: v for n, v in settings.items() if n != "l2"} | {"chosen": self._chosen}
        return {n: v for n, v in settings.items() if n != "probe_seed"}  # a given strength is not chosen

    def _choose(self, x: Tensor, codes: Tensor, kept: int) -> tuple[float, Tensor | None]:
        """Return the best strength of the path, fitted from strong to weak on the first rows, and where that ended."""
        if kept == len(x):
            return middle(self.l2_path), None
        truth = codes[kept:]

        def rating(theta: Tensor) -> tuple[float, float]:
            logits = class_scores(x[kept:], theta)
            return float((logits.argmax(0) == truth).sum()), -float(F.cross_entropy(logits.T, truth))

        problem = SoftmaxRegression(x[:kept], codes[:kept], len(self.classes_))
        return problem.best(self.l2_path, rating, max_iter=self.max_iter)
