"""Where a representation leaves its backbone, how it is pooled, and which of the backbone's tensors it depends on."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import Tensor, nn

from hfproj.backbones.features import FeatureBackbone
from hfproj.backbones.loading import files_of, library_of, timm_part_of
from hfproj.errors import UsageError, check_choice
from hfproj.typing import Pooling

POOLINGS = ("cls", "mean", "cls_mean", "max", "pooler")


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
    """

    pooling: Pooling
    module: str | None
    side: str
    prefix_tokens: int
    text: bool
    in_dim: int


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


def _prefix_tokens(backbone: nn.Module) -> tuple[int, bool]:
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


def _width(backbone: Any) -> int | None:
    if timm_part := timm_part_of(backbone):
        return int(getattr(timm_part[1], "num_features"))  # noqa: B009  torch types it as Tensor | Module
    config: Any = getattr(backbone, "config", None)
    if getattr(config, "hidden_size", None):
        return int(config.hidden_size)
    for attribute in ("hidden_sizes", "depths_width", "embed_dims"):
        if found := getattr(config, attribute, None):
            return int(found[-1])
    names = ("num_features", "embed_dim", "hidden_size", "out_features", "out_dim")
    return next((n for n in (getattr(backbone, name, None) for name in names) if isinstance(n, int)), None)


def _timm_read_module(model: nn.Module) -> tuple[str, str] | None:
    """Return (name, side) of the last feature map or token sequence of a timm model, or None when it shows neither."""
    for name, module in model.named_modules():
        if name.split(".")[-1] == "global_pool" and "Pool" in type(module).__name__:
            return name, "input"
    return ("norm", "output") if isinstance(getattr(model, "norm", None), nn.Module) else None


def _checkpoint_lacks(backbone: nn.Module, part: str) -> bool:
    """Whether the checkpoint of a transformers model has no tensor below `part`; False when that is not known."""
    from transformers.utils import cached_file

    source = files_of(backbone)
    if source is None:
        return False
    quiet = {f"_raise_exceptions_for_{e}": False for e in ("missing_entries", "gated_repo", "connection_errors")}
    try:
        index = cached_file(source, "model.safetensors.index.json", local_files_only=True, **quiet)
        if index:
            names = list(json.loads(Path(index).read_text())["weight_map"])
        else:
            with safe_open(cached_file(source, "model.safetensors", local_files_only=True), framework="pt") as handle:
                names = list(handle.keys())
    except (OSError, ValueError, KeyError):
        return False
    return bool(names) and not any(f".{part}." in f".{name}" for name in names)


def resolve_read_point(
    backbone: nn.Module, *, pooling: Pooling | None = None, layer: int = -1, in_dim: int | None = None
) -> ReadPoint:
    """Return where and how `backbone`'s representation is read.

    Args:
        backbone: The bare backbone.
        pooling: One of `POOLINGS`; None takes ``"cls"`` where there is a class token (and for text), else ``"mean"``.
        layer: -1 reads the final output (after the last norm); any other index reads the raw output of that block.
        in_dim: Width of the representation, for modules from which it can't be inferred.

    Raises:
        UsageError: If this backbone can't be read in this way.
    """
    if isinstance(backbone, FeatureBackbone):
        backbone.check(pooling, layer)
        return ReadPoint(backbone.pooling, None, "output", prefix_tokens=0, text=False, in_dim=backbone.in_dim)
    if pooling is not None:
        check_choice("pooling", pooling, POOLINGS)
    kind, width, side = type(backbone).__name__, _width(backbone), "output"
    module: str | None = None
    text = getattr(backbone, "main_input_name", None) == "input_ids"
    prefix, has_cls = _prefix_tokens(backbone)
    has_cls = has_cls or text
    timm_prefix, timm_model = timm_part_of(backbone) or ("", None)
    pooling = pooling or ("cls" if has_cls else "mean")
    if pooling == "pooler":
        if layer != -1:
            hint = "use pooling='cls' or 'mean', or layer=-1"
            raise UsageError(f"pooling='pooler' is the backbone's own; layer={layer} can't be used with it; {hint}.")
        _check_pooler(backbone)
        width = int(getattr(timm_model, "head_hidden_size", None) or 0) or width
    elif layer != -1:
        module, width = _block(backbone, layer, prefix, width)
    elif timm_model is not None:
        found = _timm_read_module(timm_model)
        if found is None:
            hint = "use pooling='pooler' with a model made by timm.create_model(…, num_classes=0)"
            raise UsageError(f"{kind} shows neither a token norm nor a pooling layer; {hint}.")
        module, side = timm_prefix + found[0], found[1]
    if pooling in ("cls", "cls_mean") and not has_cls:
        raise UsageError(f"pooling={pooling!r} needs a class token and {kind} has none; use pooling='mean' or 'max'.")
    if in_dim is None and width is not None:
        in_dim = 2 * width if pooling == "cls_mean" else width
    if in_dim is None or (pooling == "cls_mean" and width is None):
        raise UsageError(f"The width of {kind}'s representation can't be inferred; pass in_dim=… to the head's config.")
    return ReadPoint(pooling=pooling, module=module, side=side, prefix_tokens=prefix, text=text, in_dim=int(in_dim))


