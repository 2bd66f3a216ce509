"""A small ViT with a head, a few generated images and a trainer that is done in a moment, shared by these tests."""

import zlib

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image
from torch import nn
from transformers import TrainingArguments, ViTConfig, ViTModel

import hfproj

PIXELS = {"size": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3}
HEAD = {"head": "mlp", "head_options": {"hidden_dim": 12}, "out_dim": 6}


def blocks(model):
    """Return the blocks of a ViT, which were renamed within transformers 5."""
    model = model.get_base_model()
    return model.layers if hasattr(model, "layers") else model.encoder.layer


in_order = pytest.mark.skipif(
    "train_sampling_strategy" not in TrainingArguments.__dataclass_fields__,
    reason="older transformers have no order but the random one",
)


def backbone(dropout=0.0, weights=0):
    """A small ViT, of the same weights each time: an adapter is refused on others."""
    torch.manual_seed(weights)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_dropout_prob=dropout,
    )
    return ViTModel(config, add_pooling_layer=False)


def head_model(seed=0, dropout=0.0, lora=True, name="default", weights=0, **config):
    """A head on a ViT whose own weights are the same for every `seed`; the adapter's are not."""
    vit = backbone(dropout, weights)
    torch.manual_seed(seed)
    if lora and "trainable" not in config:
        config.setdefault("backbone_adapter", LoraConfig(r=2, lora_dropout=dropout, init_lora_weights=False))
    return get_peft_model(vit, hfproj.ProjectionHeadConfig(**{**HEAD, **config}), adapter_name=name)


def images(count, seed=0, labels=True):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    items = [{"image": Image.fromarray(p)} for p in pixels]
    return [{**item, "label": i % 3} for i, item in enumerate(items)] if labels else items


def views(**options):
    return hfproj.ImageViews(**{**PIXELS, "color_jitter_strength": 0, "grayscale_probability": 0, **options})


def plain():
    return hfproj.EvalImages(**PIXELS)


def trainer(folder, model=None, dataset=None, collator=None, extra=None, cls=None, **args):
    """A `ProjectionTrainer` on the CPU; `args` are training arguments, `extra` further arguments of the trainer."""
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "log_representation": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    args = defaults | args
    for name in ("num_train_epochs", "logging_steps", "save_steps", "eval_steps", "warmup_steps"):
        if name in args:
            args[name] = float(args[name])  # the type checker of the tests takes no int for a float
    return (cls or hfproj.ProjectionTrainer)(
        model if model is not None else head_model(),
        hfproj.ProjectionTrainingArguments(**args),
        train_dataset=dataset if dataset is not None else images(12),
        data_collator=collator or views(),
        **{"eval_collator": plain(), **(extra or {})},
    )


def adapter(model, name="default"):
    """Every tensor of the adapter, buffers included, detached from further training."""
    return {n: t.detach().clone() for n, t in get_peft_model_state_dict(model, adapter_name=name).items()}


def trainable(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} differ, first {different[0]}"


def differs(a, b):
    return any(not torch.equal(a[name], b[name]) for name in a)


class Seen(hfproj.ProjectionTrainer):
    """Keeps (epoch, index, checksum of the views) of each image that reaches the loss in training."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            if not hasattr(self, "seen"):
                self.seen = []
            for row, index in enumerate(inputs["index"].tolist()):
                pixels = b"".join(view[row].contiguous().numpy().tobytes() for view in inputs["views"])
                self.seen.append((self.epoch, index, zlib.crc32(pixels)))
        return super().compute_loss(model, inputs, *args, **kwargs)


class Counting(nn.Module):
    """A toy objective with a buffer that moves in training only."""

    views = (2, 2)
    needs: frozenset = frozenset()

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(6))

    def forward(self, z, *, step=None, **others):
        if self.training:
            self.center.lerp_(z.detach().float().mean((0, 1)), 0.5)
        a, b = nn.functional.normalize(z - self.center, dim=-1)
        loss = (a - b).square().sum(-1).mean()
        return loss, {"distance": loss.detach()}
