"""What an adapter is, in plain values for results and cards: its configuration, its backbone, its preprocessing."""

import os
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from hfproj.backbones import ImagePreprocessing, image_preprocessing, main_input_of
from hfproj.backbones.loading import bare_backbone, timm_part_of
from hfproj.errors import UsageError
from hfproj.files import portable
from hfproj.tuner.layer import CHILD


def describe_adapter(model: nn.Module, adapter: str | None = None) -> dict[str, Any]:
    """Return ``{"base_model", "modality", "adapter"}`` without paths of this machine; empty where there is no adapter.

    A folder of this machine is given as ``./name``. "base_model" is None for a backbone that starts from random weights
    (``pretrained=False``), since then the adapter belongs to nobody else's model. "modality" is "image" or "text", and
    missing where the backbone does not tell.

    Args:
        model: A PEFT model, or a bare backbone.
        adapter: Name of the adapter; None takes the active one.
    """
    configs: Any = getattr(model, "peft_config", None)
    if not configs:
        return {}
    if adapter is None:
        active = getattr(model, "active_adapter", None)
        adapter = active if isinstance(active, str) and active in configs else next(iter(configs))
    config = configs[adapter]
    values = config.to_dict() if hasattr(config, "to_dict") else dict(vars(config))
    backbone = values.get("backbone")
    base = _portable_id(known_base(backbone, values.get("base_model_name_or_path")))
    if kept := values.get("fingerprint"):  # the rest stays in the adapter's own config, the digest comes with a push
        values["fingerprint"] = {n: kept[n] for n in ("dtype", "quantization", "instead_of") if kept.get(n)}
    for owner, key in ((values, "base_model_name_or_path"), (backbone, "id")):
        if isinstance(owner, dict) and owner.get(key):
            owner[key] = base
    found: dict[str, Any] = {"base_model": None if starts_random(backbone) else base}
    bare = bare_backbone(model)
    takes = "pixel_values" if timm_part_of(bare) else main_input_of(bare)
    if modality := {"input_ids": "text", "pixel_values": "image"}.get(takes or ""):
        found["modality"] = modality
    return portable(found | {"adapter": {key: value for key, value in values.items() if value is not None}})


def known_base(backbone: Mapping[str, Any] | None, name: str | None) -> str | None:
    """Return what a config's `backbone` is loaded from, else PEFT's own `name`; None where that would load another."""
    return (backbone or {}).get("id", name)


def starts_random(backbone: Mapping[str, Any] | None) -> bool:
    """Return whether a config's `backbone` is loaded with random weights, so that all that counts is in the adapter."""
    return ((backbone or {}).get("kwargs") or {}).get("pretrained") is False


def known_preprocessing(model: nn.Module, adapter: str) -> ImagePreprocessing | None:
    """Return how images are prepared for `model`'s backbone; None where it takes none, or where that is not known."""
    if getattr(bare_backbone(model), CHILD).points[adapter].text:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a guessed mean must not be saved as if it were known
        try:
            return image_preprocessing(model)
        except (UsageError, UserWarning):
            return None


def _portable_id(base: Any) -> str | None:
    """Return a Hub id unchanged, and a folder as `./name`."""
    base = os.fspath(base or "")
    local = os.path.isabs(base) or os.path.exists(base)
    return f"./{os.path.basename(os.path.normpath(base))}" if local else base or None
