"""A target for the head's sparsity: the schedule, which groups are zero, the sparse-group penalty, and the alarm."""

import math

import pytest
import torch
from torch import nn

from hfproj.errors import UsageError
from hfproj.heads import create_head
from hfproj.regularizers import Weighted, create_regularizer, weighted
from hfproj.regularizers.sparse_head import group_norms, shrink_groups, smallest, sparsity_at, switched_off

GROUPS = ("input", "output", "weight")


def mlp(**options):
    return create_head("mlp", in_dim=20, out_dim=6, **{"hidden_dim": 10, "norm": None, **options}).double()


def first(head):
    return head.hidden[0].linear.weight


def noisy_training(term, head, steps):
    """Steps that move every weight, as an optimizer's do, each followed by the target's own; the first weight's."""
    seen = []
    for step in range(steps):
        term(head)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        term.follow(head, (step + 1) / steps)
        seen.append(first(head).detach().clone())
    return seen


def test_schedule_is_cubic_over_the_middle_half():
    assert [sparsity_at(p, 0.5) for p in (0.0, 0.1, 0.25)] == [0, 0, 0]
    assert [sparsity_at(p, 0.5) for p in (0.75, 0.9, 1.0)] == [0.5] * 3
    for u in (0.1, 0.3, 0.8):
        assert sparsity_at(0.25 + u / 2, 0.9) == pytest.approx(0.9 * (1 - (1 - u) ** 3), rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 7, 10, 100])