def _block(backbone: nn.Module, layer: int, prefix_tokens: int, width: int | None) -> tuple[str, int | None]:
    """Return the name of block `layer` and the width of its output."""
    blocks = blocks_of(backbone)
    if not -len(blocks) <= layer < len(blocks):
        hint = f"expected -1 (its final output) or an index from {-len(blocks)} to {len(blocks) - 1}"
        raise UsageError(f"layer={layer}: {type(backbone).__name__} has {len(blocks)} blocks; {hint}.")
    sizes = getattr(getattr(backbone, "config", None), "hidden_sizes", None) or []
    if len(sizes) == len(blocks):  # the stages of a CNN differ in width
        width = int(sizes[layer])
    prefix, model = timm_part_of(backbone) or ("", None)
    if model is not None and prefix_tokens == 0 and (_timm_read_module(model) or ("", ""))[1] == "input":
        info: Any = getattr(model, "feature_info", None)
        widths = {prefix + i["module"]: i["num_chs"] for i in info} if isinstance(info, list) else {}
        width = widths.get(blocks[layer])
    return blocks[layer], width


def _check_pooler(backbone: Any) -> None:
    kind, hint = type(backbone).__name__, "use pooling='cls' or 'mean'"
    if timm_part := timm_part_of(backbone):
        if getattr(timm_part[1], "num_classes", 0):
            raise UsageError(
                f"pooling='pooler' of {kind} would read class scores; make it with num_classes=0, or {hint}."
            )
    elif library_of(backbone) == "transformers":
        if getattr(backbone, "pooler", ...) is None:
            raise UsageError(f"pooling='pooler': this {kind} has no pooler; {hint}.")
        parts = {n: getattr(backbone, n, None) for n in ("pooler", "head")}
        learned = [n for n, m in parts.items() if isinstance(m, nn.Module) and any(True for _ in m.parameters())]
        if learned and _checkpoint_lacks(backbone, learned[0]):
            made = f"so {kind} made one with random weights; {hint}"
            raise UsageError(f"pooling='pooler': the checkpoint {backbone.name_or_path!r} has no pooler, {made}.")


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


def feeds_representation(backbone: nn.Module, point: ReadPoint) -> list[str]:
    """Return the names (as in `bare_tensors`) of the tensors that the representation depends on.

    Left out are mask tokens, poolers and classifiers that are not read, and what is registered after the module that is
    read (blocks after `layer`, final norms, classifiers).
    """
    names = list(bare_tensors(backbone))
    drop, kind = {"mask_token"}, type(backbone).__name__
    if point.pooling != "pooler":
        drop |= {"pooler"} | ({"head"} if "Siglip" in kind else set())
        drop |= {"post_layernorm"} if kind.startswith("CLIP") else set()
    elif timm_part := timm_part_of(backbone):
        classifier = (getattr(timm_part[1], "pretrained_cfg", None) or {}).get("classifier")
        drop |= {classifier} if isinstance(classifier, str) else set()
    names = [n for n in names if not drop & set(n.split("."))]
    if point.module is None:
        return names
    modules = [n for n, _ in backbone.named_modules()]
    first_after = modules.index(point.module) + (point.side == "output")
    after = {n for n in modules[first_after:] if point.side == "input" or not n.startswith(point.module + ".")}
    return [n for n in names if n.rpartition(".")[0] not in after]


