"""Loading a saved adapter: onto its backbone (`from_pretrained`), or its head alone (`load_head`)."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from hfproj.backbones import load_backbone
from hfproj.errors import AdapterFileError, UsageError
from hfproj.tuner.config import ProjectionHeadConfig
from hfproj.tuner.layer import CHILD, HeadModules

_MODULES = f"base_model.model.{CHILD}.projection_head_modules."


def from_pretrained(
    adapter: str | Path,
    *,
    backbone: nn.Module | None = None,
    adapter_name: str = "default",
    is_trainable: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Load an adapter together with the backbone it was trained on.

    Args:
        adapter: A folder written by ``save_pretrained``, or a Hub id.
        backbone: The backbone, if it is loaded already; None loads the one that the adapter's config names.
        adapter_name: Name under which the adapter is attached.
        is_trainable: Whether training goes on; False freezes the adapter and sets eval mode.
        revision: Branch, tag or commit of the Hub repository.
        subfolder: Folder inside the repository, for one of several adapters.
        low_cpu_mem_usage: Make the head on the meta device before its weights arrive.

    Raises:
        AdapterFileError: the folder has no config, a damaged file, or tensors of another head or backbone.
        UsageError: the config does not say which backbone to load.
    """
    config = _read_config(adapter, revision, subfolder)
    _fetch(adapter, SAFETENSORS_WEIGHTS_NAME, revision, subfolder)
    if backbone is None:
        source = config.backbone or {}
        if not source.get("id"):
            raise UsageError(
                f"{adapter} does not say which backbone it was trained on; load that backbone and pass it as "
                "from_pretrained(…, backbone=backbone)."
            )
        backbone = load_backbone(
            source["id"],
            library=source.get("library"),
            revision=source.get("revision"),
            **_plain_kwargs(source.get("kwargs") or {}),
        )
    with _readable_errors(adapter):
        return PeftModel.from_pretrained(
            backbone,
            str(adapter),
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            low_cpu_mem_usage=low_cpu_mem_usage,
            **{k: v for k, v in {"revision": revision, "subfolder": subfolder}.items() if v is not None},
        )


def load_head(adapter: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> nn.Module:
    """Load the head of a saved adapter without any backbone: ``z = head(h)``, in eval mode.

    Raises:
        AdapterFileError: the folder has no config, a damaged file, or tensors of another head.
    """
    config = _read_config(adapter, revision, subfolder)
    with _readable_errors(adapter):
        tensors = load_file(_fetch(adapter, SAFETENSORS_WEIGHTS_NAME, revision, subfolder))
    modules = HeadModules(config, config.in_dim)
    mine = {k.removeprefix(_MODULES): v for k, v in tensors.items() if k.startswith(_MODULES)}
    try:
        modules.load_state_dict(mine)
    except RuntimeError as error:
        raise AdapterFileError(
            f"{adapter}: its tensors are not those of head {config.head!r} ({config.in_dim} → {config.out_dim}); the "
            "file belongs to another config or is damaged; download or save it again."
        ) from error
    return modules.head.eval()


def detach(model: nn.Module, adapter_name: str | None = None) -> nn.Module:
    """Return a copy of a head of `model`, free of the backbone: ``z = head(h)``.

    Args:
        model: A model with a projection head.
        adapter_name: Whose head; None takes the active one.

    Raises:
        UsageError: there is no such head.
    """
    import copy

    layer = getattr(model.get_base_model() if hasattr(model, "get_base_model") else model, CHILD, None)
    if layer is None:
        raise UsageError(
            f"{type(model).__name__} has no projection head; attach one with get_peft_model(backbone, "
            "ProjectionHeadConfig(…))."
        )
    name = adapter_name or layer.active_adapters[0]
    if name not in layer.projection_head_modules:
        raise UsageError(f"There is no head {name!r}; there are: {', '.join(layer.projection_head_modules)}.")
    return copy.deepcopy(layer.projection_head_modules[name].head)


def _fetch(adapter: str | Path, file: str, revision: str | None, subfolder: str | None) -> str:
    folder = Path(adapter) / (subfolder or "")
    if Path(adapter).is_dir():
        if not (folder / file).is_file():
            raise AdapterFileError(f"{folder} has no {file}; expected a folder written by model.save_pretrained(…).")
        return str(folder / file)
    try:
        return hf_hub_download(str(adapter), file, revision=revision, subfolder=subfolder)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise AdapterFileError(
            f"{adapter!s} is neither a folder nor a Hub repository with {file} that can be reached; check the name and "
            f"the connection. ({type(error).__name__})"
        ) from error


def _read_config(adapter: str | Path, revision: str | None, subfolder: str | None) -> ProjectionHeadConfig:
    file = _fetch(adapter, CONFIG_NAME, revision, subfolder)
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
        kind = values.get("peft_type")
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise AdapterFileError(f"{adapter}: {CONFIG_NAME} is not JSON; download or save it again.") from error
    if kind != PeftType.PROJECTION_HEAD:
        raise AdapterFileError(f"{adapter} holds a {kind} adapter, no projection head; load it with PEFT itself.")
    parts = {n: values.get(n) for n in ("head_options", "backbone", "backbone_adapter")}
    parts["backbone.kwargs"] = parts["backbone"].get("kwargs") if isinstance(parts["backbone"], dict) else None
    for name, value in parts.items():
        if not isinstance(value, dict | None):
            raise AdapterFileError(f"{adapter}: {CONFIG_NAME} says {name}={value!r}, expected a JSON object.")
    config = ProjectionHeadConfig.from_peft_type(**values)
    if not isinstance(config.in_dim, int):
        raise AdapterFileError(
            f"{adapter}: {CONFIG_NAME} lacks in_dim; save the adapter with model.save_pretrained(…)."
        )
    return config


def _plain_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    allowed = {"add_pooling_layer", "img_size", "dynamic_img_size", "num_classes", "global_pool", "attn_implementation"}
    allowed |= {"pretrained", "in_chans", "dtype"}
    for name, value in kwargs.items():
        if name not in allowed or not isinstance(value, str | int | float | bool | list | None):
            raise AdapterFileError(
                f"The adapter's config asks to load its backbone with {name}={value!r}, which is not allowed; "
                "load the backbone yourself and pass it as backbone=."
            )
    return dict(kwargs)


@contextmanager
def _readable_errors(adapter: str | Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise AdapterFileError(
            f"{adapter}: {SAFETENSORS_WEIGHTS_NAME} is damaged or cut short ({error}); download or save it again."
        ) from error
