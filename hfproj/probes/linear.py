"""Linear probe: multinomial logistic regression to the optimum, its L2 strength given or chosen on held-out rows.

    x = (f − mean)/std,   minimise  1/n Σ_i [logsumexp(W x_i + b) − (W x_i + b)_{y_i}] + λ/2 ‖W‖_F²

The penalty is on W, for standardised columns; b is free. With two classes the penalty is λ/2 ‖w₁ − w₀‖², on the one
vector that decides. Both are scikit-learn's ``LogisticRegression(C=1/(n·λ))`` behind a ``StandardScaler``. The search
is L-BFGS, preconditioned, with a memory that is valid for every strength:

    M = 1/m Σ_i a_i x_i x_iᵀ + λI,  a_i = mean_c p_ic (1 − p_ic),  W's gradient G preconditioned as G M⁻¹

M is the Hessian with the classes averaged, where the search starts: one D×D Cholesky factor. It is made from some of
the rows, since it decides how fast the optimum is reached and not where it lies. L-BFGS stores the change of the
gradient of the loss without the penalty's, λ·s, which is known: so its memory of one λ serves the next.

It is not scikit-learn's `LogisticRegression` because that stops short of the optimum and starts anew for each λ: on
50,000 × 384 rows with a power-law spectrum and λ = 0.001 it takes 12 s of one core and ends 1e-5 (relative) above the
optimum, this one 0.7 s and at the optimum; 16 strengths cost 2.6 to 3.7 times the price of one
(``recipes/benchmarks/results/probes.json``). It also runs on a GPU.

References:
    Kornblith, Shlens, Le 2019, arXiv 1805.08974 (logistic regression by L-BFGS, the strength from a logarithmic grid on
    held-out rows, then refitted on all). Nocedal, Wright 2006, Numerical Optimization, algorithms 7.4 and 7.5 (L-BFGS
    with a matrix as initial inverse Hessian); Lewis, Overton 2013 (line search by bracketing); Hager, Zhang 2005,
    equation 4.1 (acceptance by the slope where the value's rounding hides the decrease).

Deviations:
    16 strengths instead of 45. The fits of the path stop at a relative 1e-5 of their objective, only the last one goes
    to the optimum. Rows are held out after standardising with all training rows (no label is used for that).
"""

import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor

from hfproj.checking import check_types, explained
from hfproj.functional.rows import full_precision
from hfproj.probes.base import Classifier, Scaling, check_fraction, check_numbers, check_path, hold_out

L2_PATH = tuple(float(f"{10.0 ** (1 - 7 * i / 15):.2g}") for i in range(16))  # 10 to 1e-6

_MEMORY = 20
_REFRESH = 10  # steps after which M is made anew
_SAMPLE = 12  # rows of the preconditioner for each column; more cost more than they save
_LARGEST_FACTOR = 4096  # columns; beyond, the preconditioner is a number
_BLOCK = {"cpu": 2**21, "other": 2**27}  # bytes of x at a time: on a CPU what stays in its caches
_PATH_TOLERANCE = 1e-5  # relative, of the fits among which a strength is chosen
_COARSE = 1e-10  # estimated relative decrease where float32 hands over to float64
_SMALL = 2**24  # elements of x times classes up to which float64 does it all

Theta = Float64[Tensor, "classes dim_and_one"]  # W, and b as the last column


class Optimum(NamedTuple):
    """Where a search ended."""

    theta: Theta
    objective: float  # a float64 sum
    iterations: int
    converged: bool  # the decrease still to come was estimated below the tolerance


