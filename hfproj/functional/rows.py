"""Rows of unit length, cosines between them, and views of the global batch.

What most contrastive objectives are made of is to find one's own row among others. With unit rows q̂ of queries and k̂
of keys, key i belonging to query i, and a temperature τ,

    ℓ_i = −⟨q̂_i, k̂_i⟩/τ + log Σ_j exp(⟨q̂_i, k̂_j⟩/τ).
"""

import contextlib

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hfproj import distributed
from hfproj.errors import UsageError
from hfproj.typing import HasGenerator, Scalar, Views


def at_least_float32(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Return `x` itself if it is float32 or float64, and a copy in float32 if it is of 16 bits.

    Example:
        >>> at_least_float32(torch.zeros(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Return a context in which autocast leaves matrix products alone: similarities and covariances need float32.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), full_precision(torch.eye(4)):
        ...     (torch.eye(4) @ torch.eye(4)).dtype
        torch.float32
    """
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def without_steep_rows(
    x: Float[Tensor, "*shape"], *, eps: float = 1e-8, dim: int = -1, dtype: torch.dtype | None = None
) -> Float[Tensor, "*shape"]:
    """Return `x` without the gradient of rows that are too short to have one, where they are divided by their length.

    It has the inverse length as a factor: of rows shorter than `eps`, and where it ends in float16 (`dtype`, that of
    `x` by default) than 1e-3, it would be nothing but noise, or infinite. Rows lie along `dim`.

    Example:
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
        >>> torch.autograd.grad(without_steep_rows(x).sum(), x)[0].tolist()
        [[1.0, 1.0], [0.0, 0.0]]
    """
    if not x.requires_grad:
        return x
    shortest = max(eps, 64 / torch.finfo(dtype or x.dtype).max)
    return torch.where(x.detach().abs().amax(dim, keepdim=True) <= shortest, x.detach(), x)


def unit_rows(x: Float[Tensor, "*rows dim"], *, eps: float = 1e-8) -> Float[Tensor, "*rows dim"]:
    """Divide each row by its Euclidean norm, in float32 or better.

    A row no longer than `eps` has no direction: it becomes zero, and so does its gradient (which 1/norm would blow up).

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    x = at_least_float32(without_steep_rows(x) if x.dtype == torch.float16 else x)
    # Divided by a constant first, which changes neither value nor derivatives: squares of long rows overflow float32,
    # and the cube of their inverse norm, a factor of the gradient, underflows at a length of 1e13 already.
    scale = x.detach().abs().amax(-1, keepdim=True).clamp_min(eps)
    x, shortest = x / scale, (eps / scale) ** 2
    square = x.square().sum(-1, keepdim=True)  # unlike the norm it has all derivatives at zero
    return x * torch.where(square > shortest, square.clamp_min(shortest).rsqrt(), 0)


def gather_views(z: Views) -> Views:
    """Return ``[views, batch, dim]`` with the images of all processes, differentiable (`distributed.gather_rows`).

    Example:
        >>> gather_views(torch.zeros(2, 4, 8)).shape
        torch.Size([2, 4, 8])
    """
    if distributed.world_size() == 1:
        return z
    return distributed.gather_rows(z.transpose(0, 1).contiguous()).transpose(0, 1)


def generator_of(step: HasGenerator | None) -> torch.Generator | None:
    """Return a step's generator, or None (torch's own) without one; raise a UsageError then on several processes."""
    if step is None and distributed.world_size() > 1:
        hint = "pass step=Step.at(seed, global_step, epoch), the same on all"
        raise UsageError(f"Random choices must agree over processes: {hint}.")
    return None if step is None else step.generator


def view_pairs(views: int, keys: int | None = None, *, ordered: bool = False) -> list[tuple[int, int]]:
    """Return the pairs (query view, key view) of different views, if `ordered` only those whose query comes first.

    Keys are the first `keys` views (None: all): with multi-crop these are the global ones, the others queries only.

    Example:
        >>> view_pairs(3, 2)
        [(1, 0), (2, 0), (0, 1), (2, 1)]
    """
    pairs = [(query, key) for key in range(views if keys is None else keys) for query in range(views)]
    return [(query, key) for query, key in pairs if query < key or (query > key and not ordered)]


def cosine_logits(
    queries: Float[Tensor, "rows dim"], keys: Float[Tensor, "others dim"], *, temperature: float
) -> Float[Tensor, "rows others"]:
    """Return cosines over the temperature, in float32 or better; a zero row has cosine 0 with everything.

    Example:
        >>> cosine_logits(torch.tensor([[2.0, 0.0]]), torch.eye(2), temperature=0.5)
        tensor([[2., 0.]])
    """
    rows, others = unit_rows(queries), unit_rows(keys)
    dtype = torch.promote_types(rows.dtype, others.dtype)
    with full_precision(rows):
        return rows.to(dtype) @ others.to(dtype).T / temperature


def match_rows(
    queries: Float[Tensor, "rows dim"], keys: Float[Tensor, "others dim"], *, temperature: float
) -> Float[Tensor, " rows"]:
    """Return ℓ: −log of the softmax probability with which query i picks key i among all keys, at temperature τ.

    Keys are one row for each query in the same order, then any number of negatives for all.

    Example:
        >>> match_rows(torch.ones(3, 4), torch.ones(3, 4), temperature=0.1).exp().round().tolist()
        [3.0, 3.0, 3.0]
    """
    logits = cosine_logits(queries, keys, temperature=temperature)
    return logits.logsumexp(1) - logits.diagonal()


@torch.no_grad()
def positive_cosine(z: Views) -> Scalar:
    """Return the mean cosine of two views of the same image over images and pairs of views, without a gradient.

    Example:
        >>> positive_cosine(torch.eye(2).expand(3, 2, 2))
        tensor(1.)
    """
    rows = unit_rows(z)
    return (rows * (rows.sum(0) - rows)).sum(-1).mean() / (len(rows) - 1)


def unit_rows_own_first(x: Float[Tensor, "rows dim"]) -> Float[Tensor, "all_rows dim"]:
    """Return unit rows of all processes, those of this one first: keys for :func:`match_rows` with its own queries.

    Example:
        >>> unit_rows_own_first(2 * torch.eye(2)).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    counts = distributed.row_counts(len(x), x.device)
    return distributed.gather_rows(unit_rows(x), counts=counts).roll(-sum(counts[: distributed.rank()]), 0)


def cross_view_cosines(p: Views, target: Float[Tensor, "target_views batch dim"]) -> Float[Tensor, "pairs batch"]:
    """Return the cosine of each image's view v in `p` with its view i in `target`, for all pairs with v ≠ i.

    ``p`` has all views, ``target`` the first of them in the same order. Zero rows have cosine zero with everything.

    Example:
        >>> cross_view_cosines(torch.ones(2, 1, 4), -torch.ones(2, 1, 4)).tolist()
        [[-1.0], [-1.0]]
    """
    rows, others = unit_rows(p), unit_rows(target)
    dtype = torch.promote_types(rows.dtype, others.dtype)
    with full_precision(p):
        cosines = torch.einsum("vnk,tnk->vtn", rows.to(dtype), others.to(dtype))
    same = torch.eye(len(p), len(target), dtype=torch.bool, device=p.device)
    return cosines[~same]
