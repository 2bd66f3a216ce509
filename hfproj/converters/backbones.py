"""The backbone of an official checkpoint as a timm model, or in a model that is given.

Official ResNets have torchvision's names, which are timm's; official ViTs descend from timm's and have its names. Sizes
are read from the shapes: blocks, widths, patch, number of positions, register tokens. Two things no shape shows: the
number of attention heads (the family knows it by the width) and strides, which are torchvision's in all these families.

timm's models without weights come with the preprocessing of the checkpoint: mean and std of ImageNet.

Deviations:
    Sums are taken in another order than in the official code: h agrees to rounding. ``transformers``' ViT has ε 1e-12
    in its norms where the official ones have 1e-6, unless its config says so.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hfproj.backbones import FeatureBackbone, bare_tensors, feeds_representation, library_of, resolve_read_point
from hfproj.backbones.loading import timm_part_of
from hfproj.converters.family import Family, Parts
from hfproj.converters.mlp import Problems
from hfproj.errors import AdapterFileError, UsageError

# (block has three convolutions, blocks per stage) → timm's name, with torchvision's preprocessing
_OF_18, _OF_50 = (2, 2, 2, 2), (3, 4, 6, 3)
_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, _OF_18): "resnet18.tv_in1k", (False, _OF_50): "resnet34.tv_in1k", (True, _OF_50): "resnet50.tv_in1k",
    (True, (3, 4, 23, 3)): "resnet101.tv_in1k", (True, (3, 8, 36, 3)): "resnet152.tv_in1k",
    (True, (3, 24, 36, 3)): "resnet200",
}  # fmt: skip
_CHANNELS = (64, 128, 256, 512)
# timm's name → (width, depth, heads, patch, image size), all with ImageNet's mean and std
_VITS = {
    "deit_tiny_patch16_224.fb_in1k": (192, 12, 3, 16, 224), "deit_small_patch16_224.fb_in1k": (384, 12, 6, 16, 224),
    "deit_base_patch16_224.fb_in1k": (768, 12, 12, 16, 224), "vit_large_patch16_224.mae": (1024, 24, 16, 16, 224),
    "vit_small_patch8_224.dino": (384, 12, 6, 8, 224), "vit_small_patch16_224.dino": (384, 12, 6, 16, 224),
    "vit_base_patch8_224.dino": (768, 12, 12, 8, 224), "vit_base_patch16_224.dino": (768, 12, 12, 16, 224),
}  # fmt: skip
_DINOV2 = {  # with layer scale
    "vit_small_patch14_dinov2.lvd142m": (384, 12, 6, 14, 518),
    "vit_base_patch14_dinov2.lvd142m": (768, 12, 12, 14, 518),
    "vit_large_patch14_dinov2.lvd142m": (1024, 24, 16, 14, 518),
}
_GIANT = {"vit_giant_patch14_dinov2.lvd142m": (1536, 40, 24, 14, 518)}  # with SwiGLU too
_MOST = 5000  # tensors of a backbone
_GIANT_RATIO = 2.66667 * 2  # timm's; others have 4


@dataclass
class Matched(Problems):
    """The tensors of a checkpoint under the names of a backbone, and what does not match."""

    tensors: dict[str, Tensor] = field(default_factory=dict)


def source(parts: Parts, family: Family, num_heads: int | None) -> tuple[str, dict[str, Any]]:
    """Return timm's name and the options of a model without weights for the backbone.

    `AdapterFileError` if no such model is known, `UsageError` if the number of attention heads is not.
    """
    tensors = {name: tensor for name, (_, tensor) in parts.backbone.items()}
    of_resnet, of_vit = (any(n.startswith(first) for n in tensors) for first in ("layer1.", "blocks.0."))
    found = _resnet(tensors) if of_resnet else _vit(tensors, family, num_heads) if of_vit else None
    if found is None:
        what = f"The backbone of this checkpoint ({len(tensors)} tensors, among them {', '.join(sorted(tensors)[:3])})"
        raise AdapterFileError(
            f"{what} is neither a ResNet of torchvision's with a stem of 64 channels nor a ViT of timm's; pass a "
            "module with its names as backbone=…, or hfproj.FeatureBackbone(width of h) for the head alone."
        )
    return found


def _resnet(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    stages: dict[int, int] = {}
    widths: dict[int, int] = {}  # of a stage's first convolutions, from whichever of its tensors is there
    for name, tensor in tensors.items():
        if place := re.match(r"layer(\d)\.(\d\d?)\.(bn[12]\.(weight|bias|running_mean)|conv[12]\.weight)?", name):
            stage, block = int(place[1]), int(place[2])
            stages[stage] = max(stages.get(stage, 0), block + 1)
            if place[3] and tensor.ndim:
                widths.setdefault(stage, tensor.shape[0])
    three = any(re.match(r"layer\d\.\d+\.conv3\.", name) for name in tensors)
    layers, channels = tuple(stages[s] for s in sorted(stages)), [widths.get(s) for s in sorted(stages)]
    stem = tensors.get("conv1.weight")  # without it, what is missing is told later
    if sorted(stages) != [1, 2, 3, 4] or None in channels or (stem is not None and list(stem.shape) != [64, 3, 7, 7]):
        return None
    kwargs: dict[str, Any] = {"pretrained": False}
    if (three, layers) not in _RESNETS:
        kwargs["layers"] = list(layers)
    if tuple(channels) != _CHANNELS:
        kwargs["channels"] = channels
    return f"timm/{_RESNETS.get((three, layers), _RESNETS[three, _OF_50 if three else _OF_18])}", kwargs


def _vit(tensors: Mapping[str, Tensor], family: Family, num_heads: int | None) -> tuple[str, dict[str, Any]] | None:
    patch, positions = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")  # what is missing is told later
    depth = 1 + max(int(place.group(1)) for name in tensors if (place := re.match(r"blocks\.(\d\d?)\.", name)))
    of_width = ("cls_token", "norm.weight", "pos_embed")
    widths = [tensor.shape[-1] for name, tensor in tensors.items() if name in of_width and tensor.ndim]
    size = patch.shape[-1] if patch is not None and patch.ndim == 4 else 16
    count = positions.shape[1] - 1 if positions is not None and positions.ndim == 3 else (224 // size) ** 2
    if not widths or math.isqrt(count) ** 2 != count:
        return None
    width, grid = widths[0], math.isqrt(count)
    heads = num_heads or family.num_heads(width)
    if not heads or width % heads:
        what = f"a {family.name} ViT of width {width} has" + (f", and {heads} do not divide it" if heads else "")
        raise UsageError(f"No shape shows how many attention heads {what}: pass num_heads=….")
    scaled, hidden = any(name.endswith("ls1.gamma") for name in tensors), _hidden(tensors, width)
    gated = hidden is not None and hidden[0] != hidden[1]
    known = _GIANT if gated else _DINOV2 if scaled else _VITS
    asked = (width, depth, heads, size, grid * size)
    preferred = {**{of[:2] + of[3:4]: name for name, of in reversed(known.items())}, **family.timm_ids}
    alike = [name for name, of in known.items() if of[:2] == (width, depth)]
    name = preferred.get((width, depth, size)) or [*alike, *known][0]
    options = ("embed_dim", "depth", "num_heads", "patch_size", "img_size")
    usual, kwargs = {**_VITS, **_DINOV2, **_GIANT}[name], dict[str, Any](pretrained=False)
    kwargs |= {option: value for option, value, known_as in zip(options, asked, usual) if value != known_as}
    if hidden and int(width * (_GIANT_RATIO if gated else 4)) != hidden[0]:
        exact = hidden[0] / width
        kwargs["mlp_ratio"] = exact if int(width * exact) == hidden[0] else (hidden[0] + 0.5) / width
    registers = tensors.get("register_tokens")
    if registers is not None:
        kwargs |= {"reg_tokens": registers.shape[1], "no_embed_class": True}
    return f"timm/{name}", kwargs


def _hidden(tensors: Mapping[str, Tensor], width: int) -> tuple[int, int] | None:
    """Return the widths of an MLP behind its first layer and before its second, which is half with a gate."""
    first = next((t for n, t in tensors.items() if n.endswith("mlp.fc1.weight") and t.ndim == 2), None)
    second = next((t for n, t in tensors.items() if n.endswith("mlp.fc2.weight") and t.ndim == 2), None)
    return None if first is None or second is None else (first.shape[0], second.shape[1])


def check_heads(backbone: nn.Module, family: Family, num_heads: int | None) -> None:
    """Refuse, by a `UsageError`, a ViT with other attention heads than the official one: tensors fit, h does not."""
    timm_part = timm_part_of(backbone)
    attention = next((m for m in (timm_part[1].modules() if timm_part else ()) if hasattr(m, "num_heads")), None)
    config = getattr(backbone, "config", None)
    heads = getattr(attention, "num_heads", None) or getattr(config, "num_attention_heads", None)
    width = getattr(timm_part[1], "embed_dim", None) if timm_part else getattr(config, "hidden_size", None)
    expected = num_heads or (family.num_heads(width) if isinstance(width, int) else None)
    if heads and expected and heads != expected:
        what = f"The backbone has {heads} attention heads, but a {family.name} ViT of width {width} has {expected}"
        raise UsageError(f"{what}, so that its h would be another; pass a backbone with as many, or leave it out.")


def match(backbone: nn.Module, parts: Parts, in_dim: int | None) -> Matched:
    """Return the checkpoint's tensors under the names of `backbone`; nothing for a stand-in for cached features."""
    if isinstance(backbone, FeatureBackbone):
        return Matched()
    own = bare_tensors(backbone)
    point = resolve_read_point(backbone, in_dim=in_dim if library_of(backbone) == "torch" else None)
    wanted = set(feeds_representation(backbone, point))
    translated = _translated(backbone, parts)
    found = Matched()
    found.missing = [_official(name, translated) for name in wanted if name not in translated]
    for name, (key, tensor) in translated.items():
        if name not in own:
            found.unexpected.append(key)
        elif name in wanted and tensor.shape != own[name].shape:
            found.shapes.append(f"{key} has shape {list(tensor.shape)}, expected {list(own[name].shape)}")
        elif name in wanted:
            found.tensors[name] = tensor
    return found


