"""The `preprocessor_config.json` of an adapter: how images are made ready for its backbone."""

import warnings
from typing import Any

from torch import nn

from hfproj.backbones import image_preprocessing
from hfproj.backbones.preprocessing import ImagePreprocessing
from hfproj.errors import UsageError
from hfproj.tuner.layer import CHILD

_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # PIL's numbers


def preprocessor_config(settings: ImagePreprocessing) -> dict[str, Any]:
    """Return what ``AutoImageProcessor`` reads: shorter side resized, centre cropped, normalised, as `EvalImages` does.

    Example:
        >>> preprocessor_config(ImagePreprocessing(32, (0.5,) * 3, (0.25,) * 3))["crop_size"]
        {'height': 32, 'width': 32}
    """
    return {
        "crop_size": {"height": settings.size, "width": settings.size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(settings.mean),
        "image_processor_type": "ViTImageProcessor",
        "image_std": list(settings.std),
        "resample": _RESAMPLE.get(settings.interpolation, _RESAMPLE["bicubic"]),
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": settings.size},
    }


def known_preprocessing(model: nn.Module, adapter: str) -> ImagePreprocessing | None:
    """Return how images are made ready for the backbone of `model`, or None where it takes none or nothing is known.

    Args:
        model: A ``PeftModel`` with a projection head.
        adapter: Name of the adapter.
    """
    layer = getattr(model.get_base_model(), CHILD)  # type: ignore[operator]
    if layer.points[adapter].text:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a mean that is a guess is not to be passed on
        try:
            return image_preprocessing(model)
        except (UsageError, UserWarning):
            return None
