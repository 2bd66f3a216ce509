"""Backbones: loading them, where their representation is read, how it is pooled, and how images are prepared for them.

Three families are known: `transformers` models (vision and text), `timm` models, and plain ``nn.Module``s whose output
is a tensor ``[batch, dim]``, ``[batch, tokens, dim]`` or ``[batch, dim, height, width]``.
"""

import dataclasses
import inspect
import json
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import Tensor, nn

from hfproj.errors import UsageError, unknown

POOLINGS = ("cls", "mean", "cls_mean", "max", "pooler")
EMBEDDED = "vit_nano"
_IMAGENET_HALF = (0.5, 0.5, 0.5)
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers in a preprocessor_config.json


@dataclasses.dataclass(frozen=True)
class ImagePreprocessing:
    """How a backbone wants its images: square side in pixels, mean and std per channel of values in [0, 1]."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"


@dataclasses.dataclass(frozen=True)
class ReadPoint:
    """Where the representation leaves a backbone and how it is pooled.

    Args:
        pooling: One of `POOLINGS`.
        module: Name of the submodule to read; None reads the backbone's own output.
        side: Whether that submodule's ``"output"`` or its first ``"input"`` is read.
        prefix_tokens: How many tokens before the patches are no patches (class token, registers).
        text: Whether the tokens are those of a text, so that means respect ``attention_mask``.
        in_dim: Width of the representation.
    """

    pooling: str
    module: str | None
    side: str
    prefix_tokens: int
    text: bool
    in_dim: int


def library_of(backbone: nn.Module) -> str:
    """Return ``"transformers"``, ``"timm"`` or ``"torch"``."""
    if hasattr(backbone, "config") and hasattr(backbone.config, "model_type"):
        return "transformers"
    return "timm" if type(backbone).__module__.startswith("timm.") else "torch"


def _timm_part(backbone: nn.Module) -> tuple[str, nn.Module] | None:
    """Return (prefix of its names, timm model) for a timm model, bare or inside transformers' wrapper."""
    if library_of(backbone) == "timm":
        return "", backbone
    if type(backbone).__name__ == "TimmWrapperModel":
        return "timm_model.", backbone.timm_model
    return None


def blocks_of(backbone: nn.Module) -> list[str]:
    """Return the names of the backbone's blocks, first to last: transformer layers, or the stages of a CNN.

    The blocks are the children of the largest ``ModuleList`` or ``Sequential`` (``layers``, ``encoder.layer``,
    ``blocks``, ``stages``), or the children ``layer1`` … ``layerN`` of a ResNet.

    Raises:
        UsageError: no such container exists.
    """
    timm_part = _timm_part(backbone)
    prefix, root = timm_part or ("", backbone)
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
            "`trainable` mean nothing for it; use layer=-1 and trainable='head', 'adapter' or 'full'."
        )
    return [f"{prefix}{best}.{n}" for n, _ in root.get_submodule(best).named_children()]


def _block_name(backbone: nn.Module, layer: int) -> str:
    blocks = blocks_of(backbone)
    if not -len(blocks) <= layer < len(blocks):
        raise UsageError(
            f"layer={layer}: {type(backbone).__name__} has {len(blocks)} blocks; expected -1 (its final output) or an "
            f"index from {-len(blocks)} to {len(blocks) - 1}."
        )
    return blocks[layer]


def _prefix_tokens(backbone: nn.Module) -> tuple[int, bool]:
    """Return (tokens before the patches, whether the first of them is a class token)."""
    timm_part = _timm_part(backbone)
    if timm_part:
        model = timm_part[1]
        return int(getattr(model, "num_prefix_tokens", 0)), getattr(model, "cls_token", None) is not None
    embeddings = getattr(backbone, "embeddings", None)
    special = [
        name
        for name in ("cls_token", "class_embedding", "distillation_token")
        if getattr(embeddings, name, None) is not None
    ]
    registers = int(getattr(getattr(backbone, "config", None), "num_register_tokens", 0) or 0)
    return len(special) + registers, bool(special)


