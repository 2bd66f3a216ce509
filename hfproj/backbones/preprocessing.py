"""How images are prepared for a backbone: as its own image processor or timm's evaluation transform does.

Deviations:
    transformers' processors exist twice; these settings are those of the torchvision ones, which `AutoImageProcessor`
    takes since transformers 5. Padding (``do_pad``), patches of native size and sides that differ are not followed,
    with a warning.
"""

import dataclasses
import inspect
import math
import re
import warnings
from typing import Any

from torch import nn

from hfproj.backbones.checkpoint_files import file_beside
from hfproj.backbones.loading import bare_backbone, files_of, timm_part_of
from hfproj.checking import checked
from hfproj.errors import UsageError
from hfproj.strict_json import read_json
from hfproj.typing import OneOf, Resampling

_HALF = (0.5, 0.5, 0.5)
# PIL's numbers in a preprocessor_config.json
_RESAMPLE: dict[int, Resampling] = dict(enumerate(("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")))
_RESAMPLE_OF = {name: number for number, name in _RESAMPLE.items()}
_LARGEST, _MOST_CHANNELS = 10_000, 1000
_FLAGS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad", "do_flip_channel_order")
_OF_CLASS = (*_FLAGS, "size", "crop_size", "crop_pct", "default_to_square", "image_mean", "image_std", "include_top",
             "resample", "rescale_factor", "rescale_offset")  # fmt: skip
# Image processors with steps of their own that these settings describe (recipes/benchmarks/preprocessing.py shows it)
_FOLLOWED = ("Beit", "ConvNext", "DINOv3ViT", "EfficientNet", "Flava", "Levit", "MobileNetV2", "MobileViT",
             "PoolFormer", "Segformer")  # fmt: skip
OF_ADAPTER = "hfproj_preprocessing"  # in a backbone's __dict__: the adapter's file, for a backbone without one


