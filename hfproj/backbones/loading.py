"""Loading a backbone by name, and the source of a backbone."""

import difflib
import inspect
from importlib import resources
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from torch import nn

from hfproj.errors import UsageError, check_choice, check_type, one_line, unknown
from hfproj.typing import OneOf

EMBEDDED = "vit_nano"
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def library_of(backbone: nn.Module) -> str:
    """Return ``"transformers"``, ``"timm"`` or ``"torch"``."""
    if hasattr(backbone, "config") and hasattr(backbone.config, "model_type"):
        return "transformers"
    return "timm" if type(backbone).__module__.startswith("timm.") else "torch"


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


def embedded_folder() -> Path:
    """Return the folder of the small pretrained ViT that ships with the package."""
    return Path(str(resources.files("hfproj"))) / "assets" / EMBEDDED


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
            JSON values only, since they are stored with the adapter.

    Raises:
        UsageError: If nothing can be loaded under this name.
    """
    check_type("the backbone's name", name, str, "give a Hub id, a folder or a timm model; a module needs no loading")
    if library is None:
        library = "timm" if name.startswith(("timm/", "hf-hub:timm/")) else "transformers"
    check_choice("backbone library", library, ("transformers", "timm"))
    if "trust_remote_code" in kwargs:
        raise UsageError("trust_remote_code is not supported: code from a repository is never run.")
    if library == "timm":
        backbone = _load_timm(name, revision, kwargs)
    else:
        backbone = _load_transformers(name, revision, token, dict(kwargs))
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
        cls = towers.get(config.model_type)
        if cls is None:
            from transformers.models.auto.modeling_auto import MODEL_MAPPING

            cls = AutoModel
            if "add_pooling_layer" in inspect.signature(MODEL_MAPPING[type(config)].__init__).parameters:
                kwargs.setdefault("add_pooling_layer", False)  # else ViTs get a pooler with random weights
        options = {"revision": revision, "token": token, "trust_remote_code": False, "use_safetensors": True}
        backbone = cls.from_pretrained(source, **options, **kwargs)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UsageError(
            f"No backbone could be loaded from {name!r}; expected 'vit_nano', the id of a Hub model with safetensors, "
            f"a folder with config.json and model.safetensors, or 'timm/resnet18.a1_in1k'. ({one_line(error)})"
        ) from error
    if embedded:
        backbone.name_or_path = backbone.config._name_or_path = ""  # a path of this installation says nothing elsewhere
    return backbone


def _refuse_kernels(config: Any, name: str) -> None:
    """Refuse a config.json by which transformers would load compiled code from the Hub (``"user/kernel"``)."""
    for part in (config, *(getattr(config, sub, None) for sub in getattr(config, "sub_configs", ()))):
        attention = getattr(part, "_attn_implementation", None)
        if isinstance(attention, str) and attention.removeprefix("paged|") not in _ATTENTION:
            raise UsageError(
                f"The config.json of {name!r} asks for attention {attention!r}, code from the Hub, which is never run; "
                f"expected one of {', '.join(_ATTENTION)}."
            )


def _load_timm(name: str, revision: str | None, kwargs: dict[str, Any]) -> nn.Module:
    import timm

    bare = name.removeprefix("hf-hub:").removeprefix("timm/")
    if revision is not None:
        bare = f"hf-hub:timm/{bare}@{revision}"
    try:
        return timm.create_model(bare, **{"pretrained": True, "num_classes": 0, **kwargs})
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        known, wanted = timm.list_models(), bare.split(".")[0]
        if wanted not in known and revision is None:
            near = difflib.get_close_matches(bare, known, n=5, cutoff=0.4) or ["see timm.list_models()"]
            raise unknown("timm backbone", wanted, near) from error
        raise UsageError(
            f"The weights of timm model {name!r} could not be loaded; check the name and the connection, or use a "
            f"folder or 'vit_nano'. ({one_line(error)})"
        ) from error


def source_of(backbone: nn.Module) -> dict[str, Any] | None:
    """Return ``{"library", "id", "kwargs"}`` that loads `backbone` again, or None where that is unknown."""
    if "hfproj_source" in backbone.__dict__:
        return backbone.__dict__["hfproj_source"]
    library, model = library_of(backbone), cast(Any, backbone)
    if library == "transformers" and getattr(model, "name_or_path", None):
        no_pooler = {"add_pooling_layer": False} if getattr(model, "pooler", ...) is None else {}
        return {"library": library, "id": model.name_or_path, "kwargs": no_pooler}
    config = getattr(model, "pretrained_cfg", None) or {}
    if library == "timm" and config.get("architecture"):
        name = f"timm/{config['architecture']}" + (f".{config['tag']}" if config.get("tag") else "")
        return {"library": library, "id": name, "kwargs": {"num_classes": model.num_classes}}
    return None


def files_of(backbone: nn.Module) -> str | None:
    """Return the folder or Hub id of a transformers model's files, or None where it is unknown."""
    name = (source_of(backbone) or {}).get("id")
    return str(embedded_folder()) if name == EMBEDDED else name
