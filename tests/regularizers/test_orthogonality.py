"""Orthogonality by the paper's formula, closed forms, its gradient, and the layer it acts on."""

import pytest
import torch
from regularizers.models import ConvNet, head_model
from torch import nn

from hfproj.errors import UsageError
from hfproj.functional import matrices
from hfproj.functional.matrices import orthogonality_gap
from hfproj.regularizers import create_regularizer
from hfproj.regularizers.orthogonality import orthogonality_penalty

SHAPES = [(3, 5), (5, 3), (4, 4), (1, 6)]


def by_definition(w, side):
    gram = w @ w.T if side == "WWt" else w.T @ w
    return torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=w.dtype), "fro")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["WWt", "WtW"])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("block", [2, 512])
def test_equals_the_definition(shape, side, squared, block, monkeypatch):
    monkeypatch.setattr(matrices, "_BLOCK", block)
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    norm = by_definition(w, side)
    expected = norm**2 if squared else norm
    value = orthogonality_gap(w, side=side, squared=squared)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(value, w)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, w)[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_auto_is_the_side_that_reaches_zero(shape):
    w = nn.init.orthogonal_(torch.empty(shape, dtype=torch.float64))
    assert orthogonality_penalty(w).item() < 1e-28
    surplus = max(shape[0] - shape[1], 0)
    torch.testing.assert_close(orthogonality_penalty(w, side="WWt").item(), float(surplus), rtol=1e-12, atol=1e-28)
    random = torch.randn(shape, dtype=torch.float64)
    side = "WtW" if shape[0] > shape[1] else "WWt"
    assert torch.equal(orthogonality_penalty(random), orthogonality_penalty(random, side=side))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["auto", "WWt", "WtW"])
def test_gradient_in_closed_form(shape, side):
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(orthogonality_penalty(w, side=side), w)
    expected = 4 * (w @ w.T - torch.eye(len(w), dtype=w.dtype)) @ w
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck_twice():
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for squared in (True, False):
        assert torch.autograd.gradcheck(lambda x: orthogonality_gap(x, squared=squared), w)
        assert torch.autograd.gradgradcheck(lambda x: orthogonality_gap(x, squared=squared), w)


def test_rotations_change_nothing():
    w = torch.randn(3, 5, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for n in w.shape)
    torch.testing.assert_close(orthogonality_penalty(left @ w @ right), orthogonality_penalty(w), rtol=1e-12, atol=0)


def test_values_at_torchs_initialisation():
    """METHODS: Linear 2048 → 128 starts near 58, 512 → 512 near 284."""
    torch.testing.assert_close(orthogonality_penalty(nn.Linear(2048, 128).weight).item(), 58.0, rtol=0.02, atol=0)
    torch.testing.assert_close(orthogonality_penalty(nn.Linear(512, 512).weight).item(), 284.0, rtol=0.02, atol=0)


@pytest.mark.parametrize(("side", "size"), [("auto", 4), ("WWt", 4), ("WtW", 6)])
def test_mean_is_over_the_entries_of_the_matrix(side, size):
    model = head_model()
    values = [create_regularizer("orthogonality", side=side, reduction=r)(model, None, None) for r in ("sum", "mean")]
    torch.testing.assert_close(values[0], values[1] * size**2)


def test_layer_it_acts_on():
    model = head_model(ConvNet(), trainable="full")
    net = model.get_base_model()
    last = net.hfproj.projection_head_modules["default"].head.last.linear.weight
    conv = net.last.weight.flatten(1)
    assert torch.equal(create_regularizer("orthogonality")(model), orthogonality_penalty(last))
    assert torch.equal(create_regularizer("orthogonality", layer="encoder")(model), orthogonality_penalty(conv))
    without = head_model(ConvNet(), head="identity", trainable="full")
    expected = orthogonality_penalty(without.get_base_model().last.weight.flatten(1))
    assert torch.equal(create_regularizer("orthogonality")(without), expected)


def test_training_by_it_alone_reaches_orthonormal_rows():
    head = nn.Linear(6, 4).double()
    term = create_regularizer("orthogonality")
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        term(head).backward()
        optimizer.step()
    assert term(head).item() < 1e-8
    torch.testing.assert_close(head.weight @ head.weight.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": "left"}, "Unknown side 'left'"),
        ({"layer": "all"}, "Unknown layer 'all'"),
        ({"reduction": "max"}, "Unknown reduction 'max'"),
        ({"sides": "auto"}, "Did you mean 'side'"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(UsageError, match=message):
        create_regularizer("orthogonality", **options)


def test_functions_refuse_unknown_names():
    with pytest.raises(UsageError, match="Unknown side"):
        orthogonality_gap(torch.eye(2), side="left")
    with pytest.raises(UsageError, match="Unknown reduction"):
        orthogonality_penalty(torch.eye(2), reduction="max")
