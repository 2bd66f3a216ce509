"""Corrupted images, to test how robust a representation is: fifteen corruptions in five strengths.

Noise (Gaussian, shot, impulse), blur (defocus, glass, motion, zoom), weather (snow, frost, fog, brightness) and digital
damage (contrast, elastic, pixelate, JPEG). The parameters are those of CIFAR-10-C, Tiny-ImageNet-C and ImageNet-C, for
32, 64 and 224 pixels. An image takes those of the published side nearest in ratio to its shorter side, with the lengths
(radii, widths, shifts) scaled with the side; below 32 pixels lengths stay those of 32.

The result is a function of (image, name, severity, seed, index): the random numbers are the same at all severities, so
that a stronger corruption is the same one made stronger.

References:
    Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR
    2019, arXiv 1903.12261; its code, hendrycks/robustness, ``ImageNet-C/create_c``.

Deviations: error rates are near those on the published sets, not comparable with them. Frost is laid on from a computed
texture, not from photographs. Other random numbers. Images are not rounded to 8 bits between steps (but for pixelate,
JPEG and the means of shot noise), magnified about their exact centre, and mirrored alike at all borders of a warp.
ImageNet-C is stored as JPEG of quality 85, which adds a little damage to every corruption; here nothing is.
As published, the severities of elastic_transform, glass_blur and frost are no order of squared error.
"""

import io
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from PIL import Image
from torch import Tensor

from hfproj.checking import checked
from hfproj.data.augment import Number
from hfproj.data.images import EvalImages
from hfproj.errors import UsageError, unknown
from hfproj.shifts import corruption_ops as ops
from hfproj.shifts.corruption_ops import Draws
from hfproj.shifts.corruption_parameters import PARAMETERS, SIDES
from hfproj.shifts.image_map import ImageMap, to_grey_levels, to_pil
from hfproj.typing import Data, Interpolation

_STREAM, _STREAMS = 0x9000, 256  # of each corruption; the views of augmentations are numbered from 0


@checked
def list_corruptions() -> dict[str, str]:
    """Return every corruption with the line that describes it, in the order of the paper.

    Example:
        >>> list(list_corruptions())[:3], len(list_corruptions())
        (['gaussian_noise', 'shot_noise', 'impulse_noise'], 15)
    """
    return {name: line for name, (line, _) in PARAMETERS.items()}


@checked
def corrupt(
    images: Shaped[Tensor, "..."], name: str, severity: int, *, seed: int = 0, index: Sequence[int] | Tensor
) -> Shaped[Tensor, "..."]:
    """Return corrupted images, of the shape, dtype and device of `images`.

    The work is done on the CPU, image by image; a result does not depend on the others of its batch.

    Args:
        images: [batch, 3, height, width], uint8 or floating point in [0, 1] (before normalisation).
        name: One of `list_corruptions`.
        severity: 1 (weak) to 5 (strong).
        seed: Of the corrupted set.
        index: Number of each image in its data set, which decides its random numbers.

    Raises:
        UsageError: If the name is unknown, the severity is not one of 1 to 5, the images have another shape or type or
            are out of range, or there are more or fewer indices than images.

    Example:
        >>> x = torch.full((2, 3, 32, 32), 0.5)
        >>> noisy = corrupt(x, "gaussian_noise", 5, index=[10, 11])
        >>> alone = corrupt(x[1:], "gaussian_noise", 5, index=[11])
        >>> bool((noisy[1] == alone[0]).all()), round(float((noisy - x).std()), 2)
        (True, 0.1)
    """
    severity = _check(name, severity)
    integers = images.dtype == torch.uint8
    shaped = images.ndim == 4 and images.shape[1] == 3 and min(images.shape[2:]) > 0
    if not (shaped and (integers or images.is_floating_point())):
        raise UsageError(
            "Expected images [batch, 3, height, width], uint8 or floating point in [0, 1], got "
            f"{list(images.shape)} of {images.dtype}."
        )
    if not len(images):
        return images.clone()
    if not integers and not (images.min() >= 0 and images.max() <= 1):  # so written, NaN fails too
        raise UsageError(
            f"Expected floating-point images in [0, 1], got values from {float(images.min()):.3g} to "
            f"{float(images.max()):.3g}; corrupt the pixels before they are normalised."
        )
    try:
        indices = [operator.index(i) for i in index]
    except TypeError:
        raise UsageError(f"index must hold whole numbers, one for each image, got {index}.") from None
    if len(indices) != len(images):
        raise UsageError(f"Expected an index for each of {len(images)} images, got {len(indices)}.")
    batch = images.detach().cpu()
    pixels = (batch.float().div(255) if integers else batch.float()).numpy()
    out = np.stack([_corrupt_one(x, name, severity, seed, i) for x, i in zip(pixels, indices)])
    result = torch.from_numpy(to_grey_levels(out) if integers else out)
    return result.to(images.device, images.dtype)