@dataclasses.dataclass(frozen=True)
class ImagePreprocessing:
    """Images that a backbone expects.

    Args:
        size: Side of the square in pixels.
        mean, std: Per channel, of values in [0, 1].
        interpolation: How images are resized, by PIL's name.
        resize, resize_mode, resizer, crop_rounding, flip_channels: As in `hfproj.EvalImages`.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Resampling = "bicubic"
    resize: int | None = None
    resize_mode: OneOf["shortest", "exact", "longest"] = "shortest"
    crop_rounding: OneOf["even", "down"] = "even"
    flip_channels: bool = False
    resizer: OneOf["torch", "pil"] = "torch"

    def at(self, size: int) -> "ImagePreprocessing":
        """Return the same for images of another size: `resize` keeps its ratio to it.

        Example:
            >>> ImagePreprocessing(224, (0.5,) * 3, (0.5,) * 3, resize=256).at(112).resize
            128
        """
        resize = None if self.resize is None else size * self.resize // self.size
        return dataclasses.replace(self, size=size, resize=resize)


@checked
def image_preprocessing(model: nn.Module) -> ImagePreprocessing:
    """Return how images are prepared that `model`'s backbone was trained with.

    It is what a `transformers` checkpoint's ``preprocessor_config.json`` or timm's configuration says; where the
    backbone has neither, what that of the adapter says that `hfproj.from_pretrained` loaded onto it. Without any (a
    backbone made from a config) it is the config's size and mean = std = 0.5, with a warning. Where the backbone takes
    other channels than mean and std are given for (timm's ``in_chans``), one channel gets their averages, and others
    get them in turn, as timm repeats the weights of the first convolution; with a warning.

    Raises:
        UsageError: If the image size is unknown, a value in the file is impossible, or the backbone takes patches.
        HubError: If the Hub can't be asked for the backbone's file.
    """
    backbone = bare_backbone(model)
    kind, channels = type(backbone).__name__, channels_of(backbone)
    of_adapter = backbone.__dict__.get(OF_ADAPTER)
    if timm_part := timm_part_of(backbone):
        found = _settings_of_timm(timm_part[1])
        if len(found.mean) != channels and of_adapter:
            told = settings_of(of_adapter, f"The preprocessing of {kind}", size=found.size)
            found = dataclasses.replace(found.at(told.size), mean=told.mean, std=told.std)
        return _for_channels(found, channels, kind)
    if "spatial_shapes" in inspect.signature(backbone.forward).parameters:
        raise UsageError(
            f"{kind} takes images of any size as patches, which EvalImages does not make; pass a collator that gives "
            "{'inputs': …}, the output of the model's own processor (AutoImageProcessor.from_pretrained)."
        )
    size = getattr(getattr(backbone, "config", None), "image_size", None)
    size = size[-1] if isinstance(size, list | tuple) else size
    own = own_processor(backbone)
    if file := own or of_adapter:
        found = settings_of(file, f"The preprocessing of {kind}", size=size)
        if not own:  # its file was made of `EvalImages`
            found = dataclasses.replace(found, crop_rounding="even")
        return _for_channels(found, channels, kind)
    if not size:
        raise UsageError(f"The image size of {kind} is unknown; pass size=, mean= and std= to the collator.")
    cause = f"{kind} has no preprocessor_config.json: images are normalised with mean = std = 0.5"
    warnings.warn(f"{cause}; pass mean= and std= if it was trained with others.", stacklevel=2)
    return ImagePreprocessing(int(size), _HALF[:1] * channels, _HALF[:1] * channels)


def channels_of(backbone: nn.Module) -> int:
    """Return how many channels a backbone's images have: as its config or its first convolution says, else 3.

    Example:
        >>> channels_of(nn.Sequential(nn.Conv2d(13, 8, 3)))
        13
    """
    part = timm_part_of(backbone)
    said = None if part else getattr(getattr(backbone, "config", None), "num_channels", None)
    if isinstance(said, int):
        return said
    return next((m.in_channels for m in backbone.modules() if isinstance(m, nn.Conv2d)), 3)


def has_preprocessing(backbone: nn.Module) -> bool:
    """Return whether the backbone itself says how its images are prepared, so that an adapter need not."""
    if part := timm_part_of(backbone):
        return len(_settings_of_timm(part[1]).mean) == channels_of(backbone)
    return own_processor(backbone) is not None


def _settings_of_timm(model: nn.Module) -> ImagePreprocessing:
    from timm.data import resolve_model_data_config

    data = resolve_model_data_config(model)
    # The size that this model was made for (img_size=…) goes before the one its weights were trained with.
    sides = getattr(getattr(model, "patch_embed", None), "img_size", None) or data["input_size"][1:]
    size = sides[-1]
    if sides[0] != size:
        warnings.warn(f"{type(model).__name__} takes images of {sides}; EvalImages makes squares.", stacklevel=3)
    mode: Any = {"squash": "exact", "border": "longest"}.get(data["crop_mode"], "shortest")
    mean, std, resize = tuple(data["mean"]), tuple(data["std"]), math.floor(size / data["crop_pct"])
    known = _RESAMPLE_OF.get(data["interpolation"], _RESAMPLE_OF["bicubic"])  # "random" is for training
    return ImagePreprocessing(size, mean, std, _RESAMPLE[known], resize, mode, resizer="pil")


def _for_channels(found: ImagePreprocessing, channels: int, kind: str) -> ImagePreprocessing:
    known = len(found.mean)
    if known == channels:
        return found
    mean, std = ((sum(x) / known,) if channels == 1 else tuple(x[i % known] for i in range(channels))
                 for x in (found.mean, found.std))  # fmt: skip
    how = "their averages are taken" if channels == 1 else "they are repeated in turn"
    warnings.warn(
        f"{kind} takes images of {channels} channels, but mean and std are known of {known}: {how}; pass the mean= and "
        "std= of your channels.", stacklevel=3
    )  # fmt: skip
    return dataclasses.replace(found, mean=mean, std=std)


def preprocessor_config(settings: ImagePreprocessing) -> dict[str, Any]:
    """Return what ``AutoImageProcessor`` reads to prepare images as `EvalImages` does.

    It can't be told of ``resize_mode="longest"`` and ``flip_channels``, which stand there for this library alone.
    """
    side, size = {"height": settings.size, "width": settings.size}, settings.resize or settings.size
    exact = settings.resize_mode == "exact"
    told = {"resize_mode": "longest"} if settings.resize_mode == "longest" else {}
    return {
        **dict.fromkeys(("do_normalize", "do_rescale", "do_resize"), True),
        **({"do_flip_channel_order": True} if settings.flip_channels else {}),
        "crop_size": side,
        "do_center_crop": not exact or size != settings.size,
        "do_convert_rgb": len(settings.mean) == 3,
        "image_mean": list(settings.mean),
        "image_processor_type": "ViTImageProcessor",
        "image_std": list(settings.std),
        "resample": _RESAMPLE_OF[settings.interpolation],
        "rescale_factor": 1 / 255,
        "size": {"height": size, "width": size} if exact else {"shortest_edge": size},
        **told,
    }


def settings_of(found: dict[str, Any], where: str, *, size: int | None = None) -> ImagePreprocessing:
    """Return the settings in a ``preprocessor_config.json`` (`where` in messages); `size` is for one without.

    Raises:
        UsageError: If a value is impossible.
    """
    given = {name: value for name, value in found.items() if value is not None}
    kind = re.sub("(Fast|Pil)$", "", str(found.get("image_processor_type") or found.get("feature_extractor_type", "")))
    kind = kind.replace("FeatureExtractor", "ImageProcessor")  # its name before transformers 4.26
    found = {"do_resize": True, "do_rescale": True, "do_normalize": True, **_class_defaults(kind), **given}
    crops, wanted = bool(found.get("do_center_crop")), found.get("size")
    square = found.get("default_to_square", not crops) if isinstance(wanted, int) else _is_square(wanted)
    side: Any = _side(wanted) or size
    final: Any = (_side(found.get("crop_size")) if crops else None) or side
    for value in (side, final):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
            raise UsageError(f"{where} has image size {value!r:.60}; expected 1 to {_LARGEST:,} pixels.")
    percent = found.get("crop_pct")
    if isinstance(percent, int | float) and 0.01 <= percent <= 1 and not (kind.startswith("ConvNext") and side >= 384):
        side, square = int(side / percent), False
    elif kind.startswith("ConvNext"):  # from 384 pixels on without a crop
        square = True
    elif kind.startswith("Levit") and not square:
        side = int(256 / 224 * side)
    _warn_of_more(found, where, wanted, crops)
    mode: Any = "longest" if found.get("resize_mode") == "longest" else "exact" if square else "shortest"
    mean, std = _mean_and_std(found, where)
    resample = found.get("resample")
    interpolation = _RESAMPLE.get(resample) if isinstance(resample, int) else None
    flips = bool(found.get("do_flip_channel_order"))
    return ImagePreprocessing(final, mean, std, interpolation or "bicubic", side, mode, "down", flips)


def _warn_of_more(found: dict[str, Any], where: str, wanted: Any, crops: bool) -> None:
    left_out = [f"{name}={found[name]}" for name in ("do_pad", "size_divisor") if found.get(name)]
    if crops and not found["do_resize"]:
        left_out.append("do_resize=False")
    if isinstance(wanted, dict) and not _is_square(wanted) and set(wanted) != {"shortest_edge"}:
        left_out.append(f"size={wanted!r:.80}")
    if found.get("own_steps"):
        left_out.append("a processor with steps of its own")
    if left_out:
        what = f"{where} has {', '.join(left_out)}, which EvalImages does not follow"
        warnings.warn(f"{what}: it makes squares, resized and cropped.", stacklevel=4)


def _side(size: Any) -> Any:
    return (size.get("height") or size.get("shortest_edge")) if isinstance(size, dict) else size


def _is_square(size: Any) -> bool:
    return not isinstance(size, dict) or ("height" in size and size["height"] == size.get("width", size["height"]))


def _class_defaults(kind: str) -> dict[str, Any]:
    """Return what an image processor's class says where its file doesn't; empty for an unknown class."""
    import transformers

    if not re.fullmatch(r"[A-Z]\w*ImageProcessor", kind):
        return {}
    found = getattr(transformers, kind, None)
    if not hasattr(found, "resample"):  # the torchvision one is called so before transformers 5.4
        found = getattr(transformers, f"{kind}Fast", None)
    own_steps = kind.removesuffix("ImageProcessor") not in _FOLLOWED and any(
        step in vars(found or object) for step in ("_preprocess", "resize", "center_crop")
    )
    return {"own_steps": own_steps, **{name: getattr(found, name) for name in _OF_CLASS if hasattr(found, name)}}


def _mean_and_std(found: dict[str, Any], where: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return them for values in [0, 1], whatever the processor's scale of the pixels is."""
    normalizes = found["do_normalize"]
    mean = (found.get("image_mean") or _HALF) if normalizes else (0.0,) * 3
    std = (found.get("image_std") or _HALF) if normalizes else (1.0,) * 3
    for name, values, low in (("image_mean", mean, -math.inf), ("image_std", std, 0)):
        channels = isinstance(values, list | tuple) and 1 <= len(values) <= _MOST_CHANNELS
        if not channels or not all(isinstance(v, int | float) and low < v < math.inf for v in values):
            raise UsageError(f"{where} has {name}={values!r:.60}; expected a number per channel.")
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    factor = found.get("rescale_factor", 1 / 255) if found["do_rescale"] else 1
    if not isinstance(factor, int | float) or not 1e-6 < factor < 1e6:
        raise UsageError(f"{where} has rescale_factor={factor!r:.60}; expected a number above 0, such as 1/255.")
    if normalizes and found.get("include_top"):  # EfficientNet's divides by std once more
        std = tuple(v * v for v in std)
    if found["do_rescale"] and found.get("rescale_offset"):
        mean = tuple(v + 1 for v in mean)
    scale = 255 * factor
    if abs(scale - 1) > 1e-9:
        mean, std = tuple(v / scale for v in mean), tuple(v / scale for v in std)
    return mean, std


def own_processor(backbone: nn.Module) -> dict[str, Any] | None:
    """Return the processor's configuration that lies beside a transformers backbone, or None.

    Raises:
        HubError: If the Hub can't be asked whether there is one; images would be prepared otherwise.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        if file := file_beside(backbone, name):
            try:
                found = read_json(file, str(files_of(backbone)))
            except (OSError, ValueError):
                return None
            found = found.get("image_processor", found) if isinstance(found, dict) else None
            return found if isinstance(found, dict) else None
    return None
