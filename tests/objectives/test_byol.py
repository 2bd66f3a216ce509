"""BYOL as solo-learn writes it, closed forms, invariances, gradcheck, and where no gradient may go."""

import pytest
import torch
from inputs import extreme_projections, projections, same_directions
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.objectives import create_objective
from hfproj.objectives.byol import BYOL, byol_loss


def solo_learn(p, target):
    """Every pair of a large crop of the teacher and another view of the student."""
    losses = []
    for v1 in range(len(target)):
        for v2 in range(len(p)):
            if v1 != v2:
                losses.append(2 - 2 * F.cosine_similarity(p[v2], target[v1].detach(), dim=-1).mean())
    return losses


@pytest.mark.parametrize("views", [2, 3, 5])
def test_equals_solo_learn(views):
    p, target = projections(views), projections()
    losses = solo_learn(p, target)
    expected = sum(losses) if views == 2 else 2 * sum(losses) / len(losses)
    loss, terms = BYOL()(p, prediction=p, target=target)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms["positive_cosine"], 1 - loss / 4, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("factor", "expected"), [(2.0, 0.0), (-0.5, 8.0)])
def test_aligned_and_opposite(factor, expected):
    z = projections()
    assert abs(byol_loss(z, factor * z.flip(0)).item() - expected) < 1e-12


def test_orthogonal():
    rows = torch.eye(4).view(2, 2, 4)
    assert byol_loss(rows, rows).item() == 4


def test_gradient_reaches_predictions_only():
    z, p, target = (projections().requires_grad_() for _ in range(3))
    BYOL()(z, prediction=p, target=target).loss.backward()
    assert p.grad.abs().min() > 0
    assert z.grad is None
    assert target.grad is None


def test_only_two_target_views_count():
    p, target = projections(4), projections(4)
    expected = BYOL()(p, prediction=p, target=target[:2]).loss
    torch.testing.assert_close(BYOL()(p, prediction=p, target=target).loss, expected, rtol=0, atol=0)


def test_invariances():
    p, target = projections(3), projections()
    expected = byol_loss(p, target)
    for same in same_directions(torch.cat([p, target])):
        torch.testing.assert_close(byol_loss(same[:3], same[3:]), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(byol_loss(p[:2].flip(0), target.flip(0)), byol_loss(p[:2], target), rtol=1e-14, atol=0)


def test_gradcheck():
    target = projections()
    assert torch.autograd.gradcheck(lambda p: byol_loss(p, target), projections(3).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_are_finite(dtype):
    p, target = extreme_projections(dtype), extreme_projections(dtype).detach()
    with torch.autocast("cpu", torch.bfloat16):
        loss = BYOL()(p, prediction=p, target=target).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert p.grad.isfinite().all()
    assert not p.grad[:, 0].any()
    torch.testing.assert_close(loss.double(), byol_loss(p.detach().double(), target.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("momentum", [(0.9,), (0.9, 1.1), (-0.1, 1.0), (0.9, 0.95, 1.0)])
def test_options_that_cannot_work(momentum):
    with pytest.raises(UsageError, match="two numbers from 0 to 1"):
        create_objective("byol", ema_momentum=momentum)


def test_batches_that_cannot_work():
    z = projections()
    with pytest.raises(UsageError, match=r"needs 'prediction'.*give the config a predictor"):
        BYOL()(z, target=z)
    with pytest.raises(UsageError, match=r"needs 'target'.*EMA teacher"):
        BYOL()(z, prediction=z)
    with pytest.raises(UsageError, match=r"prediction of shape \[2, 5, 4\].*got \[1, 5, 4\]"):
        BYOL()(z, prediction=z[:1], target=z)
    with pytest.raises(UsageError, match=r"target of shape \[2, 5, 4\].*got \[2, 5, 3\]"):
        BYOL()(z, prediction=z, target=z[..., :3])
    with pytest.raises(UsageError, match="at least 2 views"):
        BYOL()(z[:1], prediction=z[:1], target=z[:1])


def test_anatomy():
    objective = create_objective("byol", ema_momentum=[0.996, 1.0])  # a list, as from JSON
    assert (objective.target_of, objective.target_views, objective.ema_momentum) == ("projection", 2, (0.996, 1.0))
    assert not list(objective.parameters())
