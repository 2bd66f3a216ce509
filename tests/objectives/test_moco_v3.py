"""MoCo v3 as its authors write it, its value at collapse, invariances and gradcheck."""

import math

import pytest
import torch
from inputs import extreme_projections, projections, same_directions
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.objectives import create_objective
from hfproj.objectives.moco_v3 import MoCoV3


def contrastive(q, k, temperature):
    """``ctr_loss`` of ``moco/builder.py`` on one process."""
    logits = torch.einsum("nc,mc->nm", [F.normalize(q, dim=1), F.normalize(k, dim=1)]) / temperature
    return F.cross_entropy(logits, torch.arange(len(q))) * (2 * temperature)


@pytest.mark.parametrize("temperature", [0.01, 0.2, 1.0, 10.0])
def test_equals_the_official_code(temperature):
    z, p, target = projections(), projections(), projections()
    loss, terms = MoCoV3(temperature=temperature)(z, prediction=p, target=target)
    expected = contrastive(p[0], target[1], temperature) + contrastive(p[1], target[0], temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    cosine = F.cosine_similarity(p, target.flip(0), dim=-1).mean()
    torch.testing.assert_close(terms["positive_cosine"], cosine, rtol=1e-12, atol=1e-14)


def test_more_views_are_queries():
    p, target = projections(4), projections()
    pairs = [(1, 0), (2, 0), (3, 0), (0, 1), (2, 1), (3, 1)]
    expected = 2 * sum(contrastive(p[q], target[k], 0.2) for q, k in pairs) / 6
    torch.testing.assert_close(MoCoV3()(p, prediction=p, target=target).loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [0.01, 0.2, 1.0])
def test_collapsed_projections(temperature):
    """METHODS fact: 4τ log N."""
    p = torch.ones(2, 5, 8, dtype=torch.float64, requires_grad=True)
    loss = MoCoV3(temperature=temperature)(p, prediction=p, target=p.detach()).loss
    loss.backward()
    torch.testing.assert_close(loss.item(), 4 * temperature * math.log(5), rtol=1e-12, atol=0)
    assert p.grad.abs().max() < 1e-12


def test_gradient_scale_is_that_of_any_temperature():
    """What 2τ is for: far from a match the softmax is one-hot and the gradient has no 1/τ."""
    target = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    norms = []
    for temperature in (0.02, 0.05):
        p = target.roll(1, 1).clone().requires_grad_()
        MoCoV3(temperature=temperature)(p, prediction=p, target=target).loss.backward()
        norms.append(p.grad.norm())
    torch.testing.assert_close(*norms, rtol=1e-6, atol=0)


def test_only_predictions_have_a_gradient():
    z, p, target = (projections().requires_grad_() for _ in range(3))
    MoCoV3()(z, prediction=p, target=target).loss.backward()
    assert z.grad is None
    assert target.grad is None
    assert p.grad.any()


def test_invariances():
    objective, p, target = MoCoV3(), projections(2, 7), projections(2, 7)
    loss = objective(p, prediction=p, target=target).loss
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    order = torch.randperm(7)
    for q, k in [
        (same_directions(p)[0], same_directions(target)[0]),
        (p @ rotation, target @ rotation),
        (p[:, order], target[:, order]),
        (p.flip(0), target.flip(0)),
    ]:
        torch.testing.assert_close(objective(p, prediction=q, target=k).loss, loss, rtol=1e-12, atol=0)


def test_gradcheck():
    p, target = projections(2, 3).requires_grad_(), projections(2, 3)
    assert torch.autograd.gradcheck(lambda p: MoCoV3()(p, prediction=p, target=target).loss, p)


@pytest.mark.parametrize("temperature", [0.01, 0.2, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes(temperature, dtype):
    p, target = extreme_projections(dtype), extreme_projections(dtype).detach()
    objective = MoCoV3(temperature=temperature)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(p, prediction=p, target=target).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert p.grad.isfinite().all()
    assert not p.grad[:, 0].any()
    exact = p.detach().double()
    exact = objective(exact, prediction=exact, target=target.double()).loss
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


def test_refused():
    z = torch.randn(2, 5, 4)
    with pytest.raises(UsageError, match=r"MoCoV3 needs 'prediction'.*predictor"):
        MoCoV3()(z, target=z)
    with pytest.raises(UsageError, match=r"MoCoV3 needs 'target'.*EMA teacher"):
        MoCoV3()(z, prediction=z)
    with pytest.raises(UsageError, match=r"prediction of shape \[2, 5, 4\].*got \[2, 5, 3\]"):
        MoCoV3()(z, prediction=z[..., :3], target=z)
    with pytest.raises(UsageError, match=r"prediction of shape \[2, 5, 4\].*got \[3, 5, 4\]"):
        MoCoV3()(z, prediction=z[[0, 1, 0]], target=z)
    with pytest.raises(UsageError, match=r"target of shape \[2, 5, 4\].*got \[2, 4, 4\]"):
        MoCoV3()(z, prediction=z, target=z[:, :4])
    with pytest.raises(UsageError, match=r"MoCoV3 tells images"):
        MoCoV3()(z[:, :1], prediction=z[:, :1], target=z[:, :1])
    with pytest.raises(UsageError, match="temperature"):
        create_objective("moco_v3", temperature=-1.0)
    with pytest.raises(UsageError, match="ema_momentum to be two numbers from 0 to 1"):
        create_objective("moco_v3", ema_momentum=[0.99])
