"""A cut head gives what the layer gave, for every MLP and every way to train the backbone, also after saving."""

import pytest
import torch
from peft import LoraConfig
from small import backbone, head_model, images, plain
from torch import nn

import hfproj
from hfproj.errors import UsageError
from hfproj.tuner.active import active_modules

DEEP = {"head_options": {"hidden_dim": [12, 10], "depth": 3}}


def perturbed(model):
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    with torch.no_grad():
        model.train()(torch.randn(32, 3, 16, 16))  # statistics of BatchNorms
    return model.eval()


CASES = {
    "three layers": (DEEP, "head.1"), "the first of three": (DEEP, "head.0"), "two layers": ({}, "head.0"),
    "LayerNorm and tanh": ({"head_options": {"hidden_dim": 9, "norm": "layer", "activation": "tanh"}}, "head.0"),
    "no norm": ({"head_options": {"hidden_dim": [9, 8], "depth": 3, "norm": None}}, "head.1"),
    "unit rows": ({"head_options": {"hidden_dim": 9, "l2_normalise": True}}, "head.0"),
    "a paper's": ({"head": "byol", "head_options": {"hidden_dim": 9}}, "head.0"),
    "another paper's": ({"head": "simclr_v2", "head_options": {}, "out_dim": 4}, "head.1"),
    "predictor and prototypes": ({**DEEP, "predictor": {"head": "mlp", "hidden_dim": 5}, "prototypes": 3}, "head.1"),
    "full": ({**DEEP, "trainable": "full"}, "head.1"), "a block": ({**DEEP, "trainable": 1}, "head.1"),
    "an inner block": ({**DEEP, "layer": 0}, "head.1"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_z_of_the_cut_is_the_layer(name, tmp_path):
    config, layer = CASES[name]
    model, data = perturbed(head_model(**config)), images(9)
    before = hfproj.extract_features(model, data, layers=[layer], collator=plain())
    state = {n: t.clone() for n, t in model.state_dict().items()}
    cut = hfproj.cut_head(model, layer)
    assert cut is model
    found = hfproj.extract_features(model, data, collator=plain())
    assert model.active_adapter == "cut"
    assert torch.allclose(found.z, before.layers[layer], atol=1e-6)
    assert torch.allclose(found.h, before.h, atol=1e-6)
    model.set_adapter("default")
    again = hfproj.extract_features(model, data, collator=plain())
    assert torch.equal(again.z, before.z)
    assert all(torch.equal(tensor, model.state_dict()[n]) for n, tensor in state.items() if "default" in n)
    model.set_adapter("cut")
    model.save_pretrained(str(tmp_path), selected_adapters=["cut"])
    loaded = hfproj.from_pretrained(tmp_path / "cut", backbone=backbone())
    assert torch.allclose(hfproj.extract_features(loaded, data, collator=plain()).z, found.z, atol=1e-6)
    modules = active_modules(loaded)
    assert (modules.predictor, modules.prototypes) == (None, None)


def test_lora_is_copied():
    model = perturbed(head_model(**DEEP, backbone_adapter=LoraConfig(r=2, init_lora_weights=False)))
    x = torch.randn(4, 3, 16, 16)
    h = model(x).representation
    assert torch.allclose(hfproj.cut_head(model, "head.0")(x).representation, h, atol=1e-6)
    with model.disable_adapter():
        assert not torch.allclose(model(x).last_hidden_state[:, 0], h, atol=1e-3)


def test_mode_and_gradients_are_those_of_the_head_before():
    model = head_model(**DEEP).train()
    head = active_modules(hfproj.cut_head(model, "head.1"))
    assert head.training
    assert all(p.requires_grad for p in head.parameters())


class Own(nn.Module):
    """Somebody's head."""

    def __init__(self, *, in_dim, out_dim=4):
        super().__init__()
        self.in_dim, self.out_dim, self.layer = in_dim, out_dim, nn.Linear(in_dim, out_dim)

    def forward(self, h):
        return self.layer(h)


def test_refusals():
    model = head_model(**DEEP)
    with pytest.raises(UsageError, match=r"one of head.0, head.1 \(the last layer gives z itself\), got 'head.2'"):
        hfproj.cut_head(model, "head.2")
    with pytest.raises(UsageError, match="which the model has: default"):
        hfproj.cut_head(model, "head.0", adapter_name="default")
    with pytest.raises(UsageError, match="an MLP head to cut, got a LinearHead"):
        hfproj.cut_head(head_model(head="linear", head_options={}), "head.0")
    with pytest.raises(UsageError, match="single layer"):
        hfproj.cut_head(head_model(head_options={"depth": 1}), "head.0")
