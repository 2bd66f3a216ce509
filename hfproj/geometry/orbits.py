"""Orbits: one image under many transforms, and what a head does to the cloud of its representations.

References:
    Chaudhry 2026, The Geometry of Projection Heads, arXiv 2605.17180, and its code
    farischaudhry/projection-head-geometry (117231d): 5 classes × 3 images × 12 rotations; sweeps of 0 to 45° in 10.

Deviations:
    :func:`head_orbits` gives the head h as it is. The paper's orbit script scales h to unit length first, which the
    head never saw in training; with a BatchNorm in eval mode this alone makes an untrained head look as if it
    contracted orbits (`normalize_input=True` reproduces it). A notebook of theirs averages the variance over
    dimensions, so that ratios scale with out_dim/in_dim; here it is summed.
"""

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hfproj.checking import checked
from hfproj.errors import UsageError, check_type
from hfproj.functional.rows import unit_rows
from hfproj.geometry._head import Map, as_input, frozen, tensors_of

Weights: TypeAlias = nn.Module | Iterable[Tensor]

_UPDATE_EPS = 1e-7  # of the paper's code


class OrbitMetrics(NamedTuple):
    """Sizes of orbits.

    Attributes:
        spread: Mean squared distance to the orbit's centroid, summed over dimensions; 0 to 1 for unit rows.
        d_intra: Mean distance of two points of an orbit; 0 to 2 for unit rows.
        d_inter: Mean distance of the centroids of two classes; NaN for one class.
        ratio: d_inter / d_intra; infinite where orbits are points, NaN where all is one point.
    """

    spread: float
    d_intra: float
    d_inter: float
    ratio: float


@torch.no_grad()
@checked
def orbit_metrics(f: Float[Tensor, "*classes objects transforms dim"], *, normalize: bool = True) -> OrbitMetrics:
    """Return the sizes of orbits of h or z: features of each object under each transform, by class.

    Without the first dimension every object is a class. `normalize` scales rows to unit length first, as in the paper.

    Raises:
        UsageError: If the shape is another, or there are fewer than two transforms, or rows that are not finite.

    Example:
        >>> f = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]]])  # two objects, two transforms each
        >>> [round(value, 6) for value in orbit_metrics(f)]  # quarter circles: √2; centroids at ±(½, ½)
        [0.5, 1.414214, 1.414214, 1.0]
    """
    f = _orbits(f, normalize)
    classes, objects, transforms, _ = f.shape
    spread = (f - f.mean(2, keepdim=True)).square().sum(3).mean()
    within = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist")  # exact for points that are close
    d_intra = within.sum() / (classes * objects * transforms * (transforms - 1))
    centroids = f.mean((1, 2))
    d_inter = torch.pdist(centroids).mean() if classes > 1 else torch.tensor(torch.nan)
    return OrbitMetrics(float(spread), float(d_intra), float(d_inter), float(d_inter / d_intra))


@checked
def compression(
    h: Float[Tensor, "*classes objects transforms in_dim"], z: Float[Tensor, "... out_dim"], *, normalize: bool = True
) -> float:
    """Return spread of h / spread of z: above 1 the head contracts orbits, below 1 it widens them.

    `h` and `z` hold the same orbits in the representation and in the projection, as :func:`orbit_metrics` takes them;
    `normalize` scales rows to unit length first. An untrained head gives a number of the order of 1: compare with that.

    Raises:
        UsageError: If :func:`orbit_metrics` raises it, or z holds other objects and transforms than h.

    Example:
        >>> h = torch.tensor([[[1.0, 1.0], [1.0, -1.0]]])
        >>> round(compression(h, h * torch.tensor([1.0, 0.5])), 6)  # 1/2 against 1/5
        2.5
    """
    _check_same_orbits(h, z)
    a, b = (orbit_metrics(f, normalize=normalize).spread for f in (h, z))
    return a / b if b else (float("inf") if a else float("nan"))


@torch.no_grad()
@checked
def local_curvature(sweep: Float[Tensor, "*sweeps steps dim"], *, normalize: bool = True) -> float:
    """Return the mean ‖r_{t+1} − 2 r_t + r_{t−1}‖ along sweeps r_t of a transform's strength.

    `sweep` holds features in equal steps; the value goes with their square. `normalize` scales rows to unit length.

    Raises:
        UsageError: If there are fewer than three steps, or rows that are not finite.

    Example:
        >>> local_curvature(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]), normalize=False) ** 2  # a corner
        2.0000000000000004
    """
    check_type("sweeps", sweep, Tensor, "make a tensor of them: torch.stack(…)")
    if sweep.ndim < 2 or sweep.shape[-2] < 3:
        raise UsageError(f"Expected sweeps of at least 3 steps, [sweeps, steps, dim], got {list(sweep.shape)}.")
    r = _rows(sweep, normalize)
    second = r[..., 2:, :] - 2 * r[..., 1:-1, :] + r[..., :-2, :]
    return float(torch.linalg.vector_norm(second, dim=-1).mean())


