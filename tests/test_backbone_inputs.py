"""What a backbone is run on, and which of its layers act in training: found, or refused in words that help."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    BrosConfig,
    BrosModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Backbone,
    Dinov2Config,
    FalconConfig,
    FalconModel,
    Idefics3VisionConfig,
    Idefics3VisionTransformer,
    MgpstrConfig,
    MgpstrForSceneTextRecognition,
    RwkvConfig,
    RwkvModel,
    SqueezeBertConfig,
    SqueezeBertModel,
    T5Config,
    T5Model,
)
from transformers.models.florence2 import Florence2VisionBackbone, Florence2VisionConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

import hfproj
from hfproj.backbones import acting_modules, feeds_representation, main_input_of, resolve_read_point
from hfproj.tuner.description import describe_adapter

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(3, 19).reshape(2, 8)
LORA = {"backbone_adapter": LoraConfig(r=2, init_lora_weights=False)}


def attach(backbone, **options):
    return get_peft_model(backbone, hfproj.ProjectionHeadConfig(head="linear", out_dim=4, **options))


def adapted(model):
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def without_gradient(model, *args, **inputs):
    model.train()
    model(*args, **inputs).projection.square().sum().backward()
    return [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


# --- what it takes ---


def test_a_tower_that_inherits_the_input_of_texts():
    backbone = Idefics3VisionTransformer(Idefics3VisionConfig(**WIDTH, image_size=64)).eval()
    assert backbone.main_input_name == "input_ids"
    assert main_input_of(backbone) == "pixel_values"
    with torch.no_grad():
        expected = backbone(pixel_values=IMAGES).last_hidden_state.mean(1)
    model = attach(backbone).eval()
    torch.testing.assert_close(model(pixel_values=IMAGES).representation, expected)
    assert describe_adapter(model)["modality"] == "image"


def test_an_input_of_another_name():
    sizes = {"depths": (1, 1), "embed_dim": (8, 16), "num_heads": (2, 2), "num_groups": (2, 2), "patch_size": (7, 3)}
    config = Florence2VisionConfig(**sizes, patch_stride=(4, 2), patch_padding=(3, 1), patch_prenorm=(False, True))
    model = attach(Florence2VisionBackbone(config), **LORA)
    assert not without_gradient(model, IMAGES)


def qwen():
    sizes = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    return Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**sizes))


def clip():
    return CLIPModel(CLIPConfig(text_config={**WIDTH, "vocab_size": 99}, vision_config={**WIDTH, "image_size": 64}))


def bros():
    return BrosModel(BrosConfig(**{**WIDTH, "hidden_size": 64}, vocab_size=99, dim_bbox_projection=32))


@pytest.mark.parametrize(("make", "said"), [
    (qwen, "whose forward requires grid_thw beside hidden_states"),
    (clip, r"which input_ids alone does not run.*attach the head to a part \(model.text_model, model.vision_model\)"),
    (bros, r"BrosModel, which input_ids alone does not run \(You have to specify bbox\).*or give in_dim=…"),
    (lambda: T5Model(T5Config(d_model=32, num_layers=1, num_heads=2, d_kv=16, d_ff=64)), "needs decoder inputs beside"),
], ids=["packed", "two", "boxes", "decoder"])  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"pooling": "mean"}, LORA], ids=["default", "mean", "lora"])
def test_what_images_or_texts_alone_do_not_run(make, said, options):
    with pytest.raises(hfproj.UsageError, match=said):
        attach(make(), **options)


def test_batches_with_more_inputs_are_a_matter_of_saying_so():
    inputs = {"input_ids": IDS, "bbox": torch.rand(2, 8, 4)}
    backbone = bros().eval()
    with torch.no_grad():
        expected = backbone(**inputs).last_hidden_state.mean(1)
    model = attach(backbone, in_dim=64).eval()
    torch.testing.assert_close(model(**inputs).representation, expected)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 8)

    def forward(self, x):
        return {"scores": self.fc(x)}


def mgp_str():
    return MgpstrForSceneTextRecognition(MgpstrConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))


@pytest.mark.parametrize(("make", "said"), [(Named, "returned dict"), (mgp_str, "returned MgpstrModelOutput")])
def test_an_output_without_tokens_is_refused_at_attaching(make, said):
    with pytest.raises(hfproj.UsageError, match=said):
        attach(make(), in_dim=8)


def test_maps_of_a_vit_have_no_class_token():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    backbone = Dinov2Backbone(Dinov2Config(**sizes, out_features=["stage2"])).eval()
    with torch.no_grad():
        expected = backbone(pixel_values=IMAGES).feature_maps[-1].mean((2, 3))
    model = attach(backbone).eval()
    assert model.peft_config["default"].pooling == "mean"
    torch.testing.assert_close(model(pixel_values=IMAGES).representation, expected)
    with pytest.raises(hfproj.UsageError, match="has none; use pooling='mean'"):
        attach(Dinov2Backbone(Dinov2Config(**sizes)), pooling="cls")
    assert resolve_read_point(Dinov2Backbone(Dinov2Config(**sizes)), layer=0).pooling == "cls"  # a block has its token


# --- which layers act ---


class Clipped(nn.Module):
    """Uses the weight of a layer without running it, in training mode only; drops blocks there at random."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix = nn.Linear(6, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = x if self.training and i == 1 else block(x)
        if self.training:
            return nn.functional.linear(x, self.mix.weight.clamp(-1, 1), self.mix.bias)
        return self.mix(x)


