"""What an adapter is, in plain values for results and cards: its configuration, its backbone, what that reads."""

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from hfproj.backbones.loading import timm_part_of
from hfproj.files import portable


def describe_adapter(model: nn.Module, adapter: str | None = None) -> dict[str, Any]:
    """Return ``{"base_model", "modality", "adapter"}`` without paths of this machine, empty where there is no adapter.

    A folder of this machine is given as ``./name``. "base_model" is None for a backbone that starts from random weights
    (``pretrained=False``): nobody else's model is what the adapter belongs to. "modality" ("image" or "text") is there
    where the backbone tells.

    Args:
        model: A PEFT model, or a bare backbone.
        adapter: Name of the adapter; None takes the active one.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        return {}
    if adapter is None:
        active = getattr(model, "active_adapter", None)
        adapter = active if isinstance(active, str) and active in configs else next(iter(configs))
    config = configs[adapter]
    values = config.to_dict() if hasattr(config, "to_dict") else dict(vars(config))
    backbone = values.get("backbone")
    base = _portable_id((backbone or {}).get("id") or values.get("base_model_name_or_path"))
    for owner, key in ((values, "base_model_name_or_path"), (backbone, "id")):
        if isinstance(owner, dict) and owner.get(key):
            owner[key] = base
    found: dict[str, Any] = {"base_model": None if starts_random(backbone) else base}
    if modality := _modality(model.get_base_model() if hasattr(model, "get_base_model") else model):
        found["modality"] = modality
    found["adapter"] = {key: value for key, value in values.items() if value is not None}
    return portable(found)


def starts_random(backbone: Mapping[str, Any] | None) -> bool:
    """Return whether a config's `backbone` is loaded with random weights, so that all that counts is in the adapter."""
    return ((backbone or {}).get("kwargs") or {}).get("pretrained") is False


def _modality(backbone: nn.Module) -> str | None:
    if timm_part_of(backbone):
        return "image"
    return {"input_ids": "text", "pixel_values": "image"}.get(getattr(backbone, "main_input_name", ""))


def _portable_id(base: Any) -> str | None:
    """Return a Hub id as it is and a folder as `./name`."""
    if not base:
        return None
    base = os.fspath(base)
    return f"./{os.path.basename(os.path.normpath(base))}" if os.path.isabs(base) or os.path.exists(base) else base
