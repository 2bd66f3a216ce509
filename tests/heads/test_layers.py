"""Layers of a head by hooks, beside what its modules give one after the other."""

import pytest
import torch
from torch import nn

from hfproj.heads import create_head
from hfproj.heads.layers import LayerTrace, layer_widths
from hfproj.heads.presets import PRESETS
from hfproj.heads.symmetric_relu import symmetric_relu
from hfproj.heads.topk import keep_largest

H = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def head_of(name, **options):
    torch.manual_seed(1)
    head = create_head(name, in_dim=12, **options).double().eval()
    for module in head.modules():  # statistics that matter
        if hasattr(module, "running_mean") and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return head


def traced(head, h=H):
    with LayerTrace(head) as trace:
        z = head(h)
    return trace.outputs, z


def by_hand(head, h=H):
    """Return what each block of an MLP gives."""
    found = []
    for block in [*head.hidden, head.last]:
        for module in block:
            h = module(h)
        found.append(h)
    return found


@pytest.mark.parametrize("options", [
    {"depth": 1}, {"depth": 2, "norm": None}, {"depth": 3, "hidden_dim": [9, 7], "last_norm": "batch"},
    {"depth": 3, "norm": "layer", "activation": "tanh", "last_activation": "tanh"}, {"depth": 2, "l2_normalise": True},
    {"depth": 4, "hidden_dim": 5},
])  # fmt: skip
def test_an_mlp_has_as_many_layers_as_it_is_deep(options):
    options = {"hidden_dim": 8, "out_dim": 3, **options}
    head = head_of("mlp", **options)
    found, z = traced(head)
    expected = by_hand(head)
    assert len(found) == options["depth"] == len(layer_widths(head))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    last = nn.functional.normalize(found[-1], dim=1) if options.get("l2_normalise") else found[-1]
    assert torch.allclose(last, z)
    assert layer_widths(head) == [f.shape[1] for f in expected]


@pytest.mark.parametrize("name", PRESETS)
def test_every_published_head_has_its_linear_layers(name):
    options = {"hidden_dim": 8} if PRESETS[name][2].get("hidden_dim", 0) else {}
    head = head_of(name, **options)
    assert len(layer_widths(head)) == sum(isinstance(m, nn.Linear) for m in head.modules())
    assert layer_widths(head)[-1] == head.out_dim


def test_functions_between_linear_maps_belong_to_the_layer():
    head = head_of("symmetric_relu")
    nn.init.constant_(head.threshold, 0.3)
    found, z = traced(head)
    assert torch.equal(found[0], symmetric_relu(head.first(H), head.threshold))
    assert torch.equal(found[1], z)
    assert bool((found[0] == 0).any())


def test_a_topk_head_shows_its_units():
    head = head_of("topk", width=20, top_k=4)
    found, z = traced(head)
    assert torch.equal(found[0], head.units(H))
    assert torch.equal(found[0], keep_largest(torch.relu(head.encoder(H - head.pre_bias)), 4))
    assert torch.equal(found[1] + head.pre_bias, z)


def test_a_head_inside_a_head_and_what_comes_after_it():
    head = head_of("quantized", head="mlp", head_options={"hidden_dim": 8, "out_dim": 3}, levels=3)
    found, z = traced(head)
    assert [f.shape[1] for f in found] == [8, 3]
    assert torch.equal(found[1], head.inner(H))
    assert not torch.equal(found[1], z)


@pytest.mark.parametrize("name", ["identity", "reweight", "subvector", "constant_subvector"])
def test_heads_without_a_linear_map_have_none(name):
    head = head_of(name, **({"d0": 4} if "subvector" in name else {}))
    assert layer_widths(head) == []
    assert traced(head)[0] == []


class Branches(nn.Module):
    """Defined in another order than they run: two branches of h, their sum, and a layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.in_dim = self.out_dim = 12
        self.twice, self.b, self.a = nn.Linear(12, 12), nn.Sequential(nn.Linear(12, 12), nn.Tanh()), nn.Linear(12, 12)

    def forward(self, h):
        return self.twice(self.twice(self.a(h) + self.b(h)))


def test_layers_come_in_the_order_in_which_they_run():
    torch.manual_seed(0)
    head = Branches().double()
    found, z = traced(head)
    a, both = head.a(H), head.a(H) + head.b(H)
    expected = [a, both, head.twice(both), z]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


class Matrix(nn.Module):
    """A head without modules."""

    def __init__(self):
        super().__init__()
        self.in_dim, self.weight = 12, nn.Parameter(torch.randn(12, 2))

    def forward(self, h):
        return h @ self.weight.to(h.dtype)


def test_a_head_that_is_one_matrix_has_one_layer():
    head = Matrix()
    found, z = traced(head)
    assert len(found) == 1
    assert torch.equal(found[0], z)
    assert layer_widths(head) == [2]


def test_nothing_of_the_head_changes():
    head = create_head("mlp", in_dim=12, hidden_dim=8, out_dim=3).train()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    layer_widths(head)
    assert head.training
    assert all(module.training for module in head.modules())
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())
    with LayerTrace(head) as trace:
        head(H.float())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in head.modules())
    assert trace.outputs[0].requires_grad


def test_views_and_a_second_run():
    head = head_of("mlp", hidden_dim=8, out_dim=3)
    with LayerTrace(head) as trace:
        head(H)
        first = trace.outputs
        head(torch.stack([H, 2 * H]))
    assert [tuple(f.shape) for f in trace.outputs] == [(2, 6, 8), (2, 6, 3)]
    assert torch.equal(trace.outputs[0][0], first[0])
