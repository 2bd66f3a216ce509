"""Any image as a tensor: of three channels (`to_rgb_tensor`), or of those that a backbone takes (`to_image_tensor`)."""

import io
import reprlib

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from hfproj.errors import UsageError
from hfproj.typing import AnyImage

_ORIENTATION = 0x0112  # the EXIF tag that says how a camera was held


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
    image = _opened(image, column)
    array = _pil_to_array(image, column) if isinstance(image, Image.Image) else _array_to_uint8(image, column)
    return torch.from_numpy(np.array(array.transpose(2, 0, 1), order="C"))


def to_image_tensor(
    image: AnyImage, channels: int = 3, column: str = "image"
) -> Shaped[Tensor, "{channels} height width"]:
    """Return any image with the number of channels that a backbone takes.

    Three are `to_rgb_tensor`'s. Otherwise values of 8 bits stay uint8, and 16-bit integers (divided by 65,535) and
    floating-point values in [0, 1] become float32, so that nothing of them is rounded. One channel is the grey value,
    of colours as PIL weights them, with transparency laid over white. Of any other number the image must have as many:
    arrays [height, width, channels] or [channels, height, width] (that if both fit a tensor), PIL's LA of two channels,
    RGBA, palettes with transparency and CMYK of four.

    Args:
        image: As in `to_rgb_tensor`.
        channels: Of the result, at least 1.
        column: Name of the item's entry, for messages.

    Raises:
        UsageError: In the cases of `to_rgb_tensor`, or if the image has another number of channels.

    Example (a satellite image of 13 bands, 16 bits each):
        >>> to_image_tensor(np.full((2, 2, 13), 65535, dtype=np.uint16), 13).unique().tolist()
        [1.0]
    """
    if channels == 3:
        return to_rgb_tensor(image, column)
    first = isinstance(image, Tensor)
    image = _opened(image, column)
    array = _bands_of(image, channels, column) if isinstance(image, Image.Image) else image
    shape = array.shape
    if array.ndim == 2:
        array = array[..., None]
    fits = [axis for axis in ((0, -1) if first else (-1, 0)) if array.ndim == 3 and array.shape[axis] == channels]
    colours = channels == 1 and array.ndim == 3 and any(array.shape[axis] in (3, 4) for axis in (0, -1))
    if not fits and colours:
        rgb = np.ascontiguousarray(_array_to_uint8(array, column))
        array, fits = np.asarray(Image.fromarray(rgb).convert("L"))[..., None], [-1]
    if not fits or not array.size:
        wanted = f"[height, width, {channels}] or [{channels}, height, width]"
        raise UsageError(
            f"Column {column!r} holds an image of shape {shape}; expected {channels} channels, {wanted}: mean and std "
            f"have {channels} values. Store as many bands, or take a backbone for those of the image."
        )
    array = _in_range(array.transpose(2, 0, 1) if fits[0] == -1 else array, column)
    return torch.from_numpy(np.array(array, order="C"))


def upright(image: Image.Image) -> Image.Image:
    """Return a photograph as it was seen: turned and mirrored as its EXIF orientation says, which is taken away.

    Example:
        >>> image = Image.new("L", (5, 2))
        >>> image.getexif()[0x0112] = 6  # the camera was turned by a quarter
        >>> upright(image).size, upright(upright(image)).size
        ((2, 5), (2, 5))
    """
    try:
        return ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image
    except Exception:  # broken metadata are read in a dozen ways, and make no image worthless
        return image


def _opened(image: AnyImage, column: str) -> Image.Image | np.ndarray:
    if isinstance(image, dict) and ("bytes" in image or "path" in image):
        image = _decode(image)
    if isinstance(image, Image.Image):
        return upright(image)
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    if isinstance(image, np.ndarray):
        return image
    raise UsageError(
        f"Column {column!r} holds no image: expected a PIL image, an array or encoded bytes, got "
        f"{type(image).__name__} {reprlib.repr(image)}. Name the column with the images: image_column=… "
        "(--image_column), or cast it: dataset.cast_column(name, datasets.Image()); arrays in a data set: "
        'dataset.with_format("numpy").'
    )


def _bands_of(image: Image.Image, channels: int, column: str) -> np.ndarray:
    """Return a PIL image's own bands; for one channel, grey."""
    if image.mode == "F":
        return np.asarray(image)
    if image.mode.startswith("I"):
        _check_range(np.asarray(image), 65535, column)
        return np.asarray(image).astype(np.uint16)
    if channels == 1:
        image = _over_white(image.convert("RGBA")) if image.has_transparency_data else image
        return np.asarray(image if image.mode == "L" else image.convert("L"))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return np.asarray(image)


def _in_range(array: np.ndarray, column: str) -> np.ndarray:
    """Return uint8, or float32 in [0, 1]."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype == np.uint16:
        return array.astype(np.float32) / 65535
    if array.dtype == bool:
        return array * np.uint8(255)
    if array.dtype == np.uint8:
        return array
    floating = np.issubdtype(array.dtype, np.floating)
    _check_range(array, 1 if floating else 255, column)
    return array.astype(np.float32 if floating else np.uint8)


def _decode(stored: dict) -> Image.Image:
    data, path = stored.get("bytes"), stored.get("path")
    if data is None and path is None:
        raise UsageError("The image has neither bytes nor a path. Drop the row, for example with dataset.select().")
    try:
        image: Image.Image = Image.open(io.BytesIO(data) if data is not None else str(path))
        image.load()
        return image
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
