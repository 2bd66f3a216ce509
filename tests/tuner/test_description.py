"""What results and cards say of an adapter: plain values, portable ids, what the backbone reads."""

import json

import pytest
from cases import make_backbone, make_config
from peft import get_peft_model

from hfproj.backbones import FeatureBackbone, load_backbone
from hfproj.tuner import ProjectionHeadConfig
from hfproj.tuner.description import describe_adapter


@pytest.mark.parametrize(("name", "modality"), [("vit", "image"), ("timm_vit", "image"), ("bert", "text")])
def test_the_modality_is_the_backbones(name, modality):
    found = describe_adapter(get_peft_model(make_backbone(name), make_config(name, "head")))
    assert found["modality"] == modality
    assert found["adapter"]["peft_type"] == "PROJECTION_HEAD"
    assert json.loads(json.dumps(found)) == found


def test_features_have_no_modality_and_a_bare_backbone_no_adapter():
    features = get_peft_model(FeatureBackbone(8), ProjectionHeadConfig(head="linear", out_dim=4))
    assert "modality" not in describe_adapter(features)
    assert describe_adapter(make_backbone("vit")) == {}


def test_a_folder_is_named_without_its_place(tmp_path):
    make_backbone("vit").save_pretrained(tmp_path / "mine")
    model = get_peft_model(load_backbone(str(tmp_path / "mine")), make_config("vit", "head"))
    found = describe_adapter(model)
    assert found["base_model"] == found["adapter"]["backbone"]["id"] == "./mine"
    assert str(tmp_path) not in json.dumps(found)


def test_random_weights_are_nobodys_base_model():
    tiny = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    backbone = load_backbone("vit_tiny_patch16_224", library="timm", pretrained=False, **tiny)
    found = describe_adapter(get_peft_model(backbone, make_config("timm_vit", "full")))
    assert found["base_model"] is None
    assert found["adapter"]["backbone"]["id"] == "vit_tiny_patch16_224"


def test_each_of_several_adapters():
    model = get_peft_model(make_backbone("vit"), make_config("vit", "head"))
    model.add_adapter("second", make_config("vit", "head", layer=0))
    assert describe_adapter(model)["adapter"].get("layer", -1) == -1
    assert describe_adapter(model, "second")["adapter"]["layer"] == 0
