"""h is what the backbone's author reads, in every family, and old adapters keep their reading."""

import copy
import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import timm
import torch
from cases import make_backbone, make_inputs
from peft import LoraConfig, PeftModel, get_peft_model
from thinned import thinned
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    T5Config,
    T5EncoderModel,
    T5Model,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

import hfproj
from hfproj.backbones import resolve_read_point
from hfproj.features import extract_features

_FILE = Path(__file__).parents[1] / "recipes" / "benchmarks" / "backbones.py"
_SPEC = importlib.util.spec_from_file_location("backbones_benchmark", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
benchmark = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(benchmark)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:The PyTorch API of nested tensors")


def config(**options):
    return hfproj.ProjectionHeadConfig(head="linear", out_dim=4, **options)


def attach(backbone, **options):
    return get_peft_model(backbone, config(**options)).eval()


# --- every family, a part of recipes/benchmarks/backbones.py ---


@pytest.mark.parametrize("name", thinned([
    "test_vit", "test_convnext", "test_efficientnet", "test_mambaout", "test_byobnet", "mobilenetv3_small_050",
    "ghostnet_050", "levit_128", "starnet_s050", "eva02_tiny_patch14_224", "pvt_v2_b0", "resnet10t",
]))  # fmt: skip
def test_of_timm_the_pooled_output_is_read_and_all_of_it_learns(name):
    row = benchmark.timm_row(name)
    assert row["holds"], benchmark.in_words(row)


@pytest.mark.parametrize("kind", thinned([
    "bert", "gpt2", "qwen3", "roberta", "clip_vision_model", "siglip_vision_model", "convnext", "vit_mae", "beit",
    "mobilenet_v2", "dinov2_with_registers", "xlnet",
]))  # fmt: skip
def test_of_transformers_the_rule_is_read_and_all_of_it_learns(kind):
    row = benchmark.transformers_row(kind, benchmark.MODEL_MAPPING[benchmark.CONFIG_MAPPING[kind]])
    assert row["holds"], benchmark.in_words(row)


def test_a_timm_model_without_pooling_gives_its_class_token():
    backbone = timm.create_model("test_vit", num_classes=0, global_pool="").eval()
    x = torch.randn(2, 3, 160, 160)
    model = attach(copy.deepcopy(backbone))
    assert torch.equal(model(x).representation, backbone(x)[:, 0])
    assert model.peft_config["default"].pooling == "cls"
    wrapped = timm.create_model("test_resnet", num_classes=0, global_pool="").eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(attach(copy.deepcopy(wrapped))(x).representation, wrapped(x).mean((2, 3)))


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_images_with_other_than_three_channels(channels):
    for name in ("test_vit", "test_convnext"):
        backbone = timm.create_model(name, num_classes=0, in_chans=channels).eval()
        size = backbone.pretrained_cfg["input_size"][-1]
        x = torch.randn(2, channels, size, size)
        assert torch.equal(attach(copy.deepcopy(backbone))(x).representation, backbone(x))


def test_through_transformers_wrapper_of_timm():
    from transformers import TimmWrapperConfig, TimmWrapperModel

    backbone = TimmWrapperModel(TimmWrapperConfig(architecture="test_convnext", do_pooling=True)).eval()
    x = torch.randn(2, 3, 96, 96)
    expected = backbone(pixel_values=x).pooler_output
    assert torch.equal(attach(backbone)(pixel_values=x).representation, expected)


# --- the pooled output of transformers ---


def test_a_dense_pooler_is_read_only_if_the_checkpoint_has_it(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
             "image_size": 16, "patch_size": 8}  # fmt: skip
    assert resolve_read_point(ViTModel(ViTConfig(**sizes))).pooling == "cls"
    ViTModel(ViTConfig(**sizes)).save_pretrained(tmp_path / "with")
    ViTModel(ViTConfig(**sizes), add_pooling_layer=False).save_pretrained(tmp_path / "without")
    assert resolve_read_point(ViTModel.from_pretrained(tmp_path / "with")).pooling == "pooler"
    assert resolve_read_point(ViTModel.from_pretrained(tmp_path / "without")).pooling == "cls"
    model = attach(ViTModel.from_pretrained(tmp_path / "without"), trainable="full")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".pooler." in n or "mask_token" in n)


def test_padded_patches_do_not_count():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
             "num_patches": 16, "patch_size": 4}  # fmt: skip
    model = attach(Siglip2VisionModel(Siglip2VisionConfig(**sizes)), pooling="mean")
    pixels, shapes = torch.randn(1, 6, 48), torch.tensor([[2, 3]])
    alone = model(pixel_values=pixels, pixel_attention_mask=torch.ones(1, 6).long(), spatial_shapes=shapes)
    padded = torch.cat([pixels, torch.randn(1, 4, 48)], dim=1)
    mask = (torch.arange(10) < 6).long()[None]
    both = model(pixel_values=padded, pixel_attention_mask=mask, spatial_shapes=shapes)
    torch.testing.assert_close(both.representation, alone.representation, rtol=1e-4, atol=1e-5)
    assert attach(Siglip2VisionModel(Siglip2VisionConfig(**sizes))).peft_config["default"].pooling == "pooler"


