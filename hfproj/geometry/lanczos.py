"""The smallest and the largest eigenvalue of a symmetric operator that is known by its products with vectors.

Lanczos: a random unit vector q_1 gives the Krylov space span(q_1, A q_1, …, A^{m−1} q_1), with an orthonormal basis Q
in which A is H = QᵀAQ: A Q = Q H + β q_{m+1} e_mᵀ. The extreme eigenvalues θ of H approach those of A from inside, both
ends at once; for H s = θ s an eigenvalue of A lies within β |s_m| of θ. Every new vector is orthogonalised against the
whole basis once more, against copies of converged eigenvalues; a full basis restarts from Ritz vectors of both ends.

A residual can't tell that an eigenvalue is the extreme one: of a close pair a start vector may hold little of the outer
one. For an eigenvector v with eigenvalue λ, g = Qᵀv solves (λ − H) g = β (q_{m+1}ᵀv) e_m, and ‖g‖ ≤ 1, hence

    (q_1ᵀv)² ≤ x_1² / ‖x‖²,    x = (λ − H)⁻¹ e_m    (the Christoffel function of the start vector at λ).

A random unit vector has (q_1ᵀv)² ≤ π p²/(2 dim) with probability at most p. So λ outside the Ritz values is excluded
with confidence 1 − p where the right side is below that; `bounds` are the distances from which on it is, for p = 0.01.

Why not scipy's eigsh: it certifies neither end, runs on the CPU, and took 173 and 89 products with the Hessians of two
heads where this takes 106 and 77, both ends right to 1e-3 (``recipes/benchmarks/results/geometry.md``).

References:
    Wu, Simon 2000, Thick-restart Lanczos method for large symmetric eigenvalue problems. Parlett 1998, The symmetric
    eigenvalue problem, ch. 13. Chaudhry 2026, arXiv 2605.17180, and its code farischaudhry/projection-head-geometry
    (117231d), ``get_min_eigenvalue_hvp`` (power iteration, 20 and 20 steps).

Deviations:
    The paper's code iterates to the eigenvalue λ of largest magnitude, then from A − λI to the other end, and calls
    that λ_min even where λ is negative. ``method="power"``, here to reproduce results, returns both ends in order. It
    is slower, misses small negative tails and can't tell how far it got.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.checking import checked
from hfproj.errors import UsageError, check_choice
from hfproj.geometry._head import describe
from hfproj.typing import OneOf

Matvec = Callable[[Tensor], Tensor]

_ASYMMETRY = 1e-3  # of the spectral radius: far above the noise of float32 products, far below a wrong operator
_STORED_ELEMENTS = 2**26  # of the basis: 512 MiB of float64
_SMALLEST_BASIS = 20
_ROUNDING = 32  # in units of epsilon · spectral radius: of orthogonalisation, restarts and the small eigenproblem
_RISK = 0.01
_STEPS = {"lanczos": 256, "power": 20}


class _Cycle(NamedTuple):  # what is kept of H between restarts
    theta: Tensor  # eigenvalues
    first: Tensor  # entries of the eigenvectors for the first vector of the basis
    last: Tensor  # and for the last
    beta: float


class ExtremeEigenvalues(NamedTuple):
    """Both ends of a spectrum.

    Attributes:
        min, max: Smallest and largest eigenvalue found; never outside the true ones by more than rounding.
        residuals: ‖A y − θ y‖ for both, with rounding: an eigenvalue of A lies within it.
        bounds: The extreme eigenvalues lie within it, each with a confidence of 99 % over start vectors; infinite where
            too few steps were made to tell, and for power iteration. `min` < 0 means an indefinite or negative A,
            whatever the bound; `min` > bound a positive definite one, with that confidence.
        steps: Products with A that it took.
        converged: Whether both residuals are within the tolerance.
        vectors: Unit Ritz vectors `[2, dim]` of min and max, if asked for.
    """

    min: float
    max: float
    residuals: tuple[float, float]
    bounds: tuple[float, float]
    steps: int
    converged: bool
    vectors: Float[Tensor, "2 dim"] | None = None


@checked
def extreme_eigenvalues(
    matvec: Matvec, dim: int, *, steps: int | None = None, tol: float = 1e-6,
    method: OneOf["lanczos", "power"] = "lanczos", basis: int | None = None, vectors: bool = False,
    generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu",
) -> ExtremeEigenvalues:  # fmt: skip
    """Return both extreme eigenvalues of a symmetric operator.

    Args:
        matvec: v → A v for vectors `[dim]` of `dtype` on `device`, such as the ``matvec`` of a Hessian operator.
        dim: Width of A.
        steps: At most so many products with A; for ``"power"``, so many for each end. None: 256 (20).
        tol: Stop when both residuals are below `tol` times the spectral radius. Errors are far smaller as a rule; the
            bounds say what is certain. Products in float32 allow 1e-5 or so.
        method: ``"lanczos"``, or ``"power"`` for the paper's estimator (see the module for how it fails).
        basis: Vectors to store; None: as many as steps, within 512 MiB, and at least 20.
        vectors: Whether to return the Ritz vectors.
        generator: For the start vector, on the CPU; None: seed 0, so that calls repeat exactly.
        dtype: Of the stored vectors. float32 halves the memory.
        device: Of the vectors.

    Raises:
        UsageError: If matvec returns another shape, NaN or infinity, or is not symmetric, or an option is out of range.

    Example:
        >>> A = torch.diag(torch.linspace(-0.001, 1, 50, dtype=torch.float64))
        >>> found = extreme_eigenvalues(lambda v: A @ v, 50)
        >>> round(found.min, 9), round(found.max, 9)
        (-0.001, 1.0)
    """
    check_choice("method", method, _STEPS)
    limit = _STEPS[method] if steps is None else steps
    for name, value in (("dim", dim), ("steps", limit)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"Expected {name} to be a whole number of at least 1, got {value!r}.")
    if not 0 <= tol < 1:
        raise UsageError(f"Expected tol, a fraction of the spectral radius, to be in [0, 1), got {tol}.")
    stored = max(_SMALLEST_BASIS, _STORED_ELEMENTS // dim) if basis is None else basis
    if stored < 4 and stored < min(dim, limit):
        raise UsageError(f"Expected basis to be at least 4, two vectors for each end, got {basis}.")
    apply = _checked(matvec, dim)
    generator = torch.Generator().manual_seed(0) if generator is None else generator

    def draw() -> Tensor:
        v = torch.randn(dim, generator=generator, dtype=torch.float64)
        return (v / v.norm()).to(device, dtype)

    if method == "power":
        return _power(apply, draw, limit, tol, vectors)
    return _lanczos(apply, draw(), limit, tol, min(stored, limit, dim), vectors)


def _checked(matvec: Matvec, dim: int) -> Matvec:
    """Return matvec without autograd, its results checked, in the dtype and place of its input."""
    products = itertools.count(1)

    def apply(v: Tensor) -> Tensor:
        count, w = next(products), matvec(v)
        if not isinstance(w, Tensor) or w.shape != (dim,):
            raise UsageError(f"Expected matvec to return a vector of shape [{dim}], got {describe(w)}; give dim=.")
        w = w.detach().to(v)
        if not torch.isfinite(w).all():
            hint = "loss and gradient must be finite and twice differentiable here (a norm at 0 is not)"
            raise UsageError(f"matvec returned NaN or infinity at its product number {count}; {hint}.")
        return w

    return apply


def _refuse_asymmetry(mismatch: float, scale: float) -> None:
    if mismatch > _ASYMMETRY * scale:
        seen = f"uᵀAv and vᵀAu differ by {mismatch:.2g}, beside a spectral radius near {scale:.2g}"
        hint = "Expected products with one matrix: no dropout, one batch for all calls, float32 or better."
        raise UsageError(f"matvec is not symmetric: {seen}. {hint}")


def _lanczos(
    apply: Matvec, start: Tensor, limit: int, tol: float, stored: int, want_vectors: bool
) -> ExtremeEigenvalues:
    dim, eps = len(start), torch.finfo(start.dtype).eps
    Q = start.new_empty(min(stored + 1, dim), dim)
    Q[0] = start
    H = torch.zeros(stored + 1, stored + 1, dtype=torch.float64)
    size, scale, noise, unit = 0, 0.0, 0.0, 0.0
    cycles: list[_Cycle] = []
    first = 0  # the basis vector that all others of this cycle arose from
    for step in range(1, limit + 1):
        w = apply(Q[size])
        unit = unit or float(w.abs().max()) or 1.0
        w = w / unit  # squares of very small or large entries would leave the range of numbers
        # Symmetry says what the products with earlier vectors are; taking these away first lets one more pass over all
        # of the basis do for two. What it finds is rounding, or an operator that is not symmetric.
        known = H[:size, size].nonzero().flatten()
        w -= Q[known.to(Q.device)].T @ H[known, size].to(Q)
        alpha = Q[size] @ w
        w -= alpha * Q[size]
        rest = Q[: size + 1] @ w
        w -= Q[: size + 1].T @ rest
        rest = rest.double().cpu()
        mismatch = float(rest[:size].norm())
        H[size, size] = float(alpha) + rest[size]
        beta = float(w.norm())
        scale = max(scale, float(H[: size + 1, size].norm()), beta)
        noise = max(noise, mismatch)
        _refuse_asymmetry(mismatch, scale)
        size += 1
        complete = size == dim or beta <= eps * dim**0.5 * scale  # the space is invariant: H has eigenvalues of A
        full = size == stored
        if complete or full or step == limit or size < 8 or size % (4 if size < 128 else 16) == 0:
            theta, S = torch.linalg.eigh(H[:size, :size])
            radius = float(theta[[0, -1]].abs().max())
            floor = noise + _ROUNDING * eps * radius
            low, high = (floor + (0.0 if complete else beta * float(S[-1, end].abs())) for end in (0, -1))
            converged = max(low, high) <= max(tol * radius, 2 * floor)
            cycle = _Cycle(theta, S[first], S[-1], beta)
            if complete or converged or step == limit:
                smallest, largest = (theta[[0, -1]] * unit).tolist()
                residuals = bounds = low * unit, high * unit
                if not complete:
                    hidden = [_hidden([*cycles, cycle], end, dim, floor) for end in (0, -1)]
                    bounds = max(low, hidden[0]) * unit, max(high, hidden[1]) * unit
                found = None
                if want_vectors:
                    found = S[:, [0, -1]].T.to(Q) @ Q[:size]
                    found /= found.norm(dim=1, keepdim=True)
                return ExtremeEigenvalues(smallest, largest, residuals, bounds, step, converged, found)
        if full:
            cycles.append(cycle)
            size = first = _restart(Q, H, theta, S, w / beta, beta)
        else:
            Q[size] = w / beta
            H[size - 1, size] = H[size, size - 1] = beta
    raise AssertionError("the last step returns")


def _restart(Q: Tensor, H: Tensor, theta: Tensor, S: Tensor, following: Tensor, beta: float) -> int:
    """Put the Ritz vectors of both ends and the next vector at the start of the basis; return how many are kept."""
    size = len(theta)
    low = max(1, size // 4)
    kept = torch.cat([torch.arange(low), torch.arange(size - low, size)])
    Q[: 2 * low] = S[:, kept].T.to(Q) @ Q[:size]
    Q[2 * low] = following
    H.zero_()
    H[range(2 * low), range(2 * low)] = theta[kept]
    H[: 2 * low, 2 * low] = H[2 * low, : 2 * low] = beta * S[-1, kept]
    return 2 * low


def _hidden(cycles: list[_Cycle], end: int, dim: int, floor: float) -> float:
    """Return the distance beyond the outermost Ritz value from which on another eigenvalue is excluded.

    Over restarts the fraction of the start vector is a product: (λ − H)⁻¹ e_m leads from the first vector of a cycle to
    the one that follows it, which is the first of the next.
    """
    theta = cycles[-1].theta
    spread = float(theta[-1] - theta[0]) + floor
    distances = spread * torch.logspace(-16, 4, 400, dtype=torch.float64)
    values = theta[end] + (distances if end else -distances)
    fraction = torch.zeros_like(values)  # the logarithm of (q_1ᵀv)²
    for index, cycle in enumerate(cycles):
        inverse = 1 / (values.unsqueeze(1) - cycle.theta)  # of λ − H in its eigenbasis
        x_first = (inverse * cycle.first * cycle.last).sum(1).square()
        last = index == len(cycles) - 1
        norm = (inverse * cycle.last).square().sum(1) if last else torch.tensor(cycle.beta**-2, dtype=torch.float64)
        fraction += x_first.log() - norm.log()
    possible = (fraction > math.log(math.pi * _RISK**2 / (2 * dim))).nonzero()
    if not len(possible):
        return floor
    index = int(possible[-1]) + 1
    return float(distances[index]) + floor if index < len(distances) else math.inf


def _power(apply: Matvec, draw: Callable[[], Tensor], steps: int, tol: float, want_vectors: bool) -> ExtremeEigenvalues:
    found: list[tuple[float, float, Tensor, Tensor]] = []
    shift, taken = 0.0, 0
    for _ in range(2):
        v = draw()
        for step in range(steps):
            product = apply(v)
            taken += 1
            value = float(v @ product)
            if step + 1 < steps:
                w = product - shift * v
                norm = float(w.norm())
                if norm == 0:
                    break
                v = w / norm
        found.append((value, float((product - value * v).norm()), v, product))
        shift = value
    (_, _, u, Au), (_, _, v, Av) = found
    scale = max(float(Au.norm()), float(Av.norm()))
    _refuse_asymmetry(abs(float(u @ Av - v @ Au)), scale)
    (low, low_residual, u, _), (high, high_residual, v, _) = sorted(found, key=lambda end: end[0])
    converged = max(low_residual, high_residual) <= tol * max(abs(low), abs(high))
    residuals, vectors = (low_residual, high_residual), torch.stack([u, v]) if want_vectors else None
    return ExtremeEigenvalues(low, high, residuals, (math.inf, math.inf), taken, converged, vectors)
