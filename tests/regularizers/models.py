"""Small models that the tests of regularizers share."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTModel

import hfproj

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def lora(**options):
    return LoraConfig(**{"r": 2, "init_lora_weights": False, **options})


def vit():
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12
    )
    return ViTModel(config, add_pooling_layer=False)


class ConvNet(nn.Module):
    """Two convolutions, global average, a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.last = nn.Conv2d(5, 8, 2)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.stem(x)))).mean((2, 3))


def head_model(backbone=None, **config):
    """Return a PeftModel with an MLP head 8 → 6 → 4."""
    head = {"head": "mlp", "head_options": {"hidden_dim": 6, "norm": None}, "out_dim": 4}
    if isinstance(backbone, ConvNet):
        head["in_dim"] = 8
    head |= {"pooling": "mean"} | config
    if head["head"] == "identity":
        head |= {"head_options": {}, "out_dim": None}
    return get_peft_model(vit() if backbone is None else backbone, hfproj.ProjectionHeadConfig(**head))


def features(views=2, batch=6, dim=8, dtype=torch.float64):
    return torch.randn(views, batch, dim, dtype=dtype)
