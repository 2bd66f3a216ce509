"""Both ends of spectra that are known, and of a real head's Hessian; the bounds hold; what is no symmetric operator."""

import math

import pytest
import torch
from geometry_cases import digit_features, double, two_layers
from torch import nn

from hfproj.errors import UsageError
from hfproj.geometry import EffectiveHessianOperator, HessianOperator, extreme_eigenvalues
from hfproj.objectives.nt_xent import nt_xent_loss


def uniform(n, seed=1):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def joined(*parts):
    return torch.cat([torch.as_tensor(part, dtype=torch.float64).reshape(-1) for part in parts])


SPECTRA = {
    "small negative tail": joined(-1e-3, uniform(150)),
    "tiny negative tail": joined(-1e-6, 1e3 * uniform(60)),
    "tail among many": joined(-1e-3, uniform(1999)),
    "dominant negative": joined(-5, 2 * uniform(100)),
    "clustered ends": joined(-1 + 1e-7 * uniform(20), 1 - 1e-5 * uniform(20, 2), 1.8 * uniform(80, 3) - 0.9),
    "wider clusters": joined(-1 + 1e-3 * uniform(20), 1 - 1e-9 * uniform(20, 2), 1.8 * uniform(80, 3) - 0.9),
    "decay": joined(1 / torch.arange(1, 301.0) ** 2, -1e-5),
    "rank one": joined(3.0, torch.zeros(40)),
    "identity": torch.ones(40, dtype=torch.float64),
    "negative identity": -torch.ones(40, dtype=torch.float64),
    "zero": torch.zeros(40, dtype=torch.float64),
    "one number": joined(-2.0),
    "two numbers": joined(-2.0, 1.0),
    "2000 even steps": torch.linspace(-1, 1, 2000, dtype=torch.float64),
    "huge": 1e200 * joined(-0.1, uniform(80)),
    "minute": 1e-200 * joined(-0.1, uniform(80)),
}


def operator(values):
    """Return v → A v for a matrix of these eigenvalues (diagonal where it is large)."""
    if len(values) > 400:
        return lambda v: values * v
    q, _ = torch.linalg.qr(double(len(values), len(values), seed=9))
    return lambda v: q @ (values * (q.T @ v))


@pytest.mark.parametrize("basis", [None, 24])
@pytest.mark.parametrize("name", SPECTRA)
def test_both_ends_to_a_millionth_of_the_radius(name, basis):
    values = SPECTRA[name]
    matvec = operator(values)
    found = extreme_eigenvalues(matvec, len(values), basis=basis, steps=400, vectors=True)
    radius = float(values.abs().max())
    low, high = found.min - float(values.min()), float(values.max()) - found.max
    assert found.converged or (name == "wider clusters" and basis)  # of 20 eigenvalues each, in a basis of 24
    assert max(low, high) <= 1e-6 * radius or not found.converged
    assert low <= found.bounds[0]
    assert high <= found.bounds[1]
    assert min(low, high) >= -1e-13 * radius  # inside the spectrum
    for value, vector, residual in zip((found.min, found.max), found.vectors, found.residuals):
        assert vector.norm().item() == pytest.approx(1)
        assert float(((matvec(vector) - value * vector) / (radius or 1)).norm() * radius) <= residual


def test_a_tail_that_small_is_found_where_the_tolerance_asks_for_it():
    values = SPECTRA["tiny negative tail"]
    found = extreme_eigenvalues(operator(values), len(values), tol=1e-12)
    assert found.min == pytest.approx(-1e-6, abs=1e-11)


@pytest.mark.parametrize("basis", [None, 20])
@pytest.mark.parametrize("steps", [2, 8, 30, 60])
def test_bounds_hold_long_before_convergence(steps, basis):
    """With a confidence of 99 % each; residuals do not."""
    inside, residual_inside, count = 0, 0, 0
    for name in ("small negative tail", "clustered ends", "decay", "dominant negative"):
        values = SPECTRA[name]
        for seed in range(15):
            generator = torch.Generator().manual_seed(seed)
            found = extreme_eigenvalues(
                lambda v: values * v, len(values), steps=steps, basis=basis, tol=1e-12, generator=generator
            )
            errors = found.min - float(values.min()), float(values.max()) - found.max
            inside += sum(error <= bound for error, bound in zip(errors, found.bounds))
            residual_inside += sum(error <= residual for error, residual in zip(errors, found.residuals))
            count += 2
    assert inside >= 0.98 * count
    if steps == 2:
        assert residual_inside < 0.98 * count


def test_bounds_say_something():
    values = SPECTRA["small negative tail"]
    found = extreme_eigenvalues(operator(values), len(values))
    assert max(found.bounds) < 1e-4
    assert extreme_eigenvalues(lambda v: values * v, len(values), steps=1).bounds == (math.inf, math.inf)


def test_stops_early_and_repeats_exactly():
    values, calls = SPECTRA["small negative tail"], []
    matvec = lambda v: calls.append(1) or values * v  # noqa: E731
    first = extreme_eigenvalues(matvec, len(values), tol=1e-3)
    assert first.steps == len(calls) < 60
    assert extreme_eigenvalues(matvec, len(values), tol=1e-3) == first
    other = extreme_eigenvalues(matvec, len(values), tol=1e-3, generator=torch.Generator().manual_seed(1))
    assert other.max != first.max
    assert other.max == pytest.approx(first.max, abs=1e-3)
    short = extreme_eigenvalues(matvec, len(values), steps=5)
    assert (short.steps, short.converged) == (5, False)
    assert max(short.residuals) > 1e-3
    assert extreme_eigenvalues(lambda v: 3 * v, 1000).steps == 1  # an invariant space after one step