def test_a_layer_that_runs_in_eval_mode_alone_gets_no_lora():
    backbone = Clipped()
    assert "mix" not in acting_modules(backbone, resolve_read_point(backbone))
    assert adapted(attach(backbone, **LORA)) == {"stem", "blocks.0.0", "blocks.1.0", "blocks.2.0"}
    assert backbone.training
    with pytest.raises(hfproj.UsageError, match="uses the weight of mix without running the layer"):
        attach(Clipped(), backbone_adapter=LoraConfig(r=2, target_modules=["mix"]))
    assert {"mix.weight", "mix.bias"} <= set(feeds_representation(backbone, resolve_read_point(backbone)))


class Doubled(nn.Linear):
    def forward(self, input):
        return nn.functional.linear(input, 2 * self.weight, self.bias)


class Spelled(nn.Linear):
    def forward(self, input):
        return input @ self.weight.T + self.bias


def test_subclasses_of_a_linear_layer_that_compute_the_same():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    backbone = nn.Sequential(Spelled(6, 8), Doubled(8, 8), nn.Linear(8, 8), normed)
    assert adapted(attach(backbone, **LORA)) == {"0", "2"}
    falcon = FalconModel(FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    model = attach(falcon, **LORA)
    assert {n.rpartition(".")[2] for n in adapted(model)} == {
        "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h",
    }  # fmt: skip
    assert not without_gradient(model, input_ids=IDS)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(2)


def test_convolutions_of_one_and_three_axes():
    for kind, axes in ((nn.Conv1d, 1), (nn.Conv3d, 3)):
        model = attach(nn.Sequential(kind(3, 8, 3), nn.ReLU(), kind(8, 8, 3, groups=2), nn.Flatten(2), Mean()), **LORA)
        assert adapted(model) == {"0"}
        assert not without_gradient(model, torch.randn(2, 3, *[9] * axes))
    groups = {f"{part}_groups": 2 for part in ("q", "k", "v", "intermediate", "output")}
    squeezed = SqueezeBertModel(SqueezeBertConfig(**WIDTH, **groups, vocab_size=99, embedding_size=32))
    assert adapted(attach(squeezed, **LORA)) == {f"encoder.layers.{i}.post_attention.conv1d" for i in (0, 1)}


def test_a_cache_that_is_written_in_place():
    backbone = RwkvModel(RwkvConfig(vocab_size=99, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2))
    assert not without_gradient(attach(backbone, **LORA), input_ids=IDS)


class Chosen(nn.Module):
    """Its forward runs without values, its backward does not."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.special = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Parameter(torch.zeros(8))
        self.unread = nn.Linear(8, 8)

    def forward(self, ids):
        x = self.embed(ids)
        x[ids == 5] = self.special
        self.unread(x)
        return self.fc(x)


def test_a_backward_that_needs_values():
    backbone = Chosen()
    names = set(feeds_representation(backbone, resolve_read_point(backbone)))
    assert names == {"embed.weight", "special", "fc.weight", "fc.bias"}
    assert adapted(attach(backbone, **LORA)) == {"fc"}


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fc):
        ctx.fc, ctx.training = fc, fc.training
        return fc(x)

    @staticmethod
    def backward(ctx, grad):
        assert ctx.training, "only in training mode"
        return grad @ ctx.fc.weight, None


class Reversible(nn.Module):
    """As Reformer's layers: its parameters are no inputs of the function, and its backward wants training mode."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x):
        return _Reversed.apply(self.stem(x), self.fc)


def test_a_backward_of_its_own():
    with pytest.raises(hfproj.UsageError, match="takes its gradients in a way of its own"):
        attach(Reversible(), **LORA)
    x = torch.randn(2, 6)
    assert attach(Reversible())(x).projection.shape == (2, 4)
    assert not [n for n in without_gradient(attach(Reversible(), trainable="full"), x) if "stem" in n]
