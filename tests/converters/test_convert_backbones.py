"""Where the official backbone goes: timm's models by their shapes, backbones that are given, none at all."""

import pytest
import timm
import torch
from official_files import CASES, dino, dinov2
from official_layers import Builder, below, run_vit
from thinned import thinned
from torch import nn
from torchvision.models import resnet18
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

import hfproj
from hfproj.backbones import image_preprocessing
from hfproj.converters import FAMILIES, backbones, conversion
from hfproj.converters.family import Parts

SIZES = {"t": (192, 12), "s": (384, 12), "b": (768, 12), "l": (1024, 24)}
RESNETS = {18: (1, (2, 2, 2, 2)), 34: (1, (3, 4, 6, 3)), 50: (4, (3, 4, 6, 3)), 101: (4, (3, 4, 23, 3)),
           152: (4, (3, 8, 36, 3)), 200: (4, (3, 24, 36, 3))}  # fmt: skip


def source(method, builder, num_heads=None):
    parts = Parts(backbone={name: (name, tensor) for name, tensor in builder.tensors.items()})
    name, kwargs = backbones.source(parts, FAMILIES[method], num_heads)
    return name.removeprefix("timm/"), {k: v for k, v in kwargs.items() if k != "pretrained"}, parts


def check(name, kwargs, parts, heads=None):
    """timm's model has exactly the official backbone's tensors and prepares images as the official code does."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **kwargs)
    matched = backbones.match(model, parts, None)
    assert matched.missing + matched.unexpected + matched.shapes == []
    assert image_preprocessing(model).mean == (0.485, 0.456, 0.406)
    assert image_preprocessing(model).std == (0.229, 0.224, 0.225)
    if heads is not None:
        assert model.blocks[0].attn.num_heads == heads
        assert image_preprocessing(model).size == model.patch_embed.img_size[0]


@pytest.mark.parametrize("depth", thinned(RESNETS, 3))
def test_resnets_of_official_size(depth):
    expansion, layers = RESNETS[depth]
    builder = Builder(meta=True)
    builder.resnet("", channels=(64, 128, 256, 512), layers=layers, expansion=expansion)
    name, kwargs, parts = source("moco_v2", builder)
    assert name.split(".")[0] == f"resnet{depth}"
    assert kwargs == {}
    check(name, kwargs, parts)


@pytest.mark.parametrize(("method", "size", "patch", "image", "name", "kwargs"), thinned([
    ("dino", "t", 16, 224, "deit_tiny_patch16_224.fb_in1k", {}),
    ("dino", "s", 16, 224, "vit_small_patch16_224.dino", {}),
    ("dino", "s", 8, 224, "vit_small_patch8_224.dino", {}),
    ("dino", "b", 16, 224, "vit_base_patch16_224.dino", {}),
    ("dino", "b", 8, 224, "vit_base_patch8_224.dino", {}),
    ("moco_v3", "s", 16, 224, "deit_small_patch16_224.fb_in1k", {"num_heads": 12}),
    ("moco_v3", "b", 16, 224, "deit_base_patch16_224.fb_in1k", {}),
    ("moco_v3", "l", 16, 224, "vit_large_patch16_224.mae", {}),
    ("dinov2", "s", 14, 224, "vit_small_patch14_dinov2.lvd142m", {"img_size": 224}),
    ("dinov2", "b", 14, 518, "vit_base_patch14_dinov2.lvd142m", {}),
    ("dinov2", "l", 14, 518, "vit_large_patch14_dinov2.lvd142m", {}),
    ("dinov2", "l", 16, 224, "vit_large_patch14_dinov2.lvd142m", {"patch_size": 16, "img_size": 224}),
]))  # fmt: skip
def test_vits_of_official_size(method, size, patch, image, name, kwargs):
    width, depth = SIZES[size]
    builder = Builder(meta=True)
    builder.vit("", width=width, depth=depth, patch=patch, image=image, scaled=method == "dinov2")
    builder.tensors.pop("mask_token", None)
    found, options, parts = source(method, builder)
    assert (found, options) == (name, kwargs)
    check(found, options, parts, 12 if (method, size) == ("moco_v3", "s") else width // 64)


@pytest.mark.long
def test_the_giant_of_dinov2():
    builder = Builder(meta=True)
    builder.vit("", width=1536, depth=40, patch=14, image=518, scaled=True, gated=True, hidden=8192)
    del builder.tensors["mask_token"]
    builder.tensors = {k.replace("w12", "fc1").replace("w3", "fc2"): v for k, v in builder.tensors.items()}
    name, kwargs, parts = source("dinov2", builder)
    assert (name, kwargs) == ("vit_giant_patch14_dinov2.lvd142m", {})
    check(name, kwargs, parts, 24)


def test_heads_that_no_shape_shows():
    case = CASES["dino: ViT"]()
    for options, said in (({}, "how many attention heads a dino ViT of width 24 has"), ({"num_heads": 5}, "5 do not")):
        with pytest.raises(hfproj.UsageError, match=said):
            hfproj.convert(case.file, "dino", **options)


@pytest.mark.parametrize("change", [
    lambda t: t.update({"conv1.weight": torch.zeros(128, 3, 7, 7)}),  # RN50-w2
    lambda t: t.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}),  # a stem for CIFAR
    lambda t: [t.pop(k) for k in list(t) if k.startswith("layer4")],
])  # fmt: skip
def test_a_backbone_that_timm_does_not_have(change):
    case = CASES["swav: release"]()
    file = {k.removeprefix("module."): v for k, v in case.file.items()}
    change(file)
    with pytest.raises(hfproj.AdapterFileError) as caught:
        hfproj.convert(file, "swav")
    for said in ("neither a ResNet", "pass a module", "FeatureBackbone"):
        assert said in str(caught.value)


def test_the_head_alone(tmp_path):
    case = CASES["swav: release"]()
    case.file["module.conv1.weight"] = torch.zeros(128, 3, 7, 7)
    done = conversion(case.file, "swav", backbone=hfproj.FeatureBackbone(64))
    assert (done.own_backbone, done.read["backbone"], done.read["prototypes"]) == (False, 0, 1)
    h = torch.randn(3, 64)
    done.model.save_pretrained(tmp_path)
    assert torch.equal(hfproj.load_head(tmp_path)(h), done.model(h).projection)
    with pytest.raises(hfproj.AdapterFileError, match=r"64 .*128|128 .*64"):
        hfproj.convert(case.file, "swav", backbone=hfproj.FeatureBackbone(128))


def moco_of(encoder):
    encoder.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 12))
    return {"state_dict": {f"module.encoder_q.{k}": t.clone() for k, t in encoder.state_dict().items()}}


def test_a_backbone_with_the_same_weights_is_named_and_not_stored(tmp_path):
    torch.manual_seed(0)
    encoder = resnet18(num_classes=12)
    file = moco_of(encoder)
    encoder.fc = nn.Identity()
    done = conversion(file, "moco_v2", backbone=encoder)
    config = done.model.peft_config["default"]
    assert (done.own_backbone, config.trainable, config.in_dim) == (False, "head", 512)
    done.model.save_pretrained(tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.glob("*.safetensors")) < 1.2e6  # 512² + 512 · 12 weights

    other = resnet18(num_classes=12)  # other weights
    other.fc = nn.Identity()
    original = {k: t.clone() for k, t in other.state_dict().items()}
    again = conversion(file, "moco_v2", backbone=other)
    config = again.model.peft_config["default"]
    assert (again.own_backbone, config.trainable, config.keep_original) == (True, "full", True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.model(x).projection, done.model(x).projection)
        with again.model.disable_adapter():
            assert not torch.equal(again.model(x), done.model(x).representation)
    bare = again.model.unload().state_dict()
    assert all(torch.equal(bare[k], t) for k, t in original.items())


def test_a_backbone_of_another_shape():
    file = moco_of(resnet18(num_classes=12))
    encoder = resnet18(num_classes=12)
    with pytest.raises(hfproj.AdapterFileError, match=r"missing 2: encoder_q.fc.bias, encoder_q.fc.weight"):
        hfproj.convert(file, "moco_v2", backbone=encoder)
    with pytest.raises(hfproj.AdapterFileError, match=r"This is no moco_v2 .* missing \d+"):
        hfproj.convert(file, "moco_v2", backbone=timm.create_model("deit_tiny_patch16_224", embed_dim=24, depth=1))


@pytest.mark.parametrize("kind", ["vit", "dinov2", "registers"])
def test_backbones_of_transformers(kind, tmp_path):
    """facebook/dino-vits16 and facebook/dinov2-… have their own names and q, k, v apart."""
    case = {"vit": dino, "dinov2": dinov2, "registers": lambda: dinov2(rich=True)}[kind]()
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "layer_norm_eps": 1e-6}
    if kind == "vit":
        config = ViTConfig(**sizes, intermediate_size=96, image_size=16, patch_size=8)
        backbone = ViTModel(config, add_pooling_layer=False)
    elif kind == "dinov2":
        backbone = Dinov2Model(Dinov2Config(**sizes, mlp_ratio=4, image_size=14, patch_size=7))
    else:  # its SwiGLU has 2/3 · mlp_ratio · width = 32 units
        config = Dinov2WithRegistersConfig(
            **sizes, mlp_ratio=2, image_size=14, patch_size=7, num_register_tokens=3, use_swiglu_ffn=True
        )
        backbone = Dinov2WithRegistersModel(config)
    options = {k: v for k, v in case.options.items() if k != "num_heads"}
    done = conversion(case.file, case.method, backbone=backbone.eval(), **options)
    assert done.own_backbone
    x = torch.randn(2, 3, case.image, case.image, dtype=torch.float64)
    expected = case.network(x)
    with torch.no_grad():
        found = done.model.double()(x)
    assert (found.representation - expected["h"]).abs().max() < 1e-10
    assert (found.projection - expected["z"]).abs().max() < 1e-10
    done.model.float().save_pretrained(tmp_path)
    weights = {k: t.clone() for k, t in done.model.state_dict().items() if ".hfproj." not in k}
    same = type(backbone)(backbone.config, **({"add_pooling_layer": False} if kind == "vit" else {}))
    same.load_state_dict({k.removeprefix("base_model.model."): t for k, t in weights.items()})
    assert not conversion(case.file, case.method, backbone=same, **options).own_backbone


def test_a_backbone_that_is_named_is_loaded_with_the_adapter(tmp_path):
    config = ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
                       image_size=16, patch_size=8)  # fmt: skip
    case = CASES["dino: ViT"]()
    first = hfproj.convert(case.file, "dino", backbone=ViTModel(config, add_pooling_layer=False), num_heads=3)
    bare = first.get_base_model()
    official = ViTModel(config, add_pooling_layer=False)
    official.load_state_dict({k: t for k, t in bare.state_dict().items() if not k.startswith("hfproj.")})
    official.save_pretrained(tmp_path / "dino-vits16")
    done = conversion(case.file, "dino", backbone=str(tmp_path / "dino-vits16"), num_heads=3)
    assert not done.own_backbone
    assert done.model.peft_config["default"].backbone["id"] == str(tmp_path / "dino-vits16")
    done.model.save_pretrained(tmp_path / "adapter")
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(hfproj.from_pretrained(tmp_path / "adapter")(x).projection, first(x).projection)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_vit_with_another_number_of_attention_heads(library):
    """MoCo v3's ViT-S has 12, timm's 6: all tensors would fit."""
    case = CASES["moco_v3: ViT"]()
    if library == "timm":
        backbone = timm.create_model(
            "deit_tiny_patch16_224", num_classes=0, embed_dim=24, depth=2, num_heads=6, patch_size=8, img_size=16
        )
    else:
        config = ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=6, intermediate_size=96,
                           image_size=16, patch_size=8)  # fmt: skip
        backbone = ViTModel(config, add_pooling_layer=False)
    with pytest.raises(hfproj.UsageError, match="has 6 attention heads, but a moco_v3 ViT of width 24 has 3"):
        hfproj.convert(case.file, "moco_v3", backbone=backbone, num_heads=3)


def test_counts_that_no_network_has():
    """A name alone must not decide how many blocks are made."""
    case = CASES["moco_v2"]()
    case.file["state_dict"]["module.encoder_q.layer1.99999999.bn1.bias"] = torch.zeros(8)
    case.file["state_dict"]["module.encoder_q.fc.99999999.bias"] = torch.zeros(8)
    with pytest.raises(hfproj.AdapterFileError, match=r"unexpected 2: encoder_q.fc.99999999.bias, encoder_q.layer1"):
        hfproj.convert(case.file, "moco_v2")


def test_a_missing_tensor_is_named_as_in_the_file_whatever_the_backbone_calls_it():
    case = CASES["dino: ViT"]()
    config = ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
                       image_size=16, patch_size=8)  # fmt: skip
    del case.file["teacher"]["backbone.blocks.1.norm2.weight"]
    with pytest.raises(hfproj.AdapterFileError, match=r"missing 1: backbone.blocks.1.norm2.weight\."):
        hfproj.convert(case.file, "dino", backbone=ViTModel(config, add_pooling_layer=False))


def test_the_class_token_keeps_its_position_beside_registers():
    builder = Builder()
    builder.vit("", width=24, scaled=True, patch=7, image=14, registers=2)
    parts = Parts(backbone={name: (name, t) for name, t in builder.tensors.items() if name != "mask_token"})
    name, kwargs = backbones.source(parts, FAMILIES["dinov2"], 3)
    model = hfproj.load_backbone(name, **kwargs)
    matched = backbones.match(model, parts, None)
    assert matched.missing + matched.unexpected + matched.shapes == []
    model.load_state_dict(matched.tensors)
    x = torch.randn(2, 3, 14, 14, dtype=torch.float64)
    tokens = run_vit({k: t.double() for k, t in builder.tensors.items()}, x, 3)
    with torch.no_grad():
        assert torch.allclose(model.double().eval().forward_features(x), tokens, atol=1e-6)


def test_a_converted_backbone_is_what_is_left(tmp_path):
    case = CASES["barlow_twins"]()
    model = hfproj.convert(case.file, "barlow_twins")
    bare = model.unload().state_dict()
    official = below(case.file["model"], "module.backbone.")
    assert set(bare) == set(official)
    assert all(torch.equal(bare[k], t) for k, t in official.items())
