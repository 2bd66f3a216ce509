"""Image operations on a batch in which each image has its own parameters; the semantics are torchvision's.

All take float images in [0, 1]; :mod:`hfproj.data.augment` says why they are not torchvision's own. An image's result
must not depend on the other images of its batch or on the number of threads, to the last bit. Hence only operations
that IEEE 754 rounds exactly are used (no fused multiply-add such as ``add(alpha=…)`` or ``lerp``, no matrix products),
sums run in a fixed order, and choices between algorithms look at one image only.

References:
    torchvision 0.29, ``transforms.v2.functional`` (which the tests compare with).

Deviations:
    The hue shift computes the same map from fewer operations, as chroma and sextant; results agree to rounding.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Images = Float[Tensor, "batch channels height width"]  # three, where an operation is one on colours
PerImage = Float[Tensor, " batch"]
Integers = Int[Tensor, " batch"]


def _column(value: PerImage) -> Float[Tensor, "batch 1 1 1"]:
    return value[:, None, None, None]


def sum_pixels(x: Float[Tensor, "batch height width"]) -> PerImage:
    """Return the sum over each image, by halving: the order of the additions depends on the image's size only."""
    x = x.flatten(1)
    while (n := x.shape[1]) > 1:
        half = n // 2
        folded = x[:, :half] + x[:, half : 2 * half]
        if n % 2:
            folded[:, 0] += x[:, -1]
        x = folded
    return x[:, 0]


def luminance(x: Images) -> Float[Tensor, "batch 1 height width"]:
    """Return the grey value, 0.2989 R + 0.587 G + 0.114 B."""
    red, green, blue = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    return (red * 0.2989).add_(green * 0.587).add_(blue * 0.114)


def grayscale(x: Images) -> Images:
    """Return the grey image, in three equal channels."""
    return luminance(x).expand_as(x)


def adjust_brightness(x: Images, factor: PerImage) -> Images:
    """Return ``clamp(factor · x)``."""
    return (x * _column(factor)).clamp_(0, 1)


def adjust_contrast(x: Images, factor: PerImage) -> Images:
    """Blend with the mean grey value: ``clamp(factor · x + (1 - factor) · mean)``; without colours, the mean value."""
    grey = luminance(x).squeeze(1) if x.shape[1] == 3 else x.flatten(1, 2)
    mean = sum_pixels(grey) / grey[0].numel()
    return (x * _column(factor)).add_(_column((1 - factor) * mean)).clamp_(0, 1)


def adjust_saturation(x: Images, factor: PerImage) -> Images:
    """Blend with the grey image: ``clamp(factor · x + (1 - factor) · grey)``."""
    return (x * _column(factor)).add_(luminance(x) * _column(1 - factor)).clamp_(0, 1)


def adjust_hue(x: Images, factor: PerImage) -> Images:
    """Turn the hue by `factor` (in turns, -0.5 to 0.5), keeping HSV's saturation and value.

    Example (a third of a turn makes green of red):
        >>> red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
        >>> adjust_hue(red, torch.tensor([1 / 3])).flatten().round(decimals=5).tolist()
        [0.0, 1.0, 0.0]
    """
    red, green, blue = x.unbind(1)
    top = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = top - low
    scale = chroma.clamp_min(1e-12)  # grey: 0 / 1e-12, and chroma 0 then ignores the hue
    r, g, b = (red - low).div_(scale), (green - low).div_(scale), (blue - low).div_(scale)
    # The hue in sixths of a turn is 1 + g - r where b is the smallest (b = 0), 3 + b - g where r is, else 5 + r - b.
    # `ceil` is 0 at 0 and 1 elsewhere: torch.where and comparisons take ten times as long on a CPU.
    no_red = (b - g).add_(3)
    sextant = (r - b).add_(5).sub_(no_red).mul_(r.ceil()).add_(no_red)
    no_blue = g.sub_(r).add_(1)
    sextant = sextant.sub_(no_blue).mul_(b.ceil_()).add_(no_blue)
    sextant = sextant.add_((6 * factor)[:, None, None])
    sextant = sextant.sub_((sextant / 6).floor_().mul_(6))  # [0, 6]
    out = torch.empty_like(x)
    out[:, 0] = (sextant - 3).abs_().sub_(1).clamp_(0, 1).mul_(chroma).add_(low)
    out[:, 1] = (sextant - 2).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma).add_(low)
    out[:, 2] = (sextant - 4).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma).add_(low)
    return out