def _official(name: str, translated: Mapping[str, tuple[str, Tensor]]) -> str:
    """Return what the file would call the backbone's tensor `name`: as its nearest neighbour's name tells."""
    if len(translated) > _MOST:  # no network has as many, and each is looked through for each name
        return name
    places = name.split(".")
    for depth in range(len(places) - 1, -1, -1):
        module = ".".join([*places[:depth], ""])
        for known, (key, _) in translated.items():
            rest = known.removeprefix(module)
            if known.startswith(module) and f".{key}".endswith(f".{rest}"):
                return key.removesuffix(rest) + name.removeprefix(module)
    return name


def equal(backbone: nn.Module, matched: Matched) -> bool:
    """Return whether the backbone has the checkpoint's tensors already."""
    own = bare_tensors(backbone)
    return all(torch.equal(own[n].detach().cpu(), t.to(own[n].dtype).cpu()) for n, t in matched.tensors.items())


def _translated(backbone: nn.Module, parts: Parts) -> dict[str, tuple[str, Tensor]]:
    """Return name in `backbone` → (key in the file, tensor)."""
    tensors = dict(parts.backbone)
    timm_part = timm_part_of(backbone)
    if timm_part:
        if "register_tokens" in tensors and {"cls_token", "pos_embed"} <= tensors.keys():
            tensors |= _registers(tensors)
            del tensors["register_tokens"]
        return {timm_part[0] + name: value for name, value in tensors.items()}
    config = getattr(backbone, "config", None)
    kind = {"dinov2_with_registers": "dinov2"}.get(getattr(config, "model_type", ""), getattr(config, "model_type", ""))
    if kind not in _BLOCKS:
        return tensors
    apart: dict[str, tuple[str, ...]] = {".qkv.": (".q_proj.", ".k_proj.", ".v_proj.")}  # one matrix in the file
    older = any(".attention.attention.query." in name for name in bare_tensors(backbone))
    swiglu = getattr(config, "use_swiglu_ffn", False)
    if swiglu and not older:
        apart |= {".mlp.fc1.": (".mlp.gate_proj.", ".mlp.up_proj."), ".mlp.fc2.": (".mlp.down_proj.",)}
    renamed: dict[str, tuple[str, Tensor]] = {}
    for name, (key, tensor) in tensors.items():
        new = _transformers_name(name, kind)
        whole = next((part for part in apart if part in new), None)
        parts_of = apart[whole] if whole else ()
        for part, rows in zip(parts_of, tensor.chunk(max(len(parts_of), 1))):
            renamed[new.replace(str(whole), part)] = key, rows
        if not parts_of:
            renamed[new] = key, tensor
    return {_older_name(name, kind, swiglu): value for name, value in renamed.items()} if older else renamed


