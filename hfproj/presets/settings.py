"""What a preset is, and optimizers and augmentations that several published settings share.

Numbers of epochs and fractions are floats: `TrainingArguments` declares them so.
"""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from hfproj.backbones import load_backbone
from hfproj.errors import UsageError
from hfproj.tuner import ProjectionHeadConfig
from hfproj.typing import Pooling

Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published setting.

    Learning rate and batch go together: the batch is that of all processes, so divide it by their number, and scale the
    learning rate with it if you change it.

    Args:
        line: What it is.
        source: Paper, table or file that it follows, what that leaves open, and how this differs.
        objective: ``{"name": name, **options}``, without what `ProjectionTrainer` fills in.
        head: Name of the head.
        head_options: Its options, without `out_dim`.
        out_dim: Width of the projection; None where the head decides it.
        predictor, prototypes, scales, pooling: As in `ProjectionHeadConfig`.
        backbone: What it was published for, as `hfproj.load_backbone` takes it: ``{"name": name, **options}``. Where
            that has no pretrained weights, train all of it: ``preset.config(trainable="full")``. None: no single one,
            or none that timm or transformers has.
        regularizers: As in `ProjectionTrainer`.
        views: Options of `hfproj.ImageViews`; those that are missing are its defaults, SimCLR's.
        training: Values of `ProjectionTrainingArguments`.
    """

    line: str
    source: str
    objective: dict[str, Any]
    head: str
    head_options: dict[str, Any] = field(default_factory=dict)
    out_dim: int | None = None
    predictor: dict[str, Any] | None = None
    prototypes: int | dict[str, Any] | None = None
    scales: dict[str, float] | None = None
    pooling: Pooling | None = None
    backbone: dict[str, Any] | None = None
    regularizers: dict[str, Any] = field(default_factory=dict)
    views: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def config(self, **changes: Any) -> ProjectionHeadConfig:
        """Return the config of the adapter; `changes` replace its values.

        Raises:
            UsageError: If a change contradicts another value.
        """
        names = ("head", "head_options", "out_dim", "predictor", "prototypes", "scales", "pooling")
        own = {name: copy.deepcopy(getattr(self, name)) for name in names}
        return ProjectionHeadConfig(**{**own, **changes})

    def load_backbone(self, **changes: Any) -> nn.Module:
        """Return the backbone that it was published for; `changes` replace its options (``width=0.25``).

        Raises:
            UsageError: If there is none, or it can't be loaded.
        """
        if self.backbone is None:
            raise UsageError(
                f"Expected a preset with a backbone, got {self.line!r}, which was published for none with a name; "
                "load one, hfproj.load_backbone('vit_nano')."
            )
        return load_backbone(**{**self.backbone, **changes})

    def but(self, line: str, source: str = "", **changes: Any) -> "Preset":
        """Return this preset with another `line`, `source` after its own, and `changes` in place of its values."""
        return replace(self, line=line, source=f"{self.source} {source}".strip(), **changes)


# Backbones that the papers trained from scratch; CIFAR's have a 3×3 stem and no max-pool.
RESNET_18: Settings = {"name": "timm/resnet18", "pretrained": False}
RESNET_50: Settings = {"name": "timm/resnet50", "pretrained": False}
CIFAR_RESNET_18: Settings = {**RESNET_18, "stem": "cifar"}
CIFAR_RESNET_50: Settings = {**RESNET_50, "stem": "cifar"}
NO_CLIPPING: Settings = {"max_grad_norm": 0.0}  # transformers clips at 1 unless told not to


def training(epochs: float, batch: int, learning_rate: float, weight_decay: float, *, warmup_epochs: float = 10.0,
             **others: Any) -> Settings:  # fmt: skip
    """Return values of `ProjectionTrainingArguments`: AdamW with linear warm-up and a cosine to 0, and `others`.

    The batch is that of all processes, the learning rate its peak for that batch; weight decay is that of matrices.
    """
    return {
        **NO_CLIPPING, "num_train_epochs": float(epochs), "per_device_train_batch_size": batch,
        "learning_rate": learning_rate, "weight_decay": weight_decay, "warmup_steps": warmup_epochs / epochs, **others,
    }  # fmt: skip


SGD: Settings = {"optim": "sgd", "optim_args": "momentum=0.9"}
LARS: Settings = {"lars": True, "lars_trust_coefficient": 0.001}  # the official codes of SimCLR, MoCo v3, VICReg …
SOLO_LARS: Settings = {"lars": True, "lars_trust_coefficient": 0.02, "lars_clip": True}  # solo-learn on CIFAR
ZERO_CL_LARS: Settings = {"lars": True, "lars_trust_coefficient": 0.02}
SIMCLR_LARS_100 = training(100.0, 4096, 4.8, 1e-6, **LARS)  # 0.3 · 4096/256

# Ranges of the jitter that MoCo v2 and BYOL have, below SimCLR's.
_WEAK: Settings = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
_WEAKER: Settings = {**_WEAK, "saturation": 0.2}

MOCO_VIEWS: Settings = {"scale": (0.2, 1.0), **_WEAK, "blur_probability": 0.5}
# Two augmentations that differ: blur 1 and 0.1, solarization 0 and 0.2. Each view has their mean here.
BYOL_VIEWS: Settings = {**_WEAKER, "blur_probability": 0.55, "solarize_probability": 0.1}
BYOL_VIEWS_NOTE = "Its two augmentations differ (blur 1 and 0.1, solarization 0 and 0.2); here both have the mean."

# solo-learn's augmentations/{symmetric, symmetric_weak, asymmetric}.yaml for CIFAR
SOLO_VIEWS: Settings = {"blur_probability": 0.5}
SOLO_WEAK_VIEWS: Settings = {**_WEAK, "blur_probability": 0.5}
SOLO_ASYMMETRIC_VIEWS: Settings = {**_WEAKER, "blur_probability": 0.0, "solarize_probability": 0.1}
SOLO_ASYMMETRIC_NOTE = "Solarization: 0 in one view and 0.2 in the other there, 0.1 in both here."


def only_crops(scale: tuple[float, float]) -> Settings:
    """Return an augmentation by crops and flips alone."""
    off = dict.fromkeys(("color_jitter_probability", "grayscale_probability", "blur_probability"), 0.0)
    return {"scale": scale, **off}


def multi_crop(number: int, scale: tuple[float, float], local_scale: tuple[float, float]) -> Settings:
    """Return two large views and `number` small ones of 96 pixels, for images of 224."""
    return {"scale": scale, "local_views": number, "local_size": 96, "local_scale": local_scale}
