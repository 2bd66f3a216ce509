"""How images are prepared for a backbone."""

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from hfproj.backbones.loading import bare_backbone, files_of, timm_part_of
from hfproj.errors import UsageError
from hfproj.typing import Interpolation

_HALF = (0.5, 0.5, 0.5)
# PIL's numbers in a preprocessor_config.json, those that views know
_RESAMPLE: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}
_RESAMPLE_OF = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # those that timm's configurations name
_LARGEST, _MOST_CHANNELS = 10_000, 1000
OF_ADAPTER = "hfproj_preprocessing"  # in a backbone's __dict__: the adapter's file, for a backbone without one


@dataclasses.dataclass(frozen=True)
class ImagePreprocessing:
    """Images that a backbone expects: side of the square in pixels, mean and std per channel of values in [0, 1]."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bicubic"


def image_preprocessing(model: nn.Module) -> ImagePreprocessing:
    """Return the image size, mean and std that `model`'s backbone was trained with.

    They come from a `transformers` checkpoint's ``preprocessor_config.json`` or from timm's configuration; where the
    backbone has neither, from that of the adapter that `hfproj.from_pretrained` loaded onto it. Without any (a backbone
    made from a config) it is the config's size and mean = std = 0.5, with a warning.

    Raises:
        UsageError: If the image size is unknown, or a value in the file is impossible.
    """
    backbone = bare_backbone(model)
    kind = type(backbone).__name__
    if timm_part := timm_part_of(backbone):
        from timm.data import resolve_model_data_config

        data = resolve_model_data_config(timm_part[1])
        # The size that this model was made for (img_size=…) goes before the one its weights were trained with.
        size = getattr(getattr(timm_part[1], "patch_embed", None), "img_size", None) or data["input_size"][1:]
        return ImagePreprocessing(size[-1], tuple(data["mean"]), tuple(data["std"]), data["interpolation"])
    size = getattr(getattr(backbone, "config", None), "image_size", None)
    size = size[-1] if isinstance(size, list | tuple) else size
    found = own_processor(backbone) or backbone.__dict__.get(OF_ADAPTER)
    if found:
        return settings_of(found, f"The preprocessing of {kind}", size=size)
    if not size:
        raise UsageError(f"The image size of {kind} is unknown; pass size=, mean= and std= to the collator.")
    cause = f"{kind} has no preprocessor_config.json: images are normalised with mean = std = 0.5"
    warnings.warn(f"{cause}; pass mean= and std= if it was trained with others.", stacklevel=2)
    return ImagePreprocessing(int(size), _HALF, _HALF)


def preprocessor_config(settings: ImagePreprocessing) -> dict[str, Any]:
    """Return what ``AutoImageProcessor`` reads: shorter side resized, centre cropped, normalised, as `EvalImages`."""
    return {
        "crop_size": {"height": settings.size, "width": settings.size},
        **dict.fromkeys(("do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize"), True),
        "image_mean": list(settings.mean), "image_processor_type": "ViTImageProcessor", "image_std": list(settings.std),
        "resample": _RESAMPLE_OF.get(settings.interpolation, _RESAMPLE_OF["bicubic"]), "rescale_factor": 1 / 255,
        "size": {"shortest_edge": settings.size},
    }  # fmt: skip


def settings_of(found: dict[str, Any], where: str, *, size: int | None = None) -> ImagePreprocessing:
    """Return the settings in a ``preprocessor_config.json`` (`where` in messages); `size` is for one without."""
    wanted = found.get("crop_size") if found.get("do_center_crop", False) else found.get("size")
    if isinstance(wanted, dict):
        wanted = wanted.get("height") or wanted.get("shortest_edge")
    side = wanted or size
    if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= _LARGEST:
        raise UsageError(f"{where} has image size {side!r:.60}; expected 1 to {_LARGEST:,} pixels.")
    mean, std = found.get("image_mean") or _HALF, found.get("image_std") or _HALF
    for name, values, low in (("image_mean", mean, -math.inf), ("image_std", std, 0)):
        channels = isinstance(values, list | tuple) and 1 <= len(values) <= _MOST_CHANNELS
        if not channels or not all(isinstance(v, int | float) and low < v < math.inf for v in values):
            raise UsageError(f"{where} has {name}={values!r:.60}; expected a number per channel.")
    resample = found.get("resample")
    interpolation = _RESAMPLE.get(resample) if isinstance(resample, int) else None
    return ImagePreprocessing(side, tuple(map(float, mean)), tuple(map(float, std)), interpolation or "bicubic")


def own_processor(backbone: nn.Module) -> dict[str, Any] | None:
    """Return the processor's configuration that lies beside a transformers backbone, or None."""
    from transformers.utils import cached_file

    source = files_of(backbone)
    if not source:
        return None
    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            file = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            found = json.loads(Path(file).read_text(encoding="utf-8")) if file else None
        except (OSError, ValueError, RecursionError):
            return None
        if file:
            found = found.get("image_processor", found) if isinstance(found, dict) else None
            return found if isinstance(found, dict) else None
    return None
