"""SIGReg by complex characteristic functions, its closed forms, an invariance and gradcheck."""

import pytest
import torch

from hfproj.errors import UsageError
from hfproj.functional.distributions import random_directions, sigreg


def by_characteristic_functions(z, directions, knots, t_max):
    """Epps-Pulley per direction, integrated over negative and positive frequencies."""
    t = torch.linspace(-t_max, t_max, 2 * knots - 1, dtype=z.dtype)
    gaussian = torch.exp(-(t**2) / 2)
    values = []
    for direction in directions.T:
        empirical = torch.exp(1j * (z @ direction)[:, None] * t).mean(0)
        values.append(len(z) * torch.trapezoid(gaussian * (empirical - gaussian).abs() ** 2, t))
    return torch.stack(values).mean()


@pytest.mark.parametrize(("knots", "t_max"), [(17, 3.0), (2, 1.0), (9, 5.0)])
@pytest.mark.parametrize("rows", [1, 2, 12])
def test_equals_the_statistic_by_complex_numbers(rows, knots, t_max):
    z = torch.randn(rows, 5, dtype=torch.float64)
    directions = random_directions(z, 7)
    expected = by_characteristic_functions(z, directions, knots, t_max)
    torch.testing.assert_close(
        sigreg(z, directions=directions, knots=knots, t_max=t_max), expected, rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("rows", [16, 128])
def test_expectation_under_the_standard_gaussian(rows):
    """Σ w φ (1 − φ²), about 1.052, whatever the number of rows."""
    t = torch.linspace(-3, 3, 33, dtype=torch.float64)
    gaussian = torch.exp(-(t**2) / 2)
    expected = torch.trapezoid(gaussian * (1 - gaussian**2), t).item()
    assert abs(expected - 1.052) < 5e-4
    values = []
    for _ in range(100):
        z = torch.randn(rows, 32, dtype=torch.float64)
        values.append(sigreg(z, directions=random_directions(z, 32)))
    assert abs(torch.stack(values).mean().item() - expected) < 0.06


def test_collapse_at_zero_is_a_saddle():
    n, k = 6, 2
    z = torch.zeros(n, k, dtype=torch.float64, requires_grad=True)
    directions = random_directions(z, 5)
    value = sigreg(z, directions=directions)
    (grad,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(value.item(), 0.40205 * n, rtol=0, atol=1e-5 * n)
    assert not grad.any()
    hessian = torch.autograd.functional.hessian(lambda z: sigreg(z, directions=directions), z).view(n * k, n * k)
    assert torch.linalg.eigvalsh(hessian)[0] < -1e-2


def test_rotating_rows_with_directions_changes_nothing():
    z = torch.randn(8, 4, dtype=torch.float64)
    directions, rotation = random_directions(z, 6), torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    expected = sigreg(z, directions=directions)
    for rows, columns in (
        (z @ rotation, rotation.T @ directions),
        (z[torch.randperm(8)], directions),
        (-z, directions),
    ):
        torch.testing.assert_close(sigreg(rows, directions=columns), expected, rtol=1e-12, atol=0)


def test_gradcheck():
    z = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    directions = random_directions(z, 4)
    assert torch.autograd.gradcheck(lambda z: sigreg(z, directions=directions), z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_are_finite(dtype):
    z = torch.randn(6, 4)
    z[0], z[1], z[2] = 0, z[3], 1e4
    z = z.to(dtype).requires_grad_()
    directions = random_directions(z, 16)
    with torch.autocast("cpu", torch.bfloat16):
        value = sigreg(z, directions=directions)
    value.backward()
    assert value.dtype == directions.dtype == torch.float32
    assert z.grad.isfinite().all()
    torch.testing.assert_close(
        value.double(), sigreg(z.detach().double(), directions=directions.double()), rtol=1e-2, atol=0
    )


def test_directions_are_unit_and_follow_the_generator():
    z = torch.zeros(2, 6, dtype=torch.float64)
    first, again, other = (random_directions(z, 500, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first.shape == (6, 500)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(500, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.mean(1).abs().max() < 0.1


def test_refused():
    z, directions = torch.zeros(4, 3), torch.eye(3)
    with pytest.raises(UsageError, match=r"at least 2 knots.*knots=1"):
        sigreg(z, directions=directions, knots=1)
    with pytest.raises(UsageError, match=r"positive t_max.*t_max=0\.0"):
        sigreg(z, directions=directions, t_max=0.0)
    with pytest.raises(UsageError, match=r"at least 1 slice.*got 0"):
        random_directions(z, 0)