def test_a_masked_autoencoder_hides_nothing_while_a_head_reads_it():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
             "image_size": 32, "patch_size": 8}  # fmt: skip
    backbone = ViTMAEModel(ViTMAEConfig(**sizes)).eval()
    x = torch.randn(3, 3, 32, 32)
    for pooling, rows in ((None, slice(0, 1)), ("mean", slice(1, None))):
        model = attach(copy.deepcopy(backbone), pooling=pooling)
        out = model(pixel_values=x)
        assert out.backbone_output.last_hidden_state.shape[1] == 17
        assert torch.equal(out.representation, model(x).representation)
        torch.testing.assert_close(out.representation, out.backbone_output.last_hidden_state[:, rows].mean(1))
        with model.disable_adapter():
            torch.manual_seed(0)
            bare = model(pixel_values=x).last_hidden_state
        torch.manual_seed(0)
        assert torch.equal(bare, backbone(pixel_values=x).last_hidden_state)
        assert bare.shape[1] == 5
        with pytest.raises(Exception, match=r"size|shape|channel"):
            model(pixel_values=torch.randn(3, 2, 32, 32))
        assert model.get_base_model().config.mask_ratio == 0.75
    rows = [{"x": image} for image in x]

    def collator(items):
        return {"pixel_values": torch.stack([item["x"] for item in items])}

    f = extract_features(backbone, rows, collator=collator)
    assert torch.equal(f.h, attach(copy.deepcopy(backbone))(x).representation)


# --- texts ---

WORDS = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 16, "max_position_embeddings": 40}  # fmt: skip
TEXTS = {
    "bert": (lambda: BertModel(BertConfig(**WORDS)), "mean"),
    "bert_decoder": (lambda: BertModel(BertConfig(**WORDS, is_decoder=True)), "last"),
    "roberta": (lambda: RobertaModel(RobertaConfig(**WORDS)), "mean"),
    "llama": (lambda: LlamaModel(LlamaConfig(**WORDS)), "last"),
    "gpt2": (lambda: GPT2Model(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=40)), "last"),
    "t5_encoder": (
        lambda: T5EncoderModel(T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)),
        "mean",
    ),
    "bart": (
        lambda: BartModel(BartConfig(vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1,
                                     encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
                                     decoder_ffn_dim=16, max_position_embeddings=40)),
        "last",
    ),
}  # fmt: skip


@pytest.mark.parametrize("pooling", [None, "cls", "mean", "last", "max", "cls_mean"])
@pytest.mark.parametrize("name", [n for n in TEXTS if n != "bart"])
def test_a_text_has_one_h_wherever_it_is_padded(name, pooling):
    make, default = TEXTS[name]
    backbone = make()
    model = attach(backbone, pooling=pooling)
    assert model.peft_config["default"].pooling == (pooling or default)
    ids = torch.randint(5, 60, (1, 5))
    expected = model(input_ids=ids).representation
    for left, right in ((3, 0), (0, 3), (2, 4)):
        pads = torch.ones(2, left + 5 + right, dtype=torch.long)
        mask = torch.zeros_like(pads)
        pads[:, left : left + 5], mask[:, left : left + 5] = ids, 1
        for by_name in (True, False):
            if name == "gpt2" and not by_name:
                continue  # its second argument is another
            h = (model(input_ids=pads, attention_mask=mask) if by_name else model(pads, mask)).representation
            torch.testing.assert_close(h, expected.expand(2, -1), rtol=1e-4, atol=1e-5)
        rows = [{"ids": row, "mask": m} for row, m in zip(pads, mask, strict=True)]

        def collator(items):
            ids, mask = (torch.stack([i[n] for i in items]) for n in ("ids", "mask"))
            return {"inputs": {"input_ids": ids, "attention_mask": mask}}

        f = extract_features(backbone, rows, collator=collator)
        torch.testing.assert_close(f.h, h.detach(), rtol=1e-5, atol=1e-6)


def test_texts_that_begin_alike_differ_for_a_causal_model():
    for name in ("gpt2", "llama"):
        model = attach(TEXTS[name][0]())
        ids = torch.randint(5, 60, (6, 7))
        ids[:, 0] = 5
        assert (model(input_ids=ids).representation.std(0) > 1e-3).any()


def test_encoder_decoder_models():
    assert attach(TEXTS["bart"][0]()).peft_config["default"].pooling == "last"
    small = T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(hfproj.UsageError, match="T5EncoderModel"):
        attach(T5Model(small))


