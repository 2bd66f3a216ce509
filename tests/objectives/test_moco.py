"""MoCo as its authors write it, both directions as solo-learn does, its queue, closed forms and gradcheck."""

import math

import pytest
import torch
from inputs import extreme_projections, projections, same_directions
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.objectives import create_objective
from hfproj.objectives.moco import MoCo


def small(**options):
    return MoCo(**{"out_dim": 4, "queue_size": 10, **options}).double()


def as_moco_writes_it(z_q, z_k, queue, temperature):
    """``moco/builder.py``, with the queue's unit rows as columns."""
    q, k = F.normalize(z_q, dim=1), F.normalize(z_k, dim=1)
    positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
    negative = torch.einsum("nc,ck->nk", q, queue.T)
    logits = torch.cat([positive, negative], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))


@pytest.mark.parametrize("temperature", [0.01, 0.2, 10.0])
def test_equals_moco_over_several_steps(temperature):
    objective = small(temperature=temperature)
    queue = objective.queues[0].rows.clone()
    for step in range(3):
        z, target = projections(), projections()
        loss = objective(z, target=target).loss
        expected = as_moco_writes_it(z[0], target[1], queue, temperature)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        start = 5 * step % 10
        queue[start : start + 5] = F.normalize(target[1], dim=1)
        torch.testing.assert_close(objective.queues[0].rows, queue, rtol=0, atol=1e-15)


def test_symmetric_equals_solo_learn():
    objective = small(symmetric=True)
    first, second = (queue.rows.clone() for queue in objective.queues)
    assert not torch.equal(first, second)
    z, target = projections(), projections()
    expected = as_moco_writes_it(z[0], target[1], second, 0.2) + as_moco_writes_it(z[1], target[0], first, 0.2)
    torch.testing.assert_close(objective(z, target=target).loss, expected / 2, rtol=1e-12, atol=0)
    for queue, keys in zip(objective.queues, target):
        torch.testing.assert_close(queue.rows[:5], F.normalize(keys, dim=1), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("symmetric", "pairs"), [(False, [(0, 1), (2, 1)]), (True, [(1, 0), (2, 0), (0, 1), (2, 1)])])
def test_more_views_are_queries(symmetric, pairs):
    objective, z, target = small(symmetric=symmetric), projections(3), projections()
    queues = {view: queue.rows.clone() for view, queue in zip(objective.key_views, objective.queues)}
    loss, terms = objective(z, target=target)
    losses = [as_moco_writes_it(z[q], target[k], queues[k], 0.2) for q, k in pairs]
    torch.testing.assert_close(loss, sum(losses) / len(losses), rtol=1e-12, atol=0)
    cosines = [F.cosine_similarity(z[q], target[k], dim=1).mean() for q, k in pairs]
    torch.testing.assert_close(terms["positive_cosine"], sum(cosines) / len(cosines), rtol=1e-12, atol=1e-14)


def test_collapsed_projections():
    objective = small(temperature=0.01).eval()
    objective.queues[0].rows.fill_(0.5)  # unit rows of ones
    z = torch.ones(2, 5, 4, dtype=torch.float64, requires_grad=True)
    loss = objective(z, target=z.detach()).loss
    loss.backward()
    torch.testing.assert_close(loss.item(), math.log(11), rtol=1e-12, atol=0)
    assert z.grad.abs().max() < 1e-12


def test_only_queries_have_a_gradient_and_only_training_moves_the_queue():
    objective = small()
    z, target = projections().requires_grad_(), projections().requires_grad_()
    before = objective.queues[0].rows.clone()
    objective.eval()(z, target=target)
    assert torch.equal(objective.queues[0].rows, before)
    loss, terms = objective.train()(z, target=target)
    assert not torch.equal(objective.queues[0].rows, before)
    loss.backward()  # with the queue as it was
    assert z.grad[0].any()
    assert not z.grad[1].any()
    assert target.grad is None
    assert not terms["positive_cosine"].requires_grad


def test_invariances():
    objective, z, target = small(queue_size=14).eval(), projections(2, 7), projections(2, 7)
    loss = objective(z, target=target).loss
    scaled = same_directions(z)[0]
    torch.testing.assert_close(objective(scaled, target=target).loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(objective(z, target=3 * target).loss, loss, rtol=1e-12, atol=0)
    order = torch.randperm(7)
    torch.testing.assert_close(objective(z[:, order], target=target[:, order]).loss, loss, rtol=1e-12, atol=0)
    objective.queues[0].rows.copy_(objective.queues[0].rows.flip(0))
    torch.testing.assert_close(objective(z, target=target).loss, loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradcheck(symmetric):
    objective, target = small(symmetric=symmetric).eval(), projections(2, 3)
    z = projections(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: objective(z, target=target).loss, z)


@pytest.mark.parametrize("temperature", [0.01, 0.2, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes(temperature, dtype):
    z, target = extreme_projections(dtype), extreme_projections(dtype).detach()
    objective = MoCo(temperature=temperature, out_dim=4, queue_size=12, symmetric=True).eval()
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(z, target=target).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert z.grad.isfinite().all()
    assert not z.grad[:, 0].any()
    exact = objective.double()(z.detach().double(), target=target.double()).loss
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


def test_refused():
    z = torch.randn(2, 5, 4)
    with pytest.raises(UsageError, match=r"MoCo needs 'target'.*EMA teacher"):
        MoCo(out_dim=4, queue_size=10)(z)
    with pytest.raises(UsageError, match=r"target of shape \[2, 5, 4\].*got \[1, 5, 4\]"):
        MoCo(out_dim=4, queue_size=10)(z, target=z[:1])
    with pytest.raises(UsageError, match="pass out_dim=4"):
        MoCo(queue_size=10)(z, target=z)
    with pytest.raises(UsageError, match=r"no whole number of batches of 5.*queue_size=10"):
        MoCo(out_dim=4, queue_size=12)(z, target=z)
    assert MoCo(out_dim=4, queue_size=12).eval()(z, target=z).loss.isfinite()  # nothing is enqueued
    with pytest.raises(UsageError, match=r"at least 2 views.*got 1"):
        MoCo(out_dim=4, queue_size=10)(z[:1], target=z)
    with pytest.raises(UsageError, match="queue_size to be at least 1, got 0"):
        create_objective("moco", queue_size=0)
    with pytest.raises(UsageError, match="temperature"):
        create_objective("moco", temperature=0.0)
    with pytest.raises(UsageError, match="ema_momentum to be two numbers from 0 to 1"):
        create_objective("moco", ema_momentum=[0.9, 1.1])


def test_anatomy():
    objective = create_objective("moco", out_dim=8, queue_size=64)
    assert (objective.target_of, objective.target_views, objective.ema_momentum) == ("projection", 2, (0.999, 0.999))
    assert "queue_size=64" in repr(objective)
    assert set(objective.state_dict()) == {"queues.0.rows", "queues.0.pointer", "queues.0.filled"}