class CorruptedDataset(ImageMap):
    """A data set with every image corrupted: what `hfproj.corrupt` does to image i with index i.

    The images come out as PIL images; other entries of the items are kept. It works where a data set does:
    `hfproj.evaluate`, `hfproj.extract_features`, or `hfproj.IndexedDataset` with `hfproj.EvalImages`.

    Args:
        dataset: As in `hfproj.IndexedDataset`; the items hold an image.
        name: One of `list_corruptions`.
        severity: 1 (weak) to 5 (strong).
        size: Side in pixels to which images are brought before they are corrupted (shorter side to `resize`, centre
            crop, as in `hfproj.EvalImages`): best the size that the model sees, as in the published sets (224 after
            ``resize=256`` for ImageNet). None: corrupted at their own size.
        resize: Length of the shorter side before the crop; None: `size`.
        interpolation: ``"bicubic"`` or ``"bilinear"``.
        seed: Of the corrupted set.
        image_column: Entry of an item that holds the image.

    Raises:
        UsageError: If the name is unknown, the severity is not one of 1 to 5, or the data set has no length or no
            indices; on access, if the item has no image.

    Example:
        >>> from hfproj.data import load_image_dataset
        >>> digits = CorruptedDataset(load_image_dataset("digits", split="test"), "fog", 3, size=32)
        >>> len(digits), digits[0]["image"].size, sorted(digits[0])
        (597, (32, 32), ['image', 'label'])
    """

    @checked
    def __init__(
        self,
        dataset: Data,
        name: str,
        severity: int,
        *,
        size: int | None = None,
        resize: int | None = None,
        interpolation: Interpolation = "bicubic",
        seed: int = 0,
        image_column: str = "image",
    ):
        super().__init__(dataset, image_column)
        self.name, self.severity, self.seed, self.size = name, _check(name, severity), seed, size
        if size is None and resize is not None:
            raise UsageError(f"resize={resize} needs the side of the crop after it: size=…")
        self._fit = size and EvalImages(
            size=size,
            mean=(0, 0, 0),
            std=(1, 1, 1),
            resize=resize,
            interpolation=interpolation,
            image_column=image_column,
            label_column=None,
        )

    def change(self, item: dict[str, Any], row: int, index: int) -> dict[str, Any]:
        """Return the item with its image corrupted."""
        if self._fit:
            image = self._fit([{self.image_column: item[self.image_column]}])["pixel_values"].clamp_(0, 1)
            image = image.mul_(255).round_().byte()
        else:
            image = self.read(item)[None]
        corrupted = corrupt(image, self.name, self.severity, seed=self.seed, index=[row])
        return {**item, self.image_column: to_pil(corrupted[0])}

    def __repr__(self) -> str:
        return f"CorruptedDataset({self.name!r}, severity={self.severity}, size={self.size}, seed={self.seed})"


def _check(name: str, severity: Any) -> int:
    if name not in PARAMETERS:
        raise unknown("corruption", name, PARAMETERS)
    if isinstance(severity, bool) or severity not in (1, 2, 3, 4, 5):
        raise UsageError(
            f"Expected severity to be 1 (weak) to 5 (strong), got {severity!r}; 0 would be the clean images."
        )
    return int(severity)


def _corrupt_one(x: np.ndarray, name: str, severity: int, seed: int, index: int) -> np.ndarray:
    side = max(min(x.shape[1:]), SIDES[0])
    nearest = min(range(len(SIDES)), key=lambda i: abs(math.log(side / SIDES[i])))
    parameters = PARAMETERS[name][1][nearest][severity - 1]
    draws = Draws(seed, index, _STREAM + _STREAMS * list(PARAMETERS).index(name))
    out = _OPERATIONS[name](x, draws, parameters, side / SIDES[nearest])
    return np.clip(out, 0, 1).astype(np.float32)


# Each takes the image, float32 [3, height, width], its random numbers, the parameters and the factor on lengths.


def _gaussian_noise(x: np.ndarray, draws: Draws, deviation: Number, scale: Number) -> np.ndarray:
    return x + np.float32(deviation) * draws.normal(*x.shape)


def _shot_noise(x: np.ndarray, draws: Draws, photons: Number, scale: Number) -> np.ndarray:
    return ops.poisson(to_grey_levels(x).astype(np.int64), photons, draws.uniform(*x.shape)) / photons


def _impulse_noise(x: np.ndarray, draws: Draws, fraction: Number, scale: Number) -> np.ndarray:
    u = draws.uniform(*x.shape)
    return np.where(u < fraction, u < fraction / 2, x)


def _defocus_blur(x: np.ndarray, draws: Draws, c: tuple, scale: Number) -> np.ndarray:
    return ops.disk_blur(x, c[0] * scale, c[1] * scale)


