"""What a backbone is recorded as is what that record loads; files without its weights are refused."""

import pytest
import timm
import torch
from cases import assert_refused
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, BertConfig, BertModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

import hfproj
from hfproj.backbones import source_of
from hfproj.reporting import render_card

HEAD = {"head": "linear", "out_dim": 4}
SMALL = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}

TIMM = [
    ("vit_tiny_patch16_224", {}, {}),
    ("vit_tiny_patch16_224", {"depth": 3}, None),
    ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2}, None),
    ("vit_tiny_patch16_224", {"num_heads": 6}, None),
    ("vit_tiny_patch16_224", {"img_size": 96}, {"img_size": [96, 96]}),
    ("vit_tiny_patch16_224", {"in_chans": 5, "img_size": 32}, {"in_chans": 5, "img_size": [32, 32]}),
    ("vit_tiny_patch16_224", {"global_pool": "avg"}, {"global_pool": "avg"}),
    ("vit_tiny_patch16_224", {"dynamic_img_size": True}, {"dynamic_img_size": True}),
    ("resnet10t", {"in_chans": 1}, {"in_chans": 1}),
    ("resnet10t", {"channels": (8, 16, 32, 64)}, None),
    ("convnext_atto", {}, {}),
    ("convnext_atto", {"depths": (1, 1, 1, 1)}, None),
    ("test_efficientnet", {"act_layer": nn.Tanh}, None),
]


@pytest.mark.parametrize(("name", "options", "recorded"), TIMM, ids=str)
def test_a_timm_model_is_recorded_as_what_its_name_makes(name, options, recorded):
    backbone = timm.create_model(name, pretrained=False, num_classes=0, **options)
    source = source_of(backbone)
    assert source["library"] == "timm"
    if recorded is None:
        assert source["id"] is None
        return
    assert source["id"].startswith(f"timm/{name}")
    assert source["kwargs"] == {"num_classes": 0, **recorded}
    again = hfproj.load_backbone(name, library="timm", pretrained=False, **source["kwargs"])
    again.load_state_dict(backbone.state_dict())


def test_another_timm_architecture_is_not_named_and_asks_for_its_backbone(tmp_path):
    torch.manual_seed(3)
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=0)
    model = get_peft_model(backbone, hfproj.ProjectionHeadConfig(**HEAD))
    model.save_pretrained(tmp_path)
    assert_refused(lambda: hfproj.from_pretrained(tmp_path), "does not say which backbone", "backbone=backbone")
    described = hfproj.tuner.description.describe_adapter(model)
    assert described["base_model"] is None
    card = render_card(hfproj.Results(config=described))
    assert "base_model" not in card
    assert "Its backbone has no public source" in card
    hfproj.from_pretrained(tmp_path, backbone=model.unload())


FAMILIES = {
    "vit": lambda: ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8), add_pooling_layer=False),
    "bert": lambda: BertModel(BertConfig(**SMALL, vocab_size=30), add_pooling_layer=False),
}
CHANGES = [{"num_hidden_layers": 2}, {"num_attention_heads": 4, "hidden_act": "relu"}, {"layer_norm_eps": 1e-3}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("load", [AutoModel.from_pretrained, hfproj.load_backbone], ids=["AutoModel", "load_backbone"])
def test_a_transformers_model_that_differs_from_its_files_comes_back_as_it_was(load, name, changes, tmp_path):
    FAMILIES[name]().save_pretrained(tmp_path / "backbone")
    pooler = {"add_pooling_layer": False} if load is AutoModel.from_pretrained else {}
    backbone = load(str(tmp_path / "backbone"), **changes, **pooler)
    model = get_peft_model(backbone, hfproj.ProjectionHeadConfig(**HEAD)).eval()
    kwargs = model.peft_config["default"].backbone["kwargs"]
    assert {n: kwargs[n] for n in changes} == changes
    model.save_pretrained(tmp_path / "adapter")
    pulled = hfproj.from_pretrained(tmp_path / "adapter")
    x = torch.randn(2, 3, 32, 32) if name == "vit" else torch.randint(0, 30, (2, 5))
    assert torch.equal(pulled(x).representation, model(x).representation)


def test_a_difference_that_can_not_be_asked_for_leaves_the_source_unknown(tmp_path):
    FAMILIES["bert"]().save_pretrained(tmp_path)
    backbone = AutoModel.from_pretrained(tmp_path, is_decoder=True)
    assert source_of(backbone)["id"] is None
    assert source_of(AutoModel.from_pretrained(tmp_path, hidden_dropout_prob=0.3))["id"] == str(tmp_path)


@pytest.mark.parametrize("kept", ["none", "some", "all but a pooler"])
def test_files_without_the_weights_of_the_backbone(kept, tmp_path):
    make = {"vit": FAMILIES["vit"], "dinov2": lambda: Dinov2Model(Dinov2Config(**SMALL, image_size=32, patch_size=8))}
    for name, backbone in make.items():
        folder = tmp_path / name
        backbone().save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        chosen = {
            "none": {"other.weight": torch.ones(3)},
            "some": {n: t for i, (n, t) in enumerate(tensors.items()) if i % 5},
            "all but a pooler": tensors,
        }[kept]
        save_file(chosen, folder / "model.safetensors", metadata={"format": "pt"})
        if kept == "all but a pooler":
            hfproj.load_backbone(str(folder))
        else:
            assert_refused(lambda f=folder: hfproj.load_backbone(str(f)), "lack", "would be random")
    if kept == "all but a pooler":
        assert hfproj.load_backbone(str(tmp_path / "vit"), add_pooling_layer=True).pooler is not None
