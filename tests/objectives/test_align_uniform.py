"""Alignment and uniformity as Wang & Isola write them, closed forms, invariances and gradcheck."""

import math

import pytest
import torch
from inputs import extreme_projections, projections, same_directions
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.functional.distributions import uniformity
from hfproj.objectives import create_objective
from hfproj.objectives.align_uniform import AlignUniform, alignment


def as_wang_and_isola_write_it(z_a, z_b, alpha, t, weight):
    x, y = F.normalize(z_a, dim=1), F.normalize(z_b, dim=1)
    align = (x - y).norm(p=2, dim=1).pow(alpha).mean()
    uniform = [torch.pdist(v, p=2).pow(2).mul(-t).exp().mean().log() for v in (x, y)]
    return align + weight * sum(uniform) / 2


@pytest.mark.parametrize(("alpha", "t", "weight"), [(2.0, 2.0, 1.0), (1.0, 1.0, 0.3), (3.0, 5.0, 2.0)])
def test_equals_wang_and_isola(alpha, t, weight):
    z = projections()
    loss, terms = AlignUniform(exponent=alpha, kernel_scale=t, uniformity_weight=weight)(z)
    torch.testing.assert_close(loss, as_wang_and_isola_write_it(*z, alpha, t, weight), rtol=1e-12, atol=0)
    torch.testing.assert_close(terms["alignment"] + weight * terms["uniformity"], loss, rtol=1e-13, atol=0)


def test_more_views():
    z = projections(3)
    align = sum(alignment(z[[a, b]]) for a, b in [(0, 1), (0, 2), (1, 2)]) / 3
    uniform = sum(uniformity(view) for view in z) / 3
    torch.testing.assert_close(AlignUniform()(z).loss, align + uniform, rtol=1e-13, atol=0)


@pytest.mark.parametrize("block_rows", [1, 3, 6, 7, 100])
def test_blocks_equal_the_whole(block_rows):
    f = projections(1, 7)[0].requires_grad_()
    results = []
    for rows in (block_rows, 1024):
        value = uniformity(f, block_rows=rows)
        results.append((value.detach(), *torch.autograd.grad(value, f)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


def test_closed_forms():
    z = torch.ones(2, 4, 8, dtype=torch.float64, requires_grad=True)
    loss = AlignUniform()(z).loss  # collapsed: both terms 0, and stationary
    loss.backward()
    assert abs(loss.item()) < 1e-14
    assert z.grad.abs().max() < 1e-14
    orthonormal = torch.eye(6, dtype=torch.float64)
    assert uniformity(orthonormal, kernel_scale=3.0).item() == pytest.approx(-6, rel=1e-14)
    antipodes = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert uniformity(antipodes, kernel_scale=2.0).item() == pytest.approx(-8, rel=1e-14)
    assert alignment(torch.stack([antipodes, -antipodes]), exponent=3.0).item() == pytest.approx(8, rel=1e-14)
    half = torch.cat([antipodes, antipodes])  # pairs: 2 equal, 4 opposite
    assert uniformity(half, kernel_scale=1.0).item() == pytest.approx(math.log((2 + 4 * math.exp(-4)) / 6), rel=1e-13)


def test_uniform_rows_in_many_dimensions():
    f = torch.randn(500, 64, dtype=torch.float64)
    assert uniformity(f).item() == pytest.approx(-4 + 8 / 64, abs=0.01)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_equal_views_have_a_gradient(alpha):
    z = projections(1).expand(2, 5, 4).clone().requires_grad_()
    value = alignment(z, exponent=alpha)
    value.backward()
    assert value.item() == 0
    assert not z.grad.any()


def test_invariances():
    z, objective = projections(3, 7), AlignUniform(exponent=1.5)
    for same in [*same_directions(z), z.flip(0)]:
        torch.testing.assert_close(objective(same).loss, objective(z).loss, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_gradcheck(alpha):
    objective = AlignUniform(exponent=alpha)
    assert torch.autograd.gradcheck(lambda z: objective(z).loss, projections(2, 3).requires_grad_())


@pytest.mark.parametrize("kernel_scale", [0.1, 2.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes(kernel_scale, dtype):
    z = extreme_projections(dtype)
    objective = AlignUniform(kernel_scale=kernel_scale, exponent=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(z).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert z.grad.isfinite().all()
    assert not z.grad[:, 0].any()
    torch.testing.assert_close(loss.double(), objective(z.detach().double()).loss, rtol=1e-4, atol=1e-4)


def test_far_rows_do_not_underflow():
    """exp(−1000 · 4) is 0 in float32, and its logarithm −∞."""
    f = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    value = uniformity(f, kernel_scale=1000.0)
    value.backward()
    assert value.item() == -4000
    assert f.grad.isfinite().all()


def test_refused():
    with pytest.raises(UsageError, match="needs at least 2, got 1"):
        uniformity(torch.ones(1, 4))
    with pytest.raises(UsageError, match=r"at least 2 views.*got 1"):
        AlignUniform()(torch.randn(1, 5, 4))
    with pytest.raises(UsageError, match="AlignUniform tells images"):
        AlignUniform()(torch.randn(2, 1, 4))
    for options, message in [
        ({"exponent": 0.5}, "exponent to be at least 1"),
        ({"exponent": -1.0}, "exponent to be a positive"),
        ({"kernel_scale": 0.0}, "kernel_scale to be"),
        ({"uniformity_weight": math.nan}, "uniformity_weight to be"),
    ]:
        with pytest.raises(UsageError, match=message):
            create_objective("align_uniform", **options)
