"""Zero-CL as its two official scripts write it, closed forms, invariances, and what the gradient skips."""

import pytest
import torch
from inputs import extreme_projections, projections
from torch import nn

from hfproj.errors import UsageError
from hfproj.objectives import create_objective
from hfproj.objectives.zero_cl import ZeroCL, zero_cl_loss


def zca(x, covariance, eps):
    u, s, _ = torch.linalg.svd(covariance)
    return (u @ torch.diag(1 / torch.sqrt(s + eps)) @ u.T).detach() @ x.T


def standardization(x, dim):
    return (x - x.mean(dim, keepdim=True)) / (x.std(dim, keepdim=True) + 1e-4)


def fea_loss(z1, z2):
    """``ImageNet-100/main.py --mode fea``."""
    z1, z2 = (standardization(z, 0) for z in (z1, z2))
    z1, z2 = (zca(z, z.T @ z / len(z), 0.01).T for z in (z1, z2))
    return ((z1.T @ z2 / len(z1)).diagonal() - 1).pow(2).sum()


def ins_loss(z1, z2):
    """``--mode ins``."""
    hidden = z1.shape[1]
    z1, z2 = (standardization(z, -1).T for z in (z1, z2))
    z1, z2 = (zca(z, z.T @ z / hidden, 0.01).T for z in (z1, z2))
    return ((z1.T @ z2 / hidden).diagonal() - 1).pow(2).sum()


def both_losses(z1, z2):
    return fea_loss(z1, z2) + ins_loss(z1, z2)


def cifar_loss(z1, z2):
    """``cifar/main.py --whiten true``."""
    n, k = z1.shape
    bn = nn.BatchNorm1d(k, affine=False).double()
    z1, z2 = bn(z1), bn(z2)
    z1, z2 = (zca(z, 0.9 * (z.T @ z / (n - 1)) + 0.1 * torch.eye(k), 1e-5).T for z in (z1, z2))
    return ((z1.T @ z2 / n).diagonal() - 1).pow(2).sum()


FORMS = [
    ({}, fea_loss),
    ({"mode": "instance"}, ins_loss),
    ({"mode": "both"}, both_losses),
    ({"variant": "cifar"}, cifar_loss),
]
every_form = pytest.mark.parametrize(("options", "formula"), FORMS)


@every_form
@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (2, 3)])
def test_equals_the_official_scripts(options, formula, shape):
    z = projections(2, *shape).requires_grad_()
    results = []
    for loss in (ZeroCL(**options)(z).loss, formula(*z)):
        results.append((loss.detach(), *torch.autograd.grad(loss, z)))  # none through the whitening matrices
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


def test_equal_views():
    """METHODS facts: 0 in the ImageNet form as eps goes to 0; k/N² in the CIFAR form with exact whitening."""
    n, k = 10, 3
    z = projections(1, n, k).expand(2, n, k)
    assert zero_cl_loss(z, eps=1e-14).item() < 1e-10
    exact = zero_cl_loss(z, variant="cifar", shrinkage=0.0, eps=0.0)
    torch.testing.assert_close(exact.item(), k / n**2, rtol=1e-8, atol=0)


@pytest.mark.parametrize("variant", ["imagenet", "cifar"])
@pytest.mark.parametrize(("batch", "out_dim"), [(5, 256), (129, 32)])
def test_collapse_to_any_point_costs_one_per_feature(variant, batch, out_dim):
    """In float32, where the mean of equal rows is not exact; dividing what it leaves by 1e-4 gave gradients of 15."""
    z = (100 * torch.randn(1, 1, out_dim)).expand(2, batch, out_dim).clone().requires_grad_()
    loss = create_objective("zero_cl", variant=variant)(z).loss
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(float(out_dim)), rtol=1e-5, atol=0)
    assert z.grad.abs().max() < 1e-6


def test_unrelated_views_cost_one_per_feature():
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    z = torch.stack([signs, signs.flip(1)])  # feature j of one view is orthogonal to feature j of the other
    torch.testing.assert_close(zero_cl_loss(z, eps=1e-3).item(), 2.0, rtol=1e-12, atol=0)


@every_form
def test_collapsed_batches_are_finite(options, formula):
    z = torch.full((2, 6, 4), 0.5, requires_grad=True)
    loss = ZeroCL(**options)(z).loss
    loss.backward()
    assert loss.item() == {"both": 10, "instance": 6}.get(options.get("mode"), 4)  # one per feature, one per image
    assert z.grad.isfinite().all()


@every_form
def test_invariances(options, formula):
    objective, z = ZeroCL(**options), projections(2, 9, 4)
    for same in (z.flip(0), z[:, torch.randperm(9)], z[..., torch.randperm(4)], -z):
        torch.testing.assert_close(objective(same).loss, objective(z).loss, rtol=1e-9, atol=0)


def test_scales_and_shifts_of_features_do_not_matter():
    z = 1e6 * projections(2, 9, 4)
    moved = z * torch.tensor([1.0, 2.0, 3.0, 0.5]) + 1e6
    torch.testing.assert_close(zero_cl_loss(moved), zero_cl_loss(z), rtol=1e-6, atol=0)


@every_form
def test_gradient_with_whitening_held_still(options, formula, monkeypatch):
    """Finite differences agree once the matrices are constants."""
    from hfproj.objectives import zero_cl

    matrices = {}

    def first_time(covariance, *, eps):
        key = covariance.shape
        if key not in matrices:
            matrices[key] = original(covariance, eps=eps)
        return matrices[key]

    original = zero_cl.zca_matrix
    monkeypatch.setattr(zero_cl, "zca_matrix", first_time)
    z = projections(2, 5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ZeroCL(**options)(z).loss, z)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_are_finite(options, formula, dtype):
    z = extreme_projections(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = ZeroCL(**options)(z)
    loss.backward()
    assert loss.dtype == torch.float32
    assert z.grad.isfinite().all()
    torch.testing.assert_close(loss.double(), formula(*z.detach().double()), rtol=1e-3, atol=1e-3)
    assert not any(term.requires_grad for term in terms.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "featur"}, "Did you mean 'feature'"),
        ({"variant": "imagenette"}, "Did you mean 'imagenet'"),
        ({"variant": "cifar", "mode": "both"}, "mode='feature' only, got 'both'"),
        ({"eps": 0.0}, r"positive number .0\.01, that of None, is usual"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(UsageError, match=message):
        create_objective("zero_cl", **options)


def test_batches_that_cannot_work():
    with pytest.raises(UsageError, match="needs 2 views"):
        ZeroCL()(projections(3))
    with pytest.raises(UsageError, match="at least 2 images, got 1 over all processes"):
        ZeroCL()(projections(2, 1))
    with pytest.raises(UsageError, match=r"out_dim to be at least 2 for mode='both', got 1"):
        ZeroCL(mode="both")(projections(2, 4, 1))
