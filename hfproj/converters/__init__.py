"""Official self-supervised checkpoints as adapters: the head that is thrown away elsewhere, kept.

`families` lists the families of checkpoints: what their keys mean, what is left out and where that was read.
:func:`convert` reads the file, sorts its tensors by that, infers depth, widths and BatchNorm from the shapes, and
returns a backbone with a PROJECTION_HEAD adapter whose h, z (and p, scores) are those of the official network. A file
that lacks a tensor or has one too many is refused with the list of them. May import `tuner`, `backbones` and below.

How the backbone's weights travel: without `backbone`, it is a timm model without weights, and all its tensors lie in
the adapter (``trainable="full"``): one file, which loads without a network; the model without the adapter
(``model.unload()``) is the official backbone. With `backbone`, its tensors are compared with those of the checkpoint:
where all are equal, the adapter holds the head alone and names that backbone; else it holds the checkpoint's as well.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from hfproj import limits
from hfproj.checking import checked
from hfproj.backbones import FeatureBackbone, bare_tensors, load_backbone
from hfproj.backbones.allowance import bytes_of
from hfproj.converters import backbones
from hfproj.converters.checkpoint import read_file
from hfproj.converters.families import FAMILIES
from hfproj.converters.family import Content, Family, Parts, refusal, settle, sort
from hfproj.errors import HfprojError, unknown
from hfproj.tuner import ProjectionHeadConfig
from hfproj.tuner.layer import CHILD

__all__ = ["Conversion", "conversion", "convert", "list_converters"]


@dataclass
class Conversion:
    """A converted model, and what became of the file's tensors.

    Attributes:
        model: The backbone with its adapter, in eval mode.
        method: Name of the family.
        source: The official repositories.
        network: Which of the file's networks was read.
        own_backbone: Whether the adapter holds the backbone's tensors; else the backbone had them already.
        read: "backbone", "head", "predictor", "prototypes" → number of tensors.
        ignored: Why tensors were left out → their keys, sorted.
    """

    model: PeftModel
    method: str
    source: str
    network: str
    own_backbone: bool
    read: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, list[str]] = field(default_factory=dict)


@checked
def convert(
    checkpoint: str | os.PathLike | Mapping[str, Any], method: str, *, backbone: str | nn.Module | None = None,
    network: str | None = None, num_heads: int | None = None, **options: Any,
) -> PeftModel:  # fmt: skip
    """Return an official checkpoint as a backbone with a projection head.

    Args:
        checkpoint: A ``.pth`` or ``.safetensors`` file, or what ``torch.load`` made of it.
        method: One of :func:`list_converters`.
        backbone: None for a timm model that is made for it. An id of :func:`hfproj.load_backbone`
            (``"facebook/dino-vits16"``) or a module whose names are those of timm, torchvision or the file. A
            ``FeatureBackbone`` leaves the backbone out: the head alone, on features.
        network: Which network of the file, where there are two: ``"teacher"`` or ``"student"``, ``"query"`` or
            ``"key"``, …; None: the one that the authors evaluate.
        num_heads: Attention heads of a ViT whose width the family does not know.
        **options: Of the family: ``d0`` of ``"directclr"``, ``head`` of ``"dinov2"``.

    Returns:
        In eval mode; ``model.save_pretrained(folder)`` writes what :func:`hfproj.from_pretrained` loads.

    Raises:
        UsageError: If there is no such file, method, network or option, or the backbone does not go with it.
        AdapterFileError: If the file is damaged, holds more than data, or is not of this method: all keys that are
            missing, unexpected or of a wrong shape are listed.

    Example:
        >>> from torchvision.models import resnet18
        >>> encoder = resnet18(num_classes=128)
        >>> encoder.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), encoder.fc)
        >>> checkpoint = {"state_dict": {f"module.encoder_q.{k}": t for k, t in encoder.state_dict().items()}}
        >>> model, x = convert(checkpoint, "moco_v2"), torch.randn(2, 3, 64, 64)
        >>> torch.allclose(model(x).projection, encoder.eval()(x), atol=1e-5)
        True
    """
    return conversion(checkpoint, method, backbone=backbone, network=network, num_heads=num_heads, **options).model


@checked
def list_converters() -> dict[str, str]:
    """Return the methods whose checkpoints can be converted, with a line each.

    Example:
        >>> list_converters()["moco_v2"]
        'MoCo v2 (ResNet): two layers, no norm'
    """
    return {name: family.line for name, family in sorted(FAMILIES.items())}


@checked
def conversion(
    checkpoint: str | os.PathLike | Mapping[str, Any], method: str, *, backbone: str | nn.Module | None = None,
    network: str | None = None, num_heads: int | None = None, **options: Any,
) -> Conversion:  # fmt: skip
    """Convert as :func:`convert` does, and return what became of the tensors as well.

    `checkpoint`, `method`, `backbone`, `network`, `num_heads` and the family's `options` are those of :func:`convert`.

    Raises:
        UsageError: If :func:`convert` raises it.
        AdapterFileError: If :func:`convert` raises it.
    """
    if method not in FAMILIES:
        raise unknown("method", method, FAMILIES)
    family = FAMILIES[method]
    choices = settle(family, network, options)
    content = Content(checkpoint if isinstance(checkpoint, Mapping) else read_file(checkpoint))
    parts = sort(content, family, choices)
    given = backbone is not None
    if not isinstance(backbone, nn.Module):
        backbone = _backbone(backbone, content, parts, family, num_heads)
    if given:
        backbones.check_heads(backbone, family, num_heads)
    matched = backbones.match(backbone, parts, in_dim := parts.head.in_dim or None)
    parts.add(matched)
    if parts.problems:
        raise refusal(parts, family, _hint(content, parts, family))
    alone = isinstance(backbone, FeatureBackbone) or (given and backbones.equal(backbone, matched))
    trained, pooling = "head" if alone else "full", "mean" if choices.get("head") == "ibot_head" else None
    settings: dict[str, Any] = {"trainable": trained, "pooling": pooling, "in_dim": in_dim, **parts.config()}
    # a timm model made for this has nothing but random weights to return to: no keep_original
    config = ProjectionHeadConfig(keep_original=given, **settings)
    model = get_peft_model(backbone, config)
    with torch.no_grad():
        inner = model.get_base_model()
        getattr(inner, CHILD).projection_head_modules["default"].load_state_dict(parts.state())
        own = bare_tensors(inner)
        for name, tensor in ({} if alone else matched.tensors).items():
            own[name].copy_(tensor)
    ignored: dict[str, list[str]] = {}
    for key, why in sorted(parts.ignored.items()):
        ignored.setdefault(why, []).append(key)
    read = {"backbone": len(matched.tensors), **Counter(name.split(".")[0] for name in parts.state())}
    return Conversion(model.eval(), method, family.source, choices["network"], not alone, read, ignored)


def _backbone(name: str | None, content: Content, parts: Parts, family: Family, num_heads: int | None) -> nn.Module:
    """Load the backbone that is named, or make a timm model for the checkpoint's."""
    if name is not None:
        return load_backbone(name)
    if not parts.backbone:
        raise refusal(parts, family, _hint(content, parts, family))
    try:
        name, kwargs = backbones.source(parts, family, num_heads)
    except HfprojError:
        if parts.problems:  # what is wrong with the keys goes first
            raise refusal(parts, family, _hint(content, parts, family)) from None
        raise
    import timm

    largest = limits.UNBACKED_BYTES + limits.COPIES * sum(t.numel() * 4 for _, t in parts.backbone.values())
    make = partial(timm.create_model, name.removeprefix("timm/"), **{**kwargs, "num_classes": 0})
    bytes_of(
        make, largest, "The backbone whose names this checkpoint has", "pass the backbone that it is of as backbone="
    )
    return load_backbone(name, **kwargs)


def _hint(content: Content, parts: Parts, family: Family) -> str:
    """Return what the file seems to be instead, as the end of a message."""
    families = {name: other for name, other in FAMILIES.items() if other is not family}
    others = [name for name, f in families.items() if not sort(content, f, settle(f, None, {})).problems]
    if others:
        return f" Its keys are those of method={' or '.join(map(repr, others))}."
    keys = [str(key).removeprefix("module.") for key in content.content]
    if {"conv1.weight", "patch_embed.proj.weight"} & set(keys) and not parts.head.state:
        return f" It seems to hold a backbone whose head was thrown away: look for {family.full_file}."
    return ""