def test_float32_products_end_at_their_noise():
    A = double(200, 200)
    A = (A + A.T).float()
    found = extreme_eigenvalues(lambda v: (A @ v.float()).double(), 200)
    exact = torch.linalg.eigvalsh(A.double())
    assert found.min == pytest.approx(exact[0].item(), abs=found.residuals[0])
    assert found.max == pytest.approx(exact[-1].item(), abs=found.residuals[1])
    assert found.max == pytest.approx(exact[-1].item(), rel=1e-6)
    half = extreme_eigenvalues(lambda v: A @ v, 200, dtype=torch.float32, tol=1e-4, vectors=True)
    assert half.vectors.dtype == torch.float32
    assert half.min == pytest.approx(exact[0].item(), rel=1e-4)


@pytest.mark.parametrize("basis", [None, 20])
def test_what_is_not_symmetric_is_refused(basis):
    A = double(50, 50)
    with pytest.raises(UsageError, match="not symmetric: uᵀAv and vᵀAu differ"):
        extreme_eigenvalues(lambda v: A @ v, 50, basis=basis)
    noise = torch.Generator().manual_seed(0)
    with pytest.raises(UsageError, match="no dropout"):
        extreme_eigenvalues(lambda v: v * torch.rand(50, generator=noise, dtype=v.dtype).round() + v, 50)
    with pytest.raises(UsageError, match="not symmetric"):
        extreme_eigenvalues(lambda v: A @ v, 50, method="power")
    slightly = torch.diag(uniform(50)) + 1e-7 * A
    assert extreme_eigenvalues(lambda v: slightly @ v, 50).residuals[0] > 1e-8  # and that much shows


def test_power_iteration_and_how_it_fails():
    """The paper's estimator: its second result is no λ_min where the dominant eigenvalue is negative."""
    values = SPECTRA["dominant negative"]
    found = extreme_eigenvalues(lambda v: values * v, len(values), method="power")
    assert found.steps == 40
    assert found.min == pytest.approx(-5)
    assert 1.8 < found.max < float(values.max())  # 20 steps do not reach it
    tail = SPECTRA["small negative tail"]
    missed = extreme_eigenvalues(lambda v: tail * v, len(tail), method="power")
    assert missed.min > 0  # though the truth is −1e-3
    assert missed.bounds == (math.inf, math.inf)
    assert not missed.converged
    exact = extreme_eigenvalues(operator(joined(-1, 3)), 2, method="power", steps=60, vectors=True)
    assert (exact.min, exact.max) == (pytest.approx(-1), pytest.approx(3))
    assert exact.vectors.shape == (2, 2)
    assert extreme_eigenvalues(lambda v: 0 * v, 5, method="power").residuals == (0.0, 0.0)


def test_a_real_head_on_real_features():
    """vit_nano's h of digits; a head trained for some steps; H_eff, and the Hessian in the head's parameters."""
    h, _ = digit_features(24)
    head = two_layers("gelu", 128, 4, 4)
    views = torch.stack([h, h + 0.1 * h.std() * double(24, 128)])

    def loss_of(z):
        return nt_xent_loss(z.view(2, -1, 4), temperature=0.5)

    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(head(views.flatten(0, 1))).backward()
        optimizer.step()
    rows = views[:, :2].flatten(0, 1)
    for hessian in (
        HessianOperator(lambda: loss_of(head(rows)), head),
        EffectiveHessianOperator(head, loss_of, rows),
    ):
        exact = torch.linalg.eigvalsh(hessian.dense())
        found = extreme_eigenvalues(hessian.matvec, hessian.dim)
        assert exact[0] < 0 < exact[-1]
        for value, expected, bound in zip((found.min, found.max), exact[[0, -1]].tolist(), found.bounds):
            assert value == pytest.approx(expected, abs=1e-6 * float(exact.abs().max()))
            assert abs(value - expected) <= bound


def test_refusals():
    calls = []
    with pytest.raises(UsageError, match="NaN or infinity at its product number 2"):
        extreme_eigenvalues(lambda v: calls.append(1) or v * torch.arange(5) / (0 if len(calls) > 1 else 1), 5)
    with pytest.raises(UsageError, match=r"vector of shape \[5\].*got shape \[4\]"):
        extreme_eigenvalues(lambda v: v[1:], 5)
    with pytest.raises(UsageError, match="got float"):
        extreme_eigenvalues(lambda v: 1.0, 5)
    with pytest.raises(UsageError, match="Did you mean 'lanczos'"):
        extreme_eigenvalues(lambda v: v, 5, method="lanczoz")
    for options, message in (({"steps": 0}, "steps"), ({"tol": 1.0}, "tol"), ({"basis": 2}, "basis")):
        with pytest.raises(UsageError, match=message):
            extreme_eigenvalues(lambda v: v, 5, **options)
    with pytest.raises(UsageError, match="dim"):
        extreme_eigenvalues(lambda v: v, 0)
    layer = nn.Linear(3, 3).double()
    found = extreme_eigenvalues(lambda v: layer.weight.T @ layer.weight @ v, 3)  # a graph is no trouble
    assert found.max == pytest.approx(torch.linalg.matrix_norm(layer.weight, 2).item() ** 2)
