"""DCL and DCLW as lightly writes them, closed forms, the identity with NT-Xent, invariances and gradcheck."""

import math

import pytest
import torch
from inputs import extreme_projections, projections, same_directions
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.objectives import create_objective
from hfproj.objectives.dcl import DCL, dcl_loss, dcl_weights
from hfproj.objectives.nt_xent import nt_xent_loss

both_forms = pytest.mark.parametrize("weighted", [False, True])


def as_lightly_writes_it(z_a, z_b, temperature, sigma=None):
    """Equation 6: anchors of one view, negatives of both without the diagonals; then the other direction."""
    z_a, z_b = F.normalize(z_a, dim=1), F.normalize(z_b, dim=1)
    n = len(z_a)
    diagonal = torch.eye(n, dtype=torch.bool)
    losses = []
    for x, y in [(z_a, z_b), (z_b, z_a)]:
        within, across = x @ x.T / temperature, x @ y.T / temperature
        weight = 1 if sigma is None else 2 - n * F.softmax((x * y).sum(1) / sigma, dim=0)
        negatives = torch.cat([within[~diagonal].view(n, -1), across[~diagonal].view(n, -1)], dim=1)
        losses.append((-across[diagonal] * weight + torch.logsumexp(negatives, dim=1)).mean())
    return sum(losses) / 2


@both_forms
@pytest.mark.parametrize("temperature", [0.01, 0.1, 10.0])
def test_equals_lightly(weighted, temperature):
    z = projections()
    loss = DCL(temperature=temperature, weighted=weighted, concentration=0.3)(z).loss
    expected = as_lightly_writes_it(*z, temperature, sigma=0.3 if weighted else None)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


@both_forms
def test_more_views_anchor_by_anchor(weighted):
    z, temperature, sigma = projections(3, 4), 0.2, 0.5
    u = F.normalize(z, dim=-1)
    total = 0.0
    for a in range(3):
        for i in range(4):
            negatives = [(u[a, i] @ u[b, j] / temperature).exp() for b in range(3) for j in range(4) if j != i]
            pulls = []
            for b in {0, 1, 2} - {a}:
                softmax = F.softmax((u[a] * u[b]).sum(1) / sigma, dim=0)
                pulls.append((2 - 4 * softmax[i] if weighted else 1) * (u[a, i] @ u[b, i]) / temperature)
            total += sum(negatives).log() - sum(pulls) / 2
    loss = dcl_loss(z, temperature=temperature, weighted=weighted, concentration=sigma)
    torch.testing.assert_close(loss, total / 12, rtol=1e-12, atol=0)


def test_identity_with_nt_xent():
    """METHODS fact: per anchor, NT-Xent − DCL = log1p(exp(S_pos − logsumexp(negatives)))."""
    z, temperature = projections(), 0.2
    rows = F.normalize(z, dim=-1).flatten(0, 1)
    similarity = rows @ rows.T / temperature
    positive = similarity.diagonal(5).repeat(2)
    image = torch.arange(5).repeat(2)
    negatives = similarity.masked_fill(image[:, None] == image, -torch.inf).logsumexp(1)
    gap = nt_xent_loss(z, temperature=temperature) - dcl_loss(z, temperature=temperature)
    torch.testing.assert_close(gap, torch.log1p((positive - negatives).exp()).mean(), rtol=1e-12, atol=0)


def test_weights_have_mean_one_and_no_gradient():
    z = projections(3, 6).requires_grad_()
    weights = dcl_weights(z, concentration=0.2)
    assert not weights.requires_grad
    torch.testing.assert_close(weights.mean(2), torch.ones(3, 3, dtype=torch.float64), rtol=0, atol=1e-14)
    assert weights.std() > 0.1
    # the gradient is that of the formula with constant weights
    temperature = 0.1
    (grad,) = torch.autograd.grad(dcl_loss(z, temperature=temperature, weighted=True), z)
    u = F.normalize(z, dim=-1)
    cosines = (u[:, None] * u).sum(-1)
    pull = ((dcl_weights(z) - 1) * cosines)[~torch.eye(3, dtype=torch.bool)].mean() / temperature
    (expected,) = torch.autograd.grad(dcl_loss(z, temperature=temperature) - pull, z)
    torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-12)


@both_forms
def test_collapsed_projections(weighted):
    z = torch.ones(3, 4, 8, dtype=torch.float64, requires_grad=True)
    loss = DCL(weighted=weighted)(z).loss
    loss.backward()
    torch.testing.assert_close(loss.item(), math.log(9), rtol=1e-12, atol=0)
    assert z.grad.abs().max() < 1e-12


def test_loss_may_be_negative():
    z = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    torch.testing.assert_close(DCL(temperature=0.1)(z).loss.item(), math.log(10) - 10, rtol=1e-13, atol=0)


@both_forms
def test_invariances(weighted):
    objective, z = DCL(weighted=weighted), projections(3, 7)
    for same in [*same_directions(z), z.flip(0)]:
        torch.testing.assert_close(objective(same).loss, objective(z).loss, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_gradcheck(temperature):
    objective, z = DCL(temperature=temperature), projections(3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: objective(z).loss, z)


@both_forms
@pytest.mark.parametrize("temperature", [0.01, 0.1, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes(weighted, temperature, dtype):
    z = extreme_projections(dtype)
    objective = DCL(temperature=temperature, weighted=weighted, concentration=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(z).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert z.grad.isfinite().all()
    assert not z.grad[:, 0].any()
    torch.testing.assert_close(loss.double(), objective(z.detach().double()).loss, rtol=2e-5, atol=2e-5)


def test_registry_knows_dclw():
    z = projections()
    assert create_objective("dclw")(z).loss == DCL(weighted=True)(z).loss
    assert "concentration=0.5" in repr(create_objective("dclw"))


def test_refused():
    with pytest.raises(UsageError, match=r"at least 2 views.*got 1"):
        DCL()(torch.randn(1, 8, 4))
    with pytest.raises(UsageError, match=r"DCL tells images.*at least 2 of them, got 1"):
        DCL()(torch.randn(2, 1, 4))
    with pytest.raises(UsageError, match=r"concentration to be a positive number \(0.5 is usual\), got 0.0"):
        create_objective("dcl", concentration=0.0)
    with pytest.raises(UsageError, match="temperature"):
        create_objective("dclw", temperature=math.inf)
