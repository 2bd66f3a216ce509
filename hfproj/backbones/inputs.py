"""Blank inputs that a backbone may take: guessed from its configuration, its first layer and its forward."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hfproj.backbones.loading import library_of, main_input_of, timm_part_of

_SIDES = (224, 64, 32, 256, 384, 128)  # of images, where the backbone does not say
_LENGTHS = (8, 64, 128)  # of texts: some attention runs in chunks
Inputs = dict[str | int, Any]  # by keyword, or 0 for the first argument


def blank_inputs(backbone: Any, batch: int, device: torch.device) -> Iterator[Inputs]:
    """Yield inputs of `batch` rows that `backbone` may take, likely ones first; nothing where none can be guessed."""
    name = main_input_of(backbone)
    if timm_part_of(backbone) is not None:
        for shape in _image_shapes(timm_part_of(backbone)[1]):  # type: ignore[index]
            yield {0: _blank((batch, *shape), backbone, device)}
    elif library_of(backbone) == "transformers" and name == "input_ids":
        uncached: Inputs = {"use_cache": False} if "use_cache" in inspect.signature(backbone.forward).parameters else {}
        for length in _LENGTHS:
            words = torch.arange(3, 3 + batch * length, device=device) % (
                getattr(backbone.config, "vocab_size", 0) or 9
            )
            yield {"input_ids": words.reshape(batch, length), **uncached}
    elif library_of(backbone) == "transformers" and str(name).startswith("pixel_values"):
        yield from _pixel_values(backbone, str(name), batch, device)
    else:
        yield from _of_first_layer(backbone, batch, device)


def _blank(shape: tuple[int, ...], backbone: nn.Module, device: torch.device) -> Tensor:
    dtype = next((p.dtype for p in backbone.parameters() if p.is_floating_point()), torch.float32)
    return torch.zeros(shape, dtype=dtype, device=device)


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, dict):
        size = size.get("height"), size.get("width")
    if isinstance(size, int):
        return size, size
    found = tuple(size)[-2:] if isinstance(size, tuple | list) else ()
    return found if len(found) == 2 and all(isinstance(n, int) for n in found) else None  # type: ignore[return-value]


def first_convolution(backbone: nn.Module) -> int | None:
    """Return how many channels the first convolution of `backbone` takes."""
    return next((m.in_channels for m in backbone.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)


def _image_shapes(model: Any) -> Iterator[tuple[int, int, int]]:
    """Yield (channels, height, width) that a timm model may take."""
    settings, modules = getattr(model, "pretrained_cfg", None) or {}, dict(model.named_modules())
    first = settings.get("first_conv")
    layers = [modules.get(name) for name in ((first,) if isinstance(first, str) else first or ())]
    channels = [getattr(m, "in_channels", None) or getattr(m, "in_chans", None) for m in layers]
    channels += [first_convolution(model), (settings.get("input_size") or (3,))[0], 3, 1, 4]  # some fold pixels first
    embed = getattr(model, "patch_embed", None)
    sizes = [getattr(embed, "img_size", None), getattr(model, "img_size", None), settings.get("input_size")]
    for number in dict.fromkeys([c for c in channels if c]):
        for size in dict.fromkeys([*[s for s in map(_pair, sizes) if s is not None], *[(s, s) for s in _SIDES]]):
            yield number, *size


def _pixel_values(backbone: Any, name: str, batch: int, device: torch.device) -> Iterator[Inputs]:
    config, takes = backbone.config, inspect.signature(backbone.forward).parameters
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None)
    channels = channels or first_convolution(backbone) or 3
    if "spatial_shapes" in takes:  # patches of images of any size
        patch, side = config.patch_size, 4
        pixels = _blank((batch, side * side, channels * patch * patch), backbone, device)
        mask = torch.ones(batch, side * side, dtype=torch.long, device=device)
        shapes = torch.full((batch, 2), side, dtype=torch.long, device=device)
        yield {name: pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
        return
    frames = next((n for n in (getattr(config, f, None) for f in ("num_frames", "frames_per_clip")) if n), None)
    given = [_pair(getattr(config, s, None)) for s in ("image_size", "crop_size", "img_size", "input_size")]
    for size in dict.fromkeys([*[s for s in given if s is not None], *[(s, s) for s in _SIDES]]):
        shape = (batch, frames, channels, *size) if isinstance(frames, int) else (batch, channels, *size)
        yield {name: _blank(shape, backbone, device)}


def _of_first_layer(backbone: nn.Module, batch: int, device: torch.device) -> Iterator[Inputs]:
    """Yield what the first layer of a module takes, by position."""
    for module in backbone.modules():
        shapes: list[tuple[int, ...]] = []
        if isinstance(module, nn.Embedding):
            yield {0: torch.zeros(batch, 8, dtype=torch.long, device=device)}
            return
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            axes = len(module.kernel_size)
            shapes = [(module.in_channels, *[side] * axes) for side in ((32, 224, 64, 96) if axes < 3 else (16, 32))]
        elif isinstance(module, nn.Linear):
            shapes = [(module.in_features,), (8, module.in_features)]
        elif isinstance(module, nn.TransformerEncoderLayer):
            shapes = [(8, module.self_attn.embed_dim)]
        elif isinstance(module, nn.LSTM | nn.GRU | nn.RNN):
            shapes = [(8, module.input_size)]
        elif isinstance(module, nn.LayerNorm):
            shapes = [(8, *module.normalized_shape)]
        for shape in shapes:
            yield {0: _blank((batch, *shape), backbone, device)}
        if shapes:
            return
