"""Images to batches: `ImageViews` makes augmented views for training, `EvalImages` plain pixels for measuring."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from PIL import Image
from torch import Tensor, nn

from hfproj.checking import check_types, checked
from hfproj.data.augment import Augmentation, Number
from hfproj.data.indexing import check_items, index_and_labels, whole_numbers
from hfproj.data.pixels import to_image_tensor, to_rgb_tensor
from hfproj.errors import UsageError, check_choice, unknown
from hfproj.typing import OneOf, Resampling, Unpack

# fmt: off
# The keywords of collators and what they may be, for type checkers; values are checked where they are used.
_Pair = tuple[Number, Number]
_Augmentations = Augmentation | Sequence[Augmentation] | None
class _Of(TypedDict, total=False):
    size: int
    mean: Sequence[Number]
    std: Sequence[Number]
    image_column: str
    label_column: str | None
    flip_channels: bool
class _Parts(TypedDict, total=False):
    scale: _Pair | None
    ratio: _Pair
    flip_probability: Number | None
    color_jitter_probability: Number | None
    color_jitter_strength: Number | None
    brightness: Number | None
    contrast: Number | None
    saturation: Number | None
    hue: Number | None
    grayscale_probability: Number | None
    blur_probability: Number | OneOf["auto"] | None
    blur_sigma: _Pair
    solarize_probability: Number | None
    rotation_degrees: Number | None
    translation: Number | None


class _OfViews(_Of, _Parts, total=False):
    num_views: int; local_views: int; local_size: int | None; local_scale: _Pair  # noqa: E702
    seed: int; augmentation: _Augmentations; local_augmentation: _Augmentations  # noqa: E702


class _OfEval(_Of, total=False):
    resize: int | None; resize_mode: OneOf["shortest", "exact", "longest"]; resizer: OneOf["torch", "pil"]  # noqa: E702
    interpolation: Resampling; crop_rounding: OneOf["even", "down"]  # noqa: E702
# fmt: on

__all__ = ["EvalImages", "ImageViews", "to_rgb_tensor"]

_PIL = {kind.name.lower(): kind for kind in Image.Resampling}
_NOT_TORCHS = ("box", "hamming") if "lanczos" in (F.interpolate.__doc__ or "") else ("box", "hamming", "lanczos")


class _Images:
    """What the two collators share: reading the items and normalising the pixels."""

    def __init__(
        self, size: int, mean: Sequence[Number], std: Sequence[Number], image_column: str, label_column: str | None,
        flip_channels: bool,
    ):  # fmt: skip
        if size < 1 or not 1 <= len(mean) == len(std) or min(std) <= 0:
            what = "Expected size ≥ 1, and one value of mean and std for each channel (three values for RGB; std > 0)"
            raise UsageError(f"{what}, got size={size}, mean={mean}, std={std}.")
        if max(mean) > 1:
            given = f"mean={tuple(mean)} and std={tuple(std)} are of pixels from 0 to 255"
            warnings.warn(f"{given}, and pixels here are in [0, 1]: divide both by 255.", stacklevel=4)
        self.size, self.image_column, self.label_column = size, image_column, label_column
        self.flip_channels = flip_channels
        self.mean, self.std = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in (mean, std))

    def _read(self, items: Sequence[dict]) -> list[Tensor]:
        check_items(items)
        images = []
        for item in items:
            if self.image_column not in item:
                what = f"The items have no column {self.image_column!r}; they have {', '.join(map(repr, item))}"
                raise UsageError(f"{what}. Name the one with the images: image_column=… (--image_column).")
            try:
                images.append(to_image_tensor(item[self.image_column], len(self.mean), self.image_column))
            except UsageError as error:
                where = f" (item {item['index']} of the data set)" if "index" in item else ""
                raise UsageError(f"{error}{where}") from error
        return images

    def _normalized(self, x: Float[Tensor, "batch channels size size"]) -> Float[Tensor, "batch channels size size"]:
        return (x.flip(1) if self.flip_channels else x).sub_(self.mean).div_(self.std)


def _settings(model: nn.Module, options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return the options, and what is not among them of the model's own preprocessing at their size."""
    from hfproj.backbones import image_preprocessing

    with warnings.catch_warnings():
        if "mean" in options and "std" in options:  # what is warned of is that these are unknown
            warnings.simplefilter("ignore", UserWarning)
        found = image_preprocessing(model)
    found = found.at(options.get("size", found.size))
    return {**{name: getattr(found, name) for name in names}, **options}


