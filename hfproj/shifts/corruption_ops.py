"""What the corruptions are made of: blurs, magnification, fractal clouds, warps, and a frost texture.

All work on one image, a numpy array [channels, height, width] in [0, 1], on one thread: the result depends on neither a
batch nor the number of threads. Randomness comes from `Draws`, whose numbers are a function of (seed, index, stream).

References:
    Fournier, Fussell, Carpenter, "Computer Rendering of Stochastic Models", Communications of the ACM 25(6), 1982
    (midpoint displacement, here in its diamond-square form).
    ImageMagick's ``-motion-blur`` (one-sided Gaussian along a line, whole pixels).
"""

import math
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int

from hfproj.data.augment import Number
from hfproj.data.philox import uniforms

_CALL = 64  # streams between two calls of one corruption: 16 million numbers


class Draws:
    """Random numbers of one image: each call returns the next ones, whatever was drawn for other images.

    Args:
        seed: Of the whole set.
        index: Number of the image in its data set.
        stream: First of the streams that this purpose owns (the ``view`` of `hfproj.data.philox`).

    Example:
        >>> one, same = Draws(0, 7, 100), Draws(0, 7, 100)
        >>> bool((one.uniform(2, 3) == same.uniform(2, 3)).all()), bool((one.uniform(2) == same.normal(2)).any())
        (True, False)
    """

    def __init__(self, seed: int, index: int, stream: int):
        self.seed, self.index, self.stream = seed, np.array([index]), stream

    def uniform(self, *shape: int) -> Float[np.ndarray, "..."]:
        """Return numbers in (0, 1), float64."""
        count = math.prod(shape)
        u = uniforms(count, seed=self.seed, epoch=np.zeros(1, dtype=np.int64), index=self.index, view=self.stream)
        self.stream += _CALL
        return u.reshape(shape)

    def normal(self, *shape: int) -> Float[np.ndarray, "..."]:
        """Return standard normal numbers by Box and Muller's formula, float32."""
        count = math.prod(shape)
        radius, angle = self.uniform(2, -(-count // 2))
        radius, angle = np.sqrt(-2 * np.log(radius)), 2 * np.pi * angle
        both = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))
        return both[:count].reshape(shape).astype(np.float32)


