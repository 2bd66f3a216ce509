"""Matrix entropy and mutual information by the definition, closed forms, bounds, gradcheck and collapsed rows."""

import math

import numpy as np
import pytest
import torch
from regularizers.models import features
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.functional.distributions import matrix_entropy, matrix_mutual_information
from hfproj.regularizers import create_regularizer

ALPHAS = [0.5, 1.0, 1.5, 2.0, 3.0]
every_alpha = pytest.mark.parametrize("alpha", ALPHAS)


def entropy_by_definition(k, alpha):
    """Of a kernel matrix with unit diagonal, by NumPy."""
    eigenvalues = np.linalg.eigvalsh(k.numpy() / len(k))
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    if alpha == 1:
        return -(eigenvalues * np.log(eigenvalues)).sum()
    return np.log((eigenvalues**alpha).sum()) / (1 - alpha)


def kernel(f):
    return F.cosine_similarity(f[:, None], f[None], dim=-1)


def information_by_definition(h, z, alpha):
    parts = [entropy_by_definition(k, alpha) for k in (kernel(h), kernel(z), kernel(h) * kernel(z))]
    return parts[0] + parts[1] - parts[2]


def official_alpha_2(h, z):
    """PKU-ML/Projector_Theory, ``methods/simclr.py``, for α = 2: traces of matrix powers."""

    def entropy(k):
        return -torch.log2(torch.trace(torch.matrix_power(k / len(k), 2)))

    a, b = F.normalize(h, dim=1), F.normalize(z, dim=1)
    return (entropy(a @ a.T) + entropy(b @ b.T) - entropy((a @ a.T) * (b @ b.T))) * math.log(2)


@every_alpha
@pytest.mark.parametrize("shape", [(6, 3), (4, 9)])
def test_equals_the_definition(alpha, shape):
    h, z = torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], 5, dtype=torch.float64)
    tolerance = 1e-4 if alpha < 1 else 1e-10  # the rounding of zero eigenvalues shows below 1
    assert matrix_entropy(h, alpha=alpha).item() == pytest.approx(
        entropy_by_definition(kernel(h), alpha), abs=tolerance
    )
    value = matrix_mutual_information(h, z, alpha=alpha).item()
    assert value == pytest.approx(information_by_definition(h, z, alpha), abs=tolerance)


def test_equals_the_official_code():
    h, z = (torch.randn(10, d, dtype=torch.float64, requires_grad=True) for d in (7, 3))
    ours, theirs = matrix_mutual_information(h, z), official_alpha_2(h, z)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    for a, b in zip(torch.autograd.grad(ours, (h, z)), torch.autograd.grad(theirs, (h, z))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@every_alpha
def test_orthogonal_and_constant_rows(alpha):
    orthogonal = 3 * torch.eye(6, dtype=torch.float64)
    assert matrix_entropy(orthogonal, alpha=alpha).item() == pytest.approx(math.log(6), abs=1e-12)
    assert matrix_mutual_information(orthogonal, orthogonal, alpha=alpha).item() == pytest.approx(
        math.log(6), abs=1e-12
    )
    constant = torch.ones(6, 4, dtype=torch.float64)
    tolerance = 1e-6 if alpha < 1 else 1e-12
    assert matrix_entropy(constant, alpha=alpha).item() == pytest.approx(0, abs=tolerance)
    for other in (constant, orthogonal, torch.randn(6, 3, dtype=torch.float64)):
        assert matrix_mutual_information(constant, other, alpha=alpha).item() == pytest.approx(0, abs=tolerance)


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, 0.693), (2.0, -0.236), (3.0, -0.709)])
def test_information_can_be_negative(alpha, expected):
    """METHODS: 16 rows h_i = e_{a_i}, z_i = e_{b_i} with (a, b) over (0, 1..8) and (1..8, 0)."""
    eye = torch.eye(9, dtype=torch.float64)
    h = eye[[0] * 8 + list(range(1, 9))]
    z = eye[list(range(1, 9)) + [0] * 8]
    assert matrix_mutual_information(h, z, alpha=alpha).item() == pytest.approx(expected, abs=5e-4)


def test_second_entropy_is_the_frobenius_norm():
    f = torch.randn(7, 4, dtype=torch.float64)
    expected = -(kernel(f) / 7).square().sum().log()
    torch.testing.assert_close(matrix_entropy(f, alpha=2.0), expected, rtol=1e-12, atol=0)


@every_alpha
def test_bounds(alpha):
    for seed in range(20):
        torch.manual_seed(seed)
        h, z = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
        value = matrix_mutual_information(h, z, alpha=alpha)
        assert value <= min(matrix_entropy(h, alpha=alpha), matrix_entropy(z, alpha=alpha)) + 1e-12
        if alpha == 1:
            assert value >= -1e-12


@every_alpha
def test_invariances(alpha):
    h, z = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
    value = matrix_mutual_information(h, z, alpha=alpha)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    order = torch.randperm(8)
    scale = torch.logspace(-3, 3, 8, dtype=torch.float64)[:, None]
    for a, b in [(h @ rotation, z), (h[order], z[order]), (h * scale, z), (z, h)]:
        torch.testing.assert_close(matrix_mutual_information(a, b, alpha=alpha), value, rtol=1e-10, atol=1e-12)


@every_alpha
def test_gradcheck(alpha):
    h, z = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in "hz")
    assert torch.autograd.gradcheck(lambda h, z: matrix_mutual_information(h, z, alpha=alpha), (h, z))
    assert torch.autograd.gradcheck(lambda h: matrix_entropy(h, alpha=alpha), h)


def test_rows_without_a_direction_are_one_direction():
    zero = torch.zeros(5, 3)
    assert matrix_entropy(zero).item() == pytest.approx(0, abs=1e-6)
    assert matrix_mutual_information(zero, torch.randn(5, 3)).item() == pytest.approx(0, abs=1e-6)
    rows = torch.eye(4)
    rows[2:] = 0
    expected = -math.log((1 + 1 + 4) / 16)
    assert matrix_entropy(rows).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("views", [2, 3])
def test_regularizer_is_over_all_views(views):
    h, z = features(views), features(views, dim=3)
    value = create_regularizer("bottleneck", alpha=1.0)(None, h, z)
    expected = information_by_definition(h.reshape(-1, 8), z.reshape(-1, 3), 1)
    assert value.item() == pytest.approx(expected, abs=1e-10)


def test_gradient_reaches_both():
    h, z = features().requires_grad_(), features(dim=3).requires_grad_()
    create_regularizer("bottleneck")(None, h, z).backward()
    assert h.grad.any()
    assert z.grad.any()


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_orders_that_cannot_work(alpha):
    for refused in (
        lambda: create_regularizer("bottleneck", alpha=alpha),
        lambda: matrix_entropy(torch.eye(3), alpha=alpha),
        lambda: matrix_mutual_information(torch.eye(3), torch.eye(3), alpha=alpha),
    ):
        with pytest.raises(UsageError, match="alpha, the order of the entropy, to be a positive number"):
            refused()


def test_rows_must_agree():
    with pytest.raises(UsageError, match="got 6 rows of h and 4 of z"):
        matrix_mutual_information(torch.randn(6, 3), torch.randn(4, 3))
