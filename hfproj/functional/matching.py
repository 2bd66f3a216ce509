"""Finding one's own row among others: what most contrastive objectives are made of.

With unit rows q̂ of queries and k̂ of keys, key i belonging to query i, and a temperature τ,

    ℓ_i = −⟨q̂_i, k̂_i⟩/τ + log Σ_j exp(⟨q̂_i, k̂_j⟩/τ).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj import distributed
from hfproj.functional.moments import joint_mean
from hfproj.functional.rows import full_precision, unit_rows
from hfproj.typing import Scalar, Views


def view_pairs(views: int, keys: int | None = None) -> list[tuple[int, int]]:
    """Return the pairs (query view, key view) of different views, for keys of the first `keys` views (None: of all).

    With multi-crop the first views are the global ones; the others are queries only.

    Example:
        >>> view_pairs(3, 2)
        [(1, 0), (2, 0), (0, 1), (2, 1)]
    """
    return [(query, key) for key in range(views if keys is None else keys) for query in range(views) if query != key]


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
        >>> losses = match_rows(torch.ones(3, 4), torch.ones(3, 4), temperature=0.1)
        >>> torch.allclose(losses, torch.tensor(3.0).log())
        True
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


@torch.no_grad()
def joint_cosine(queries: Views, keys: Views) -> Scalar:
    """Return the mean cosine of rows that belong together over all processes, without a gradient.

    Example:
        >>> joint_cosine(torch.ones(2, 3, 4), -torch.ones(2, 3, 4))
        tensor(-1.)
    """
    rows = unit_rows(queries)
    return joint_mean((rows * unit_rows(keys).to(rows.dtype)).sum(-1))


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
        >>> p = torch.eye(4).view(2, 2, 4)
        >>> cross_view_cosines(p, p.flip(0)).tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    rows, others = unit_rows(p), unit_rows(target)
    dtype = torch.promote_types(rows.dtype, others.dtype)
    with full_precision(p):
        cosines = torch.einsum("vnk,tnk->vtn", rows.to(dtype), others.to(dtype))
    same = torch.eye(len(p), len(target), dtype=torch.bool, device=p.device)
    return cosines[~same]