def _glass_blur(x: np.ndarray, draws: Draws, c: tuple, scale: Number) -> np.ndarray:
    sigma, reach, turns = c[0] * scale, max(1, round(c[1] * scale)), c[2]
    rows, columns = (max(side - 2 * reach, 0) for side in x.shape[1:])
    u = draws.uniform(turns, rows, columns, 2)
    return ops.gaussian_blur(ops.copy_nearby(ops.gaussian_blur(x, sigma), u, reach), sigma)


def _motion_blur(x: np.ndarray, draws: Draws, c: tuple, scale: Number) -> np.ndarray:
    return ops.motion_blur(x, c[0] * scale, c[1] * scale, 90 * float(draws.uniform(1)[0]) - 45)


def _zoom_blur(x: np.ndarray, draws: Draws, c: tuple, scale: Number) -> np.ndarray:
    factors = np.arange(1, *c)  # its rounding decides whether the end belongs to it, as in the published code
    total = x.astype(np.float64)
    for factor in factors:
        total += ops.zoom(x, float(factor))
    return total / (len(factors) + 1)


def _snow(x: np.ndarray, draws: Draws, c: tuple, scale: Number) -> np.ndarray:
    mean, deviation, size, threshold, radius, sigma, keep = c
    flakes = ops.zoom(mean + deviation * draws.normal(1, *x.shape[1:]), max(size * scale, 1))
    flakes = np.where(flakes < threshold, 0, np.clip(flakes, 0, 1))
    flakes = ops.motion_blur(flakes, radius * scale, sigma * scale, -135 + 90 * float(draws.uniform(1)[0]))
    grey = 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]
    x = keep * x + (1 - keep) * np.maximum(x, 1.5 * grey + 0.5)
    return x + flakes + np.flip(flakes, (1, 2))


def _frost(x: np.ndarray, draws: Draws, c: tuple, scale: Number) -> np.ndarray:
    return c[0] * x + c[1] * ops.frost_texture(draws, *x.shape[1:])


def _fog(x: np.ndarray, draws: Draws, c: tuple, scale: Number) -> np.ndarray:
    weight, decay = c
    height, width = x.shape[1:]
    cloud = ops.plasma(draws, max(height, width), decay)[:height, :width]
    brightest = float(x.max())
    return (x + weight * cloud) * (brightest / (brightest + weight))


def _brightness(x: np.ndarray, draws: Draws, added: Number, scale: Number) -> np.ndarray:
    value = x.max(axis=0)  # HSV's; with hue and saturation kept, a colour is proportional to it
    brighter = np.minimum(value + np.float32(added), 1)
    return np.where(value > 0, x * (brighter / np.maximum(value, 1e-12)), brighter)


def _contrast(x: np.ndarray, draws: Draws, factor: Number, scale: Number) -> np.ndarray:
    mean = x.mean(axis=(1, 2), keepdims=True, dtype=np.float64)
    return (x - mean) * factor + mean


def _elastic_transform(x: np.ndarray, draws: Draws, c: tuple, scale: Number) -> np.ndarray:
    height, width = x.shape[1:]
    side = min(height, width)
    shift, sigma, affine = (length * side for length in c)
    u = 2 * draws.uniform(3, 2) - 1
    field = 2 * draws.uniform(2, height, width) - 1
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    middle, arm = np.array([height // 2, width // 2]), side // 3
    corners = middle + arm * np.array([[1, 1], [-1, 1], [-1, -1]])
    if arm:  # three points move; where a pixel of the result comes from is the inverse map
        moved = np.column_stack((corners + affine * u, np.ones(3)))
        back = np.linalg.solve(moved, corners)
        where = [rows * back[0, k] + columns * back[1, k] + back[2, k] for k in (0, 1)]
        x = ops.sample(x, *where)
    if not shift:
        return x
    # A field smoothed over more pixels is weaker in proportion: `scale` keeps the shift a fraction of the side.
    down, right = (shift * scale * ops.smooth(part, sigma, truncate=3) for part in field)
    return ops.sample(x, rows + down, columns + right)


def _pixelate(x: np.ndarray, draws: Draws, fraction: Number, scale: Number) -> np.ndarray:
    image = to_pil(torch.from_numpy(to_grey_levels(x)))
    small = max(int(image.width * fraction), 1), max(int(image.height * fraction), 1)
    return _from_pil(image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX))


def _jpeg_compression(x: np.ndarray, draws: Draws, quality: int, scale: Number) -> np.ndarray:
    buffer = io.BytesIO()
    to_pil(torch.from_numpy(to_grey_levels(x))).save(buffer, "jpeg", quality=quality)
    return _from_pil(Image.open(buffer))


def _from_pil(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255


_OPERATIONS: dict[str, Callable[[np.ndarray, Draws, Any, float], np.ndarray]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
