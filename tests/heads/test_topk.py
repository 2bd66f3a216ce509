"""The sparse projector: its formula row by row, where gradients flow, and the count of idle units."""

import pytest
import torch

from hfproj import distributed
from hfproj.heads import create_head
from hfproj.heads.topk import keep_largest

WIDTH = 20


def make(**options):
    head = create_head("topk", in_dim=6, **{"width": WIDTH, "top_k": 3, **options}).double()
    torch.nn.init.normal_(head.pre_bias)
    return head


def by_rows(head, v):
    """The formula, with the units of each row sorted by hand."""
    rows = []
    for row in v:
        a = (head.encoder.weight @ (row - head.pre_bias) + head.encoder.bias).clamp_min(0)
        order = sorted(range(len(a)), key=lambda j: -a[j].item())[: head.top_k]
        z = head.decoder.bias + head.pre_bias
        for j in order:
            z = z + a[j] * head.decoder.weight[:, j]
        rows.append(z)
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [1, 3, WIDTH])
def test_equals_the_formula_with_gradients(top_k):
    head, h = make(top_k=top_k), torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(7, 6, dtype=torch.float64)
    wanted = [h, *head.parameters()]
    grads = torch.autograd.grad(head(h), wanted, cotangent)
    expected = torch.autograd.grad(by_rows(head, h), wanted, cotangent)
    torch.testing.assert_close(head(h), by_rows(head, h), rtol=0, atol=1e-13)
    for grad, expected_grad in zip(grads, expected):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


def test_no_more_units_than_top_k_are_active():
    head, h = make(), torch.randn(2, 64, 6, dtype=torch.float64)
    active = (head.units(h) != 0).sum(-1)
    assert active.max() == 3
    few = make(top_k=WIDTH)
    positive = (few.units(h) > 0).sum(-1)
    assert positive.max() < WIDTH
    cut = make(top_k=int(positive.max()))
    cut.load_state_dict(few.state_dict())
    assert torch.equal(cut.units(h), few.units(h))  # as many as are positive: nothing is cut off


def test_gradient_flows_through_kept_units_only():
    head, h = make(top_k=1), torch.randn(4, 6, dtype=torch.float64)
    head(h).square().sum().backward()
    idle = ~(head.units(h) > 0).any(0)
    assert 0 < idle.sum() < WIDTH
    for grad in (head.encoder.weight.grad, head.encoder.bias.grad, head.decoder.weight.grad.T):
        assert not grad[idle].any()
        assert grad[~idle].flatten(1).any(1).all() if grad.ndim > 1 else grad[~idle].all()


def test_keep_largest_takes_no_more_at_ties():
    assert (keep_largest(torch.ones(5, 8), 3) == 1).sum(1).tolist() == [3] * 5


def test_defaults():
    with torch.device("meta"):
        head = create_head("topk", in_dim=512)
        stem = {"depth": 1, "last_norm": "batch", "last_bias": True, "last_activation": "relu"}
        twins = create_head("topk", in_dim=512, out_dim=2048, stem="mlp", stem_options=stem)
    assert (head.width, head.top_k, head.out_dim) == (32 * 512, 163, 512)
    assert (twins.width, twins.top_k, twins.out_dim) == (32 * 2048, 655, 2048)
    assert [name for name, _ in twins.stem.named_children()] == ["hidden", "last"]
    assert [type(module).__name__ for module in twins.stem.last] == ["Linear", "BatchNorm", "ReLU"]
    assert twins.encoder.weight.shape == (65536, 2048)


def test_stem_comes_first():
    head = make(stem="mlp", stem_options={"hidden_dim": 8}, out_dim=3)
    h = torch.randn(7, 6, dtype=torch.float64)
    torch.testing.assert_close(head(h), by_rows(head, head.stem(h)), rtol=0, atol=1e-13)


def test_dead_units_are_those_idle_for_so_many_rows():
    head = make()
    with torch.no_grad():
        head.encoder.bias[:5] = -100.0
    for _ in range(20):
        head(torch.randn(2, 8, 6, dtype=torch.float64))
    assert head.idle[:5].tolist() == [320] * 5
    assert set(range(5)) <= set(head.dead_units(rows=320).tolist())
    assert head.idle.min() == 0
    assert not len(head.dead_units(rows=321))
    before = head.idle.clone()
    head.eval()(torch.randn(8, 6, dtype=torch.float64))
    assert torch.equal(head.idle, before)  # evaluation does not count
    with torch.no_grad():
        head.encoder.bias[:5] = 100.0
    head.train()(torch.randn(1, 6, dtype=torch.float64))
    assert (head.idle[:5] == 0).sum() == 3  # top_k of them are alive again


def test_activity_on_other_processes_counts(monkeypatch):
    """Another process with 4 rows, on which unit 0 alone is active."""
    there = torch.zeros(WIDTH + 1, dtype=torch.int64)
    there[0], there[-1] = 1, 4
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda counts: counts + there)
    head = make()
    with torch.no_grad():
        head.encoder.bias.fill_(-100.0)
    head(torch.randn(8, 6, dtype=torch.float64))
    assert head.idle.tolist() == [0] + [12] * (WIDTH - 1)


def test_counts_survive_casts_and_saving():
    head = make().half()
    assert head.idle.dtype == torch.int64
    assert "idle" in head.state_dict()