def _without_colour(augmentations: list[Augmentation], channels: int) -> None:
    """Say once what `Augmentation` leaves out of images that are no colour images."""
    left_out = dict.fromkeys(part for augmentation in augmentations for part in augmentation.for_colour())
    if channels != 3 and left_out:
        what = f"Images of {channels} channels have no colours: {', '.join(left_out)} are left out of their views"
        warnings.warn(f"{what}. Set them to 0 to say that you know.", stacklevel=3)


def _for_each_view(augmentation: Augmentation | Sequence[Augmentation], name: str, views: int) -> list[Augmentation]:
    augmentations = [augmentation] * views if isinstance(augmentation, Augmentation) else list(augmentation)
    if len(augmentations) != views:
        raise UsageError(f"Expected one augmentation for each of {name}={views} views, got {len(augmentations)}.")
    return augmentations


@torch.no_grad()
def _try_size(model: nn.Module, size: int, channels: int) -> None:
    """Refuse a size of local views that the backbone fails on: there is no other way to know for every architecture."""
    from hfproj.backbones import fit_image_size
    from hfproj.backbones.wrong_inputs import patch_of

    backbone: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    modes = {module: module.training for module in backbone.modules()}
    like = next(p for p in backbone.parameters() if p.is_floating_point())
    backbone.eval()
    try:
        options = {"interpolate_pos_encoding": True} if fit_image_size(backbone, (size, size)) else {}
        with warnings.catch_warnings():  # of the border, which is refused below
            warnings.simplefilter("ignore")
            backbone(like.new_zeros(1, channels, size, size), **options)
        if (patch := patch_of(backbone)) and size % patch:
            raise ValueError(f"its patches have {patch} pixels, and the border would be left out")
    except Exception as error:
        raise UsageError(
            f"{type(backbone).__name__} takes no views of local_size={size} ({type(error).__name__}: {error}). Take "
            "another local_size, a multiple of its patch size, or a backbone for images of any size."
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training


class ImageViews(_Images):
    """Collator of augmented views: a list of items → ``{"views", "index", "labels"}``.

    ``views`` is a list of `num_views` float tensors [batch, channels, size, size], normalised; ``index`` is int64
    [batch]; ``labels``, int64 [batch], is there if an item has the label column, with −1 for one that has no label. A
    view depends on (seed, epoch, index, view) alone: not on the batch, the worker, the rank or the number of threads.

    With `local_views` it is multi-crop (SwAV, DINO): smaller views of smaller parts come after the `num_views` others,
    as tensors [batch, channels, local_size, local_size]. The papers crop the others from at least 0.4 (DINO) or 0.14
    (SwAV) of the image: ``scale=(0.4, 1.0)``.

    Args:
        size: Side of the views in pixels.
        mean, std: Of each channel, and thereby how many channels there are; pixels in [0, 1] become (x − mean) / std.
            With other than three `hfproj.data.pixels.to_image_tensor` reads the images, and operations on colours are
            left out, with a warning.
        num_views: Views of each image, at least 1.
        local_views: Further views of `local_size`: 6 in SwAV, 8 in DINO. 0: none.
        local_size: Their side in pixels, one that the backbone takes: 96 beside 224 in both papers.
        local_scale: Fraction of the image's area that they are cropped from. (0.05, 0.4): DINO; (0.05, 0.14): SwAV.
        seed: Seed of the run.
        image_column: Entry of an item that holds the image.
        label_column: Entry that holds the class number; None for no labels.
        augmentation: An `Augmentation`, or a list of one for each of the `num_views` (BYOL's two differ).
        local_augmentation: The same for the `local_views`; None: the first of the others with `local_scale`.
        flip_channels: Whether the backbone takes blue, green, red.
        options: Instead of `augmentation`, options of `Augmentation`.

    Raises:
        UsageError: If an option is unknown, there is no view, another number of augmentations than views, or local
            views without a size (or a size without views); on call, if an item has no ``"index"`` or no image.

    Example:
        >>> collate = ImageViews(size=8, mean=(0.5,) * 3, std=(0.5,) * 3, flip_probability=0)
        >>> batch = collate([{"image": np.zeros((8, 8)), "label": 7, "index": 0, "epoch": 0}])
        >>> [tuple(view.shape) for view in batch["views"]], batch["labels"].tolist()
        ([(1, 3, 8, 8), (1, 3, 8, 8)], [7])
    """

    @checked
    def __init__(
        self, *, size: int, mean: Sequence[Number], std: Sequence[Number], num_views: int = 2,
        local_views: int = 0, local_size: int | None = None, local_scale: tuple[Number, Number] = (0.05, 0.4),
        seed: int = 0, image_column: str = "image", label_column: str | None = "label",
        augmentation: _Augmentations = None, local_augmentation: _Augmentations = None, flip_channels: bool = False,
        **options: Unpack[_Parts],
    ):  # fmt: skip
        super().__init__(size, mean, std, image_column, label_column, flip_channels)
        if num_views < 1:
            raise UsageError(f"Expected num_views to be at least 1, got {num_views}.")
        for option in options:
            if option not in Augmentation.__dataclass_fields__:
                known = {**Augmentation.__dataclass_fields__, **_OfViews.__annotations__}
                raise unknown("option of ImageViews:", option, known)
        if augmentation is not None and options:
            raise UsageError(f"Give either augmentation=… or its options ({', '.join(options)}), not both.")
        if (local_views, local_size) != (0, None) and (local_size is None or min(local_views, local_size) < 1):
            what = "Local views need a number and a size, such as local_views=6, local_size=96 (0 and None for none)"
            raise UsageError(f"{what}, got local_views={local_views} and local_size={local_size}.")
        self.num_views, self.local_views, self.local_size, self.seed = num_views, local_views, local_size, seed
        augmentation = Augmentation(**options) if augmentation is None else augmentation
        self.augmentations = _for_each_view(augmentation, "num_views", num_views)
        self.sizes = [size] * num_views
        if local_size is not None:
            if local_augmentation is None:
                local_augmentation = dataclasses.replace(self.augmentations[0], scale=local_scale)
            self.augmentations += _for_each_view(local_augmentation, "local_views", local_views)
            self.sizes += [local_size] * local_views
        _without_colour(self.augmentations, len(mean))

    @classmethod
    def for_model(cls, model: nn.Module, **options: Unpack[_OfViews]) -> "ImageViews":
        """Return a collator with size, mean and std of the model's own preprocessing; `options` go to the class.

        Raises:
            UsageError: In the cases of the class, or if the backbone takes no images of `local_size`.
        """
        check_types(cls.__name__, cls.__init__, options)
        views = cls(**_settings(model, options, "size", "mean", "std", "flip_channels"))
        if views.local_size is not None:
            _try_size(model, views.local_size, len(views.mean))
        return views

    def __call__(self, items: Sequence[dict]) -> dict[str, Any]:
        """Return the batch of `items`, dicts of `hfproj.IndexedDataset` or `hfproj.data.StreamDataset`."""
        check_items(items)
        if not all("index" in item for item in items):
            wrap = "Wrap the data set: hfproj.IndexedDataset(dataset) (a stream: hfproj.data.StreamDataset)."
            plain = "To measure, take hfproj.EvalImages, which makes no views."
            raise UsageError(f"The items have no 'index', which decides their views. {wrap} {plain}")
        images = self._read(items)
        index, epoch = whole_numbers(items, "index"), whole_numbers(items, "epoch")
        views = [
            augment(images, size=size, seed=self.seed, epoch=epoch, index=index, view=view)
            for view, (augment, size) in enumerate(zip(self.augmentations, self.sizes))
        ]
        return {"views": [self._normalized(view) for view in views], **index_and_labels(items, self.label_column)}


class EvalImages(_Images):
    """Collator without randomness: a list of items → ``{"pixel_values", "index", "labels"}``.

    Images are resized (antialiased, in 8 bits as image processors do), the centre is cropped to `size`, the pixels are
    normalised. ``pixel_values`` is float [batch, channels, size, size]; ``index`` and ``labels`` are those of
    `ImageViews`, if the items have them.

    Args:
        size, mean, std, image_column, label_column, flip_channels: As in `ImageViews`.
        resize: Length of the resized side before the crop, at least `size`; None: `size`.
        interpolation: ``"bicubic"``, ``"bilinear"``, ``"nearest"``, ``"lanczos"``, ``"box"`` or ``"hamming"``.
        resize_mode: ``"shortest"``: the shorter side becomes `resize`. ``"exact"``: both do, whatever the image's shape
            (ViT, SigLIP). ``"longest"``: the longer side does; the border has the colour of `mean` (timm's "border").
        resizer: What resizes: ``"torch"`` (transformers; box and hamming are always PIL's) or ``"pil"`` (timm), which
            differ by a few grey levels in bicubic.
        crop_rounding: Where a crop begins that would begin at half a pixel: at the ``"even"`` one (torchvision) or
            ``"down"`` (transformers).

    Raises:
        UsageError: If `resize` is below `size` or an option is unknown; on call, if an item has no image.

    Example:
        >>> collate = EvalImages(size=2, mean=(0.5,) * 3, std=(0.5,) * 3)
        >>> collate([{"image": np.eye(2)}])["pixel_values"][0, 0].tolist()
        [[1.0, -1.0], [-1.0, 1.0]]
    """

    @checked
    def __init__(
        self, *, size: int, mean: Sequence[Number], std: Sequence[Number], resize: int | None = None,
        interpolation: Resampling = "bicubic", image_column: str = "image", label_column: str | None = "label",
        resize_mode: OneOf["shortest", "exact", "longest"] = "shortest",
        resizer: OneOf["torch", "pil"] = "torch", crop_rounding: OneOf["even", "down"] = "even",
        flip_channels: bool = False,
    ):  # fmt: skip
        super().__init__(size, mean, std, image_column, label_column, flip_channels)
        check_choice("interpolation", interpolation, list(_PIL))
        check_choice("resize_mode", resize_mode, ("shortest", "exact", "longest"))
        check_choice("resizer", resizer, ("torch", "pil"))
        check_choice("crop_rounding", crop_rounding, ("even", "down"))
        if resize is not None and resize < size:
            raise UsageError(f"Expected resize to be at least size, which is cropped from it, got {resize} < {size}.")
        self.resize, self.interpolation = resize or size, interpolation
        self.resize_mode, self.resizer, self.crop_rounding = resize_mode, resizer, crop_rounding

    @classmethod
    def for_model(cls, model: nn.Module, **options: Unpack[_OfEval]) -> "EvalImages":
        """Return a collator that prepares images as the model's own image processor or timm's transform does.

        With `size` in the `options`, which go to the class, `resize` keeps its ratio to it.

        Raises:
            UsageError: In the cases of the class, or if the image size is unknown.
        """
        check_types(cls.__name__, cls.__init__, options)
        names = ("interpolation", "resize", "resize_mode", "resizer", "crop_rounding", "flip_channels")
        settings = _settings(model, options, "size", "mean", "std", *names)
        resize = settings["resize"] or settings["size"]
        found = cls(**(settings if "resize" in options else {**settings, "resize": None}))
        found.resize = resize  # below the size in a few processors, which then pad with black
        return found

    def __call__(self, items: Sequence[dict]) -> dict[str, Any]:
        """Return the batch of `items`."""
        x = self._normalized(torch.stack([self._fit(image) for image in self._read(items)]))
        return {"pixel_values": x, **index_and_labels(items, self.label_column)}

    def _fit(self, image: Shaped[Tensor, "channels height width"]) -> Float[Tensor, "channels size size"]:
        size, whole = self.size, not image.is_floating_point()
        image = _resized(image, self._target(*image.shape[1:]), self.interpolation, self.resizer)
        image = image.float().div_(255) if whole else image
        missing = [max(size - side, 0) for side in image.shape[1:]]
        if any(missing):
            top, left = missing[0] // 2, missing[1] // 2
            fill = (self.mean * 255).round() / 255 if self.resize_mode == "longest" else torch.zeros_like(self.mean)
            padded = fill.expand(-1, *(max(size, side) for side in image.shape[1:])).clone()
            padded[:, top : top + image.shape[1], left : left + image.shape[2]] = image
            image = padded
        rounded = int if self.crop_rounding == "down" else round
        top, left = (rounded((side - size) / 2) for side in image.shape[1:])
        return image[:, top : top + size, left : left + size]

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.resize_mode == "exact":
            return self.resize, self.resize
        if self.resize_mode == "longest":
            ratio = max(height, width) / self.resize
            return max(round(height / ratio), 1), max(round(width / ratio), 1)
        short = min(height, width)
        high, wide = (self.resize if side == short else int(self.resize * side / short) for side in (height, width))
        return high, wide


def _resized(
    image: Shaped[Tensor, "channels height width"], target: tuple[int, int], interpolation: str, resizer: str
) -> Shaped[Tensor, "channels {target[0]} {target[1]}"]:
    """Return the image of its type: uint8, or float in [0, 1]."""
    if image.shape[1:] == target:
        return image
    if resizer == "pil" or interpolation in _NOT_TORCHS:  # band by band: PIL has no images of any number of them
        bands = [Image.fromarray(band).resize(target[::-1], _PIL[interpolation]) for band in image.numpy()]
        image = torch.from_numpy(np.stack([np.asarray(band) for band in bands]))
    elif interpolation == "nearest":
        image = F.interpolate(image[None], size=target, mode="nearest-exact")[0]
    else:
        image = F.interpolate(image[None], size=target, mode=interpolation, antialias=True)[0]
    return image.clamp_(0, 1) if image.is_floating_point() else image
