"""Any image as a tensor: of three channels (`to_rgb_tensor`), or of those that a backbone takes (`to_image_tensor`).

A file of some kilobytes may announce a picture that fills the memory, and so may an array that is one number, expanded.
How many pixels an image may have is read from its header or its shape, before anything is decoded or copied: Pillow's
own limit, ``PIL.Image.MAX_IMAGE_PIXELS`` (89,478,485; None for none), from which on Pillow itself only warns.
"""

import io
import math
import os
import reprlib
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from PIL import EpsImagePlugin, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from hfproj.checking import checked
from hfproj.errors import HfprojError, UsageError, one_line
from hfproj.typing import AnyImage

Made = TypeVar("Made")
BOMBS = (Image.DecompressionBombWarning, Image.DecompressionBombError)
BY_SKIPPING = ", or leave such files out: on_bad_image='skip', and of what is measured hfproj.data.without_bad_images"
_REPAIR = f"Repair the file, drop the row, for example with dataset.select(){BY_SKIPPING}"
_LIMIT = "Make it smaller or drop the row; if it is meant, raise PIL.Image.MAX_IMAGE_PIXELS (None: no limit)"
_NOT_NUMPYS = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_ORIENTATION = 0x0112  # the EXIF tag that says how a camera was held


@checked
def to_rgb_tensor(image: AnyImage, column: str = "image") -> UInt8[Tensor, "3 height width"]:
    """Return any image as uint8 RGB.

    Args:
        image: A PIL image of any mode, a numpy array, a tensor, an encoded file as bytes, or a ``{"bytes", "path"}``
            dict as `datasets` stores images; an array of any other library that numpy can read counts as one.
            Transparency is laid over white. 16-bit grey is divided by 257. Arrays are [height, width] or [height,
            width, 1, 3 or 4], also channels first; floating-point values in [0, 1], integers in 0 to 255.
        column: Name of the item's entry, for messages.

    Raises:
        UsageError: If it is no image, its values are out of range, a file cannot be decoded, or its header or shape
            announces more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``.

    Example:
        >>> to_rgb_tensor(np.array([[0.0, 1.0]])).tolist()
        [[[0, 255]], [[0, 255]], [[0, 255]]]
    """
    return _checked(lambda: _rgb(_opened(image, 3, column), column), column)


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
    return _checked(lambda: _of_channels(_opened(image, channels, column), channels, column, first=first), column)


def _rgb(image: Image.Image | np.ndarray, column: str) -> Tensor:
    array = _pil_to_array(image, column) if isinstance(image, Image.Image) else _array_to_uint8(image, column)
    return torch.from_numpy(np.array(array.transpose(2, 0, 1), order="C"))


def _of_channels(image: Image.Image | np.ndarray, channels: int, column: str, *, first: bool) -> Tensor:
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


@contextmanager
def bounded() -> Iterator[None]:
    """Return a context in which Pillow refuses images beyond its limit when it reads their headers, and PostScript."""
    with warnings.catch_warnings(), without_postscript():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


_reading, _lock, _ghostscript = 0, threading.Lock(), [EpsImagePlugin.gs_binary]


@contextmanager
def without_postscript() -> Iterator[None]:
    """Return a context in which Pillow starts no Ghostscript: an EPS file is a program, and data are a stranger's."""
    global _reading
    with _lock:  # of several threads the first one in and the last one out
        if not _reading:
            _ghostscript[0], EpsImagePlugin.gs_binary = EpsImagePlugin.gs_binary, False
        _reading += 1
    try:
        yield
    finally:
        with _lock:
            _reading -= 1
            if not _reading:
                EpsImagePlugin.gs_binary = _ghostscript[0]


def cure(error: Exception) -> str:
    """Return what to do about a file that could not be read."""
    return _LIMIT if isinstance(error, BOMBS) else _REPAIR


def decoded(image: Any, column: str = "image") -> Any:
    """Return an image that is stored or lazy as a PIL image in memory, and any other value as it is.

    Raises:
        UsageError: If it cannot be decoded.

    Example:
        >>> decoded(Image.new("L", (5, 2))).size, decoded(3)
        ((5, 2), 3)
    """
    if _is_stored(image):
        image = _checked(lambda: _decode(image), column)
    if isinstance(image, Image.Image):
        _check_pixels(*image.size)
        _checked(image.load, column)
    return image


