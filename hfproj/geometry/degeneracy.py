"""Which directions a head forgets, and how much its metric varies from sample to sample.

With G = JᵀJ the pullback metric, vᵀGv = 0 says that the head annihilates the direction v. A head that is exactly
invariant to an augmentation does so for its tangents. For the Fisher information I_h and I_z that h and z carry, such
directions bound the rank: rank I_z ≤ rank I_h − dim V_aug; for a linear head, rank(WA) = rank A − dim(ker W ∩ range A).

References:
    Chaudhry 2026, The Geometry of Projection Heads, arXiv 2605.17180, Prop. 5.2, Thm 5.3 (from secondary sources).

Deviations:
    r, the overlap and the variation are our definitions. The bottom eigenspace has at least as many dimensions as the
    nullity of G: any part of a null space is as much at the bottom as any other.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hfproj.checking import checked
from hfproj.errors import UsageError
from hfproj.functional.feature_rows import check_features
from hfproj.geometry._head import Map
from hfproj.geometry.pullback import check_rtol, jacobian, jacobian_blocks
from hfproj.typing import Features

_STORED_ELEMENTS = 2**26  # of all G: 512 MiB of float64
_SHAPES = "[rows, in_dim] or [rows, tangents, in_dim]"


class Overlap(NamedTuple):
    """How far tangents lie in the bottom eigenspace of G, at each sample.

    Attributes:
        overlap: Mean squared cosine of the principal angles, 0 to 1; NaN where all tangents are 0.
        dim, chance: Dimension of the bottom eigenspace; ``dim / in_dim``, the overlap of random directions.
        cosines: Cosines of the principal angles, sorted descending; 0 beyond the dimension of the span.
    """

    overlap: Float[Tensor, " rows"]
    dim: Int[Tensor, " rows"]
    chance: Float[Tensor, " rows"]
    cosines: Float[Tensor, "rows tangents"]


@checked
def augmentation_tangents(
    h: Float[Tensor, "rows in_dim"], h_moved: Float[Tensor, "_ *tangents _"], eps: float
) -> Float[Tensor, "rows *tangents in_dim"]:
    """Return v = (h(T_ε x) − h(x)) / ε in float64: the directions in which augmentations move the representation.

    `h_moved` is h after the transform, `[rows, in_dim]`, or after several, `[rows, tangents, in_dim]`; `eps`, ε, is the
    strength of the transform in its own unit (degrees, fraction of brightness).

    Raises:
        UsageError: If ε is 0 or not finite, or shapes do not fit.

    Example:
        >>> h = torch.zeros(2, 3)
        >>> augmentation_tangents(h, h + torch.tensor([0.5, 0.0, 0.0]), 0.5)[0].tolist()
        [1.0, 0.0, 0.0]
    """
    if not eps or not abs(eps) < float("inf"):
        raise UsageError(f"Expected eps, the strength of the transform, to be a finite number other than 0, got {eps}.")
    if h_moved.ndim not in (2, 3) or h_moved.shape[0] != h.shape[0] or h_moved.shape[-1] != h.shape[-1]:
        wanted = f"h_moved of the same rows and width as h {list(h.shape)}, {_SHAPES}"
        raise UsageError(f"Expected {wanted}, got {list(h_moved.shape)}.")
    return (h_moved.double() - (h if h_moved.ndim == 2 else h.unsqueeze(1)).double()) / eps


@checked
def metric_degeneracy(
    head: Map, h: Features, v: Float[Tensor, "_ *tangents _"], *, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "rows *tangents"]:
    """Return r(v) = (vᵀGv / ‖v‖²) / (tr G / in_dim) at each row of `h`: 0 annihilated, 1 average.

    At least 0, NaN where v or G is 0.

    Args:
        head: Any module or function from h `[rows, in_dim]` to z `[rows, out_dim]`, as for `jacobian`.
        h: Representations `[rows, in_dim]`.
        v: Directions at the rows, `[rows, in_dim]` or `[rows, tangents, in_dim]`.
        dtype: Type of the computation.

    Raises:
        UsageError: If :func:`hfproj.geometry.jacobian` raises it, or `v` does not fit `h`.

    Example:
        >>> h, v = torch.randn(2, 3), torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        >>> metric_degeneracy(lambda h: h[:, :2], h, v).tolist()  # the last entry of h is dropped
        [1.5, 0.0]
    """
    v, single = _tangents(h, v)
    found, start = [], 0
    for J in jacobian_blocks(head, h, dtype=dtype):
        directions = v[start : start + len(J)].to(J)
        start += len(J)
        stretched = (J @ directions.mT).square().sum(1) / directions.square().sum(2)
        found.append(stretched / (J.square().sum((1, 2)) / J.shape[2]).unsqueeze(1))
    ratios = torch.cat(found)
    return ratios.squeeze(1) if single else ratios


@checked
def bottom_overlap(
    head: Map, h: Features, v: Float[Tensor, "_ *tangents _"], *, dim: int | None = None, rtol: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Overlap:  # fmt: skip
    """Return how far span(v_1 … v_q) lies in the bottom eigenspace of G, at each row of `h`.

    It is ‖EᵀV‖_F² / q, E an orthonormal basis of that space and V one of the span.

    Args:
        head: Any module or function from h `[rows, in_dim]` to z `[rows, out_dim]`, as for `jacobian`.
        h: Representations `[rows, in_dim]`.
        v: Directions at the rows, `[rows, in_dim]` or `[rows, tangents, in_dim]`.
        dim: Dimension of the bottom eigenspace (None: that of the span of the tangents); the nullity of G, if larger.
        rtol: What counts as 0 in that nullity, as for `metric_condition_number`.
        dtype: Type of the computation.

    Raises:
        UsageError: If `jacobian` raises it, `v` does not fit `h`, `dim` is not in 1…in_dim, or `rtol` not in [0, 1).

    Example:
        >>> h, v = torch.randn(1, 3), torch.tensor([[0.0, 1.0, 1.0]])
        >>> found = bottom_overlap(lambda h: h[:, :2], h, v)  # half of v is in the entry that is dropped
        >>> round(found.overlap.item(), 6), found.dim.item(), round(found.chance.item(), 6)
        (0.5, 1, 0.333333)
    """
    check_rtol(rtol)
    v, _ = _tangents(h, v)
    in_dim = h.shape[1]
    if dim is not None and not 1 <= dim <= in_dim:
        raise UsageError(f"Expected dim, of the bottom eigenspace, to be from 1 to in_dim={in_dim}, got {dim}.")
    rows, start = [], 0
    for block in jacobian_blocks(head, h, dtype=dtype):
        for J, directions in zip(block.double(), v[start : start + len(block)].to(block.device)):
            rows.append(_overlap(J, directions, dim, rtol, dtype))
        start += len(block)
    cosines = torch.stack([row[0] for row in rows])
    spans, dims = (torch.tensor([row[i] for row in rows], device=cosines.device) for i in (1, 2))
    return Overlap(cosines.square().sum(1) / spans, dims, dims / in_dim, cosines)


@checked
def metric_variation(head: Map, h: Features, *, dtype: torch.dtype = torch.float64) -> float:
    """Return how much G varies over the rows of `h`, relative to its norm: 0 for a linear head; NaN where G is 0.

    It is mean_{i<j} ‖G(h_i) − G(h_j)‖_F / mean_i ‖G(h_i)‖_F. Memory is rows · in_dim² up to 512 MiB; with more, rows ·
    out_dim · in_dim at a higher cost. A few dozen rows do. `head`, `h` and `dtype` are those of `jacobian`.

    Raises:
        UsageError: If :func:`hfproj.geometry.jacobian` raises it, or there are fewer than two rows.

    Example:
        >>> metric_variation(torch.nn.Linear(3, 2), torch.randn(5, 3))
        0.0
    """
    check_features(h, what="representations h")
    J = jacobian(head, h, dtype=dtype)
    gram = J @ J.mT if J.shape[1] <= J.shape[2] else J.mT @ J
    mean_norm = torch.linalg.matrix_norm(gram).mean()
    if len(J) * J.shape[2] ** 2 <= _STORED_ELEMENTS:
        G = (J.mT @ J).flatten(1)
        total = sum((G[i + 1 :] - G[i]).norm(dim=1).sum() for i in range(len(G) - 1))
    else:
        total = sum(_distances(J[i], J[i + 1 :]).sum() for i in range(len(J) - 1))
    return float(total / (len(J) * (len(J) - 1) / 2) / mean_norm)


@checked
def nullity(G: Float[Tensor, "*rows dim dim"], *, rtol: float | None = None) -> Int[Tensor, "*rows"]:
    """Return how many eigenvalues of G, positive semidefinite matrices such as metrics, are 0 up to a tolerance.

    Eigenvalues up to `rtol` times the largest count as 0; None: the width times the machine epsilon. They are the
    squares of what ``metric_condition_number`` compares, so that this sees a rank less well.

    Raises:
        UsageError: If `rtol` is outside [0, 1).

    Example:
        >>> nullity(torch.diag(torch.tensor([4.0, 1.0, 0.0, 0.0]))).item()
        2
    """
    check_rtol(rtol)
    values = torch.linalg.eigvalsh(G.double())
    rtol = G.shape[-1] * torch.finfo(G.dtype).eps if rtol is None else rtol
    return (values <= rtol * values[..., -1:].clamp_min(0)).sum(-1)


def _tangents(h: Tensor, v: Tensor) -> tuple[Tensor, bool]:
    """Return v as `[rows, tangents, in_dim]`, and whether there was one a row."""
    if v.ndim not in (2, 3) or len(v) != len(h) or v.shape[-1] != h.shape[-1]:
        wanted = f"directions v at each of the rows of h {list(h.shape)}, {_SHAPES}"
        raise UsageError(f"Expected {wanted}, got {list(v.shape)}.")
    check_features(v.flatten(0, -2), minimum=1, what="directions v")
    return (v.unsqueeze(1), True) if v.ndim == 2 else (v, False)


def _overlap(J: Tensor, v: Tensor, dim: int | None, rtol: float | None, dtype: torch.dtype) -> tuple[Tensor, int, int]:
    in_dim = J.shape[1]
    _, sigma, right = torch.linalg.svd(J, full_matrices=True)
    rtol = max(J.shape) * torch.finfo(dtype).eps if rtol is None else rtol
    null = in_dim - int((sigma > rtol * sigma[0]).sum())
    _, lengths, basis = torch.linalg.svd(v.double(), full_matrices=False)
    span = int((lengths > max(v.shape) * torch.finfo(v.dtype).eps * lengths[0]).sum())
    bottom = max(span if dim is None else dim, null, 1)
    cosines = J.new_zeros(len(v))
    if span:
        found = torch.linalg.svdvals(right[in_dim - bottom :] @ basis[:span].T)
        cosines[: len(found)] = found.clamp_max(1)
    return cosines, span, bottom


def _distances(J: Tensor, others: Tensor) -> Tensor:
    """Return ‖JᵀJ − KᵀK‖_F for each K of `others`, without forming either.

    With A = J − K and B = (J + K)/2 it is ‖AᵀB + BᵀA‖_F, whose square is 2⟨AAᵀ, BBᵀ⟩ + 2⟨ABᵀ, BAᵀ⟩: no cancellation
    where K is near J.
    """
    a, b = J - others, (J + others) / 2
    ab = a @ b.mT
    square = 2 * ((a @ a.mT) * (b @ b.mT)).sum((1, 2)) + 2 * (ab * ab.mT).sum((1, 2))
    return square.clamp_min(0).sqrt()
