"""Doors that refuse a head, and backbones that it can be attached to all the same."""

import peft
import pytest
import torch
from cases import (
    BACKBONES,
    QUERY,
    TEXT,
    Blocks,
    assert_same_tensors,
    make_backbone,
    make_config,
    perturb,
    snapshot,
    timm_vit,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, ViTModel

import hfproj
from hfproj.backbones import bare_tensors


def attach(name: str, trained: str = "head", **options: object) -> PeftModel:
    return get_peft_model(make_backbone(name), make_config(name, trained, **options))


@pytest.fixture
def lora_vit():
    model = attach("vit", "lora")
    perturb(model)
    return model.eval()


def test_transformers_own_doors_refuse(lora_vit, tmp_path):
    # Because of what we declare, or, in a transformers that wants a later PEFT than there is, because of that.
    refusal = "shared state|version of PEFT you are using is not compatible"
    with pytest.raises(ValueError, match=refusal):
        make_backbone("vit").add_adapter(make_config("vit"))
    make_backbone("vit").save_pretrained(tmp_path / "checkpoint")
    model = get_peft_model(
        ViTModel.from_pretrained(tmp_path / "checkpoint", add_pooling_layer=False), make_config("vit", "lora")
    )
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=refusal):
        ViTModel.from_pretrained(tmp_path / "checkpoint").load_adapter(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match=refusal):
        AutoModel.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=refusal):
        peft.inject_adapter_in_model(make_config("vit"), make_backbone("vit"))


def test_merging_is_refused_before_anything_is_merged(lora_vit):
    before = snapshot(lora_vit)
    for verb in (lora_vit.merge_and_unload, lora_vit.merge_adapter):
        with pytest.raises(hfproj.UsageError, match=r"can't be merged into a backbone.*model\.unload\(\)"):
            verb()
    assert_same_tensors(snapshot(lora_vit), before)


def test_weighted_sums_of_heads_are_refused():
    model = attach("vit")
    model.add_adapter("b", make_config("vit"))
    with pytest.raises(hfproj.UsageError, match=r"heads can't be combined by weights.*model\.set_adapter"):
        model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "c")
    assert set(model.peft_config) == {"default", "b"}


def test_another_adapter_is_there_already():
    with (
        pytest.warns(UserWarning, match="modify a model with PEFT for a second time|Already found a `peft_config`"),
        pytest.raises(hfproj.UsageError, match="backbone_adapter=LoraConfig"),
    ):
        get_peft_model(get_peft_model(make_backbone("vit"), LoraConfig(target_modules=[QUERY])).base_model.model,
                       make_config("vit"))  # fmt: skip
    taken = make_backbone("plain")
    taken.hfproj = nn.Linear(2, 2)
    with pytest.raises(hfproj.UsageError, match="submodule named 'hfproj'"):
        get_peft_model(taken, make_config("plain"))
    with pytest.raises(ValueError, match="different peft types"):
        attach("vit").add_adapter("b", LoraConfig(target_modules=[QUERY]))


def test_timm_images_of_another_size():
    model = attach("timm_vit")
    with pytest.raises(
        hfproj.UsageError, match=r"made for images of 32 × 32 pixels, got 64 × 32.*dynamic_img_size=True"
    ):
        model(torch.randn(2, 3, 64, 32))
    flexible = get_peft_model(timm_vit(dynamic_img_size=True), make_config("timm_vit"))
    assert flexible(torch.randn(2, 3, 64, 32)).projection.shape == (2, 6)
    assert attach("timm_cnn")(torch.randn(2, 3, 64, 48)).projection.shape == (2, 6)


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov2_registers", "clip", "siglip", "vit_nano"])
def test_transformers_images_of_another_size(name):
    model = attach(name, pooling="mean").eval()
    images = torch.randn(2, 3, 64, 32)
    h = model(images).representation
    kwargs = {} if "dinov2" in name else {"interpolate_pos_encoding": True}
    bare = make_backbone(name)(images, **kwargs).last_hidden_state
    prefix = {"dinov2_registers": 4, "siglip": 0}.get(name, 1)
    torch.testing.assert_close(h, bare[:, prefix:].mean(1))


def test_a_head_that_is_not_run_says_so():
    class Skips(Blocks):
        def forward(self, x):
            return self.blocks[0](x)

    backbone = Skips()
    config = hfproj.ProjectionHeadConfig(head="linear", layer=1, in_dim=8, pooling="mean")
    with pytest.raises(hfproj.UsageError, match=r"did not run its module 'blocks\.1'"):
        get_peft_model(backbone, config)(torch.randn(2, 8))


def test_tensors_of_the_backbone_are_named_as_without_adapters():
    assert list(bare_tensors(attach("vit", "lora").get_base_model())) == list(make_backbone("vit").state_dict())
    assert set(TEXT) & set(BACKBONES)


def test_a_sequential_backbone_does_not_run_the_head_as_one_of_its_layers(tmp_path):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU())
    x = torch.randn(3, 3, 2, 2)
    h = backbone(x)
    model = get_peft_model(backbone, hfproj.ProjectionHeadConfig(head="mlp", out_dim=4, in_dim=8)).eval()
    out = model(x)
    torch.testing.assert_close(out.representation, h, rtol=0, atol=0)
    torch.testing.assert_close(out.projection, hfproj.detach(model).eval()(h), rtol=0, atol=0)
    with model.disable_adapter():
        assert torch.equal(model(x), h)
    model.save_pretrained(tmp_path)
    bare = model.unload()
    assert len(bare) == 3
    assert torch.equal(bare(x), h)
