"""Unit rows: exact for rows of any length that float32 holds, with the derivatives of x/‖x‖."""

import pytest
import torch

from hfproj.functional.rows import unit_rows


def test_formula_and_derivatives():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(unit_rows(x), x / x.norm(dim=-1, keepdim=True), rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(unit_rows, x)
    assert torch.autograd.gradgradcheck(unit_rows, x, fast_mode=True)


@pytest.mark.parametrize("length", [1e-6, 1.0, 1e13, 1e18, 1e37])
def test_rows_of_any_length(length):
    """The gradient is orthogonal to the row, g − ⟨g, x̂⟩x̂ over its length: without the last part it would be another."""
    x = torch.randn(3, 8)
    x = (x * (length / x.norm(dim=1, keepdim=True))).requires_grad_()
    g = torch.randn(3, 8)
    (unit_rows(x) * g).sum().backward()
    u = x.detach().double() / length
    u /= u.norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit_rows(x).double(), u, rtol=0, atol=1e-6)
    expected = (g - (g * u).sum(1, keepdim=True) * u).double()
    torch.testing.assert_close(x.grad.double() * length, expected, rtol=0, atol=2e-6 if length < 1e37 else 0.1)


def test_rows_up_to_eps_are_zero():
    x = torch.tensor([[0.0, 0.0], [0.0, 1e-8], [3e-8, 4e-8], [1e-20, 0.0]], dtype=torch.float64, requires_grad=True)
    unit_rows(x).sum().backward()
    assert unit_rows(x).tolist() == [[0, 0], [0, 0], [pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]
    assert x.grad[[0, 1, 3]].count_nonzero() == 0
    assert unit_rows(torch.tensor([[torch.inf, 1.0], [torch.nan, 1.0]])).isnan().any(1).all()