def poisson(mean: Int[np.ndarray, "*shape"], rate: Number, u: Float[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
    """Return Poisson counts of mean ``rate · mean / 255`` by inverting the distribution function at `u`.

    Args:
        mean: Grey values, 0 to 255.
        rate: Expected count of a white pixel.
        u: Uniform numbers.

    Example:
        >>> poisson(np.array([0, 255]), 3.0, np.array([0.9, 0.9])).tolist()
        [0, 5]
    """
    table, width = _poisson_table(rate)
    count = np.searchsorted(table, mean + u) - mean * width
    return np.minimum(count, width - 1)


@lru_cache(maxsize=16)
def _poisson_table(rate: Number) -> tuple[np.ndarray, int]:
    """Return the 256 distribution functions in a row, the one of grey value g raised by g: one sorted array."""
    width = math.ceil(rate + 10 * math.sqrt(rate) + 20)
    k = np.arange(width, dtype=np.float64)
    log_factorial = np.concatenate(([0.0], np.cumsum(np.log(k[1:]))))
    means = np.arange(256)[:, None] * (rate / 255)
    log_mean = np.log(np.maximum(means, 1e-300))
    probability = np.exp(k * log_mean - means - log_factorial)
    return (np.arange(256)[:, None] + np.minimum(np.cumsum(probability, axis=1), 1)).ravel(), width


def gaussian_blur(
    x: Float[np.ndarray, "channels height width"], sigma: Number, *, truncate: Number = 4.0
) -> Float[np.ndarray, "channels height width"]:
    """Blur with a normalised Gaussian cut off at ``truncate · sigma`` pixels; sigma 0 returns the image.

    Example:
        >>> x = np.zeros((1, 9, 9))
        >>> x[0, 4, 4] = 1
        >>> bool(np.isclose(gaussian_blur(x, 1.0).sum(), 1))
        True
    """
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return x
    weights = _gaussian_weights(sigma, radius)
    return _separable(np.pad(x, ((0, 0), (radius, radius), (radius, radius)), mode="edge"), weights)


def _gaussian_weights(sigma: Number, radius: int) -> np.ndarray:
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


def _separable(padded: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the part of a symmetric separable filter's result that needs no border."""
    radius = len(weights) // 2
    for axis in (1, 2):
        length = padded.shape[axis] - 2 * radius
        parts = [_cut(padded, axis, start, length) for start in range(2 * radius + 1)]
        out = parts[radius] * padded.dtype.type(weights[radius])
        for i in range(radius):
            out += (parts[i] + parts[-1 - i]) * padded.dtype.type(weights[i])
        padded = out
    return padded


def _cut(x: np.ndarray, axis: int, start: int, length: int) -> np.ndarray:
    return x[:, start : start + length] if axis == 1 else x[:, :, start : start + length]


def smooth(field: Float[np.ndarray, "height width"], sigma: Number, *, truncate: Number) -> np.ndarray:
    """Return `field` filtered with a wide Gaussian, mirrored at its borders, by Fourier transform along each axis.

    Example:
        >>> bool(np.allclose(smooth(np.ones((4, 6)), 50.0, truncate=3), 1))
        True
    """
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return field
    weights = _gaussian_weights(sigma, radius)
    for axis in (0, 1):
        period = 2 * field.shape[axis]
        kernel = np.zeros(period)
        np.add.at(kernel, np.arange(-radius, radius + 1) % period, weights)
        mirrored = np.concatenate((field, np.flip(field, axis)), axis)
        gain = np.fft.rfft(kernel).real
        spectrum = np.fft.rfft(mirrored, axis=axis) * (gain[:, None] if axis == 0 else gain)
        field = np.fft.irfft(spectrum, period, axis=axis).take(np.arange(period // 2), axis)
    return field


def disk_blur(
    x: Float[np.ndarray, "channels height width"], radius: Number, alias_sigma: Number
) -> Float[np.ndarray, "channels height width"]:
    """Return the mean over a disk whose edge is softened by a Gaussian of 3 taps (5 above a radius of 8).

    A row of the disk is a run of pixels, whose sum is a difference of two cumulative sums.
    """
    whole, soft = int(radius), 2 if radius > 8 else 1
    pad = whole + soft
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
    sums = np.zeros((*padded.shape[:2], padded.shape[2] + 1))
    np.cumsum(padded, axis=2, out=sums[:, :, 1:])
    height, width = x.shape[1] + 2 * soft, x.shape[2] + 2 * soft
    total, count = np.zeros((len(x), height, width)), 0
    for row in range(-whole, whole + 1):
        half = int(math.sqrt(radius**2 - row**2))
        part = sums[:, whole + row : whole + row + height]
        total += (
            part[:, :, whole + half + 1 : whole + half + 1 + width] - part[:, :, whole - half : whole - half + width]
        )
        count += 2 * half + 1
    return _separable((total / count).astype(x.dtype), _gaussian_weights(alias_sigma, soft))


def motion_blur(
    x: Float[np.ndarray, "channels height width"], radius: Number, sigma: Number, degrees: Number
) -> Float[np.ndarray, "channels height width"]:
    """Blur to one side along a line, with the weights exp(-i² / 2σ²), i = 0 … 2 · radius, at whole pixels.

    Example:
        >>> x = np.zeros((1, 3, 9))
        >>> x[0, 1, 4] = 1
        >>> np.flatnonzero(motion_blur(x, 1, 1.0, 0.0)[0, 1]).tolist()
        [2, 3, 4]
    """
    steps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).astype(x.dtype)
    angle = math.radians(degrees)
    right, down = (np.ceil(steps * part - 0.5).astype(int) for part in (math.cos(angle), math.sin(angle)))
    left_pad, top_pad = max(0, -right.min()), max(0, -down.min())
    padding = ((0, 0), (top_pad, max(0, down.max())), (left_pad, max(0, right.max())))
    padded = np.pad(x, padding, mode="edge")
    out = np.zeros_like(x)
    for weight, column, row in zip(weights, right + left_pad, down + top_pad):
        out += padded[:, row : row + x.shape[1], column : column + x.shape[2]] * weight
    return out


def zoom(x: Float[np.ndarray, "channels height width"], factor: Number) -> Float[np.ndarray, "channels height width"]:
    """Magnify about the centre, bilinearly, and keep the size.

    Example:
        >>> x = np.random.default_rng(0).random((3, 5, 5))
        >>> bool((zoom(x, 1.0) == x).all())
        True
    """
    for axis in (1, 2):
        length = x.shape[axis]
        middle = (length - 1) / 2
        position = (np.arange(length) - middle) / factor + middle
        low = np.clip(np.floor(position).astype(int), 0, max(length - 2, 0))
        weight = (position - low).astype(x.dtype)
        weight = weight[:, None] if axis == 1 else weight
        x = x.take(low, axis) * (1 - weight) + x.take(np.minimum(low + 1, length - 1), axis) * weight
    return x


def sample(
    x: Float[np.ndarray, "channels height width"],
    rows: Float[np.ndarray, "rows columns"],
    columns: Float[np.ndarray, "rows columns"],
) -> Float[np.ndarray, "channels rows columns"]:
    """Return the image at fractional positions, bilinearly, mirrored beyond its borders."""
    height, width = x.shape[1:]
    top, left = np.floor(rows), np.floor(columns)
    down, right = (rows - top).astype(x.dtype), (columns - left).astype(x.dtype)
    flat = x.reshape(len(x), -1)

    def at(row: int, column: int) -> np.ndarray:
        where = _mirror(top.astype(int) + row, height) * width + _mirror(left.astype(int) + column, width)
        return flat[:, where]

    upper = at(0, 0) * (1 - right) + at(0, 1) * right
    lower = at(1, 0) * (1 - right) + at(1, 1) * right
    return upper * (1 - down) + lower * down


def _mirror(i: np.ndarray, length: int) -> np.ndarray:
    period = max(2 * (length - 1), 1)
    i = i % period
    return np.minimum(i, period - i) if length > 1 else np.zeros_like(i)


def plasma(draws: Draws, side: int, decay: Number) -> Float[np.ndarray, "size size"]:
    """Return a fractal cloud in [0, 1] that repeats at its borders, by the diamond-square rule.

    The size is the power of two from `side` up. Every midpoint is the mean of its four neighbours plus w² · U(-1, 1);
    w is divided by `decay` from one scale to the next.
    """
    size = 1 << max(side - 1, 1).bit_length()
    u = draws.uniform(size, size) * 2 - 1  # a number for each point, taken when its turn comes
    cloud = np.zeros((size, size))
    step, amplitude = size, 1e4  # 100², as in the published code; only ratios matter
    while step >= 2:
        half = step // 2
        corners = cloud[::step, ::step]
        around = corners + np.roll(corners, -1, 0)
        around = around + np.roll(around, -1, 1)
        cloud[half::step, half::step] = around / 4 + amplitude * u[half::step, half::step]
        centres = cloud[half::step, half::step]
        top = centres + np.roll(centres, 1, 0) + corners + np.roll(corners, -1, 1)
        left = centres + np.roll(centres, 1, 1) + corners + np.roll(corners, -1, 0)
        cloud[::step, half::step] = top / 4 + amplitude * u[::step, half::step]
        cloud[half::step, ::step] = left / 4 + amplitude * u[half::step, ::step]
        step, amplitude = half, amplitude / decay**2
    cloud -= cloud.min()
    return cloud / cloud.max()


def copy_nearby(
    x: Float[np.ndarray, "channels height width"], u: Float[np.ndarray, "turns rows columns 2"], reach: int
) -> Float[np.ndarray, "channels height width"]:
    """Give each pixel, from the bottom right on, the colour of one -reach … reach - 1 rows and columns away.

    So for each turn. The published code writes this as a swap of two pixels, but its second half reads what the first
    has overwritten: what it does is copy.
    """
    height, width = x.shape[1:]
    rows, columns = np.arange(height - reach, reach, -1)[:, None], np.arange(width - reach, reach, -1)
    here = (rows * width + columns).ravel().tolist()
    order = list(range(height * width))
    for turn in np.floor(u * (2 * reach)).astype(int) - reach:
        there = (rows + turn[..., 0]) * width + columns + turn[..., 1]
        for a, b in zip(here, there.ravel().tolist()):  # one after the other: a colour may travel far
            order[a] = order[b]
    return x.reshape(len(x), -1)[:, order].reshape(x.shape)


def frost_texture(draws: Draws, height: int, width: int) -> Float[np.ndarray, "3 height width"]:
    """Return ice on a window pane: bluish, veined, in [0, 1], with a mean brightness near 0.6.

    Veins are where a fractal cloud passes its middle, on three scales; each vein fades to the sides.
    """
    side = max(height, width)
    grey = np.zeros((height, width))
    for decay, sharpness, weight in ((1.8, 30.0, 1.0), (1.5, 16.0, 0.8), (1.3, 8.0, 0.6)):
        cloud = plasma(draws, side, decay)
        cloud = cloud[:height, :width]
        distance = np.abs(cloud - np.median(cloud))
        grey += weight * np.exp(-sharpness * distance)
    grey = (grey - grey.mean()) / max(float(grey.std()), 1e-12)
    # The five published photographs have a brightness of 0.51 to 0.81 and a deviation of 0.07 to 0.17.
    grey = 0.62 + 0.14 * grey
    tint = np.array([0.87, 1.0, 1.07])[:, None, None]
    return np.clip(grey * tint, 0, 1).astype(np.float32)