def _width(backbone: nn.Module) -> int | None:
    timm_part = _timm_part(backbone)
    if timm_part:
        return int(timm_part[1].num_features)
    config = getattr(backbone, "config", None)
    if getattr(config, "hidden_size", None):
        return int(config.hidden_size)
    for owner, attribute in ((config, "hidden_sizes"), (config, "depths_width"), (config, "embed_dims")):
        if getattr(owner, attribute, None):
            return int(getattr(owner, attribute)[-1])
    for attribute in ("num_features", "embed_dim", "hidden_size", "out_features", "out_dim"):
        if isinstance(getattr(backbone, attribute, None), int):
            return int(getattr(backbone, attribute))
    return None


def _timm_read_module(model: nn.Module) -> tuple[str, str] | None:
    """Return (name, side) of the last feature map or token sequence of a timm model, or None when it shows neither."""
    for name, module in model.named_modules():
        if name.split(".")[-1] == "global_pool" and "Pool" in type(module).__name__:
            return name, "input"
    return ("norm", "output") if isinstance(getattr(model, "norm", None), nn.Module) else None


def _checkpoint_lacks(backbone: nn.Module, part: str) -> bool:
    """Whether the checkpoint of a transformers model has no tensor below `part`; False when it can't be told."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    source = _files_of(backbone)
    if source is None:
        return False
    names: list[str] = []
    try:
        index = cached_file(
            source,
            "model.safetensors.index.json",
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if index:
            names = list(json.loads(Path(index).read_text())["weight_map"])
        else:
            file = cached_file(source, "model.safetensors", local_files_only=True)
            with safe_open(file, framework="pt") as handle:
                names = list(handle.keys())
    except (OSError, ValueError, KeyError):
        return False
    return bool(names) and not any(f".{part}." in f".{name}" for name in names)


def resolve_read_point(
    backbone: nn.Module, *, pooling: str | None = None, layer: int = -1, in_dim: int | None = None
) -> ReadPoint:
    """Return where and how `backbone`'s representation is read.

    Args:
        backbone: The bare backbone.
        pooling: One of `POOLINGS`; None takes ``"cls"`` where there is a class token (and for text), else ``"mean"``.
        layer: -1 reads the final output (after the last norm); any other index reads the raw output of that block.
        in_dim: Width of the representation, for modules from which it can't be inferred.

    Raises:
        UsageError: the combination can't work for this backbone.
    """
    if pooling is not None and pooling not in POOLINGS:
        raise unknown("pooling", pooling, POOLINGS)
    kind = type(backbone).__name__
    text = getattr(backbone, "main_input_name", None) == "input_ids"
    prefix, has_cls = _prefix_tokens(backbone)
    has_cls = has_cls or text
    width = _width(backbone)
    timm_part = _timm_part(backbone)
    module: str | None = None
    side = "output"

    if pooling is None:
        pooling = "cls" if has_cls else "mean"
    if pooling == "pooler":
        if layer != -1:
            raise UsageError(
                f"pooling='pooler' reads the backbone's own pooled output, so layer={layer} can't be used "
                "with it; use pooling='cls' or 'mean', or layer=-1."
            )
        _check_pooler(backbone)
        if timm_part and getattr(timm_part[1], "head_hidden_size", None):
            width = int(timm_part[1].head_hidden_size)
    elif layer != -1:
        module = _block_name(backbone, layer)
        sizes = getattr(getattr(backbone, "config", None), "hidden_sizes", None) or []
        if len(sizes) == len(blocks_of(backbone)):  # the stages of a CNN differ in width
            width = int(sizes[layer])
        if timm_part:
            info = timm_part[1].feature_info if isinstance(getattr(timm_part[1], "feature_info", None), list) else []
            widths = {timm_part[0] + i["module"]: i["num_chs"] for i in info}
            if prefix == 0 and library_of(timm_part[1]) == "timm" and _timm_read_module(timm_part[1])[1] == "input":
                width = widths.get(module)
    elif timm_part:
        found = _timm_read_module(timm_part[1])
        if found is None:
            raise UsageError(
                f"{kind} shows neither a token norm nor a pooling layer; use pooling='pooler' with a model "
                "made by timm.create_model(…, num_classes=0)."
            )
        module, side = timm_part[0] + found[0], found[1]
    if pooling in ("cls", "cls_mean") and not has_cls:
        raise UsageError(f"pooling={pooling!r} needs a class token and {kind} has none; use pooling='mean' or 'max'.")
    width = in_dim if in_dim is not None and pooling != "cls_mean" else width
    if width is None:
        raise UsageError(f"The width of {kind}'s representation can't be inferred; pass in_dim=… to the head's config.")
    if pooling == "cls_mean":
        width = 2 * width if in_dim is None else in_dim
    return ReadPoint(pooling=pooling, module=module, side=side, prefix_tokens=prefix, text=text, in_dim=int(width))


def _check_pooler(backbone: nn.Module) -> None:
    kind, cure = type(backbone).__name__, "use pooling='cls' or 'mean'"
    timm_part = _timm_part(backbone)
    if timm_part:
        if getattr(timm_part[1], "num_classes", 0):
            raise UsageError(
                f"pooling='pooler' of {kind} would read class scores; make the backbone with num_classes=0, or {cure}."
            )
        return
    if library_of(backbone) != "transformers":
        return
    parts = {n: getattr(backbone, n, None) for n in ("pooler", "head")}
    learned = [n for n, m in parts.items() if isinstance(m, nn.Module) and any(True for _ in m.parameters())]
    if hasattr(backbone, "pooler") and backbone.pooler is None:
        raise UsageError(f"pooling='pooler': this {kind} has no pooler; {cure}.")
    if learned and _checkpoint_lacks(backbone, learned[0]):
        raise UsageError(
            f"pooling='pooler': the checkpoint {backbone.name_or_path!r} has no pooler, so {kind} made one with random "
            f"weights; {cure}."
        )


def bare_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """Return the backbone's own parameters and persistent buffers, named as if no adapter had been attached."""
    found: dict[str, Tensor] = {}

    def walk(module: nn.Module, prefix: str) -> None:
        for wrapped in ("base_layer", "original_module"):  # how PEFT's layers keep what they wrap
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and hasattr(module, wrapped):
                return walk(getattr(module, wrapped), prefix)
        if isinstance(module, BaseTunerLayer):
            return None
        found.update({prefix + n: p for n, p in module.named_parameters(recurse=False)})
        transient = module._non_persistent_buffers_set
        found.update({prefix + n: b for n, b in module.named_buffers(recurse=False) if n not in transient})
        for name, child in module.named_children():
            walk(child, f"{prefix}{name}.")
        return None

    walk(backbone, "")
    return found


