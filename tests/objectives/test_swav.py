"""SwAV by the official loop over crops, queue included; closed forms, invariances and gradcheck; frozen prototypes."""

import math

import pytest
import torch
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.functional.assignments import sinkhorn
from hfproj.objectives import create_objective
from hfproj.objectives.base import Step
from hfproj.objectives.swav import SwAV, swav_loss

K, DIM = 5, 3


def unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def batch(views=4, images=8):
    """Prototypes, projections of any length, and their scores."""
    prototypes, z = unit(K, DIM), 3 * torch.randn(views, images, DIM, dtype=torch.float64)
    return prototypes, z, F.normalize(z, dim=-1) @ prototypes.T


def official_codes(scores, epsilon=0.05):
    q = (scores / epsilon).exp().T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True)
        q /= len(q)
        q /= q.sum(0, keepdim=True)
        q /= q.shape[1]
    return (q * q.shape[1]).T


def officially(scores, assigned=2, temperature=0.1, queued=None):
    """The loop of main_swav.py; `queued`: scores of the queue's rows for each assigned crop."""
    loss = 0
    for i in range(assigned):
        rows = scores[i].detach()
        if queued is not None:
            rows = torch.cat((queued[i], rows))
        q = official_codes(rows)[-len(scores[i]) :]
        others = [v for v in range(len(scores)) if v != i]
        loss -= sum(torch.mean(torch.sum(q * F.log_softmax(scores[v] / temperature, dim=1), dim=1)) for v in others) / (
            len(scores) - 1
        )
    return loss / assigned


@pytest.mark.parametrize(("views", "assigned"), [(2, 2), (5, 2), (3, 1), (3, 3)])
def test_equals_the_official_loop(views, assigned):
    _, z, scores = batch(views)
    loss, terms = SwAV(assigned_views=assigned)(z, scores=scores)
    torch.testing.assert_close(loss, officially(scores, assigned), rtol=1e-12, atol=0)
    codes = torch.stack([official_codes(s) for s in scores[:assigned]])
    torch.testing.assert_close(terms["code_entropy"], torch.distributions.Categorical(codes).entropy().mean())
    torch.testing.assert_close(terms["kl"], loss - terms["code_entropy"])


def test_two_views_are_solo_learns():
    """The mean over ordered pairs of views, with a temperature of its own."""
    _, z, scores = batch(2)
    pairs = [
        -torch.mean(torch.sum(official_codes(scores[a]) * torch.log_softmax(scores[b] / 0.2, dim=1), dim=1))
        for a, b in ((0, 1), (1, 0))
    ]
    torch.testing.assert_close(SwAV(temperature=0.2)(z, scores=scores).loss, sum(pairs) / 2, rtol=1e-12, atol=0)


def test_closed_forms():
    z = torch.ones(3, 6, DIM, dtype=torch.float64)
    for scores in (torch.zeros(3, 6, K, dtype=torch.float64), torch.full((3, 6, K), 0.9, dtype=torch.float64)):
        loss, terms = SwAV()(z, scores=scores)
        assert loss.item() == pytest.approx(math.log(K), abs=1e-14)
        assert terms["kl"].item() == pytest.approx(0, abs=1e-14)
    # Collapsed on one prototype: codes are uniform all the same, so the loss is well above log K.
    scores = torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64).repeat(2, 6, 1)
    expected = -(scores / 0.1).log_softmax(-1).mean()
    torch.testing.assert_close(SwAV()(z[:2], scores=scores).loss, expected, rtol=1e-12, atol=0)
    # Every image at a prototype of its own, in both views: codes and predictions are the same one-hot rows.
    scores = torch.eye(K, dtype=torch.float64).expand(2, K, K)
    loss = SwAV(temperature=0.01, epsilon=0.01)(z[:2, :K], scores=scores).loss
    assert 0 <= loss.item() < 1e-30


def test_invariances():
    _, z, scores = batch()
    loss = SwAV()(z, scores=scores).loss
    images, order = torch.randperm(8), torch.randperm(K)
    for same in (scores[:, images], scores[..., order], scores[[1, 0, 3, 2]], scores + 0.5):
        torch.testing.assert_close(SwAV()(z, scores=same).loss, loss, rtol=1e-12, atol=0)


def test_gradcheck_with_codes_held_fixed():
    """Codes carry no gradient, which finite differences of the objective itself could not know."""
    _, z, scores = batch(3, 4)
    codes = torch.stack([sinkhorn(s) for s in scores[:2]])
    assert torch.autograd.gradcheck(lambda s: swav_loss(s, codes), scores.requires_grad_())
    expected = torch.autograd.grad(officially(scores), scores)[0]
    found = torch.autograd.grad(SwAV()(z, scores=scores).loss, scores)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def at(epoch):
    return Step.at(0, 0, epoch)


