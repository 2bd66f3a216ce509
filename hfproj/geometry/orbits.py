"""Orbits: one image under many transforms, and what a head does to the cloud of its representations.

With f `[classes, objects, transforms, dim]`, rows of unit length unless told otherwise,

    spread      mean squared distance to the orbit's centroid, ‖f_t − f̄‖² summed over dimensions,
    D_intra     mean distance between two points of an orbit,
    D_inter     mean distance between the centroids of two classes,
    ratio       D_inter / D_intra,
    compression spread of h / spread of z: above 1 the head contracts orbits,
    curvature   mean ‖r_{t+1} − 2 r_t + r_{t−1}‖ along a sweep r_t of a transform's strength (not divided by Δt²),
    alignment gain   mean cosine to the untransformed image, in z minus in h,
    update ratio     η ‖∇w‖ / (‖w‖ + 1e-7), the relative step of a group of parameters; the timescale ratio is the
                     head's over the backbone's.

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
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hfproj.errors import UsageError
from hfproj.functional.rows import unit_rows
from hfproj.geometry._head import Map, as_input, check_rows, frozen

_UPDATE_EPS = 1e-7  # of the paper's code


class OrbitMetrics(NamedTuple):
    """Sizes of orbits.

    Attributes:
        spread: Mean over orbits of the mean squared distance to the centroid; 0 to 1 for unit rows.
        d_intra: Mean distance within an orbit; 0 to 2 for unit rows.
        d_inter: Mean distance of class centroids; NaN for one class.
        ratio: d_inter / d_intra; infinite where orbits are points, NaN where all is one point.
    """

    spread: float
    d_intra: float
    d_inter: float
    ratio: float


@torch.no_grad()
def orbit_metrics(f: Float[Tensor, "*classes objects transforms dim"], *, normalize: bool = True) -> OrbitMetrics:
    """Return the sizes of orbits of h or z.

    Args:
        f: Features of each object under each transform, by class; without the first dimension every object is a class.
        normalize: Scale every row to unit length first. On, as in the paper.

    Raises:
        UsageError: another shape, fewer than two transforms, or rows that are not finite.

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


def compression(
    h: Float[Tensor, "*classes objects transforms in_dim"],
    z: Float[Tensor, "... out_dim"],
    *,
    normalize: bool = True,
) -> float:
    """Return spread of h / spread of z: above 1 the head contracts orbits, below 1 it widens them.

    An untrained head gives a number of the order of 1: compare with that.

    Args:
        h: Orbits in the representation.
        z: The same in the projection.
        normalize: As for :func:`orbit_metrics`.

    Raises:
        UsageError: as :func:`orbit_metrics`, or other objects and transforms in z than in h.

    Example:
        >>> h = torch.tensor([[[1.0, 1.0], [1.0, -1.0]]])
        >>> round(compression(h, h * torch.tensor([1.0, 0.5])), 6)  # 1/2 against 1/5
        2.5
    """
    _check_same_orbits(h, z)
    a, b = (orbit_metrics(f, normalize=normalize).spread for f in (h, z))
    return a / b if b else (float("inf") if a else float("nan"))


@torch.no_grad()
def local_curvature(sweep: Float[Tensor, "*sweeps steps dim"], *, normalize: bool = True) -> float:
    """Return the mean length of second differences along sweeps of a transform's strength.

    Args:
        sweep: Features along each sweep, in equal steps. The value depends on the size of the steps (of its square).
        normalize: Scale every row to unit length first. On, as in the paper.

    Raises:
        UsageError: fewer than three steps, or rows that are not finite.

    Example:
        >>> local_curvature(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]), normalize=False) ** 2  # a corner
        2.0000000000000004
    """
    if sweep.ndim < 2 or sweep.shape[-2] < 3:
        raise UsageError(f"Expected sweeps of at least 3 steps, [sweeps, steps, dim], got {list(sweep.shape)}.")
    r = _rows(sweep, normalize)
    second = r[..., 2:, :] - 2 * r[..., 1:-1, :] + r[..., :-2, :]
    return float(torch.linalg.vector_norm(second, dim=-1).mean())


