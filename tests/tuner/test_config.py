"""The config: what it refuses, and that JSON holds all of it."""

import importlib
import json
import re

import peft
import pytest
from cases import make_backbone
from peft import LoraConfig, PeftConfig, get_peft_model

import hfproj


def test_the_method_is_registered_by_the_import():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    kind = peft.PeftType("PROJECTION_HEAD")
    assert kind.value == "PROJECTION_HEAD"
    assert kind in list(peft.PeftType)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[kind] is hfproj.ProjectionHeadConfig
    assert PEFT_TYPE_TO_PREFIX_MAPPING[kind] == PEFT_TYPE_TO_TUNER_MAPPING[kind].prefix == "projection_head_"

    before = list(peft.PeftType)
    importlib.reload(hfproj.tuner)
    assert list(peft.PeftType) == before


def test_it_survives_json(tmp_path):
    config = hfproj.ProjectionHeadConfig(
        head="mlp",
        head_options={"hidden_dim": [8, 8], "depth": 3},
        out_dim=4,
        predictor={"head": "linear"},
        prototypes=5,
        backbone_adapter=LoraConfig(r=2, target_modules={"v_proj", "q_proj", "k_proj"}),
        pooling="mean",
        layer=-2,
        in_dim=16,
        backbone={"library": "timm", "id": "timm/x", "kwargs": {"img_size": 32}},
    )
    assert config.backbone_adapter["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    json.dumps(config.to_dict())
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is hfproj.ProjectionHeadConfig
    assert loaded.to_dict() == config.to_dict()
    inner = loaded.inner_config()
    assert isinstance(inner, LoraConfig)
    assert (inner.r, set(inner.target_modules)) == (2, {"q_proj", "k_proj", "v_proj"})


def test_a_name_alone_is_a_predictor():
    assert hfproj.ProjectionHeadConfig(predictor="mlp").predictor == {"head": "mlp"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task_type": "FEATURE_EXTRACTION"}, "task_type to be None"),
        ({"predictor": {"hidden_dim": 4}}, "'head': name"),
        ({"prototypes": 1}, "at least 2"),
        ({"out_dim": 10**12}, "Expected sizes of at most 1,048,576 as out_dim, got"),
        ({"head_options": {"hidden_dim": [64, 10**12]}}, "Expected sizes of at most 1,048,576 as hidden_dim, got"),
        ({"head_options": {"hidden_dim": [1] * 300}}, "Expected sizes of at most"),
        ({"head_options": {"depth": 300}}, "Expected depth to be at most 256 layers"),
        (
            {"predictor": {"head": "mlp", "hidden_dim": 10**12}},
            "Expected sizes of at most 1,048,576 as hidden_dim, got",
        ),
        ({"prototypes": 10**12}, "Expected sizes of at most 1,048,576 as prototypes, got"),
        ({"trainable": "heads"}, "Did you mean 'head'"),
        ({"trainable": True}, "Unknown value of trainable"),
        ({"trainable": "full", "backbone_adapter": LoraConfig()}, "drop one of the two"),
        ({"trainable": 2, "backbone_adapter": LoraConfig()}, "drop one of the two"),
        ({"backbone_adapter": LoraConfig(modules_to_save=["norm"])}, "trainable=n for the last n blocks"),
        ({"backbone_adapter": LoraConfig(bias="all")}, "bias='none'"),
        ({"backbone_adapter": LoraConfig(trainable_token_indices=[1])}, "trainable='full'"),
        ({"backbone_adapter": LoraConfig(layer_replication=[(0, 1), (0, 1)])}, "layer_replication"),
        ({"backbone_adapter": LoraConfig(init_lora_weights="pissa")}, "'gaussian' or 'orthogonal'"),
        ({"backbone_adapter": LoraConfig(init_lora_weights="pissa_niter_4")}, "rewrites the backbone's weights"),
        ({"backbone_adapter": LoraConfig(init_lora_weights="olora")}, "rewrites the backbone's weights"),
        ({"backbone_adapter": {"r": 8}}, "can't live beside a head"),
        ({"backbone_adapter": {"peft_type": "LORAX"}}, "can't live beside a head"),
    ],
)
def test_what_cannot_work_is_refused(options, said):
    with pytest.raises(hfproj.UsageError, match=re.escape(said)):
        hfproj.ProjectionHeadConfig(**options)


@pytest.mark.parametrize("error", [RuntimeError("can't allocate memory: 4 TB"), MemoryError()], ids=repr)
def test_a_head_larger_than_the_memory_leaves_the_backbone_as_it_was(monkeypatch, error):
    def too_large(*args, **kwargs):
        raise error

    monkeypatch.setattr("hfproj.tuner.layer.HeadModules", too_large)
    backbone = make_backbone("vit")
    with pytest.raises(hfproj.UsageError, match="Memory does not suffice for head 'mlp'"):
        get_peft_model(backbone, hfproj.ProjectionHeadConfig(head="mlp", out_dim=4))
    assert not hasattr(backbone, "hfproj")


@pytest.mark.parametrize(
    "inner",
    [
        peft.PromptTuningConfig(num_virtual_tokens=2),
        peft.PrefixTuningConfig(num_virtual_tokens=2),
        peft.PromptEncoderConfig(num_virtual_tokens=2),
        peft.AdaptionPromptConfig(),
        peft.VeraConfig(),
        peft.VBLoRAConfig(),
        peft.AdaLoraConfig(total_step=10),
        peft.PolyConfig(),
        peft.TrainableTokensConfig(token_indices=[1]),
        hfproj.ProjectionHeadConfig(),
    ],
    ids=lambda c: c.peft_type.value,
)
def test_kinds_that_cannot_live_beside_a_head(inner):
    with pytest.raises(hfproj.UsageError, match="use LoRA, DoRA, IA3") as caught:
        hfproj.ProjectionHeadConfig(backbone_adapter=inner)
    assert "\n" not in str(caught.value)
