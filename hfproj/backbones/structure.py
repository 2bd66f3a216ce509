"""What can be seen of a backbone without running it: its blocks, its tokens before the patches, its own tensors."""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from hfproj.backbones.loading import timm_part_of
from hfproj.checking import checked
from hfproj.errors import UsageError
from hfproj.typing import Pooling

POOLINGS = ("cls", "mean", "cls_mean", "max", "last", "pooler")
READING = 2  # version of the rules by which h is read, see `hfproj.backbones.reading`


@dataclasses.dataclass(frozen=True)
class ReadPoint:
    """Where the representation leaves a backbone and how it is pooled.

    Attributes:
        pooling: One of `POOLINGS`.
        module: Name of the submodule to read; None reads the backbone's own output.
        side: Whether that submodule's "output" or its first "input" is read.
        prefix_tokens: Number of tokens before the patches (class token, registers).
        text: Whether the tokens are those of a text, so that means respect attention_mask.
        in_dim: Width of the representation.
        reading: Version of the rules, see `hfproj.backbones.reading`.
    """

    pooling: Pooling
    module: str | None
    side: str
    prefix_tokens: int
    text: bool
    in_dim: int
    reading: int = 1


@checked
def blocks_of(backbone: nn.Module) -> list[str]:
    """Return the names of the backbone's blocks, first to last: transformer layers, or the stages of a CNN.

    The blocks are the children of the largest ``ModuleList`` or ``Sequential`` (``layers``, ``encoder.layer``,
    ``blocks``, ``stages``), or the children ``layer1`` … ``layerN`` of a ResNet.

    Raises:
        UsageError: If no such container exists.
    """
    prefix, root = timm_part_of(backbone) or ("", backbone)
    numbered = [n for n, _ in root.named_children() if n.startswith("layer") and n[5:].isdigit()]
    if len(numbered) >= 2:
        return [prefix + n for n in numbered]
    best, best_size = "", 0
    for name, module in root.named_modules():
        if name.split(".")[0] == "hfproj" or not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        size = sum(p.numel() for p in module.parameters())
        if size > best_size and not (best and name.startswith(best + ".")):
            best, best_size = name, size
    if not best:
        raise UsageError(
            f"{type(backbone).__name__} has no list of blocks (ModuleList or Sequential), so `layer` and an integer "
            "`trainable` can't be used with it; use layer=-1 and trainable='head', 'adapter' or 'full'."
        )
    return [f"{prefix}{best}.{n}" for n, _ in root.get_submodule(best).named_children()]


def prefix_tokens_of(backbone: nn.Module) -> tuple[int, bool]:
    """Return (tokens before the patches, whether the first of them is a class token)."""
    if timm_part := timm_part_of(backbone):
        model: Any = timm_part[1]
        return int(getattr(model, "num_prefix_tokens", 0)), getattr(model, "cls_token", None) is not None
    tower = getattr(backbone, "vision_model", backbone)  # where older versions of transformers keep CLIP's
    embeddings = getattr(tower, "embeddings", None)
    names = ("cls_token", "class_embedding", "distillation_token")
    special = sum(getattr(embeddings, name, None) is not None for name in names)
    registers = int(getattr(getattr(backbone, "config", None), "num_register_tokens", 0) or 0)
    return special + registers, special > 0


def bare_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """Return the backbone's own parameters and persistent buffers, named as if no adapter had been attached."""
    found: dict[str, Tensor] = {}

    def walk(module: nn.Module, prefix: str) -> None:
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            for wrapped in ("base_layer", "original_module"):  # where PEFT's layers keep what they wrap
                if hasattr(module, wrapped):
                    return walk(getattr(module, wrapped), prefix)
            if isinstance(module, BaseTunerLayer):
                return
        found.update({prefix + n: p for n, p in module.named_parameters(recurse=False)})
        transient = module._non_persistent_buffers_set
        found.update({prefix + n: b for n, b in module.named_buffers(recurse=False) if n not in transient})
        for name, child in module.named_children():
            walk(child, f"{prefix}{name}.")

    walk(backbone, "")
    return found


@checked
def fit_image_size(backbone: nn.Module, size: tuple[int, int]) -> bool:
    """Return whether a `transformers` ViT needs ``interpolate_pos_encoding=True`` for images of `size`.

    Raises:
        UsageError: If a `timm` model that takes images of one size only would get another.
    """
    if timm_part := timm_part_of(backbone):
        embed = getattr(timm_part[1], "patch_embed", None)
        wanted = getattr(embed, "img_size", None)
        if getattr(embed, "strict_img_size", False) and wanted is not None and tuple(wanted) != size:
            raise UsageError(
                f"{type(timm_part[1]).__name__} was made for images of {wanted[0]} × {wanted[1]} pixels, got "
                f"{size[0]} × {size[1]}; make it with dynamic_img_size=True or img_size={size[0]}, or resize them."
            )
        return False
    wanted = getattr(getattr(backbone, "config", None), "image_size", None)
    wanted = (wanted, wanted) if isinstance(wanted, int) else wanted
    if wanted is None or tuple(wanted) == size:
        return False
    return "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters


def without_masking(backbone: Any, images: Any, given: dict[str, Any], undo: list[Callable[[], Any]]) -> dict[str, Any]:
    """Return the options of a call of a backbone that hides random patches in eval mode too (a masked autoencoder).

    With them it hides none and keeps their order; other backbones get `given` alone.

    What restores its configuration afterwards is added to `undo`.
    """
    config: Any = getattr(backbone, "config", None)
    ratio = getattr(config, "mask_ratio", None)
    if not ratio or not isinstance(images, Tensor) or "noise" not in inspect.signature(backbone.forward).parameters:
        return given
    config.mask_ratio = 0.0
    undo.append(partial(setattr, config, "mask_ratio", ratio))
    if given.get("noise") is not None:
        return given
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    count = (images.shape[-2] // patch) * (images.shape[-1] // patch)
    # Patches are sorted by this noise.
    return {**given, "noise": torch.arange(count, device=images.device).expand(len(images), -1)}