@torch.no_grad()
@checked
def alignment_gain(h: Float[Tensor, "*classes objects transforms in_dim"], z: Float[Tensor, "... out_dim"]) -> float:
    """Return the mean cosine to the first transform of each orbit, in z minus in h; −2 to 2.

    The first transform is as a rule the untransformed image; `h` and `z` are those of :func:`compression`.

    Raises:
        UsageError: If :func:`compression` raises it.

    Example:
        >>> h = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> round(alignment_gain(h, torch.ones(1, 2, 3)), 9)  # orthogonal before, the same after
        1.0
    """
    _check_same_orbits(h, z)
    before, after = ((f[:, :, 1:] * f[:, :, :1]).sum(3).mean() for f in (_orbits(h, True), _orbits(z, True)))
    return float(after - before)


@checked
def head_orbits(
    head: Map, h: Float[Tensor, "*orbits in_dim"], *, normalize_input: bool = False
) -> Float[Tensor, "*orbits out_dim"]:
    """Return z of orbits or sweeps of h, representations of any leading shape, in float64, without gradient.

    `head` is any module or function from `[rows, in_dim]` to `[rows, out_dim]`. `normalize_input` scales h to unit
    length first, as the paper's script does (see the module).

    Raises:
        UsageError: If a BatchNorm or Dropout is in training mode, or rows are not finite.

    Example:
        >>> h = torch.randn(2, 3, 12, 8)  # classes, objects, transforms
        >>> head_orbits(nn.Linear(8, 4), h).shape
        torch.Size([2, 3, 12, 4])
    """
    x = as_input(h.flatten(0, -2), torch.float64)
    with frozen(head, torch.float64) as run, torch.no_grad():
        z = run(unit_rows(x) if normalize_input else x)
    return z.unflatten(0, h.shape[:-1])


@torch.no_grad()
@checked
def update_ratio(parameters: Weights, learning_rate: float) -> float:
    """Return η ‖∇w‖ / (‖w‖ + 1e-7) over all parameters that have a gradient: their relative step under plain SGD.

    `learning_rate` is η. Call it after ``backward``; `parameters` is a module, or tensors with their ``grad``.
    Optimizers with momentum or adaptive steps move parameters by other amounts.

    Raises:
        UsageError: If no parameter has a gradient.

    Example:
        >>> w = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> (w.square().sum() / 2).backward()
        >>> round(update_ratio([w], 0.1), 6)
        0.1
    """
    tensors = tensors_of(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)
    moved = [(tensor, tensor.grad) for tensor in tensors if tensor.grad is not None]
    if not moved:
        raise UsageError("No parameter has a gradient: call this after backward, before gradients are cleared.")
    weights, gradients = (_norm(tensors) for tensors in zip(*moved))
    return learning_rate * gradients / (weights + _UPDATE_EPS)


@checked
def timescale_ratio(
    head: Weights, backbone: Weights, learning_rate: float, *, backbone_learning_rate: float | None = None
) -> float:
    """Return the update ratio of the head over that of the backbone: above 1 the head is the faster of the two.

    Parameters without a gradient do not count. `learning_rate` is η of the head, and of the backbone unless
    `backbone_learning_rate` says otherwise.

    Raises:
        UsageError: If :func:`update_ratio` raises it.

    Example:
        >>> a, b = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([10.0]))
        >>> (a + b).backward()
        >>> round(timescale_ratio([a], [b], 0.1), 4)
        10.0
    """
    slow = update_ratio(backbone, learning_rate if backbone_learning_rate is None else backbone_learning_rate)
    fast = update_ratio(head, learning_rate)
    return fast / slow if slow else (float("inf") if fast else float("nan"))


def _orbits(f: Tensor, normalize: bool) -> Tensor:
    """Return `[classes, objects, transforms, dim]` in float64."""
    check_type("orbits", f, Tensor, "make a tensor of them: torch.stack(…)")
    if f.ndim not in (3, 4) or f.shape[-2] < 2:
        wanted = "[classes, objects, transforms, dim] or [objects, transforms, dim], with at least 2 transforms"
        raise UsageError(f"Expected orbits as {wanted}, got {list(f.shape)}.")
    f = _rows(f, normalize)
    return f.unsqueeze(1) if f.ndim == 3 else f


def _rows(f: Tensor, normalize: bool) -> Tensor:
    rows = as_input(f.flatten(0, -2), torch.float64, "features")
    return (unit_rows(rows) if normalize else rows).view(f.shape)


def _check_same_orbits(h: Tensor, z: Tensor) -> None:
    for name, f in (("h", h), ("z", z)):
        check_type(name, f, Tensor, "make a tensor of it: torch.tensor(…)")
    if h.shape[:-1] != z.shape[:-1]:
        raise UsageError(f"Expected the same orbits in h and z, got {list(h.shape)} and {list(z.shape)}.")


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([tensor.double().square().sum().cpu() for tensor in tensors]).sum().sqrt())