@torch.no_grad()
def alignment_gain(h: Float[Tensor, "*classes objects transforms in_dim"], z: Float[Tensor, "... out_dim"]) -> float:
    """Return the mean cosine to the first transform of each orbit, in z minus in h; −2 to 2.

    Args:
        h: Orbits in the representation; the first transform is the anchor, as a rule the untransformed image.
        z: The same in the projection.

    Raises:
        UsageError: as :func:`compression`.

    Example:
        >>> h = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> round(alignment_gain(h, torch.ones(1, 2, 3)), 9)  # orthogonal before, the same after
        1.0
    """
    _check_same_orbits(h, z)
    cosines = []
    for f in (h, z):
        f = _orbits(f, True)
        cosines.append((f[:, :, 1:] * f[:, :, :1]).sum(3).mean())
    return float(cosines[1] - cosines[0])


def head_orbits(
    head: Map, h: Float[Tensor, "*orbits in_dim"], *, normalize_input: bool = False
) -> Float[Tensor, "*orbits out_dim"]:
    """Return z of orbits or sweeps of h, in float64 and in eval mode, without gradient.

    Args:
        head: Any module or function from `[rows, in_dim]` to `[rows, out_dim]`.
        h: Representations of any leading shape.
        normalize_input: Scale h to unit length first, as the paper's script does (see the module for what is wrong with
            it).

    Raises:
        UsageError: a BatchNorm or Dropout in training mode, or rows that are not finite.

    Example:
        >>> h = torch.randn(2, 3, 12, 8)  # classes, objects, transforms
        >>> head_orbits(nn.Linear(8, 4), h).shape
        torch.Size([2, 3, 12, 4])
    """
    rows = h.flatten(0, -2)
    check_rows(rows)
    x = as_input(rows, torch.float64)
    with frozen(head, torch.float64) as run, torch.no_grad():
        z = run(unit_rows(x) if normalize_input else x)
    return z.unflatten(0, h.shape[:-1])


@torch.no_grad()
def update_ratio(parameters: nn.Module | Iterable[Tensor], learning_rate: float) -> float:
    """Return η ‖∇w‖ / (‖w‖ + 1e-7) over all parameters that have a gradient: their relative step under plain SGD.

    Call it after ``backward``. Optimizers with momentum or adaptive steps move parameters by other amounts.

    Args:
        parameters: A module, or tensors with their ``grad``.
        learning_rate: η.

    Raises:
        UsageError: no parameter has a gradient.

    Example:
        >>> w = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> (w.square().sum() / 2).backward()
        >>> round(update_ratio([w], 0.1), 6)
        0.1
    """
    tensors = list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)
    tensors = [tensor for tensor in tensors if tensor.grad is not None]
    if not tensors:
        raise UsageError("No parameter has a gradient: call this after backward, before gradients are cleared.")
    gradient = _norm([tensor.grad for tensor in tensors if tensor.grad is not None])
    return learning_rate * gradient / (_norm(tensors) + _UPDATE_EPS)


def timescale_ratio(
    head: nn.Module | Iterable[Tensor],
    backbone: nn.Module | Iterable[Tensor],
    learning_rate: float,
    *,
    backbone_learning_rate: float | None = None,
) -> float:
    """Return the update ratio of the head over that of the backbone: above 1 the head is the faster of the two.

    Args:
        head: The head, or its parameters.
        backbone: The backbone, or its parameters; those without a gradient do not count.
        learning_rate: η of the head.
        backbone_learning_rate: η of the backbone; None: the same.

    Raises:
        UsageError: as :func:`update_ratio`.

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
    if f.ndim not in (3, 4) or f.shape[-2] < 2:
        raise UsageError(
            "Expected orbits as [classes, objects, transforms, dim], or [objects, transforms, dim] where every object "
            f"is a class, with at least 2 transforms; got {list(f.shape)}."
        )
    f = _rows(f, normalize)
    return f.unsqueeze(1) if f.ndim == 3 else f


def _rows(f: Tensor, normalize: bool) -> Tensor:
    check_rows(f.flatten(0, -2), "the features")
    f = as_input(f, torch.float64)
    return unit_rows(f) if normalize else f


def _check_same_orbits(h: Tensor, z: Tensor) -> None:
    if h.shape[:-1] != z.shape[:-1]:
        raise UsageError(f"Expected the same orbits in h and z, got {list(h.shape)} and {list(z.shape)}.")


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.double().square().sum().cpu() for tensor in tensors]).sum().sqrt())