class SoftmaxRegression:
    """Minimise for one strength after the other: rows in random order with comparable columns, of classes 0, 1, …"""

    def __init__(self, x: Float[Tensor, "rows dim"], codes: Int[Tensor, " rows"], classes: int):
        self.x, self.codes, self.classes = x, codes, classes
        self._known: tuple[Tensor, torch.dtype, float, Tensor] | None = None  # loss and gradient where a search ended
        self._pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=_MEMORY)
        self._single = x.dtype == torch.float32 and x.numel() * classes > _SMALL
        self._block = _BLOCK["cpu" if x.device.type == "cpu" else "other"] // (x.shape[1] + classes)

    def start(self) -> Theta:
        """Return W = 0 and the intercepts that fit the frequencies of the classes."""
        theta = torch.zeros(self.classes, self.x.shape[1] + 1, dtype=torch.float64, device=self.x.device)
        bias = torch.bincount(self.codes, minlength=self.classes).double().log()
        theta[:, -1] = bias - bias.mean()
        return theta

    @torch.no_grad()
    def minimise(self, l2: float, theta: Theta, *, tol: float = 1e-11, max_iter: int = 1000) -> Optimum:
        """Return the optimum for λ = `l2` > 0, from `theta` until the relative decrease is estimated below `tol`."""
        # Of two opposite rows, each half of w₁ − w₀, the squares add up to half of ‖w₁ − w₀‖².
        l2 = 2 * l2 if self.classes == 2 else l2
        with full_precision(self.x):
            done = 0
            if self._single:
                found = self._search(l2, theta, max(tol, _COARSE), max_iter, torch.float32)
                if tol >= _COARSE and found.converged:
                    return found
                theta, done = found.theta, found.iterations
            found = self._search(l2, theta, tol, max_iter - done, torch.float64)
            return found._replace(iterations=found.iterations + done)

    def best(
        self, path: Sequence[float], rating: Callable[[Theta], tuple[float, float]], *, max_iter: int = 1000
    ) -> tuple[float, Theta]:
        """Return the λ whose optimum has the largest rating, of equal ones the strongest, and that optimum."""
        theta, best = self.start(), None
        for l2 in sorted(path, reverse=True):
            theta = self.minimise(l2, theta, tol=_PATH_TOLERANCE, max_iter=max_iter).theta
            found = rating(theta)
            if best is None or found > best[0]:
                best = found, l2, theta
        assert best is not None  # the path is not empty
        return best[1:]

    def _search(self, l2: float, theta: Tensor, tol: float, max_iter: int, dtype: torch.dtype) -> Optimum:
        penalty = torch.full((theta.shape[1],), l2, dtype=torch.float64, device=theta.device)
        penalty[-1] = 0
        noise = 1e-7 if dtype == torch.float32 else 1e-14
        precondition = self._preconditioner(l2, theta)
        if self._known is not None and self._known[0] is theta and self._known[1] == dtype:
            loss, loss_gradient = self._known[2:]
            value = loss + l2 / 2 * float(theta[:, :-1].square().sum())
        else:
            value, loss_gradient = self._evaluate(l2, theta, dtype)
        gradient = loss_gradient + penalty * theta
        memory = deque(((s, y + penalty * s) for s, y in self._pairs), maxlen=_MEMORY)
        for iteration in range(max_iter):
            direction = -_inverse_hessian(gradient, memory, precondition)
            slope = _dot(gradient, direction)
            if -slope <= 2 * tol * value:
                self._known = theta, dtype, value - l2 / 2 * float(theta[:, :-1].square().sum()), loss_gradient
                if dtype == torch.float32:  # float64 goes on from here, or the tolerance is loose
                    return Optimum(theta, value, iteration, True)
                # Where classes part, curvature has fallen since M was made, and the estimate is too good.
                precondition = self._preconditioner(l2, theta)
                if _dot(gradient, precondition(gradient)) <= 2 * tol * value:
                    return Optimum(theta, value, iteration, True)
                direction = -_inverse_hessian(gradient, memory, precondition)
                slope = _dot(gradient, direction)
            elif iteration % _REFRESH == _REFRESH - 1:
                precondition = self._preconditioner(l2, theta)
            low, high, step = 0.0, math.inf, 1.0
            for _ in range(40):
                at = theta + step * direction
                new_value, new_loss_gradient = self._evaluate(l2, at, dtype)
                new_gradient = new_loss_gradient + penalty * at
                new_slope = _dot(new_gradient, direction)
                if not new_value <= value + 1e-4 * step * slope and not (
                    new_value <= value * (1 + noise) and new_slope <= -0.9 * slope
                ):
                    high = step
                    bend = new_value - value - step * slope  # the parabola through both values and the first slope
                    guess = -slope * step**2 / (2 * bend) if math.isfinite(bend) and bend > 0 else low
                    step = min(max(guess, low + 0.1 * (high - low)), low + 0.6 * (high - low))
                elif new_slope < 0.9 * slope:
                    low = step
                    step = 2 * step if high == math.inf else (low + high) / 2
                else:
                    break
            else:  # rounding hides every decrease
                return Optimum(theta, value, iteration, -slope <= 1e-9 * value)
            s, y = at - theta, new_loss_gradient - loss_gradient
            theta, value, gradient, loss_gradient = at, new_value, new_gradient, new_loss_gradient
            if _dot(s, y + penalty * s) > 0:
                self._pairs.append((s, y))
                memory.append((s, y + penalty * s))
        return Optimum(theta, value, max_iter, False)

    def _evaluate(self, l2: float, theta: Tensor, dtype: torch.dtype) -> tuple[float, Tensor]:
        """Return the objective, and the gradient of the loss without the penalty's; sums over blocks in float64."""
        # Classes by rows, not rows by classes: products with few classes are four times faster so.
        weight, bias = theta[:, :-1].to(dtype), theta[:, -1:].to(dtype)
        gradient, loss = torch.zeros_like(theta), theta.new_zeros(())
        block = max(1, self._block // dtype.itemsize)
        for x, codes in zip(self.x.split(block), self.codes.split(block)):
            x = x.to(dtype)
            logits = torch.addmm(bias, weight, x.T)
            logits -= logits.amax(0, keepdim=True)
            codes = codes[None]
            loss -= logits.gather(0, codes).sum(dtype=torch.float64)
            p = logits.exp_()
            total = p.sum(0, keepdim=True)
            loss += total.log().sum(dtype=torch.float64)
            p /= total
            p.scatter_add_(0, codes, p.new_full(codes.shape, -1.0))
            gradient[:, :-1] += p @ x
            gradient[:, -1] += p.sum(1)
        rows = len(self.x)
        return float(loss / rows + l2 / 2 * theta[:, :-1].square().sum()), gradient / rows

    def _preconditioner(self, l2: float, theta: Tensor) -> Callable[[Tensor], Tensor]:
        dim = self.x.shape[1]
        x = self.x[: max(256, _SAMPLE * dim)]
        p = torch.addmm(theta[:, -1:].to(x.dtype), theta[:, :-1].to(x.dtype), x.T).softmax(0)
        spread = p * (1 - p)
        of_bias = spread.mean(1, keepdim=True).double().clamp_min_(1e-9)
        spread = spread.mean(0)[:, None]
        if dim > _LARGEST_FACTOR:
            scale = float((spread * x.square()).mean()) + l2
            return lambda g: torch.cat([g[:, :-1] / scale, g[:, -1:] / of_bias], 1)
        x = x * spread.sqrt()
        hessian = (x.T @ x).double() / len(x)
        floor = l2 + 1e-9 * float(hessian.diagonal().mean())
        hessian.diagonal().add_(floor)
        factor, info = torch.linalg.cholesky_ex(hessian)
        if int(info):  # float32's rounding of a Gram matrix that is singular
            hessian.diagonal().add_(1e-5 * float(hessian.diagonal().mean()))
            factor = torch.linalg.cholesky(hessian)
        return lambda g: torch.cat([torch.cholesky_solve(g[:, :-1].T, factor).T, g[:, -1:] / of_bias], 1)


def middle(path: Sequence[float]) -> float:
    """Return the strength of a path that is taken if no rows are left to choose on."""
    return sorted(path, reverse=True)[len(path) // 2]


def class_scores(x: Float[Tensor, "rows dim"], theta: Theta) -> Float64[Tensor, "classes rows"]:
    """Return the logits of scaled rows, computed in float64."""
    step = max(1, 2**20 // x.shape[1])
    with full_precision(x):
        return torch.cat([torch.addmm(theta[:, -1:], theta[:, :-1], part.double().T) for part in x.split(step)], 1)


def predicted_codes(x: Float[Tensor, "rows dim"], theta: Theta) -> Int[Tensor, " rows"]:
    """Return the class of the largest logit of each row."""
    return class_scores(x, theta).argmax(0)


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())


def _inverse_hessian(gradient: Tensor, memory: deque, precondition: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply L-BFGS's approximate inverse Hessian by the two-loop recursion."""
    q = gradient.clone()
    factors = []
    for s, y in reversed(memory):
        rho = 1 / _dot(s, y)
        alpha = rho * _dot(s, q)
        q -= alpha * y
        factors.append((rho, alpha))
    r = precondition(q)
    if memory:
        s, y = memory[-1]
        r = r * (_dot(s, y) / _dot(y, precondition(y)))
    for (s, y), (rho, alpha) in zip(memory, reversed(factors)):
        r += (alpha - rho * _dot(y, r)) * s
    return r


@explained
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
        classes_: `[classes]` labels, sorted.
        coef_: `[classes, dim]` float64, for features as given: logits are `f @ coef_.T + intercept_`.
        intercept_: `[classes]` float64.
        l2_: λ of the fit.
        objective_: Its objective, in nats.
        results_: After scoring: `{"value": accuracy, "protocol": {…}}`.
        correct_: After scoring: `[rows]` bool, for `paired_interval`.

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
        check_types(type(self).__name__, type(self).__init__, vars(self))
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
