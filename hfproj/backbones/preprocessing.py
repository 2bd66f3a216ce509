"""How images are prepared for a backbone."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from hfproj.backbones.loading import files_of, timm_part_of
from hfproj.errors import UsageError

_HALF = (0.5, 0.5, 0.5)
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers in a preprocessor_config.json


@dataclasses.dataclass(frozen=True)
class ImagePreprocessing:
    """How a backbone wants its images: square side in pixels, mean and std per channel of values in [0, 1]."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"


def image_preprocessing(model: nn.Module) -> ImagePreprocessing:
    """Return the image size, mean and std that `model`'s backbone was trained with.

    They come from a `transformers` checkpoint's ``preprocessor_config.json`` or from timm's configuration. Where
    neither exists (a backbone made from a config) it is the config's size and mean = std = 0.5, with a warning.

    Raises:
        UsageError: the image size is unknown.
    """
    backbone = model.get_base_model() if hasattr(model, "get_base_model") else model
    timm_part = timm_part_of(backbone)
    if timm_part:
        from timm.data import resolve_model_data_config

        data = resolve_model_data_config(timm_part[1])
        # the size this very model was made for (img_size=…) goes before the one its weights were trained with
        size = getattr(getattr(timm_part[1], "patch_embed", None), "img_size", None) or data["input_size"][1:]
        return ImagePreprocessing(size[-1], tuple(data["mean"]), tuple(data["std"]), data["interpolation"])
    source = files_of(backbone)
    found = _read_processor(source) if source else None
    size = getattr(getattr(backbone, "config", None), "image_size", None)
    size = size[-1] if isinstance(size, list | tuple) else size
    if found:
        wanted = found.get("crop_size") if found.get("do_center_crop", False) else found.get("size")
        if isinstance(wanted, dict):
            wanted = wanted.get("height") or wanted.get("shortest_edge")
        mean, std = found.get("image_mean") or _HALF, found.get("image_std") or _HALF
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
    return ImagePreprocessing(int(size), _HALF, _HALF)


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
