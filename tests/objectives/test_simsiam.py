"""SimSiam as the official code writes it, the closed form of its Hessian, invariances and gradcheck."""

import math

import pytest
import torch
from inputs import extreme_projections, projections, same_directions
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.objectives import create_objective
from hfproj.objectives.simsiam import SimSiam, simsiam_loss


def test_equals_the_official_code():
    z, p = projections().requires_grad_(), projections()
    loss, terms = SimSiam()(z, prediction=p)
    cosine = [F.cosine_similarity(p[i], z[1 - i].detach(), dim=1).mean() for i in range(2)]
    torch.testing.assert_close(loss, -sum(cosine) * 0.5, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(terms["positive_cosine"], -loss, rtol=0, atol=0)


@pytest.mark.parametrize("views", [3, 5])
def test_more_views_are_the_mean_over_solo_learns_pairs(views):
    z, p = projections(views), projections(views)
    pairs = [-F.cosine_similarity(p[v], z[i], dim=1).mean() for i in range(2) for v in range(views) if v != i]
    torch.testing.assert_close(simsiam_loss(p, z), sum(pairs) / len(pairs), rtol=1e-12, atol=0)


@pytest.mark.parametrize("factor", [3.0, -3.0])
def test_aligned_and_opposite(factor):
    z = projections()
    torch.testing.assert_close(simsiam_loss(factor * z.flip(0), z).item(), -factor / 3, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("angle", "eigenvalues"), [(0.0, [0, 1, 1]), (math.pi, [-1, -1, 0]), (1.0, None)])
def test_hessian_in_the_prediction(angle, eigenvalues):
    """METHODS fact: (1/r²) [u t̂ᵀ + t̂ uᵀ + s I − 3 s u uᵀ], indefinite between alignment and opposition."""
    u = torch.tensor([math.cos(angle), math.sin(angle), 0.0], dtype=torch.float64)
    t = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    r, s = 2.0, u @ t

    def both_pairs(p):
        return simsiam_loss(p.expand(2, 1, 3), t.expand(2, 1, 3))

    hessian = torch.autograd.functional.hessian(both_pairs, r * u)
    expected = (torch.outer(u, t) + torch.outer(t, u) + s * torch.eye(3).double() - 3 * s * torch.outer(u, u)) / r**2
    torch.testing.assert_close(hessian, expected, rtol=1e-10, atol=1e-12)
    if eigenvalues is None:
        root = math.sqrt(s**2 + 4 * (1 - s**2))
        eigenvalues = sorted([(s - root) / 2, s, (s + root) / 2])
    spectrum = torch.linalg.eigvalsh(hessian) * r**2
    torch.testing.assert_close(spectrum, torch.tensor(eigenvalues, dtype=torch.float64), rtol=0, atol=1e-10)


def test_gradient_reaches_predictions_only():
    z, p = projections().requires_grad_(), projections().requires_grad_()
    SimSiam()(z, prediction=p).loss.backward()
    assert p.grad.abs().min() > 0
    assert z.grad is None


def test_invariances():
    z, p = projections(3), projections(3)
    for same in same_directions(torch.cat([p, z])):
        torch.testing.assert_close(simsiam_loss(same[:3], same[3:]), simsiam_loss(p, z), rtol=1e-12, atol=1e-15)


def test_gradcheck():
    z = projections(3)
    assert torch.autograd.gradcheck(lambda p: simsiam_loss(p, z), projections(3).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_are_finite(dtype):
    p, z = extreme_projections(dtype), extreme_projections(dtype).detach()
    with torch.autocast("cpu", torch.bfloat16):
        loss = SimSiam()(z, prediction=p).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert p.grad.isfinite().all()
    assert not p.grad[:, 0].any()
    torch.testing.assert_close(loss.double(), simsiam_loss(p.detach().double(), z.double()), rtol=1e-5, atol=1e-6)


def test_refused():
    z = projections()
    with pytest.raises(UsageError, match=r"needs 'prediction'.*give the config a predictor"):
        create_objective("simsiam")(z)
    with pytest.raises(UsageError, match=r"prediction of shape \[2, 5, 4\].*got \[2, 5, 3\]"):
        SimSiam()(z, prediction=z[..., :3])
    with pytest.raises(UsageError, match="at least 2 views"):
        SimSiam()(z[:1], prediction=z[:1])
    with pytest.raises(UsageError, match="Unknown option"):
        create_objective("simsiam", temperature=0.1)
