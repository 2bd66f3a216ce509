"""Images to batches: `ImageViews` makes augmented views for training, `EvalImages` plain pixels for measuring."""

import dataclasses
import io
import operator
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor, nn

from hfproj.data.augment import Augmentation, Number
from hfproj.data.indexing import index_and_labels
from hfproj.errors import UsageError, check_choice, unknown
from hfproj.typing import AnyImage, Interpolation, OneOf, Unpack

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
    resize: int | None; interpolation: Interpolation  # noqa: E702
# fmt: on


def to_rgb_tensor(image: AnyImage, column: str = "image") -> UInt8[Tensor, "3 height width"]:
    """Return any image as uint8 RGB.

    Args:
        image: A PIL image of any mode, a numpy array, a tensor, or a ``{"bytes", "path"}`` dict as `datasets` stores
            images. Transparency is laid over white. 16-bit grey is divided by 257. Arrays are [height, width] or
            [height, width, 1, 3 or 4], also channels first; floating-point values in [0, 1], integers in 0 to 255.
        column: Name of the item's entry, for messages.

    Raises:
        UsageError: If it is no image, its values are out of range, or a file cannot be decoded.

    Example:
        >>> to_rgb_tensor(np.array([[0.0, 1.0]])).tolist()
        [[[0, 255]], [[0, 255]], [[0, 255]]]
    """
    if isinstance(image, dict) and ("bytes" in image or "path" in image):
        image = _decode(image)
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    if isinstance(image, Image.Image):
        array = _pil_to_array(image, column)
    elif isinstance(image, np.ndarray):
        array = _array_to_uint8(image, column)
    else:
        raise UsageError(
            f"Column {column!r} holds no image: expected a PIL image, an array or encoded bytes, got "
            f"{type(image).__name__} {reprlib.repr(image)}. Name the column with the images: image_column=… "
            "(--image_column), or cast it: dataset.cast_column(name, datasets.Image())."
        )
    return torch.from_numpy(np.array(array.transpose(2, 0, 1), order="C"))


def _decode(stored: dict) -> Image.Image:
    data, path = stored.get("bytes"), stored.get("path")
    if data is None and path is None:
        raise UsageError("The image has neither bytes nor a path. Drop the row, for example with dataset.select().")
    try:
        image: Image.Image = Image.open(io.BytesIO(data) if data is not None else str(path))
        image.load()
        return ImageOps.exif_transpose(image)  # datasets.Image turns photographs upright as well
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        what = f"The image {path or ''} cannot be decoded ({type(error).__name__}: {error})"
        raise UsageError(f"{what}. Repair the file or drop the row.") from error


def _pil_to_array(image: Image.Image, column: str) -> np.ndarray:
    if image.mode == "F":
        return _array_to_uint8(np.asarray(image), column)
    if image.mode.startswith("I"):  # mode "I" is what older versions of Pillow make of 16-bit PNG files
        array = np.asarray(image)
        _check_range(array, 65535, column)
        return _array_to_uint8(array.astype(np.uint16), column)
    if image.has_transparency_data:
        image = _over_white(image.convert("RGBA"))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _over_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _check_range(array: np.ndarray, high: int, column: str) -> None:
    if array.size and not (array.min() >= 0 and array.max() <= high):  # so written, NaN fails too
        what = f"Column {column!r} holds {array.dtype} values from {array.min()} to {array.max()}"
        raise UsageError(f"{what}; an image of this type has values from 0 to {high}. Rescale them, or store uint8.")


