"""W-MSE as the official code writes it, closed forms, invariances, gradcheck, and refusal of what can't be whitened."""

import pytest
import torch
from inputs import projections
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.objectives import create_objective
from hfproj.objectives.base import Step
from hfproj.objectives.w_mse import WMSE, w_mse_loss


def official(samples, order, w_size, eps, normalise):
    """``methods/w_mse.py``: whiten by the inverse factor, sub-batch by sub-batch; sum over pairs of views."""

    def whiten(x):
        centred = (x - x.mean(0)).T
        covariance = centred @ centred.T / (centred.shape[1] - 1)
        covariance = (1 - eps) * covariance + eps * torch.eye(len(covariance), dtype=x.dtype)
        return (torch.linalg.inv(torch.linalg.cholesky(covariance)) @ centred).T

    def norm_mse(x0, x1):
        return 2 - 2 * (F.normalize(x0) * F.normalize(x1)).sum(dim=-1).mean()

    z = torch.empty_like(samples)
    for part in order.view(-1, w_size):
        for view in range(len(samples)):
            z[view, part] = whiten(samples[view, part])
    loss_f = norm_mse if normalise else F.mse_loss
    pairs = [loss_f(z[i], z[j]) for i in range(len(z)) for j in range(i + 1, len(z))]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize(("views", "w_iter"), [(2, 1), (3, 2)])
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("l2_normalise", [True, False])
def test_equals_the_official_code(views, w_iter, eps, l2_normalise):
    z = projections(views, 16, 3).requires_grad_()
    step = Step.at(1, 2, 0.0)
    orders = [torch.randperm(16, generator=step.generator) for _ in range(w_iter)]
    objective = WMSE(w_size=8, w_iter=w_iter, eps=eps, l2_normalise=l2_normalise)
    expected = sum(official(z, order, 8, eps, l2_normalise) for order in orders) / w_iter
    results = []
    for loss in (objective(z, step=Step.at(1, 2, 0.5)).loss, expected):
        results.append((loss.detach(), *torch.autograd.grad(loss, z)))  # through the whitening of all views
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("l2_normalise", [True, False])
def test_whitening_undoes_scales_and_shifts_and_triangular_maps(l2_normalise):
    z = projections(1, 12, 3)[0]
    triangular = torch.tensor([[2.0, 1, -3], [0, 0.1, 1], [0, 0, 5]], dtype=torch.float64)
    views = torch.stack([z, 3 * z + 1, z @ triangular - 2])
    assert abs(w_mse_loss(views, w_size=6, l2_normalise=l2_normalise).item()) < 1e-12


def test_opposite_views():
    z = projections(1, 8, 3)
    views = torch.cat([z, -z])
    assert abs(w_mse_loss(views, w_size=8).item() - 4) < 1e-12
    # entries: the mean of (2 z̃)², with variances of 1 over 7
    torch.testing.assert_close(w_mse_loss(views, w_size=8, l2_normalise=False).item(), 4 * 7 / 8, rtol=1e-12, atol=0)


def test_order_of_images_does_not_matter_within_a_sub_batch():
    z = projections(3, 12, 3)
    order = torch.cat([torch.randperm(6), 6 + torch.randperm(6)])
    expected = w_mse_loss(z, w_size=6)
    for same in (z[:, order], z.flip(0)):
        torch.testing.assert_close(w_mse_loss(same, w_size=6), expected, rtol=1e-11, atol=0)


def test_cuts_change_from_step_to_step_and_follow_it():
    z, objective = projections(2, 16, 3), WMSE(w_size=8)
    first, again, later = (objective(z, step=Step.at(0, s, 0.0)).loss.item() for s in (0, 0, 1))
    assert first == again != later


def test_whole_batch():
    z = projections(2, 10, 3)
    expected = official(z, torch.arange(10), 10, 0.0, True)
    torch.testing.assert_close(WMSE(w_size=None)(z).loss, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("l2_normalise", [True, False])
def test_gradcheck(l2_normalise):
    z = projections(2, 8, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: w_mse_loss(z, w_size=4, eps=0.1, l2_normalise=l2_normalise), z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_zero_and_duplicated_rows(dtype):
    z = torch.randn(2, 16, 4)
    z[:, 0] = 0
    z[:, 1] = z[:, 2]
    z[:, 4] *= 1e3
    z = z.to(dtype).requires_grad_()
    step = (Step.at(0, 0, 0.0), Step.at(0, 0, 0.0))
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = WMSE(w_size=16)(z, step=step[0])
    loss.backward()
    assert loss.dtype == torch.float32
    assert z.grad.isfinite().all()
    torch.testing.assert_close(
        loss.double(), WMSE(w_size=16)(z.detach().double(), step=step[1]).loss, rtol=1e-5, atol=0
    )
    assert not terms["positive_cosine"].requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounding_of_equal_rows_is_no_spread(dtype):
    z = (5 + torch.rand(4) + torch.finfo(dtype).eps * torch.randn(2, 64, 4)).to(dtype)
    assert (z != z[:, :1]).any(1).all()  # by the last digit
    with pytest.raises(UsageError, match="have collapsed"):
        WMSE(w_size=None)(z)


def test_collapse_is_refused_or_mended():
    z = torch.ones(2, 16, 3)
    with pytest.raises(UsageError, match=r"16 rows in 3 dimensions is singular.*have collapsed.*eps=1e-3"):
        WMSE(w_size=16)(z)
    for point in (z, torch.randn(3).expand(2, 33, 3), 100 * torch.randn(3).expand(2, 33, 3)):
        assert WMSE(w_size=None, eps=1e-3)(point).loss.item() == 2  # no direction is left to agree on


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_size": 1}, "w_size to be at least 2"),
        ({"w_iter": 0}, "w_iter to be at least 1"),
        ({"eps": 1.0}, "eps to be from 0 to below 1"),
        ({"eps": -0.1}, r"got -0\.1"),
        ({"w_sise": 8}, "Did you mean 'w_size'"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(UsageError, match=message):
        create_objective("w_mse", **options)


def test_batches_that_cannot_work():
    with pytest.raises(UsageError, match=r"w_size=8: take w_size=10 or more, or a head with out_dim=4 or less"):
        WMSE(w_size=8)(projections(2, 16, 5))
    with pytest.raises(UsageError, match=r"w_size=8 images, and 12 .* no multiple.*drop the last"):
        WMSE(w_size=8)(projections(2, 12, 4))
    with pytest.raises(UsageError, match="w_size=5: take w_size=6"):
        WMSE(w_size=None)(projections(2, 5, 3))
    with pytest.raises(UsageError, match="at least 2 views"):
        WMSE(w_size=8)(projections(1, 8, 4))