def solarize(x: Images, threshold: float) -> Images:
    """Invert the values from `threshold` up."""
    return torch.where(x >= threshold, 1 - x, x)


def gaussian_blur(x: Images, sigma: PerImage, kernel_size: int) -> Images:
    """Blur with a normalised Gaussian of `kernel_size` taps (odd) and reflected borders."""
    radius = kernel_size // 2
    taps = torch.arange(-radius, radius + 1, dtype=torch.float64, device=sigma.device)
    weights = torch.exp(-(taps**2) / (2 * sigma.double()[:, None] ** 2))
    total = weights[:, 0].clone()
    for tap in range(1, kernel_size):
        total += weights[:, tap]
    weights = (weights / total[:, None]).to(x.dtype)
    out = torch.empty_like(x)
    for i in range(len(x)):  # one by one, so that an image stays in the cache over all taps
        out[i] = _blur_one(x[i], weights[i, radius:].tolist(), radius)
    return out


def _blur_one(
    x: Float[Tensor, "channels height width"], half: list[float], radius: int
) -> Float[Tensor, "channels height width"]:
    for dim, padding in ((1, (0, 0, radius, radius)), (2, (radius, radius, 0, 0))):
        length = x.shape[dim]
        padded = F.pad(x[None], padding, mode="reflect")[0]
        x = padded.narrow(dim, radius, length) * half[0]
        for tap in range(1, radius + 1):
            pair = padded.narrow(dim, radius - tap, length) + padded.narrow(dim, radius + tap, length)
            x.add_(pair.mul_(half[tap]))
    return x


def resized_crop(
    x: Images, top: Integers, left: Integers, height: Integers, width: Integers, size: int
) -> Float[Tensor, "batch channels {size} {size}"]:
    """Resize a rectangle of each image to a square, bilinearly with antialiasing.

    An image not larger than `size` is only magnified, where antialiasing does nothing, and goes with all others of
    its kind through one ``grid_sample``; larger ones go one by one.
    """
    if max(x.shape[-2:]) > size:
        out = x.new_empty(*x.shape[:2], size, size)
        for i, (y0, x0, h, w) in enumerate(torch.stack((top, left, height, width), 1).tolist()):
            part = x[i : i + 1, :, y0 : y0 + h, x0 : x0 + w]
            out[i] = F.interpolate(part, size=(size, size), mode="bilinear", antialias=True)[0]
        return out
    grid = x.new_empty(len(x), size, size, 2)
    grid[..., 0] = _positions(left, width, x.shape[-1], size)[:, None, :]
    grid[..., 1] = _positions(top, height, x.shape[-2], size)[:, :, None]
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _positions(start: Integers, length: Integers, full: int, size: int) -> Float[Tensor, "batch {size}"]:
    """Return where the output pixels lie in the input, in ``grid_sample``'s units (-1 to 1 over the whole input)."""
    steps = torch.arange(size, dtype=torch.float64, device=start.device) + 0.5
    inside = steps * (length.double()[:, None] / size) - 0.5
    last = length.double()[:, None] - 1
    pixel = torch.minimum(inside.clamp_min_(0), last) + start.double()[:, None]  # no pixel from outside the rectangle
    return ((2 * pixel + 1) / full - 1).float()


def rotate_translate(x: Images, degrees: PerImage, shift_x: PerImage, shift_y: PerImage) -> Images:
    """Rotate about the centre (counter-clockwise), then shift (in pixels, right and down); bilinear, outside is 0."""
    height, width = x.shape[-2:]
    angle = torch.deg2rad(degrees.double())[:, None, None]
    sides = (torch.arange(n, dtype=torch.float64, device=degrees.device) - (n - 1) / 2 for n in (height, width))
    down, across = sides
    rows = down[None, :, None] - shift_y.double()[:, None, None]
    columns = across[None, None] - shift_x.double()[:, None, None]
    grid = x.new_empty(len(x), height, width, 2)
    grid[..., 0] = (columns * angle.cos() - rows * angle.sin()) * (2 / width)
    grid[..., 1] = (columns * angle.sin() + rows * angle.cos()) * (2 / height)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