def _checked(read: Callable[[], Made], column: str) -> Made:
    """Return what `read` gives; what libraries say of broken and odd images, in dozens of types, is a UsageError."""
    try:
        with without_postscript():
            return read()
    except HfprojError:
        raise
    except Exception as error:
        what = f"Column {column!r} holds an image that cannot be read ({type(error).__name__}: {one_line(error)})"
        raise UsageError(f"{what}. {_REPAIR}.") from error


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


def _is_stored(image: Any) -> bool:
    return isinstance(image, bytes) or (isinstance(image, dict) and ("bytes" in image or "path" in image))


def _opened(image: AnyImage, channels: int, column: str) -> Image.Image | np.ndarray:
    if _is_stored(image):
        image = _decode(image)
    if isinstance(image, Image.Image):
        _check_pixels(*image.size)
        image.load()
        return upright(image)
    _check_shape(image, channels)
    if isinstance(image, Tensor):
        if image.layout != torch.strided or image.is_quantized or image.is_meta:
            kind = "quantized" if image.is_quantized else "meta" if image.is_meta else str(image.layout)
            raise UsageError(f"Column {column!r} holds a {kind} tensor; store images as dense ones, best in uint8.")
        image = image.detach().cpu()
        image = (image.float() if image.dtype in _NOT_NUMPYS else image).numpy()
    elif hasattr(image, "__array__") and not isinstance(image, np.ndarray | np.generic):
        image = np.asarray(image)  # of TensorFlow, JAX and others
        _check_shape(image, channels)
    if isinstance(image, np.ndarray):
        if image.dtype.name == "bfloat16":  # of ml_dtypes, which JAX and TensorFlow use
            image = image.astype(np.float32)
        if image.dtype.kind not in "biuf":
            hint = "an image has real numbers: uint8, or floating-point values in [0, 1]"
            raise UsageError(f"Column {column!r} holds an array of {image.dtype} values; {hint}.")
        return image
    raise UsageError(
        f"Column {column!r} holds no image: expected a PIL image, an array or an encoded file, got "
        f"{type(image).__name__} {reprlib.repr(image)}. Name the column with the images: image_column=… "
        "(--image_column), or cast it: dataset.cast_column(name, datasets.Image()); arrays in a data set: "
        'dataset.with_format("numpy").'
    )


def _check_shape(image: Any, channels: int) -> None:
    """Refuse an array that shows more pixels than Pillow's limit, before it is copied; others are not looked at."""
    shape = getattr(image, "shape", None)
    if not isinstance(shape, tuple) or not all(isinstance(side, int) for side in shape) or 0 in shape:
        return
    taken = {1, 3, 4} if channels in (1, 3) else {channels}
    first = isinstance(image, Tensor) and channels != 3
    bands = next((axis for axis in ((0, -1) if first else (-1, 0)) if len(shape) == 3 and shape[axis] in taken), None)
    sides = [*shape] if bands is None else [*(shape[1:] if bands == 0 else shape[:-1])]
    _check_pixels(math.prod(sides[1:]), math.prod(sides[:1]))


def _check_pixels(width: int, height: int) -> None:
    """Refuse an image that announces more pixels than Pillow's limit, or none."""
    limit = Image.MAX_IMAGE_PIXELS
    if not width * height:
        raise UsageError(f"The image has {width} × {height} pixels, which is nothing to see; drop the row.")
    if limit is not None and width * height > limit:
        raise UsageError(
            f"The image has {width} × {height} pixels, more than the limit of {limit}: it may fill the memory. "
            f"{_LIMIT}."
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


def _decode(stored: Any) -> Image.Image:
    stored = {"bytes": stored} if isinstance(stored, bytes) else stored
    data, path = stored.get("bytes"), stored.get("path")
    if data is None and path is None:
        raise UsageError("The image has neither bytes nor a path. Drop the row, for example with dataset.select().")
    try:
        if data is None and os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
            raise OSError("no file")
        with bounded():
            image: Image.Image = Image.open(io.BytesIO(data) if data is not None else str(path))
        _check_pixels(*image.size)
        image.load()
        return image
    except HfprojError:
        raise
    except Exception as error:  # decoders fail in dozens of types
        known = not isinstance(error, UnidentifiedImageError)  # its message has an address in memory
        why = f"{type(error).__name__}: {one_line(error)}" if known else "it is of no format that Pillow knows"
        what = f"The image{'' if path is None else f' {path!s:.200}'} cannot be decoded ({why})"
        raise UsageError(f"{what}. {cure(error)}.") from error


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
        raise UsageError(
            f"{what}; an image of this type has values from 0 to {high}. Rescale them (x / 255), or store uint8."
        )


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