def _registers(tensors: Mapping[str, tuple[str, Tensor]]) -> dict[str, tuple[str, Tensor]]:
    """Give the position of the class token to it: timm's ViTs with registers have positions of patches alone."""
    (key, token), (at, positions), registers = (tensors[n] for n in ("cls_token", "pos_embed", "register_tokens"))
    of_class, of_patches = (key, token + positions[:, :1]), (at, positions[:, 1:])
    return {"cls_token": of_class, "pos_embed": of_patches, "reg_token": registers}


_COMMON = (
    (r"^cls_token$", "embeddings.cls_token"), (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^register_tokens$", "embeddings.register_tokens"), (r"^norm\.", "layernorm."),
)  # fmt: skip
_BLOCKS = {
    "vit": (("blocks.", "layers."), (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after.")),
    "dinov2": (
        ("blocks.", "encoder.layer."), (".ls1.gamma", ".layer_scale1.lambda1"), (".ls2.gamma", ".layer_scale2.lambda1"),
    ),
}  # fmt: skip


# What early versions of transformers 5 call the parts of a block.
_OLDER_BLOCK = (
    (".attention.q_proj.", ".attention.attention.query."), (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."), (".attention.o_proj.", ".attention.output.dense."),
)  # fmt: skip
_OLDER_MLP = {"vit": (".intermediate.dense.", ".output.dense."), "swiglu": (".mlp.weights_in.", ".mlp.weights_out.")}


def _older_name(name: str, kind: str, swiglu: bool) -> str:
    first, second = _OLDER_MLP.get("swiglu" if swiglu else kind, (".mlp.fc1.", ".mlp.fc2."))
    for new, old in (*_OLDER_BLOCK, (".mlp.fc1.", first), (".mlp.fc2.", second)):
        name = name.replace(new, old)
    return re.sub(r"^layers\.", "encoder.layer.", name)


def _transformers_name(name: str, kind: str) -> str:
    """Return the name of a ViT's tensor in `transformers`; qkv stays one."""
    for pattern, replacement in _COMMON:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    for old, new in (*_BLOCKS[kind], (".attn.proj.", ".attention.o_proj."), (".attn.", ".attention.")):
        name = name.replace(old, new)
    return name