def last_blocks(backbone: nn.Module, point: ReadPoint, count: int) -> list[str]:
    """Return the names, among `feeds_representation`, of the last `count` blocks that feed it and of what follows them.

    Raises:
        UsageError: If `count` is not between 1 and the number of blocks that feed the representation.
    """
    names = feeds_representation(backbone, point)
    blocks = [b for b in blocks_of(backbone) if any(n.startswith(b + ".") for n in names)]
    if not 1 <= count <= len(blocks):
        blocks_there = f"1 to {len(blocks)} blocks of {type(backbone).__name__}"
        wanted = f"trainable to be {blocks_there}"
        raise UsageError(f"Expected {wanted}, got {count}; to train all of it use trainable='full'.")
    first = next(i for i, n in enumerate(names) if n.startswith(blocks[-count] + "."))
    return names[first:]


def _tokens(output: Any) -> Tensor:
    first = output[0] if isinstance(output, tuple | list) and output else None
    named = (getattr(output, name, None) for name in ("last_hidden_state", "pooler_output"))
    found = next((value for value in (output, *named, first) if isinstance(value, Tensor)), None)
    if found is None:
        expected = "a tensor, a tuple of tensors or an output with last_hidden_state"
        raise UsageError(f"The backbone returned {type(output).__name__}; expected {expected}.")
    return found


def _pooled(output: Any) -> Tensor:
    named = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    pooled = output[1] if isinstance(output, tuple) and len(output) > 1 else named  # a tuple: return_dict=False
    if not isinstance(pooled, Tensor) or pooled.ndim < 2 or pooled.shape[2:].numel() != 1:
        raise UsageError("pooling='pooler': the backbone returned no pooled vector per sample; use 'cls' or 'mean'.")
    return pooled.flatten(1)


def pool(output: Any, point: ReadPoint, attention_mask: Tensor | None = None) -> Tensor:
    """Return the representation ``h`` ``[batch, in_dim]`` from a backbone's output or a captured feature.

    Raises:
        UsageError: If the output has another width than the head was made for, or can't be pooled this way.
    """
    if point.pooling == "pooler":
        h = _pooled(output)
    else:
        f = _tokens(output)
        prefix = 0 if f.ndim == 4 else point.prefix_tokens
        if f.ndim == 4:  # feature map; timm's Swin family keeps channels last
            f = f.flatten(1, 2) if f.shape[-1] == point.in_dim and f.shape[1] != point.in_dim else f.flatten(2).mT
        h = f if f.ndim == 2 else _pool_tokens(f, point, prefix, attention_mask)
    if h.shape[-1] != point.in_dim:
        raise UsageError(
            f"The representation has {h.shape[-1]} dimensions and the head was made for {point.in_dim}; give "
            f"the config in_dim={h.shape[-1]}, or use the backbone that the head was trained on."
        )
    return h


def _pool_tokens(f: Tensor, point: ReadPoint, prefix: int, attention_mask: Tensor | None) -> Tensor:
    if point.pooling == "cls":
        return f[:, 0]
    patches = f if point.text else f[:, prefix:]
    mask = None
    if point.text and attention_mask is not None:
        mask = attention_mask.to(patches.dtype).unsqueeze(-1)
    if point.pooling == "max":
        return (patches if mask is None else patches.masked_fill(mask == 0, -torch.inf)).amax(1)
    mean = patches.mean(1) if mask is None else (patches * mask).sum(1) / mask.sum(1).clamp_min(1)
    return torch.cat([f[:, 0], mean], dim=-1) if point.pooling == "cls_mean" else mean


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