@pytest.mark.parametrize("tenths", range(10))
def test_number_of_smallest(n, tenths):
    norms = torch.rand(n, dtype=torch.float64)
    expected = min(-(-tenths * n // 10), n - 1)  # in whole numbers: 0.7 · 10 is above 7 in floating point
    found = smallest(norms, tenths / 10)
    assert found.sum() == expected
    if expected > 0:
        assert norms[found].max() <= norms[~found].min()
    assert smallest(torch.ones(n), tenths / 10).sum() == expected  # never all of equal ones


def test_what_was_zero_comes_first():
    norms = torch.tensor([5.0, 0.1, 0.2, 3.0])
    assert smallest(norms, 0.5, first=norms == 5).tolist() == [True, True, False, False]
    weight = torch.tensor([[5.0, 0.1], [0.0, 0.1]])
    keep = torch.tensor([[True, False], [True, False]])
    assert torch.equal(switched_off(weight, 0.5, keep=keep), keep)
    assert torch.equal(switched_off(weight.T, 0.5, keep=keep.T, group="output"), keep.T)
    assert switched_off(weight, 0.25, keep=weight == 5, group="weight").tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("target", [0.25, 0.5, 0.75, 0.9, 0.999])
def test_target_is_reached_and_held(group, target):
    head = mlp()
    term = create_regularizer("sparse_head", sparsity=target, group=group)
    seen = noisy_training(term, head, 40)
    norms = [group_norms(w, group=group) for w in seen]
    d = len(norms[0])
    for step, n in enumerate(norms):
        share = sparsity_at((step + 1) / 40, target)
        assert (n == 0).sum() == min(math.ceil(share * d - 1e-9), d - 1)
    assert abs(term.report(head)["sparsity"] - min(target, 1 - 1 / d)) <= 1 / d
    held = norms[29:]  # three quarters are over
    assert all(torch.equal(n == 0, held[0] == 0) for n in held)


def test_groups_come_back_until_three_quarters_and_not_after():
    head = mlp()
    term = create_regularizer("sparse_head", sparsity=0.5)

    def zero_after(progress):
        term(head)
        with torch.no_grad():
            nn.init.normal_(first(head))
        term.follow(head, progress)
        return group_norms(first(head)) == 0

    before, after, held, still = (zero_after(p) for p in (0.5, 0.74, 0.75, 0.9))
    assert (before & ~after).any()
    assert after.sum() == held.sum() == 10
    assert torch.equal(after, held)
    assert torch.equal(held, still)


def test_layers_each_reach_it_and_biases_stay():
    head = mlp(bias=True)
    biases = {n: p.detach().clone() for n, p in head.named_parameters() if n.endswith("bias")}
    term = create_regularizer("sparse_head", sparsity=0.5, layers="all")
    term(head)
    term.follow(head, 1.0)
    assert (group_norms(first(head)) == 0).sum() == 10
    assert (group_norms(head.last.linear.weight) == 0).sum() == 5
    assert all(torch.equal(dict(head.named_parameters())[n], b) for n, b in biases.items())


@pytest.mark.parametrize("options", [{"sparsity": 0.0}, {"sparsity": 0.0, "shrink": 0.5, "l1": 0.5}, {}])
def test_a_target_of_zero_changes_nothing(options):
    head = mlp()
    before = {n: p.detach().clone() for n, p in head.named_parameters()}
    term = create_regularizer("sparse_head", **options)
    for progress in (0.1, 0.5, 1.0):
        term(head)
        term.follow(head, progress)
        term.after_step(head, 0.1, 0.0)
    assert all(torch.equal(p, before[n]) for n, p in head.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_remains_keeps_its_bits(dtype):
    head = mlp().to(dtype)
    before = first(head).detach().clone()
    create_regularizer("sparse_head", sparsity=0.5).follow(head, 1.0)
    stays = group_norms(first(head)) > 0
    assert stays.sum() == 10
    assert torch.equal(first(head)[:, stays], before[:, stays])


def test_soft_steps_shrink_what_remains():
    head = mlp()
    before = group_norms(first(head)).detach()
    term = create_regularizer("sparse_head", sparsity=0.8, shrink=0.5)
    term.follow(head, 0.5)  # s = 0.7: 14 of 20
    threshold = before.sort().values[13]
    expected = torch.where(before > threshold, before - 0.5 * threshold, 0)
    torch.testing.assert_close(group_norms(first(head)), expected, rtol=1e-12, atol=1e-14)
    after = first(head).detach().clone()
    term.follow(head, 0.75)
    stays = group_norms(first(head)) > 0
    assert stays.sum() == 4
    assert torch.equal(first(head)[:, stays], after[:, stays])  # no more shrinking


@pytest.mark.parametrize("group", ["input", "output"])
def test_sparse_group_target_thins_what_remains(group):
    head = mlp()
    noisy_training(create_regularizer("sparse_head", sparsity=0.5, l1=0.4, group=group), head, 20)
    weight = first(head).detach() if group == "output" else first(head).detach().T
    zeros = (weight == 0).sum(1)
    size = weight.shape[1]
    expected = {size: len(weight) // 2, math.ceil(0.4 * 0.5 * size): len(weight) // 2}
    assert {int(n): int((zeros == n).sum()) for n in zeros.unique()} == expected


@pytest.mark.parametrize("group", ["input", "output"])
def test_sparse_group_penalty_and_its_proximal_map(group):
    """The value by its formula; argmin_V ½‖V − W‖² + t ((1 − a) Σ ‖V_g‖ + a Σ |V_ij|) against steps around it."""
    head, share, threshold = mlp(), 0.3, 0.2
    w = first(head).detach()
    columns = w.T if group == "input" else w
    formula = 0.7 * sum(c.norm() for c in columns) + 0.3 * sum(abs(x) for x in w.flatten())
    value = create_regularizer("sparse_head", l1=share, group=group)(head)
    torch.testing.assert_close(value, formula, rtol=1e-12, atol=0)

    def goal(v):
        groups = v.norm(dim=0 if group == "input" else 1).sum()
        return 0.5 * (v - w).square().sum() + threshold * (0.7 * groups + 0.3 * v.abs().sum())

    found = shrink_groups(w, threshold, group=group, l1=share)
    assert (found == 0).any()
    for size in (1e-3, 1e-1):
        for _ in range(100):
            assert goal(found) <= goal(found + size * torch.randn_like(w))
            assert goal(found) <= goal(torch.where(found == 0, found, found + size * torch.randn_like(w)))
    term = create_regularizer("sparse_head", l1=share, group=group, method="proximal")
    term.after_step(head, 0.5, 2 * threshold)
    torch.testing.assert_close(first(head).detach(), found, rtol=1e-13, atol=0)


def test_single_weights_are_l1():
    head = mlp()
    w = first(head).detach().clone()
    term = create_regularizer("sparse_head", group="weight")
    torch.testing.assert_close(term(head), w.abs().sum())
    (gradient,) = torch.autograd.grad(term(head), first(head))
    assert torch.equal(gradient, w.sign())
    soft = create_regularizer("sparse_head", group="weight", method="proximal")
    soft.after_step(head, 0.5, 0.2)
    torch.testing.assert_close(first(head).detach(), w.sign() * (w.abs() - 0.1).clamp_min(0), rtol=1e-12, atol=1e-15)
    assert soft.report(head)["sparsity"] == (w.abs() <= 0.1).double().mean()


def test_alarm_rings_once_where_the_head_is_dead():
    head = mlp()
    term = create_regularizer("sparse_head", method="proximal")
    term.after_step(head, 1.0, 100.0)
    with pytest.warns(UserWarning, match=r"all of head\.hidden\.0\.linear \(sparsity 1\).*'sparsity': 0.5"):
        assert term.report(head) == {"sparsity": 1.0}
    term.report(head)  # a second warning would be an error


def test_a_target_has_no_weight():
    made = weighted("sparse_head", {"sparsity": 0.5})
    assert [made.at(p) for p in (0.0, 1.0)] == [0, 0]
    assert made.describe() == {"sparsity": 0.5}
    assert weighted("sparse_head", made.describe()).describe() == made.describe()
    assert not made(mlp(), None, None).requires_grad
    for wrong in ({"keep_at": 60.0}, {"weight": -1.0}, {"schedule": "linear", "end_weight": -1.0}):
        with pytest.raises(UsageError, match="makes weights smaller and never larger"):
            weighted("sparse_head", {"method": "proximal", **wrong})
        assert weighted("sparse_head", wrong)  # the gradient of the term goes both ways
    with pytest.raises(UsageError, match="threshold of at least 0"):
        shrink_groups(torch.eye(2), -0.1)
    for wrong in ({"weight": 0.1}, {"schedule": "linear"}, {"at_most": 2.0}):
        with pytest.raises(UsageError, match="has a target of its own and no weight; leave weight"):
            weighted("sparse_head", {"sparsity": 0.5, **wrong})
    with pytest.raises(UsageError, match="has a target of its own"):
        Weighted(create_regularizer("sparse_head", sparsity=0.0), 3.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"Expected sparsity of sparse_head in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, "got -0.1"),
        ({"l1": 1.5}, "Expected l1 of sparse_head"),
        ({"sparsity": 0.5, "shrink": 1.0}, "Expected shrink of sparse_head"),
        ({"shrink": 0.5}, "no effect without a target"),
        ({"group": "weight", "l1": 0.5}, "is L1 already"),
        ({"sparsity": 0.5, "normalise": True}, "no effect with a target"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(UsageError, match=message):
        create_regularizer("sparse_head", **options)


def test_weight_norm_has_no_target():
    head = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))
    with pytest.raises(UsageError, match=r"head\.0 is reparametrized.*which has no target"):
        create_regularizer("sparse_head", sparsity=0.5).follow(head, 1.0)


def test_a_split_weight_has_no_target():
    head = nn.Sequential(nn.Linear(4, 2))
    head[0].weight.full_tensor = head[0].weight.detach  # as the DTensor of FSDP has
    with pytest.raises(UsageError, match=r"FSDP splits head\.0.*train with DDP"):
        create_regularizer("sparse_head", sparsity=0.5).follow(head, 1.0)