def feeds_representation(backbone: nn.Module, point: ReadPoint) -> list[str]:
    """Return the names (as in `bare_tensors`) of the tensors that the representation depends on.

    Left out are mask tokens, poolers and classifiers that are not read, and whatever is registered after the module
    that is read (blocks after `layer`, final norms, classifiers).
    """
    names = list(bare_tensors(backbone))
    drop = {"mask_token"}
    if point.pooling != "pooler":
        drop |= {"pooler"}
        if "Siglip" in type(backbone).__name__:
            drop |= {"head"}
        if type(backbone).__name__.startswith("CLIP"):
            drop |= {"post_layernorm"}
    else:
        timm_part = _timm_part(backbone)
        classifier = timm_part and (getattr(timm_part[1], "pretrained_cfg", None) or {}).get("classifier")
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
        UsageError: `count` is no number from 1 to the number of blocks that feed the representation.
    """
    names = feeds_representation(backbone, point)
    blocks = [b for b in blocks_of(backbone) if any(n.startswith(b + ".") for n in names)]
    if not 1 <= count <= len(blocks):
        raise UsageError(
            f"trainable={count}: expected 1 to {len(blocks)} blocks of {type(backbone).__name__}; to train "
            "all of the backbone use trainable='full'."
        )
    first = next(i for i, n in enumerate(names) if n.startswith(blocks[-count] + "."))
    return names[first:]


def _tokens(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    for attribute in ("last_hidden_state", "pooler_output"):
        value = getattr(output, attribute, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise UsageError(
        f"The backbone returned {type(output).__name__}; expected a tensor, a tuple of tensors or an output "
        "with last_hidden_state."
    )


def _pooled(output: Any) -> Tensor:
    if isinstance(output, tuple) and len(output) > 1:  # return_dict=False
        pooled = output[1]
    else:
        pooled = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    if not isinstance(pooled, Tensor) or pooled.ndim < 2 or pooled.shape[2:].numel() != 1:
        raise UsageError(
            "pooling='pooler': the backbone returned no pooled vector per sample; use pooling='cls' or 'mean'."
        )
    return pooled.flatten(1)


def pool(output: Any, point: ReadPoint, attention_mask: Tensor | None = None) -> Tensor:
    """Return the representation ``h`` ``[batch, in_dim]`` from a backbone's output or a captured feature.

    Raises:
        UsageError: the output has another width than the head was made for, or can't be pooled this way.
    """
    if point.pooling == "pooler":
        h = _pooled(output)
    else:
        f = _tokens(output)
        if f.ndim == 4:  # feature map; timm's Swin family keeps channels last
            f = f.flatten(1, 2) if f.shape[-1] == point.in_dim and f.shape[1] != point.in_dim else f.flatten(2).mT
            prefix = 0
        else:
            prefix = point.prefix_tokens
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
    """Return whether a `transformers` ViT has to be told to interpolate its positions for images of `size`.

    Raises:
        UsageError: a `timm` model made for one size only gets another.
    """
    timm_part = _timm_part(backbone)
    if timm_part:
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


# --- loading ---------------------------------------------------------------------------------------------------------


def embedded_folder() -> Path:
    """Return the folder of the small pretrained ViT that ships with the package."""
    return Path(str(resources.files("hfproj"))) / "assets" / EMBEDDED


def load_backbone(name: str, *, library: str | None = None, revision: str | None = None, **kwargs: Any) -> nn.Module:
    """Load a pretrained backbone and note on it where it came from, so that an adapter can be loaded with it again.

    Args:
        name: ``"vit_nano"`` (ships with the package), a Hub id, a folder with a `transformers` model, or a timm model
            (``"timm/vit_small_patch16_224.augreg_in1k"`` from the Hub, or a bare timm name with ``library="timm"``).
        library: ``"transformers"`` or ``"timm"``; None decides by `name`.
        revision: A branch, tag or commit of the Hub repository.
        **kwargs: Passed to ``from_pretrained`` or ``timm.create_model`` (``img_size=…``, ``pretrained=False``); plain
            JSON values only, since they are stored with the adapter.

    Raises:
        UsageError: nothing can be loaded under this name.
    """
    if library not in (None, "transformers", "timm"):
        raise unknown("backbone library", library, ("transformers", "timm"))
    if "trust_remote_code" in kwargs:
        raise UsageError("trust_remote_code is not supported: code from a repository is never run.")
    if library is None:
        library = "timm" if name.startswith("timm/") or name.startswith("hf-hub:timm/") else "transformers"
    load = _load_timm if library == "timm" else _load_transformers
    backbone = load(name, revision, dict(kwargs))
    source = {"library": library, "id": name, "kwargs": dict(kwargs)}
    if revision is not None:
        source["revision"] = revision
    backbone.__dict__["hfproj_source"] = source
    return backbone


def _load_transformers(name: str, revision: str | None, kwargs: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModel, CLIPVisionModel, Siglip2VisionModel, SiglipVisionModel

    towers = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel, "siglip2": Siglip2VisionModel}
    embedded = name == EMBEDDED and not Path(name).is_dir()
    source = str(embedded_folder()) if embedded else name
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        cls = towers.get(config.model_type)
        if cls is None:
            from transformers.models.auto.modeling_auto import MODEL_MAPPING

            target = MODEL_MAPPING[type(config)]
            cls = AutoModel
            if "add_pooling_layer" in inspect.signature(target.__init__).parameters:
                kwargs.setdefault("add_pooling_layer", False)  # else ViTs get a pooler with random weights
        backbone = cls.from_pretrained(source, revision=revision, use_safetensors=True, **kwargs)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"No backbone could be loaded from {name!r}; expected 'vit_nano', the id of a Hub model with safetensors, "
            "a folder with config.json and model.safetensors, or a timm name such as 'timm/resnet18.a1_in1k'. "
            f"({reason})"
        ) from error
    if embedded:
        backbone.name_or_path = backbone.config._name_or_path = ""  # a path of this installation says nothing elsewhere
    return backbone


def _load_timm(name: str, revision: str | None, kwargs: dict[str, Any]) -> nn.Module:
    import timm

    bare = name.removeprefix("hf-hub:").removeprefix("timm/")
    if revision is not None:
        bare = f"hf-hub:timm/{bare}@{revision}"
    kwargs = {"pretrained": True, "num_classes": 0, **kwargs}
    try:
        return timm.create_model(bare, **kwargs)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        known = timm.list_models()
        if bare.split(".")[0] not in known and revision is None:
            raise unknown("timm backbone", bare.split(".")[0], known[:0] or _near(bare, known)) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"The weights of timm model {name!r} could not be loaded; check the name and the connection, or "
            f"use a folder or 'vit_nano'. ({reason})"
        ) from error


def _near(name: str, known: list[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, known, n=5, cutoff=0.4) or ["see timm.list_models()"]


def source_of(backbone: nn.Module) -> dict[str, Any] | None:
    """Return ``{"library", "id", "kwargs"}`` that loads `backbone` again, or None where that is unknown."""
    if "hfproj_source" in backbone.__dict__:
        return backbone.__dict__["hfproj_source"]
    library = library_of(backbone)
    if library == "transformers" and getattr(backbone, "name_or_path", ""):
        kwargs = {}
        if getattr(backbone, "pooler", False) is None:
            kwargs["add_pooling_layer"] = False
        return {"library": library, "id": backbone.name_or_path, "kwargs": kwargs}
    if library == "timm":
        config = getattr(backbone, "pretrained_cfg", None) or {}
        name = config.get("architecture")
        if name:
            tag = f".{config['tag']}" if config.get("tag") else ""
            return {"library": library, "id": f"timm/{name}{tag}", "kwargs": {"num_classes": backbone.num_classes}}
    return None


def image_preprocessing(model: nn.Module) -> ImagePreprocessing:
    """Return the image size, mean and std that `model`'s backbone was trained with.

    They come from a `transformers` checkpoint's ``preprocessor_config.json`` or from timm's configuration. Where
    neither exists (a backbone made from a config) it is the config's size and mean = std = 0.5, with a warning.

    Raises:
        UsageError: the image size is unknown.
    """
    backbone = model.get_base_model() if hasattr(model, "get_base_model") else model
    timm_part = _timm_part(backbone)
    if timm_part:
        from timm.data import resolve_model_data_config

        data = resolve_model_data_config(timm_part[1])
        # the size this very model was made for (img_size=…) goes before the one its weights were trained with
        size = getattr(getattr(timm_part[1], "patch_embed", None), "img_size", None) or data["input_size"][1:]
        return ImagePreprocessing(size[-1], tuple(data["mean"]), tuple(data["std"]), data["interpolation"])
    source = _files_of(backbone)
    found = _read_processor(source) if source else None
    size = getattr(getattr(backbone, "config", None), "image_size", None)
    size = size[-1] if isinstance(size, list | tuple) else size
    if found:
        wanted = found.get("crop_size") if found.get("do_center_crop", False) else found.get("size")
        if isinstance(wanted, dict):
            wanted = wanted.get("height") or wanted.get("shortest_edge")
        mean, std = found.get("image_mean") or _IMAGENET_HALF, found.get("image_std") or _IMAGENET_HALF
        resample = _RESAMPLE.get(found.get("resample"), "bicubic")
        return ImagePreprocessing(int(wanted or size), tuple(mean), tuple(std), resample)
    if not size:
        raise UsageError(
            f"The image size of {type(backbone).__name__} is unknown; pass size=, mean= and std= to the "
            "collator instead of for_model."
        )
    warnings.warn(
        f"{type(backbone).__name__} has no preprocessor_config.json: images are normalised with mean = std = 0.5; "
        "pass mean= and std= if it was trained with others.",
        stacklevel=2,
    )
    return ImagePreprocessing(int(size), _IMAGENET_HALF, _IMAGENET_HALF)


def _files_of(backbone: nn.Module) -> str | None:
    """Return the folder or Hub id of a transformers model's files."""
    name = (source_of(backbone) or {}).get("id")
    return str(embedded_folder()) if name == EMBEDDED else name


def _read_processor(source: str) -> dict[str, Any] | None:
    from transformers.utils import cached_file

    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            file = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError):
            return None
        if file:
            found = json.loads(Path(file).read_text())
            return found.get("image_processor", found)
    return None