def _array_to_uint8(array: np.ndarray, column: str) -> np.ndarray:
    """Return [height, width, 3] uint8."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or not array.size:
        shapes = "[height, width] or [height, width, 1, 3 or 4 channels]"
        raise UsageError(f"Column {column!r} holds an array of shape {array.shape}; an image is {shapes}.")
    if array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype == np.uint16:
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif array.dtype != np.uint8:
        floating = np.issubdtype(array.dtype, np.floating)
        _check_range(array, 1 if floating else 255, column)
        array = np.rint(array * 255).astype(np.uint8) if floating else array.astype(np.uint8)
    if array.shape[-1] == 4:
        return np.asarray(_over_white(Image.fromarray(np.ascontiguousarray(array))))
    return np.broadcast_to(array, (*array.shape[:2], 3))


class _Images:
    """What the two collators share: reading the items and normalising the pixels."""

    def __init__(
        self, size: int, mean: Sequence[Number], std: Sequence[Number], image_column: str, label_column: str | None
    ):
        if size < 1 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            what = "Expected size ≥ 1 and three values each of mean and std (std > 0)"
            raise UsageError(f"{what}, got size={size}, mean={mean}, std={std}.")
        self.size, self.image_column, self.label_column = size, image_column, label_column
        self.mean, self.std = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in (mean, std))

    def _read(self, items: Sequence[dict]) -> list[Tensor]:
        images = []
        for item in items:
            if self.image_column not in item:
                what = f"The items have no column {self.image_column!r}; they have {', '.join(map(repr, item))}"
                raise UsageError(f"{what}. Name the one with the images: image_column=… (--image_column).")
            try:
                images.append(to_rgb_tensor(item[self.image_column], self.image_column))
            except UsageError as error:
                where = f" (item {item['index']} of the data set)" if "index" in item else ""
                raise UsageError(f"{error}{where}") from error
        return images


def _settings(model: nn.Module, options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    from hfproj.backbones import image_preprocessing

    found = image_preprocessing(model)
    return {**{name: getattr(found, name) for name in names}, **options}


def _for_each_view(augmentation: Augmentation | Sequence[Augmentation], name: str, views: int) -> list[Augmentation]:
    augmentations = [augmentation] * views if isinstance(augmentation, Augmentation) else list(augmentation)
    if len(augmentations) != views:
        raise UsageError(f"Expected one augmentation for each of {name}={views} views, got {len(augmentations)}.")
    return augmentations


@torch.no_grad()
def _try_size(model: nn.Module, size: int) -> None:
    """Refuse a size of local views that the backbone fails on: there is no other way to know for every architecture."""
    from hfproj.backbones import fit_image_size

    backbone: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    modes = {module: module.training for module in backbone.modules()}
    like = next(p for p in backbone.parameters() if p.is_floating_point())
    backbone.eval()
    try:
        options = {"interpolate_pos_encoding": True} if fit_image_size(backbone, (size, size)) else {}
        backbone(like.new_zeros(1, 3, size, size), **options)
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

    ``views`` is a list of `num_views` float tensors [batch, 3, size, size], normalised; ``index`` is int64 [batch];
    ``labels``, int64 [batch], is there if all items have the label column. A view depends on (seed, epoch, index, view)
    alone: not on the batch, the worker, the rank or the number of threads.

    With `local_views` it is multi-crop (SwAV, DINO): smaller views of smaller parts come after the `num_views` others,
    as tensors [batch, 3, local_size, local_size]. The papers crop the others from at least 0.4 (DINO) or 0.14 (SwAV) of
    the image: ``scale=(0.4, 1.0)``.

    Args:
        size: Side of the views in pixels.
        mean, std: Of each channel; pixels in [0, 1] become (x − mean) / std.
        num_views: Views of each image, at least 1.
        local_views: Further views of `local_size`: 6 in SwAV, 8 in DINO. 0: none.
        local_size: Their side in pixels, one that the backbone takes: 96 beside 224 in both papers.
        local_scale: Fraction of the image's area that they are cropped from. (0.05, 0.4): DINO; (0.05, 0.14): SwAV.
        seed: Seed of the run.
        image_column: Entry of an item that holds the image.
        label_column: Entry that holds the class number; None for no labels.
        augmentation: An `Augmentation`, or a list of one for each of the `num_views` (BYOL's two differ).
        local_augmentation: The same for the `local_views`; None: the first of the others with `local_scale`.
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

    def __init__(
        self, *, size: int, mean: Sequence[Number], std: Sequence[Number], num_views: int = 2,
        local_views: int = 0, local_size: int | None = None, local_scale: tuple[Number, Number] = (0.05, 0.4),
        seed: int = 0, image_column: str = "image", label_column: str | None = "label",
        augmentation: _Augmentations = None, local_augmentation: _Augmentations = None, **options: Unpack[_Parts],
    ):  # fmt: skip
        super().__init__(size, mean, std, image_column, label_column)
        if num_views < 1:
            raise UsageError(f"Expected num_views to be at least 1, got {num_views}.")
        for option in options:
            if option not in Augmentation.__dataclass_fields__:
                raise unknown("option of ImageViews:", option, Augmentation.__dataclass_fields__)
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

    @classmethod
    def for_model(cls, model: nn.Module, **options: Unpack[_OfViews]) -> "ImageViews":
        """Return a collator with size, mean and std of the model's own preprocessing; `options` go to the class.

        Raises:
            UsageError: In the cases of the class, or if the backbone takes no images of `local_size`.
        """
        views = cls(**_settings(model, options, "size", "mean", "std"))
        if views.local_size is not None:
            _try_size(model, views.local_size)
        return views

    def __call__(self, items: Sequence[dict]) -> dict[str, Any]:
        """Return the batch of `items`, dicts of `hfproj.IndexedDataset` or `hfproj.data.StreamDataset`."""
        if not all("index" in item for item in items):
            wrap = "Wrap the data set: hfproj.IndexedDataset(dataset) (a stream: hfproj.data.StreamDataset)."
            raise UsageError(f"The items have no 'index', which decides their views. {wrap}")
        images = self._read(items)
        index = [operator.index(item["index"]) for item in items]
        epoch = [operator.index(item.get("epoch", 0)) for item in items]
        views = [
            augment(images, size=size, seed=self.seed, epoch=epoch, index=index, view=view)
            for view, (augment, size) in enumerate(zip(self.augmentations, self.sizes))
        ]
        views = [view.sub_(self.mean).div_(self.std) for view in views]
        return {"views": views, **index_and_labels(items, self.label_column)}


class EvalImages(_Images):
    """Collator without randomness: a list of items → ``{"pixel_values", "index", "labels"}``.

    The shorter side is resized to `resize` (antialiased, in 8 bits as image processors do), the centre cropped
    to `size`, the pixels normalised. An image that has the size already is only normalised. ``pixel_values`` is float
    [batch, 3, size, size]; ``index`` and ``labels``, int64 [batch], are there if all items have them.

    Args:
        size, mean, std, image_column, label_column: As in `ImageViews`.
        resize: Length of the shorter side before the crop, at least `size`; None: `size`.
        interpolation: ``"bicubic"`` or ``"bilinear"``.

    Raises:
        UsageError: If `resize` is below `size` or the interpolation is unknown; on call, if an item has no image.

    Example:
        >>> collate = EvalImages(size=2, mean=(0.5,) * 3, std=(0.5,) * 3)
        >>> collate([{"image": np.eye(2)}])["pixel_values"][0, 0].tolist()
        [[1.0, -1.0], [-1.0, 1.0]]
    """

    def __init__(
        self, *, size: int, mean: Sequence[Number], std: Sequence[Number], resize: int | None = None,
        interpolation: Interpolation = "bicubic", image_column: str = "image", label_column: str | None = "label",
    ):  # fmt: skip
        super().__init__(size, mean, std, image_column, label_column)
        check_choice("interpolation", interpolation, ("bicubic", "bilinear"))
        if resize is not None and resize < size:
            raise UsageError(f"Expected resize to be at least size, which is cropped from it, got {resize} < {size}.")
        self.resize, self.interpolation = resize or size, interpolation

    @classmethod
    def for_model(cls, model: nn.Module, **options: Unpack[_OfEval]) -> "EvalImages":
        """Return a collator with size, mean, std and interpolation of the model's own preprocessing.

        An interpolation other than ``"bilinear"`` becomes ``"bicubic"`` (timm knows ``"random"`` and others).
        """
        settings = _settings(model, options, "size", "mean", "std", "interpolation")
        if "interpolation" not in options and settings["interpolation"] != "bilinear":
            settings["interpolation"] = "bicubic"
        return cls(**settings)

    def __call__(self, items: Sequence[dict]) -> dict[str, Any]:
        """Return the batch of `items`."""
        x = torch.stack([self._fit(image) for image in self._read(items)]).div_(255).sub_(self.mean).div_(self.std)
        return {"pixel_values": x, **index_and_labels(items, self.label_column)}

    def _fit(self, image: UInt8[Tensor, "3 height width"]) -> Float[Tensor, "3 size size"]:
        size, sides = self.size, image.shape[1:]
        if sides == (size, size):
            return image.float()
        target = [self.resize if side == min(sides) else int(self.resize * side / min(sides)) for side in sides]
        image = F.interpolate(image[None], size=target, mode=self.interpolation, antialias=True)[0]
        top, left = (round((side - size) / 2) for side in target)
        return image[:, top : top + size, left : left + size].float()
