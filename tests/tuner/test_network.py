"""The network that fine-tuning trains: h of a backbone, with what its adapter learned merged in."""

import copy

import pytest
import torch
from cases import (
    BACKBONES,
    QUERY,
    TRAINED,
    VALUE,
    WIDTHS,
    assert_same_tensors,
    make_backbone,
    make_config,
    make_inputs,
    perturb,
    snapshot,
)
from peft import IA3Config, LNTuningConfig, LoraConfig, get_peft_model
from torch import nn

from hfproj.backbones import bare_tensors
from hfproj.errors import UsageError
from hfproj.tuner.network import network_of


def attach(name, trained="lora", **options):
    model = get_peft_model(make_backbone(name), make_config(name, trained, **options))
    perturb(model)
    return model


def represent(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).representation


@pytest.mark.parametrize("name", BACKBONES)
def test_of_a_bare_backbone_h_is_its_pooled_output(name):
    backbone, inputs = make_backbone(name), make_inputs(name)
    before = snapshot(backbone)
    width = {"in_dim": WIDTHS[name]} if name == "plain" else {}
    network = network_of(backbone, **width)
    model = get_peft_model(copy.deepcopy(backbone), make_config(name))
    assert represent(network, inputs).equal(represent(model, inputs))
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    assert trained
    assert not any(part in n for n in trained for part in ("pooler", "mask_token"))
    assert_same_tensors(snapshot(backbone), before)
    assert not hasattr(backbone, "hfproj")


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        *((name, trained) for name in ("vit", "timm_vit", "timm_cnn", "bert") for trained in TRAINED),
        *(("plain", trained) for trained in ("head", "lora", "full")),  # it has no blocks
    ],
)
def test_of_a_model_with_a_head_h_is_what_its_adapter_computes(name, trained):
    model = attach(name, trained)
    inputs, before = make_inputs(name), snapshot(model)
    flags = [module.training for module in model.modules()]
    network = network_of(model)
    assert [module.training for module in model.modules()] == flags
    torch.testing.assert_close(represent(network, inputs), represent(model, inputs), rtol=1e-5, atol=1e-5)
    assert_same_tensors(snapshot(model), before)
    assert not any("lora" in n for n, _ in network.named_parameters())
    assert {n for n, p in network.named_parameters() if p.requires_grad} >= {
        f"base_model.model.{n}" for n, p in bare_tensors(model.get_base_model()).items()
        if isinstance(p, nn.Parameter) and "weight" in n and "pooler" not in n
    }  # fmt: skip


@pytest.mark.parametrize("method", [LoraConfig(r=2, use_dora=True), LNTuningConfig(), IA3Config()])
def test_other_methods_are_merged(method):
    model = attach("vit", "head", trainable="adapter", backbone_adapter=method)
    inputs = make_inputs("vit")
    torch.testing.assert_close(represent(network_of(model), inputs), represent(model, inputs), rtol=1e-4, atol=1e-5)


def test_of_a_disabled_adapter_it_is_the_bare_backbone():
    for trained in ("lora", "full"):
        model = attach("vit", trained)
        with model.disable_adapter():
            network = network_of(model)
        bare = network_of(make_backbone("vit"))
        assert represent(network, make_inputs("vit")).equal(represent(bare, make_inputs("vit")))


def test_pooling_and_layer():
    inputs = make_inputs("vit")
    for options in ({"pooling": "mean", "layer": 1}, {"pooling": "cls_mean"}):
        expected = represent(attach("vit", "head", **options), inputs)
        assert represent(network_of(make_backbone("vit"), **options), inputs).equal(expected)
        assert represent(network_of(attach("vit", "head", **options)), inputs).equal(expected)
    with pytest.raises(UsageError, match="pooling, layer and in_dim are those of the projection head"):
        network_of(attach("vit", "head"), pooling="mean")
    with pytest.raises(UsageError, match="width of Identity's representation can't be found"):
        network_of(torch.nn.Identity())


def test_another_peft_method_without_a_head_is_merged():
    torch.manual_seed(0)
    model = get_peft_model(make_backbone("vit"), LoraConfig(target_modules=[QUERY, VALUE], init_lora_weights=False))
    inputs = make_inputs("vit")
    with torch.no_grad():
        expected = model.eval()(**inputs).last_hidden_state[:, 0]
    torch.testing.assert_close(represent(network_of(model), inputs), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_is_trained_in_float32():
    model = make_backbone("vit").to(torch.bfloat16)
    assert {p.dtype for p in network_of(model).parameters()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