def _declare(folder, pooling, *kinds, own=""):
    """Write a model with the files of sentence-transformers, in `own` its own, and return its modules."""
    BertModel(BertConfig(**WORDS)).save_pretrained(folder / own)
    modules = [{"idx": i, "name": str(i), "path": f"{i}_{kind}/" if i else own, "type": f"sentence_transformers.{kind}"}
               for i, kind in enumerate(kinds)]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return modules


@pytest.mark.parametrize(
    ("declared", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "max"}, "max"),
        ({"pooling_mode": ["lasttoken"]}, "last"),
        ({"pooling_mode": ["mean", "cls"]}, "cls_mean"),
        ({"pooling_mode": "cls+mean"}, "cls_mean"),
        ({"pooling_mode": ["max", "mean"]}, None),
        ({"pooling_mode": [{}]}, None),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls_mean"),
        ({"pooling_mode_weightedmean_tokens": True}, None),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, None),
        ([], "mean"),
    ],
)
def test_the_pooling_that_a_folder_declares(declared, pooling, tmp_path):
    modules = _declare(tmp_path, declared, "Transformer", "Pooling", "Normalize")
    backbone = BertModel.from_pretrained(tmp_path)
    if pooling is None:
        with pytest.warns(UserWarning, match="declares the pooling"):
            assert resolve_read_point(backbone).pooling == "mean"
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert resolve_read_point(backbone).pooling == pooling
    (tmp_path / "modules.json").write_text(json.dumps([{**modules[1], "path": "../1_Pooling"}]))
    assert resolve_read_point(backbone).pooling == "mean"


def test_a_model_in_a_folder_of_its_own_and_what_reads_its_pooling(tmp_path):
    _declare(tmp_path, {"pooling_mode": "cls"}, "Transformer", "Pooling", "Dense", "LayerNorm", own="0_Transformer/")
    backbone = BertModel.from_pretrained(tmp_path / "0_Transformer")
    with pytest.warns(UserWarning, match="Dense, LayerNorm behind its pooling") as caught:
        assert resolve_read_point(backbone).pooling == "cls"
    assert len(caught) == 1
    (tmp_path / "0_Transformer").rename(tmp_path / "other")  # not the one that modules.json above it names
    assert resolve_read_point(BertModel.from_pretrained(tmp_path / "other")).pooling == "mean"


def test_presets_of_simcse_say_cls():
    for name in ("simcse_unsupervised", "simcse_supervised"):
        model = get_peft_model(make_backbone("bert"), hfproj.get_preset(name).config())
        assert model.peft_config["default"].pooling == "cls"


# --- blocks after the one that is read ---


@pytest.mark.parametrize("name", ["timm_vit", "vit", "dinov2", "bert", "clip", "timm_cnn"])
def test_blocks_after_the_one_that_is_read_are_left_out(name):
    inputs, ran = make_inputs(name), []
    for trained in ({"trainable": "head"}, {"backbone_adapter": LoraConfig(r=2)}, {"trainable": "full"}):
        model = get_peft_model(make_backbone(name), config(layer=0, **trained)).eval()
        backbone = model.get_base_model()
        blocks = hfproj.backbones.blocks_of(backbone)
        before = list(dict(backbone.named_modules()))
        for block in blocks:
            backbone.get_submodule(block).register_forward_hook(lambda m, a, o, b=block: ran.append(b))
        out = model(**inputs)
        skips = name != "timm_cnn"  # its last convolution has another width
        assert ran == (blocks[:1] if skips else blocks)
        assert (out.backbone_output is None) == skips
        assert list(dict(backbone.named_modules())) == before
        out.projection.sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        ran.clear()
        copied = copy.deepcopy(model)
        assert torch.equal(copied(**inputs).representation, out.representation)
        ran.clear()
        with model.disable_adapter():
            model(**inputs)
        assert ran == blocks
        ran.clear()
        layer = backbone.hfproj
        layer.whole = True
        whole = model(**inputs)
        assert whole.backbone_output is not None
        assert torch.equal(whole.representation, out.representation)
        ran.clear()


# --- versions of the rules ---


def test_an_adapter_keeps_the_reading_it_was_saved_with(tmp_path):
    for name in ("timm_vit", "bert", "clip"):
        model = get_peft_model(make_backbone(name), config(reading=1)).eval()
        assert model.peft_config["default"].pooling == "cls"
        inputs = make_inputs(name)
        expected = model(**inputs).projection
        model.save_pretrained(tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        saved = json.loads(file.read_text())
        assert saved["reading"] == 1
        for old in (saved, {k: v for k, v in saved.items() if k != "reading"}):
            file.write_text(json.dumps(old))
            loaded = PeftModel.from_pretrained(make_backbone(name), tmp_path / name).eval()
            assert loaded.peft_config["default"].reading == 1
            assert torch.equal(loaded(**inputs).projection, expected)
    assert config().reading == 2
    with pytest.raises(hfproj.UsageError, match="newer hfproj"):
        attach(make_backbone("vit"), reading=99)