def test_queue_is_the_official_one():
    """It fills from its epoch on, takes part once full, and is scored with the prototypes of that step."""
    module = SwAV(queue_size=16, out_dim=DIM, queue_start_epoch=2.0).double()
    past = []
    for number, epoch in enumerate([0.0, 1.9, 2.0, 2.1, 2.2, 2.3, 2.4]):
        prototypes, z, scores = batch(3)
        queued = None
        if number >= 4:  # two batches of 8 have been pushed
            rows = torch.cat(past[-2:], 1)
            queued = rows @ prototypes.T
        loss = module(z, scores=scores, prototypes=prototypes, step=at(epoch)).loss
        torch.testing.assert_close(loss, officially(scores, queued=queued), rtol=1e-10, atol=0)
        if epoch >= 2:
            past.append(F.normalize(z[:2], dim=-1))
    for queue, rows in zip(module.queues, torch.cat(past[-2:], 1)):
        torch.testing.assert_close(queue.rows.roll(-int(queue.pointer), 0), rows)
    assert (officially(scores) - loss).abs() > 1e-3


def test_queue_rests_outside_training():
    module = SwAV(queue_size=8, out_dim=DIM, queue_start_epoch=0.0).double().eval()
    prototypes, z, scores = batch()
    module(z, scores=scores, prototypes=prototypes, step=at(3.0))
    assert [int(queue.filled) for queue in module.queues] == [0, 0]
    module.train()(z, scores=scores, prototypes=prototypes, step=at(3.0))
    assert [int(queue.filled) for queue in module.queues] == [8, 8]


def test_queue_size_must_hold_whole_batches():
    module = SwAV(queue_size=12, out_dim=DIM, queue_start_epoch=0.0).double()
    prototypes, z, scores = batch()
    with pytest.raises(UsageError, match="queue_size=8"):
        module(z, scores=scores, prototypes=prototypes, step=at(0.0))
    with pytest.raises(UsageError, match=r"needs 'prototypes'.*pass prototypes="):
        module(z, scores=scores, step=at(0.0))
    with pytest.raises(UsageError, match="needs 'step'"):
        module(z, scores=scores, prototypes=prototypes)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_are_finite(temperature, dtype):
    scores = unit(3, 6, DIM, dtype=torch.float32) @ unit(K, DIM, dtype=torch.float32).T
    scores[:, 0] = 0  # a zero row has no cosine
    scores[:, 1] = scores[:, 2]
    scores[:, 3] = -1
    scores = scores.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = SwAV(temperature=temperature, epsilon=temperature)(torch.zeros(3, 6, DIM), scores=scores)
    loss.backward()
    assert loss.dtype == torch.float32
    assert scores.grad.isfinite().all()
    assert all(t.isfinite() and not t.requires_grad for t in terms.values())
    exact = SwAV(temperature=temperature, epsilon=temperature)(torch.zeros(3, 6, DIM), scores=scores.double()).loss
    torch.testing.assert_close(loss.double(), exact, rtol=2e-4, atol=1e-5)


def test_prototypes_are_frozen_in_the_first_epochs():
    module = SwAV(freeze_prototypes_epochs=2.0)
    assert [module.frozen(at(epoch)) for epoch in (0.0, 1.99, 2.0)] == [{"prototypes"}, {"prototypes"}, set()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature to be a positive number"),
        ({"epsilon": math.nan}, "epsilon to be a positive number"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations to be at least 1"),
        ({"assigned_views": 0}, "assigned_views to be at least 1"),
        ({"queue_size": -1}, "queue_size to be at least 0"),
        ({"queue_start_epoch": -1.0}, "queue_start_epoch to be at least 0"),
        ({"freeze_prototypes_epochs": -2.0}, "freeze_prototypes_epochs to be at least 0"),
        ({"epsilonn": 0.1}, "Did you mean 'epsilon'"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(UsageError, match=message):
        create_objective("swav", **options)


def test_refused():
    _, z, scores = batch(2)
    with pytest.raises(UsageError, match=r"needs at least 3 views.*got 2"):
        SwAV(assigned_views=3)(z, scores=scores)
    with pytest.raises(UsageError, match=r"needs 'scores'.*ProjectionHeadConfig\(prototypes="):
        SwAV()(z)


def test_anatomy():
    module = create_objective("swav")
    assert (module.views, module.needs, module.state_dict()) == ((2, None), {"scores"}, {})
    module = create_objective("swav", queue_size=16, out_dim=DIM, assigned_views=3)
    assert (module.views, module.needs) == ((3, None), {"scores", "prototypes", "step"})
    assert not list(module.parameters())
    rows = [queue.rows for queue in module.queues]
    assert [tuple(r.shape) for r in rows] == [(16, DIM)] * 3
    assert not torch.equal(rows[0], rows[1])
