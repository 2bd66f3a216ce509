"""Loading a backbone by name, and the source of a backbone."""

import copy
import difflib
import importlib.util
import inspect
import re
import weakref
from collections.abc import Collection, Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn

from hfproj.backbones.allowance import on_meta
from hfproj.backbones.quantized import METHODS, is_quantized
from hfproj.backbones.settings import module_settings, plain_values, settings_of
from hfproj.backbones.small_images import split_options, with_stem
from hfproj.checking import checked
from hfproj.errors import UsageError, check_choice, check_type, one_line, unknown
from hfproj.hints import plain_name
from hfproj.typing import OneOf

EMBEDDED = "vit_nano"
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def library_of(backbone: nn.Module) -> str:
    """Return ``"transformers"``, ``"timm"`` or ``"torch"``."""
    if hasattr(backbone, "config") and hasattr(backbone.config, "model_type"):
        return "transformers"
    return "timm" if type(backbone).__module__.startswith("timm.") else "torch"


def main_input_of(backbone: Any) -> str | None:
    """Return the name of the input of a `transformers` backbone, None of others.

    ``main_input_name`` is inherited, and towers of mixed models name one that their forward does not take.
    """
    name = getattr(backbone, "main_input_name", None)
    if library_of(backbone) != "transformers":
        return name if isinstance(name, str) else None
    takes = [n for n, p in inspect.signature(backbone.forward).parameters.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    return next((n for n in (name, "pixel_values", "input_ids") if n in takes), takes[0] if takes else name)


def bare_backbone(model: Any) -> nn.Module:
    """Return the backbone of a PEFT model, or `model` itself if it is a backbone."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def timm_part_of(backbone: nn.Module) -> tuple[str, nn.Module] | None:
    """Return (prefix of its names, timm model) for a timm model, bare or inside transformers' wrapper."""
    if library_of(backbone) == "timm":
        return "", backbone
    if type(backbone).__name__ == "TimmWrapperModel":
        return "timm_model.", backbone.get_submodule("timm_model")
    return None


@checked
def embedded_folder() -> Path:
    """Return the folder of the small pretrained ViT that ships with the package."""
    return Path(str(resources.files("hfproj"))) / "assets" / EMBEDDED


@checked
def load_backbone(
    name: str, *, library: OneOf["transformers", "timm"] | None = None, revision: str | None = None,
    token: str | bool | None = None, **kwargs: Any,
) -> nn.Module:  # fmt: skip
    """Load a pretrained backbone and note its source on it, so that an adapter can be loaded with it again.

    Args:
        name: ``"vit_nano"`` (ships with the package), a Hub id, a folder with a `transformers` model, or a timm model
            (``"timm/vit_small_patch16_224.augreg_in1k"`` from the Hub, or a bare timm name with ``library="timm"``).
        library: ``"transformers"`` or ``"timm"``; None decides by `name`.
        revision: A branch, tag or commit of the Hub repository.
        token: For a private repository of a transformers model; None takes HF_TOKEN or that of ``hf auth login``.
        **kwargs: Passed to ``from_pretrained`` or ``timm.create_model`` (``img_size=…``, ``pretrained=False``); plain
            JSON values only, since they are stored with the adapter. A ResNet of timm without pretrained weights also
            takes ``stem="cifar"`` (3×3 and no max-pool, for images of 32 pixels) and ``width``, which multiplies the
            channels of its stages; the stem keeps its 64.

    Raises:
        UsageError: If nothing can be loaded under this name, or an option is none of the library's.
    """
    check_type("the backbone's name", name, str, "give a Hub id, a folder or a timm model; a module needs no loading")
    if library is None:
        library = "timm" if name.startswith(("timm/", "hf-hub:timm/")) else "transformers"
    check_choice("backbone library", library, ("transformers", "timm"))
    if "trust_remote_code" in kwargs:
        raise UsageError("trust_remote_code is not supported: code from a repository is never run.")
    for option in ("dtype", "torch_dtype"):
        text = kwargs.get(option)
        if isinstance(text, str) and text != "auto" and not isinstance(getattr(torch, text, None), torch.dtype):
            raise UsageError(f"Expected {option} to be a type such as 'float16' or 'bfloat16', got {text!r}.")
    if library == "timm":
        backbone = _load_timm(name, revision, kwargs)
    else:
        backbone = _load_transformers(name, revision, token, dict(kwargs))
    quantization: Any = kwargs.get("quantization_config")
    if hasattr(quantization, "to_dict"):
        kwargs["quantization_config"] = plain_values(quantization.to_dict())
    source = {"library": library, "id": name, "kwargs": kwargs}
    backbone.__dict__["hfproj_source"] = source if revision is None else {**source, "revision": revision}
    return backbone


def _load_transformers(name: str, revision: str | None, token: str | bool | None, kwargs: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModel, CLIPVisionModel, Siglip2VisionModel, SiglipVisionModel

    towers = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel, "siglip2": Siglip2VisionModel}
    embedded = name == EMBEDDED and not Path(name).is_dir()
    source = str(embedded_folder()) if embedded else name
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, token=token, trust_remote_code=False)
        _refuse_kernels(config, name)
        _refuse_missing_package(kwargs.get("quantization_config") or getattr(config, "quantization_config", None), name)
        cls = towers.get(config.model_type)
        if cls is None:
            from transformers.models.auto.modeling_auto import MODEL_MAPPING

            cls = AutoModel
            if "add_pooling_layer" in inspect.signature(MODEL_MAPPING[type(config)].__init__).parameters:
                kwargs.setdefault("add_pooling_layer", False)  # else ViTs get a pooler with random weights
        options = {"revision": revision, "token": token, "trust_remote_code": False, "use_safetensors": True}
        backbone, report = cls.from_pretrained(source, **options, **kwargs, output_loading_info=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if meant := _meant(name, error, kwargs):
            raise UsageError(f"No backbone could be loaded from {name!r}: {meant}.") from error
        raise UsageError(
            f"No backbone could be loaded from {name!r}; expected 'vit_nano', the id of a Hub model with safetensors, "
            f"a folder with config.json and model.safetensors, or 'timm/resnet18.a1_in1k'. ({one_line(error)})"
        ) from error
    _refuse_missing(backbone, report.get("missing_keys", ()), name)
    if embedded:
        backbone.name_or_path = backbone.config._name_or_path = ""  # a path of this installation says nothing elsewhere
    return backbone


_OWNERS = {"dinov2": "facebook", "dinov3": "facebook", "deit": "facebook", "ijepa": "facebook", "vit-mae": "facebook",
           "convnext": "facebook", "vit": "google", "siglip": "google", "clip": "openai", "beit": "microsoft",
           "swin": "microsoft", "resnet": "microsoft", "bert": "google-bert", "roberta": "FacebookAI",
           "all-": "sentence-transformers"}  # fmt: skip


def _meant(name: str, error: BaseException, kwargs: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the name or the options of a backbone, where it is a usual mistake; else None."""
    import timm

    if (found := re.search(r"unexpected keyword argument '(\w+)'", str(error))) and found[1] in kwargs:
        option = found[1]
        if option == "device":
            return (
                f"device is no option of a transformers model; load_backbone({name!r}).to({kwargs[option]!r}) moves it"
            )
        others = ", ".join(n for n in kwargs if n in ("num_classes", "img_size", "in_chans", "pretrained"))
        of_timm = f"; {others}: options of timm's models, whose names begin with 'timm/'" if others else ""
        return f"a transformers model has no option {option}{of_timm}"
    if (Path(name) / "adapter_config.json").is_file():
        return "the folder holds an adapter; hfproj.from_pretrained(folder) loads it with its backbone"
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        return "there is no such folder; expected one with config.json and model.safetensors"
    if "/" in name or Path(name).is_dir():
        return None
    if name.split(".")[0] in timm.list_models():
        return f"it is a model of timm; write load_backbone({f'timm/{name}'!r})"
    if plain_name(name) == plain_name(EMBEDDED):
        return f"Did you mean {EMBEDDED!r}? It ships with the package"
    owner = next((owner for begin, owner in _OWNERS.items() if name.lower().startswith(begin)), None)
    return owner and f"a Hub id begins with its owner, such as '{owner}/{name}', and the name is no folder here"


_UNREAD = {"pooler", "head", "mask_token"}  # h is not read from those that a file lacks, see `resolve_read_point`


def _refuse_missing(backbone: nn.Module, missing: Collection[str], name: str) -> None:
    """Refuse files without the tensors of the model, which transformers makes at random with a line in its log."""
    lacking = sorted(key for key in missing if not _UNREAD & set(key.split(".")))
    if lacking:
        total, more = len(backbone.state_dict()), " and others" * (len(lacking) > 2)
        raise UsageError(
            f"The files of {name!r} lack {len(lacking)} of the {total} tensors of {type(backbone).__name__} "
            f"({', '.join(lacking[:2])}{more}), which would be random; they are another model's, or damaged. For "
            "random weights make the model from its config and attach the head to it."
        )


def _refuse_kernels(config: Any, name: str) -> None:
    """Refuse a config.json by which transformers would load compiled code from the Hub (``"user/kernel"``)."""
    for part in (config, *(getattr(config, sub, None) for sub in getattr(config, "sub_configs", ()))):
        attention = getattr(part, "_attn_implementation", None)
        if isinstance(attention, str) and attention.removeprefix("paged|") not in _ATTENTION:
            raise UsageError(
                f"The config.json of {name!r} asks for attention {attention!r}, code from the Hub, which is never run; "
                f"expected one of {', '.join(_ATTENTION)}."
            )


def _refuse_missing_package(quantization: Any, name: str) -> None:
    """Refuse, with what to install, a quantization by a package that is not there."""
    values = quantization.to_dict() if hasattr(quantization, "to_dict") else quantization or {}
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
    if method in METHODS and importlib.util.find_spec(method) is None:
        raise UsageError(
            f"The backbone {name!r} is to be quantized by {method}, which is not installed: pip install {method}."
        )


def _load_timm(name: str, revision: str | None, kwargs: dict[str, Any]) -> nn.Module:
    import timm

    bare = name.removeprefix("hf-hub:").removeprefix("timm/")
    if revision is not None:
        bare = f"hf-hub:timm/{bare}@{revision}"
    own, options = split_options(kwargs)
    try:
        model = timm.create_model(bare, **{"pretrained": True, "num_classes": 0, **options})
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        known, wanted = timm.list_models(), bare.split(".")[0]
        if wanted not in known and revision is None:
            near = difflib.get_close_matches(bare, known, n=5, cutoff=0.4) or ["see timm.list_models()"]
            raise unknown("timm backbone", wanted, near) from error
        raise UsageError(
            f"The weights of timm model {name!r} could not be loaded; check the name and the connection, or use a "
            f"folder or 'vit_nano'. ({one_line(error)})"
        ) from error
    return with_stem(model, own, name)


def source_of(backbone: nn.Module) -> dict[str, Any] | None:
    """Return ``{"library", "id", "kwargs"}`` that loads `backbone` again, or None where it comes from nowhere.

    "id" is None where the backbone is of a known library, but not what its name would load: a timm model with other
    blocks than the published one, a transformers model with another config than its files, one quantized by hand.
    """
    found = _source_of(backbone)
    if found is not None and quantization_of(backbone) is None and any(map(is_quantized, backbone.parameters())):
        return found | {"id": None}
    return found


def _source_of(backbone: nn.Module) -> dict[str, Any] | None:
    if "hfproj_source" in backbone.__dict__:
        return backbone.__dict__["hfproj_source"]
    library, model = library_of(backbone), cast(Any, backbone)
    if library == "transformers" and getattr(model, "name_or_path", None):
        kwargs = {"add_pooling_layer": False} if getattr(model, "pooler", ...) is None else {}
        files = _config_of_files(model)
        changed = {} if files is None else _changed_settings(model, files)
        known = set(changed) <= set(SHAPING)
        if (quantization := quantization_of(model)) and getattr(files, "quantization_config", None) is None:
            changed["quantization_config"] = quantization
        return {"library": library, "id": model.name_or_path if known else None, "kwargs": kwargs | changed}
    if library == "timm":
        return _timm_source(model)
    return None


# What may be set when a model is loaded.
SHAPING = (
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act", "layer_norm_eps", "rms_norm_eps",
    "image_size",
)  # fmt: skip


def quantization_of(backbone: nn.Module) -> dict[str, Any] | None:
    """Return transformers' config of a quantized model, as plain values."""
    found = getattr(getattr(backbone, "config", None), "quantization_config", None)
    return None if found is None else plain_values(found.to_dict() if hasattr(found, "to_dict") else found)


def _config_of_files(model: Any) -> Any:
    """Return the config in the files of a transformers model, or None where they are not on this machine."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model.name_or_path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None


def _changed_settings(model: Any, files: Any) -> dict[str, Any]:
    """Return in which settings a transformers model is another than the config `files` in its files."""
    tower = getattr(files, "vision_config", None)  # CLIP's and SigLIP's
    own = settings_of(model)
    there = settings_of(files if files.model_type == model.config.model_type or tower is None else tower)
    return {name: own[name] for name in own if name in there and own[name] != there[name]}


_TIMM: "weakref.WeakKeyDictionary[nn.Module, tuple[int, dict[str, Any] | None]]" = weakref.WeakKeyDictionary()


def _timm_source(model: Any) -> dict[str, Any] | None:
    """Return the source of a timm model, whose shapes are compared with those of the architecture that it names."""
    published = getattr(model, "pretrained_cfg", None) or {}
    if not published.get("architecture"):
        return None
    state = sum(p.numel() for p in model.parameters())  # a classifier may be put in its place later
    if (kept := _TIMM.get(model)) is None or (kept[0] != state and not hasattr(model, "hfproj")):
        name = f"timm/{published['architecture']}" + (f".{published['tag']}" if published.get("tag") else "")
        kwargs = _timm_arguments(model, published)
        known = {"library": "timm", "id": None if kwargs is None else name, "kwargs": kwargs or {}}
        kept = _TIMM[model] = (state, known)
    return copy.deepcopy(kept[1])


def _timm_arguments(model: Any, published: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments with which `timm.create_model` makes a model of these shapes; None if none are found."""
    import timm

    arguments = {"num_classes": model.num_classes}
    first, embed = published.get("first_conv"), getattr(model, "patch_embed", None)
    first = first if isinstance(first, str) else next(iter(first or ()), None)
    channels = getattr(dict(model.named_modules()).get(first or ""), "in_channels", None)
    size = getattr(embed, "img_size", None)
    others: dict[str, Any] = (
        {"in_chans": channels} if channels not in (None, published.get("input_size", [3])[0]) else {}
    )
    if size is not None and tuple(size) != tuple(published.get("input_size", ()))[1:]:
        others["img_size"] = list(size)
    pooling = getattr(model, "global_pool", None)
    if getattr(model, "dynamic_img_size", False):
        others["dynamic_img_size"] = True
    tries = [others, others | {"global_pool": pooling}] if isinstance(pooling, str) else [others]
    wanted = _appearance(model)
    for extra in tries:
        try:
            options = {"pretrained": False, **arguments, **extra}
            made = on_meta(partial(timm.create_model, published["architecture"], **options))
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError):  # it takes no such argument
            continue
        if _appearance(made) == wanted:
            return arguments | extra
    return None


def _appearance(model: nn.Module) -> dict[str, Any]:
    """Return names, shapes and settings of a model without adapters."""
    found: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    holders = {name for name, _ in model.named_modules() if name.split(".")[0] != "hfproj"}
    return found | {f"{n}:": v for n, v in module_settings(model, holders, whole=True).items()}


def files_of(backbone: nn.Module) -> str | None:
    """Return the folder or Hub id of a transformers model's files, or None where it is unknown."""
    kept = backbone.__dict__.get("hfproj_source") or {}
    name = (
        kept.get("id") or (library_of(backbone) == "transformers" and getattr(backbone, "name_or_path", None)) or None
    )
    return str(embedded_folder()) if name == EMBEDDED else name
