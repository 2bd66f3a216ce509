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
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hfproj.errors import UsageError
from hfproj.probes._classifier import (
    Scaling,
    check_numbers,
    check_queries,
    describe,
    hold_out,
    keep_accuracy,
    training_set,
)
from hfproj.probes._labels import Labels
from hfproj.probes._softmax_regression import SoftmaxRegression, class_scores, predicted_codes
from hfproj.typing import Features

L2_PATH = tuple(float(f"{10.0 ** (1 - 7 * i / 15):.2g}") for i in range(16))  # 10 to 1e-6

_PATH_TOLERANCE = 1e-5


class LinearProbe:
    """Accuracy of logistic regression on features, in scikit-learn's manners: `fit`, `predict`, `score`, `results_`.

    Args:
        l2: λ > 0; None: the best of `l2_path` by accuracy on held-out rows (then by their loss), refitted on all rows.
        l2_path: Strengths to choose from.
        holdout: Share of each class held out for the choice. A class of one row gives none; where no class has two, the
            middle of the path is taken.
        standardize: Divide columns by their standard deviation; constant columns are ignored. False: the penalty is for
            the features as they are.
        max_iter: L-BFGS steps of a fit at most; one that ends there warns.
        seed: Of the held-out part.

    Attributes:
        classes_: `[classes]` labels, sorted.
        coef_: `[classes, dim]` float64, for features as given: logits are `f @ coef_.T + intercept_`.
        intercept_: `[classes]` float64.
        l2_: λ of the fit.
        objective_: Its objective, in nats.
        results_: After scoring: `{"value": accuracy, "protocol": {…}}`.
        correct_: After scoring: `[rows]` bool, for `paired_interval`.

    Raises:
        UsageError: an option that is not positive, an empty path, or a share outside (0, 1).

    Example (features that do not depend on the class leave its frequencies):
        >>> f, y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), [5, 5, 8, 8]
        >>> probe = LinearProbe(l2=0.1).fit(f, y)
        >>> round(probe.objective_, 6), probe.coef_.abs().max().item()  # ln 2
        (0.693147, 0.0)
    """

    name = "linear"
    unit = "accuracy"

    def __init__(
        self,
        *,
        l2: float | None = None,
        l2_path: Sequence[float] = L2_PATH,
        holdout: float = 0.1,
        standardize: bool = True,
        max_iter: int = 1000,
        seed: int = 0,
    ):
        if not l2_path:
            raise UsageError("l2_path is empty; give at least one strength.")
        check_numbers(max_iter=max_iter, l2=1.0 if l2 is None else float(l2))
        for strength in l2_path:
            check_numbers(**{"strength in l2_path": float(strength)})
        if not 0 < holdout < 1:
            raise UsageError(f"Expected a share 0 < holdout < 1, got {holdout}.")
        self.l2, self.l2_path, self.holdout = l2, tuple(l2_path), holdout
        self.standardize, self.max_iter, self.seed = standardize, max_iter, seed

    def __repr__(self) -> str:
        return describe(self) if self.l2 is None else describe(self, without=("l2_path", "holdout"))

    def fit(self, f: Features, y: Labels) -> "LinearProbe":
        """Find the optimum for features `f` and labels `y` (any integers).

        Raises:
            UsageError: no rows, rows that are not finite, or labels that are no integers or do not match the rows.
        """
        self.classes_, codes = training_set(f, y)
        self._rows, self._chosen_on = len(f), 0
        with torch.inference_mode(False), torch.no_grad():
            f = f.detach()
            self._scaling = Scaling.of(f, scale=self.standardize)
            generator = torch.Generator().manual_seed(self.seed)
            if self.l2 is None:
                kept, held = hold_out(codes, self.holdout, generator)
            else:
                kept, held = torch.randperm(len(f), generator=generator), codes[:0]
            order = torch.cat([kept, held])
            x = self._scaling.apply(f, order)
            codes = codes[order].to(x.device)
            if self.l2 is None:
                self.l2_, theta = self._choose(x, codes, len(kept))
                self._chosen_on = len(held)
            else:
                self.l2_, theta = self.l2, None
            problem = SoftmaxRegression(x, codes, len(self.classes_))
            start = problem.start() if theta is None else theta
            found = problem.minimise(self._penalty(self.l2_), start, max_iter=self.max_iter)
        if not found.converged:
            warnings.warn(
                f"The linear probe did not reach its optimum in {found.iterations} steps (l2={self.l2_:.3g}). Raise "
                "max_iter, or l2: next to none leaves separable classes without an optimum.",
                stacklevel=2,
            )
        self.objective_, self.iterations_, self.converged_ = found.objective, found.iterations, found.converged
        self._theta = found.theta
        self.coef_ = (found.theta[:, :-1] * self._scaling.factor).cpu()
        self.intercept_ = found.theta[:, -1].cpu() - self.coef_ @ self._scaling.mean.cpu()
        return self

    def predict(self, f: Features) -> Int[Tensor, " rows"]:
        """Return the predicted label of every row, on the CPU.

        Raises:
            UsageError: not fitted, no rows, another width than in `fit`, or rows that are not finite.
        """
        check_queries(self, f, self.coef_.shape[1] if hasattr(self, "coef_") else None)
        with torch.no_grad():
            return self.classes_[predicted_codes(self._scaling.apply(f), self._theta).cpu()]

    def score(self, f: Features, y: Labels) -> float:
        """Return the accuracy on `f`, and keep it with its protocol in `results_` and row by row in `correct_`.

        Raises:
            UsageError: as `predict`, or labels that are no integers or do not match the rows.
        """
        predicted = self.predict(f)
        protocol: dict[str, Any] = {"standardize": self.standardize, "max_iter": self.max_iter}
        if self.l2 is None:
            protocol |= {"l2_path": list(self.l2_path), "holdout": self.holdout, "probe_seed": self.seed}
            protocol["chosen"] = {"l2": self.l2_, "on_rows": self._chosen_on}
        else:
            protocol["l2"] = self.l2
        protocol |= {"train_rows": self._rows, "classes": len(self.classes_)}
        return keep_accuracy(self, predicted, y, protocol)

    def _penalty(self, l2: float) -> float:
        # Of two opposite rows, each half of w₁ − w₀, the squares add up to half of ‖w₁ − w₀‖².
        return 2 * l2 if len(self.classes_) == 2 else l2

    def _choose(self, x: Tensor, codes: Tensor, kept: int) -> tuple[float, Tensor | None]:
        """Return the best strength of the path, fitted from strong to weak on the first rows, and where that ended."""
        path = sorted(self.l2_path, reverse=True)
        if kept == len(x):
            return path[len(path) // 2], None
        problem = SoftmaxRegression(x[:kept], codes[:kept], len(self.classes_))
        theta = problem.start()
        best: tuple[tuple[float, float], float, Tensor] | None = None
        for l2 in path:
            theta = problem.minimise(self._penalty(l2), theta, tol=_PATH_TOLERANCE, max_iter=self.max_iter).theta
            logits, truth = class_scores(x[kept:], theta), codes[kept:]
            loss = torch.nn.functional.cross_entropy(logits.T, truth)
            rating = (int((logits.argmax(0) == truth).sum()), -float(loss))
            if best is None or rating > best[0]:
                best = rating, l2, theta
        assert best is not None  # the path is not empty
        return best[1:]
