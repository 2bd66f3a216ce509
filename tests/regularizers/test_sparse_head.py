"""The L2,1 norm by its formula, the proximal step by its definition, the report, and the warning about BatchNorm."""

import warnings

import pytest
import torch
from regularizers.models import head_model
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from hfproj.errors import UsageError
from hfproj.heads import create_head
from hfproj.regularizers import create_regularizer
from hfproj.regularizers.sparse_head import group_norms, shrink_groups, sparsity


def mlp(**options):
    return create_head("mlp", in_dim=5, out_dim=3, **{"hidden_dim": 4, "norm": None, **options}).double()


def first(head):
    return head.hidden[0].linear.weight


@pytest.mark.parametrize(("group", "layers"), [("input", "first"), ("output", "first"), ("input", "all")])
def test_equals_the_formula(group, layers):
    head = mlp()
    weights = [first(head)] if layers == "first" else [first(head), head.last.linear.weight]
    expected = 0
    for w in weights:
        columns = w.T if group == "input" else w
        expected = expected + sum((column**2).sum().sqrt() for column in columns)
    value = create_regularizer("sparse_head", group=group, layers=layers)(head)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    (ours,), (theirs,) = (torch.autograd.grad(v, first(head)) for v in (value, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_biases_and_the_encoder_are_left_alone():
    model = head_model(trainable="full")
    create_regularizer("sparse_head", layers="all")(model).backward()
    reached = {n.rpartition(".head.")[2] for n, p in model.named_parameters() if p.grad is not None}
    assert reached == {"hidden.0.linear.weight", "last.linear.weight"}


def test_gradient_at_a_group_of_zeros():
    head = mlp()
    with torch.no_grad():
        first(head)[:, 2] = 0
    for options in ({}, {"normalise": True}):
        head.zero_grad()
        create_regularizer("sparse_head", **options)(head).backward()
        assert first(head).grad.isfinite().all()
        assert not first(head).grad[:, 2].any()
        assert first(head).grad[:, 1].any()
    nn.init.zeros_(first(head))
    head.zero_grad()
    value = create_regularizer("sparse_head", normalise=True)(head)
    value.backward()
    assert value.item() == 0
    assert first(head).grad.isfinite().all()


def test_normalised_term_does_not_see_the_scale():
    head = mlp()
    term = create_regularizer("sparse_head", normalise=True)
    value = term(head)
    (grad,) = torch.autograd.grad(value, first(head))
    assert abs((grad * first(head)).sum().item()) < 1e-12
    with torch.no_grad():
        first(head).mul_(7)
    torch.testing.assert_close(term(head), value, rtol=1e-13, atol=0)
    nn.init.zeros_(first(head))
    with torch.no_grad():
        first(head)[:, 1] = 3.0
    torch.testing.assert_close(term(head).item(), 1.0)  # one group of five: from 1 to √5


def test_proximal_map_minimises_its_definition():
    """argmin_V ½‖V − W‖² + t Σ_i ‖V[:, i]‖, found by descent."""
    w, threshold = torch.randn(3, 6, dtype=torch.float64), 1.2
    expected = shrink_groups(w, threshold)

    def goal(v):
        return 0.5 * (v - w).square().sum() + threshold * v.norm(dim=0).sum()

    off = (expected == 0).all(0)
    assert torch.equal(off, w.norm(dim=0) <= threshold)
    assert off.any()
    assert not off.all()
    torch.testing.assert_close(expected.norm(dim=0), (w.norm(dim=0) - threshold).clamp_min(0), rtol=1e-12, atol=1e-14)
    for _ in range(200):
        assert goal(expected) <= goal(expected + 0.1 * torch.randn_like(w))
    assert torch.equal(shrink_groups(w, 0.0), w)
    assert not shrink_groups(torch.zeros(2, 2), 0.1).any()
    torch.testing.assert_close(shrink_groups(w, threshold, group="output"), shrink_groups(w.T, threshold).T)


def test_proximal_steps_after_the_optimizer():
    head, untouched = mlp(), mlp()
    untouched.load_state_dict(head.state_dict())
    term = create_regularizer("sparse_head", method="proximal")
    value = term(head)
    assert not value.requires_grad
    torch.testing.assert_close(value, create_regularizer("sparse_head")(head).detach())
    before = first(head).detach().clone()
    threshold = before.norm(dim=0).median().item()
    term.after_step(head, 0.5, 2 * threshold)
    torch.testing.assert_close(first(head).detach(), shrink_groups(before, threshold), rtol=1e-13, atol=0)
    assert torch.equal(head.last.linear.weight, untouched.last.linear.weight)
    assert torch.equal(head.hidden[0].linear.bias, untouched.hidden[0].linear.bias)
    assert term.report(head) == {"sparsity": 3 / 5}
    create_regularizer("sparse_head").after_step(untouched, 0.5, 100.0)
    assert torch.equal(first(untouched), before)


def test_proximal_training_switches_off_what_does_not_matter():
    """Least squares on 2 of 5 inputs: the others' columns become exactly zero, the subgradient leaves them small."""
    x = torch.randn(64, 5, dtype=torch.float64)
    y = x[:, :2] @ torch.randn(2, 3, dtype=torch.float64)
    columns = {}
    for method in ("proximal", "subgradient"):
        torch.manual_seed(1)
        head = nn.Linear(5, 3).double()
        term = create_regularizer("sparse_head", method=method)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.2)
        for _ in range(80):
            optimizer.zero_grad()
            ((head(x) - y).square().mean() + 0.05 * term(head)).backward()
            optimizer.step()
            term.after_step(head, 0.2, 0.05)
        columns[method] = group_norms(head.weight.detach())
    assert not columns["proximal"][2:].any()
    assert (columns["proximal"][:2] > 0.1).all()
    assert (columns["subgradient"] > 0).all()


def test_sparsity_counts_groups_far_below_the_largest():
    w = torch.ones(2, 4)
    w[:, 1] = 1e-4
    w[:, 2] = 2e-3
    assert sparsity(w) == 0.25
    assert sparsity(w, group="output") == 0.0
    assert sparsity(torch.zeros(2, 4)) == 1.0
    head = mlp()
    with torch.no_grad():
        first(head)[:, :2] = 0
        head.last.linear.weight[:, :1] = 0
    report = create_regularizer("sparse_head", layers="all").report(head)
    assert report == {"sparsity": (2 + 1) / (5 + 4)}


def test_weight_norm_has_no_proximal_step():
    head = nn.Sequential(weight_norm(nn.Linear(3, 2)))
    create_regularizer("sparse_head")(head).backward()
    assert head[0].parametrizations.weight.original0.grad.any()
    with pytest.raises(UsageError, match=r"head.0 is reparametrized.*method='subgradient'"):
        create_regularizer("sparse_head", method="proximal").after_step(head, 0.1, 0.1)


def test_half_precision_weights():
    head = mlp().to(torch.bfloat16)
    term = create_regularizer("sparse_head", method="proximal")
    assert term(head).dtype == torch.float32
    term.after_step(head, 0.1, 0.1)
    assert first(head).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "head", [mlp(norm="batch"), nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))], ids=["ours", "torch's"]
)
def test_warns_once_where_batch_norm_undoes_it(head):
    term = create_regularizer("sparse_head")
    with pytest.warns(UserWarning, match=r"A BatchNorm follows head\..*normalise=True"):
        term(head)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        term(head)
        create_regularizer("sparse_head", normalise=True)(head)


def test_other_norms_and_batch_norm_elsewhere_are_no_matter():
    create_regularizer("sparse_head")(mlp(norm="layer"))  # a warning would be an error
    create_regularizer("sparse_head")(mlp(norm=None, last_norm="batch"))
    with pytest.warns(UserWarning, match=r"follows head\.last\.linear and"):
        create_regularizer("sparse_head", layers="all")(mlp(norm=None, last_norm="batch"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "prox"}, "Unknown method 'prox'. Did you mean 'proximal'"),
        ({"group": "columns"}, "Unknown group 'columns'"),
        ({"layers": "last"}, "Unknown layers 'last'"),
        ({"method": "subgradient", "sparsity": 0.5}, "method='subgradient' has no effect with a target"),
        ({"method": "proximal", "normalise": True}, "normalise=True has no proximal step"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(UsageError, match=message):
        create_regularizer("sparse_head", **options)


def test_head_without_a_linear_layer():
    with pytest.raises(UsageError, match="IdentityHead, has no linear layer"):
        create_regularizer("sparse_head")(create_head("identity", in_dim=3))
