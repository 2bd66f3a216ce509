"""NNCLR as solo-learn writes it, its neighbours and queue, closed forms, invariances and gradcheck."""

import math

import pytest
import torch
from inputs import extreme_projections, projections, same_directions
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.objectives import create_objective
from hfproj.objectives.info_nce import info_nce_loss
from hfproj.objectives.nnclr import NNCLR, nearest_rows, nnclr_loss


def small(**options):
    return NNCLR(**{"out_dim": 4, "queue_size": 10, **options}).double()


def as_solo_writes_it(nearest, p, temperature):
    logits = F.normalize(nearest, dim=-1) @ F.normalize(p, dim=-1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(p)))


def neighbours_of(z, queue):
    return queue[torch.cdist(F.normalize(z, dim=-1), queue).argmin(1)]  # by distance: the same as by cosine


@pytest.mark.parametrize("temperature", [0.01, 0.2, 10.0])
def test_equals_solo_learn_over_several_steps(temperature):
    objective = small(temperature=temperature)
    queue = objective.queue.rows.clone()
    for step in range(3):
        z, p = projections(), projections()
        loss, terms = objective(z, prediction=p)
        nearest = [neighbours_of(view, queue) for view in z]
        expected = as_solo_writes_it(nearest[0], p[1], temperature) + as_solo_writes_it(nearest[1], p[0], temperature)
        torch.testing.assert_close(loss, expected / 2, rtol=1e-12, atol=1e-13)
        nearest = torch.stack(nearest)
        for name, a, b in [("positive_cosine", p, nearest.flip(0)), ("neighbour_cosine", z, nearest)]:
            cosine = F.cosine_similarity(a, b, dim=-1).mean()
            torch.testing.assert_close(terms[name], cosine, rtol=1e-12, atol=1e-14)
        start = 5 * step % 10
        queue[start : start + 5] = F.normalize(z[0], dim=1)
        torch.testing.assert_close(objective.queue.rows, queue, rtol=0, atol=1e-15)


def test_batch_as_the_bank_is_info_nce():
    """METHODS fact: each row is its own neighbour, and the loss is InfoNCE(ẑ_a, p̂_b)."""
    z, p = projections(2, 8), projections(2, 8)
    nearest = torch.stack([nearest_rows(view, F.normalize(view, dim=-1)) for view in z])
    torch.testing.assert_close(nearest, F.normalize(z, dim=-1), rtol=0, atol=1e-15)
    pairs = [info_nce_loss(torch.stack([z[a], p[1 - a]]), temperature=0.2, symmetric=False) for a in (0, 1)]
    torch.testing.assert_close(nnclr_loss(nearest, p), sum(pairs) / 2, rtol=1e-12, atol=0)


def test_more_views_predict_the_neighbours_of_the_first_two():
    objective, z, p = small(), projections(4), projections(4)
    nearest = [neighbours_of(view, objective.queue.rows.clone()) for view in z[:2]]
    pairs = [(1, 0), (2, 0), (3, 0), (0, 1), (2, 1), (3, 1)]
    expected = sum(as_solo_writes_it(nearest[n], p[q], 0.2) for q, n in pairs) / 6
    torch.testing.assert_close(objective(z, prediction=p).loss, expected, rtol=1e-12, atol=0)


def test_closed_forms():
    orthonormal = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    expected = math.log1p(5 * math.exp(-2))
    assert nnclr_loss(orthonormal, orthonormal, temperature=0.5).item() == pytest.approx(expected, rel=1e-13)
    p = torch.ones(2, 5, 4, dtype=torch.float64, requires_grad=True)
    loss = small(temperature=0.01)(projections(), prediction=p).loss  # collapsed predictions
    assert loss.item() == pytest.approx(math.log(5), rel=1e-12)


def test_only_predictions_have_a_gradient_and_only_training_moves_the_queue():
    objective, z, p = small(), projections().requires_grad_(), projections().requires_grad_()
    before = objective.queue.rows.clone()
    objective.eval()(z, prediction=p)
    assert torch.equal(objective.queue.rows, before)
    loss, terms = objective.train()(z, prediction=p)
    assert not torch.equal(objective.queue.rows, before)
    loss.backward()
    assert z.grad is None
    assert p.grad.any()
    assert not any(term.requires_grad for term in terms.values())


def test_invariances():
    objective, z, p = small(queue_size=14).eval(), projections(2, 7), projections(2, 7)
    loss = objective(z, prediction=p).loss
    order = torch.randperm(7)
    for a, b in [
        (same_directions(z)[0], same_directions(p)[0]),
        (z[:, order], p[:, order]),
        (z.flip(0), p.flip(0)),
    ]:
        torch.testing.assert_close(objective(a, prediction=b).loss, loss, rtol=1e-12, atol=0)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    objective.queue.rows.copy_(objective.queue.rows @ rotation)
    torch.testing.assert_close(objective(z @ rotation, prediction=p @ rotation).loss, loss, rtol=1e-12, atol=0)


def test_gradcheck():
    objective, z, p = small().eval(), projections(2, 3), projections(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: objective(z, prediction=p).loss, p)


@pytest.mark.parametrize("temperature", [0.01, 0.2, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes(temperature, dtype):
    z, p = extreme_projections(dtype).detach(), extreme_projections(dtype)
    objective = NNCLR(temperature=temperature, out_dim=4, queue_size=12).eval()
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(z, prediction=p).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert p.grad.isfinite().all()
    assert not p.grad[:, 0].any()
    exact = objective.double()(z.double(), prediction=p.detach().double()).loss
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


def test_refused():
    z = torch.randn(2, 5, 4)
    with pytest.raises(UsageError, match=r"NNCLR needs 'prediction'.*predictor"):
        NNCLR(out_dim=4, queue_size=10)(z)
    with pytest.raises(UsageError, match=r"prediction of shape \[2, 5, 4\].*got \[2, 5, 3\]"):
        NNCLR(out_dim=4, queue_size=10)(z, prediction=z[..., :3])
    with pytest.raises(UsageError, match="pass out_dim=4"):
        NNCLR(queue_size=10)(z, prediction=z)
    with pytest.raises(UsageError, match=r"no whole number of batches of 5.*queue_size=10"):
        NNCLR(out_dim=4, queue_size=12)(z, prediction=z)
    with pytest.raises(UsageError, match=r"NNCLR tells images"):
        NNCLR(out_dim=4, queue_size=10)(z[:, :1], prediction=z[:, :1])
    with pytest.raises(UsageError, match="out_dim to be at least 1, got 0"):
        create_objective("nnclr", out_dim=0)
