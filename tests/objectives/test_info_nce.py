"""InfoNCE by cross entropy as DirectCLR writes it, closed forms, invariances and gradcheck."""

import math

import pytest
import torch
from inputs import extreme_projections, projections, same_directions
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.objectives import create_objective
from hfproj.objectives.info_nce import InfoNCE, info_nce_loss


def as_directclr_writes_it(z_a, z_b, temperature):
    z_a, z_b = F.normalize(z_a, dim=-1), F.normalize(z_b, dim=-1)
    logits = z_a @ z_b.T / temperature
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5, 10.0])
def test_equals_directclr(temperature):
    z = projections()
    loss = InfoNCE(temperature=temperature)(z).loss
    torch.testing.assert_close(loss, as_directclr_writes_it(*z, temperature), rtol=1e-13, atol=1e-14)


def test_one_direction_has_the_first_view_as_anchors():
    z = projections()
    expected = F.cross_entropy(F.normalize(z[0], dim=-1) @ F.normalize(z[1], dim=-1).T / 0.1, torch.arange(5))
    torch.testing.assert_close(InfoNCE(symmetric=False)(z).loss, expected, rtol=1e-13, atol=0)
    both = (info_nce_loss(z, symmetric=False) + info_nce_loss(z.flip(0), symmetric=False)) / 2
    torch.testing.assert_close(InfoNCE()(z).loss, both, rtol=1e-13, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_more_views_are_averaged_over_pairs(symmetric):
    z = projections(3)
    pairs = [info_nce_loss(z[[a, b]], symmetric=symmetric) for a, b in [(0, 1), (0, 2), (1, 2)]]
    torch.testing.assert_close(InfoNCE(symmetric=symmetric)(z).loss, sum(pairs) / 3, rtol=1e-13, atol=0)


def test_closed_forms():
    z = torch.ones(3, 4, 8, dtype=torch.float64, requires_grad=True)
    loss, terms = InfoNCE(temperature=0.01)(z)
    loss.backward()
    torch.testing.assert_close(loss.item(), math.log(4), rtol=1e-12, atol=0)
    assert terms["positive_cosine"].item() == pytest.approx(1)
    assert z.grad.abs().max() < 1e-12
    orthogonal = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    expected = math.log1p(5 * math.exp(-2))
    torch.testing.assert_close(info_nce_loss(orthogonal, temperature=0.5).item(), expected, rtol=1e-13, atol=0)


def test_invariances():
    z = projections(3, 7)
    for same in [*same_directions(z), z.flip(0)]:
        torch.testing.assert_close(InfoNCE()(same).loss, InfoNCE()(z).loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradcheck(symmetric):
    objective, z = InfoNCE(symmetric=symmetric), projections(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: objective(z).loss, z)
    assert torch.autograd.gradgradcheck(lambda z: objective(z).loss, z)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes(temperature, dtype):
    z = extreme_projections(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = InfoNCE(temperature=temperature)(z)
    loss.backward()
    assert loss.dtype == torch.float32
    assert z.grad.isfinite().all()
    assert not z.grad[:, 0].any()
    exact = InfoNCE(temperature=temperature)(z.detach().double())
    torch.testing.assert_close(loss.double(), exact.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms["positive_cosine"].double(), exact.terms["positive_cosine"], rtol=0, atol=1e-6)


def test_positive_cosine_has_no_gradient():
    z = projections().requires_grad_()
    cosine = InfoNCE()(z).terms["positive_cosine"]
    assert not cosine.requires_grad
    torch.testing.assert_close(cosine, F.cosine_similarity(*z.detach(), dim=-1).mean(), rtol=1e-12, atol=1e-14)


def test_refused():
    with pytest.raises(UsageError, match=r"at least 2 views.*got 1"):
        InfoNCE()(torch.randn(1, 8, 4))
    with pytest.raises(UsageError, match=r"InfoNCE tells images.*at least 2 of them, got 1"):
        InfoNCE()(torch.randn(2, 1, 4))
    with pytest.raises(UsageError, match=r"temperature to be a positive number \(0.05 to 1 is usual\), got 0.0"):
        create_objective("info_nce", temperature=0.0)
