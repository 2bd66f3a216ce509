"""Which weights are reached: against what the layers themselves compute, with and without PEFT."""

import copy

import pytest
import torch
from cases import FC1
from peft import IA3Config, LNTuningConfig, LoHaConfig, LoKrConfig, PeftModel, get_peft_model
from regularizers.models import IMAGES, ConvNet, head_model, lora, vit
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import hfproj
from hfproj.errors import UsageError
from hfproj.regularizers import create_regularizer
from hfproj.regularizers.weights import effective_weight, layers_of, weights_of

METHODS = {
    "lora": lambda **o: lora(**o),
    "lora, rank-stabilised": lambda **o: lora(use_rslora=True, lora_alpha=3, **o),
    "dora": lambda **o: lora(use_dora=True, **o),
    "loha": lambda **o: LoHaConfig(r=2, init_weights=False, **o),
    "lokr": lambda **o: LoKrConfig(r=2, init_weights=False, **o),
}


def perturb(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [vit, ConvNet])
def test_weights_are_those_that_the_layers_multiply_with(method, make):
    targets = {"target_modules": ["stem", "last"]} if make is ConvNet else {}
    model = head_model(make(), backbone_adapter=METHODS[method](**targets))
    perturb(model)
    model.double()
    layers = layers_of(model, "encoder")
    assert len(layers) == (2 if make is ConvNet else 2 * 6)
    for layer in layers.values():
        weight, base = effective_weight(layer), layer.get_base_layer()
        assert weight.dtype == torch.float64
        if make is ConvNet:
            x = torch.randn(2, base.in_channels, 6, 6, dtype=torch.float64)
            zero, out = layer(torch.zeros_like(x)), layer(x)
            expected = nn.functional.conv2d(x, weight.view_as(base.weight))
        else:
            x = torch.randn(5, base.in_features, dtype=torch.float64)
            zero, out = layer(torch.zeros_like(x)), layer(x)
            expected = x @ weight.T
        assert (weight - base.weight.flatten(1)).abs().max() > 1e-3
        torch.testing.assert_close(out - zero, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_what_is_trained_and_nothing_else(method):
    model = head_model(backbone_adapter=METHODS[method](), predictor={"head": "linear"}, prototypes=3)
    perturb(model)
    create_regularizer("werank")(model, None, None).backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    expected = {
        n
        for n, p in model.named_parameters()
        if p.requires_grad and not n.endswith("bias") and "predictor" not in n and "prototypes" not in n
    }
    assert reached == expected
    assert any(".head.last" in n for n in reached)


def test_gradient_of_dora_is_exact():
    model = head_model(backbone_adapter=lora(use_dora=True, target_modules=[FC1])).double()
    (layer, *_) = layers_of(model, "encoder").values()
    parameters = [layer.lora_A.default.weight, layer.lora_B.default.weight, layer.lora_magnitude_vector.default.weight]
    assert torch.autograd.gradcheck(lambda *_: effective_weight(layer), parameters)


def test_names_and_order_of_each_part():
    model = head_model(trainable="full", predictor={"head": "linear"}, prototypes=3)
    encoder = list(layers_of(model, "encoder"))
    assert encoder[0].startswith("encoder.embeddings.")
    assert [n.split(".")[1:3] for n in encoder[1:]] == sorted(n.split(".")[1:3] for n in encoder[1:])
    assert len(encoder) == 1 + 2 * 6
    head = ["head.hidden.0.linear", "head.last.linear"]
    assert list(layers_of(model, "head")) == head
    assert list(layers_of(model, "first")) == head[:1]
    assert list(layers_of(model, "last")) == head[1:]
    assert list(layers_of(model, "all")) == encoder + head
    bare = model.get_base_model().hfproj.projection_head_modules["default"].head
    assert list(layers_of(bare, "all")) == head
    assert layers_of(bare, "last")["head.last.linear"] is layers_of(model, "last")["head.last.linear"]


def test_blocks_that_are_frozen_are_not_reached():
    names = list(layers_of(head_model(trainable=1), "encoder"))
    assert len(names) == 6
    assert all(".1." in n for n in names)


def test_convolutions_are_flattened_and_last_is_the_encoders_without_a_head():
    model = head_model(ConvNet(), head="identity", trainable="full")
    weights = weights_of(model, "last")
    assert {n: tuple(w.shape) for n, w in weights.items()} == {"encoder.last": (8, 5 * 2 * 2)}
    conv = model.get_base_model().last.weight
    (grad,) = torch.autograd.grad(weights["encoder.last"].square().sum(), conv)
    torch.testing.assert_close(grad, 2 * conv)


def test_weight_norm_gives_the_effective_weight():
    head = nn.Sequential(nn.Linear(3, 4), weight_norm(nn.Linear(4, 2)))
    g, v = head[1].parametrizations.weight.original0, head[1].parametrizations.weight.original1
    with torch.no_grad():
        g.fill_(2.0)
        v.mul_(5)
    weight = weights_of(head, "last")["head.1"]
    torch.testing.assert_close(weight, 2 * nn.functional.normalize(v, dim=1))
    weight.sum().backward()
    assert g.grad.any()
    assert v.grad.any()


def test_a_layer_used_twice_is_reached_once():
    layer = nn.Linear(3, 3)
    assert list(layers_of(nn.Sequential(layer, nn.ReLU(), layer), "head")) == ["head.0"]


def test_only_the_active_head():
    model = head_model(backbone_adapter=lora())
    other = hfproj.ProjectionHeadConfig(head="linear", out_dim=3, backbone_adapter=lora(r=3), pooling="mean")
    model.add_adapter("other", other)
    first = {n: w.detach() for n, w in weights_of(model, "all").items()}
    model.set_adapter("other")
    second = weights_of(model, "all")
    assert set(second) - set(first) == {"head.linear"}
    changed = [n for n in second if n.startswith("encoder") and not torch.equal(first[n], second[n])]
    assert len(changed) == 12
    sum(w.sum() for w in second.values()).backward()
    assert not any(p.grad is not None for n, p in model.named_parameters() if ".default." in n)
    model.set_adapter("default")
    for name, weight in weights_of(model, "all").items():
        assert torch.equal(weight, first[name]), name


def test_copies_are_not_reached():
    model = head_model(backbone_adapter=lora())
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(2)
    before = create_regularizer("werank")(teacher, None, None)
    value = create_regularizer("werank")(model, None, None)
    value.backward()
    assert before > value
    assert all(p.grad is None for p in teacher.parameters())


def test_wrappers_are_opened():
    model = head_model(backbone_adapter=lora())
    names = list(layers_of(model, "all"))
    compiled = nn.Module()  # what torch.compile returns looks like this
    compiled._orig_mod = model
    compiled_parallel = nn.Module()
    compiled_parallel._orig_mod = nn.DataParallel(model)
    wrappers = (nn.DataParallel(model), compiled, nn.DataParallel(compiled), compiled_parallel)
    for wrapped in (*wrappers, model.get_base_model()):
        assert list(layers_of(wrapped, "all")) == names


def test_autocast_does_not_lower_the_precision():
    model = head_model(backbone_adapter=lora())
    exact = weights_of(model, "encoder")
    with torch.autocast("cpu", torch.bfloat16):
        cast = weights_of(model, "encoder")
    for name, weight in exact.items():
        assert torch.equal(weight, cast[name])


def test_evaluation_without_gradients_reaches_the_same():
    model = head_model(backbone_adapter=lora(use_dora=True)).eval()
    names = list(layers_of(model, "all"))
    with torch.no_grad():
        assert list(weights_of(model, "all")) == names
    model(pixel_values=IMAGES)


@pytest.mark.parametrize(
    ("model", "part", "message"),
    [
        (lambda: nn.Linear(2, 2), "encoder", "Linear is a bare head: pass the PeftModel"),
        (lambda: nn.Identity(), "last", "Identity is a bare head"),
        (lambda: nn.Identity(), "first", "Identity, has no linear layer"),
        (lambda: nn.Linear(2, 2), "tail", "Unknown part of a model 'tail'"),
        (lambda: head_model(), "encoder", r"No linear layer of the encoder is trained.*LoraConfig"),
        (lambda: head_model(), "all", r"layers='head'"),
        (lambda: head_model(head="identity"), "last", "No linear layer of the encoder is trained"),
        (lambda: head_model(backbone_adapter=LNTuningConfig()), "encoder", "No linear layer of the encoder"),
        (
            lambda: head_model(backbone_adapter=IA3Config(target_modules=[FC1], feedforward_modules=[])),
            "encoder",
            "ia3.* is not known here; use LoRA",
        ),
    ],
)
def test_refused(model, part, message):
    with pytest.raises(UsageError, match=message):
        weights_of(model(), part)


def test_no_head_to_reach():
    with pytest.raises(UsageError, match="has no projection head"):
        layers_of(get_peft_model(vit(), lora(target_modules=[FC1])), "head")
    model: PeftModel = head_model()
    with model.disable_adapter(), pytest.raises(UsageError, match="all adapters are disabled"):
        layers_of(model, "head")


def test_quantized_weights_are_refused():
    head = nn.Linear(2, 2)
    head.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UsageError, match=r"uint8 is quantized"):
        weights_of(head, "last")
