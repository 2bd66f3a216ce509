"""Means, variances, covariances and cosines over the rows of all processes, exact for shards of different size.

With rows centred by the mean of the global batch and the covariance C = ZᵀZ/(N−1), VICReg's terms are

    v(z) = mean_j max(0, target − √(C_jj + ε)),        c(z) = (1/k) Σ_{i≠j} C_ij²,

and Σ_ij (aᵀb)_ij² = ⟨aaᵀ, bbᵀ⟩: with fewer rows than dimensions the N×N Gram matrices are cheaper than the k×k product.
Sum and gradient come out of the same products, and neither matrix is kept for the backward. Over processes the smaller
thing travels too: rows are gathered in the first case, the k×k product is reduced in the second.

References:
    Bardes, Ponce, LeCun 2022, "VICReg", arXiv 2105.04906, eqs. 1 to 4; facebookresearch/vicreg ``main_vicreg.py``.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.distributed import all_reduce_sum, gather_rows, row_counts, world_size
from hfproj.errors import UsageError
from hfproj.functional.rows import at_least_float32, full_precision, unit_rows
from hfproj.typing import Features, Scalar, Views

_Groups = Float[Tensor, "groups rows dim"]


def joint_moments(x: _Groups) -> tuple[Scalar, Float[Tensor, "groups dim"], Float[Tensor, "groups dim"]]:
    """Return the number of rows per group, the mean and the biased variance, over the rows of all processes.

    Example:
        >>> [moment.item() for moment in joint_moments(torch.tensor([[[1.0], [3.0]]]))]
        [2.0, 2.0, 1.0]
    """
    rows, dim = x.shape[1:]
    mean = x.sum(1) / max(rows, 1)  # a rank may hold no row
    squares = (x - mean.unsqueeze(1)).square().sum(1)
    shard = torch.cat([mean, squares, x.new_full((len(x), 1), rows)], dim=-1)
    shards = gather_rows(shard.unsqueeze(0), counts=[1] * world_size())
    means, squares, counts = shards.split([dim, dim, 1], dim=-1)
    n = counts[:, 0, 0].sum()
    mean = (counts * means).sum(0) / n
    return n, mean, (squares + counts * (means - mean).square()).sum(0) / n


def joint_centred(x: _Groups) -> tuple[Scalar, _Groups, Float[Tensor, "groups dim"]]:
    """Return the number of rows per group, the rows less their mean, and the biased variance, over all processes.

    Example:
        >>> joint_centred(torch.tensor([[[1.0], [3.0]]]))[1].flatten().tolist()
        [-1.0, 1.0]
    """
    sums = all_reduce_sum(torch.cat([x.sum(1), x.new_full((len(x), 1), x.shape[1])], dim=1))
    n = sums[0, -1]
    centred = x - (sums[:, :-1] / n).unsqueeze(1)
    return n, centred, all_reduce_sum(centred.square().sum(1)) / n


def joint_mean(values: Float[Tensor, "*shape"]) -> Scalar:
    """Return the mean of all entries that all processes hold, not the mean of their means.

    Example:
        >>> joint_mean(torch.tensor([[1.0, 2.0], [3.0, 6.0]])).item()
        3.0
    """
    total, count = all_reduce_sum(torch.stack([values.sum(), values.new_full((), values.numel())]))
    return total / count


def check_rows(what: str, here: int, n: Scalar, *, fewest: int = 2) -> None:
    """Raise a UsageError, which begins with `what` needs the rows, if all processes have fewer than `fewest` (`n`).

    If the rows `here`, of this process, suffice, there is no wait for the device that holds `n`.
    """
    if here < fewest and int(n) < fewest:
        hint = "use a larger batch, or drop the last incomplete batch"
        raise UsageError(f"{what} needs at least {fewest} images, got {int(n)} over all processes: {hint}.")


@torch.no_grad()
def joint_cosine(queries: Views, keys: Views) -> Scalar:
    """Return the mean cosine of rows that belong together over all processes, without a gradient.

    Example:
        >>> joint_cosine(torch.ones(2, 3, 4), -torch.ones(2, 3, 4))
        tensor(-1.)
    """
    rows = unit_rows(queries)
    return joint_mean((rows * unit_rows(keys).to(rows.dtype)).sum(-1))


def variance_hinge(z: Features, *, eps: float = 1e-4, target: float = 1.0) -> Scalar:
    """Return how far the standard deviations of the columns fall short of `target`, on average.

    At a collapsed batch the value is target − √ε (``eps`` is added to the variance) and the gradient is zero.

    Raises:
        UsageError: If there are fewer than two rows over all processes.

    Example:
        >>> round(variance_hinge(torch.ones(4, 8)).item(), 4)  # 1 - sqrt(1e-4)
        0.99
    """
    n, _, variance = _centred(z)
    return hinge(variance[0] * (n / (n - 1)), eps=eps, target=target)


def covariance_penalty(z: Features) -> Scalar:
    """Return the sum of squared covariances between different columns, per column.

    Raises:
        UsageError: If there are fewer than two rows over all processes.

    Example:
        >>> covariance_penalty(torch.tensor([[1.0], [0.0], [-1.0]]).expand(3, 3)).round()  # 3·2 covariances of 1
        tensor(2.)
    """
    n, centred, _ = _centred(z)
    return off_diagonal_energy(centred[0]) / ((n - 1).square() * z.shape[1])


def hinge(variance: Float[Tensor, "*dims"], *, eps: float, target: float = 1.0) -> Scalar:
    """Return the mean of max(0, target − √(variance + ε)); :func:`variance_hinge` of known variances.

    Example:
        >>> hinge(torch.tensor([0.25, 4.0]), eps=0.0).item()
        0.25
    """
    return (target - (variance + eps).sqrt()).relu().mean()


def _centred(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    moments = joint_centred(at_least_float32(z).unsqueeze(0))
    check_rows("The covariance of dimensions", len(z), moments[0])
    return moments


def off_diagonal_energy(a: Features, b: Features | None = None) -> Scalar:
    """Return Σ_{i≠j} (aᵀb)_ij² over the rows of all processes, by N×N or dim×dim matrices.

    Differentiable any number of times. ``a`` and ``b`` (None: `a` itself) are rows of this process, as many and as
    wide, in float32 or float64.

    Example:
        >>> off_diagonal_energy(torch.tensor([[1.0, 1.0], [-1.0, -1.0]])).item()
        8.0
    """
    counts = row_counts(len(a), a.device)
    # Multiplications with the gradient: 2n²d against 2nd² for one matrix, 4n²d against 3nd² for two.
    by_rows = sum(counts) < a.shape[1] * (1 if b is None else 0.75)
    return _OffDiagonalEnergy.apply(a, b, by_rows, counts)[0]


def _energy_and_gradients(
    a: Tensor, b: Tensor | None, by_rows: bool, counts: list[int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the energy and half of its gradients in the local rows of a and b (of `a` if it is both: a quarter)."""
    with full_precision(a):
        if by_rows:
            diagonal = all_reduce_sum((a * (a if b is None else b)).sum(0))
            own = diagonal.square().sum()
            all_a = gather_rows(a, counts=counts)
            gram_a = a @ all_a.T
            if b is None:
                return all_reduce_sum(gram_a.square().sum()) - own, gram_a @ all_a - a * diagonal, None
            all_b = gather_rows(b, counts=counts)
            gram_b = b @ all_b.T
            value = all_reduce_sum((gram_a * gram_b).sum()) - own
            return value, gram_b @ all_a - b * diagonal, gram_a @ all_b - a * diagonal
        product = all_reduce_sum(a.T @ (a if b is None else b))
        # Zeroed here, not subtracted from the sum: of columns of very different size nothing would be left of the rest.
        product.diagonal().zero_()
        # By columns: float32 loses digits in a norm over 10^7 entries, and the square would be another such matrix.
        value = torch.linalg.vector_norm(product, dim=0).square().sum()
        if b is None:
            return value, a @ product, None
        return value, b @ product.T, a @ product


class _OffDiagonalEnergy(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor | None, by_rows: bool, counts: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        return _energy_and_gradients(a, b, by_rows, counts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        a, b, ctx.by_rows, ctx.counts = inputs
        ctx.mark_non_differentiable(*(half for half in output[1:] if half is not None))
        ctx.save_for_backward(a, b, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor | None, None, None]:
        a, b, *gradients = ctx.saved_tensors
        if torch.is_grad_enabled():  # what was saved has no derivative
            gradients = _energy_and_gradients(a, b, ctx.by_rows, ctx.counts)[1:]
        grad_a, grad_b = gradients
        grad = all_reduce_sum(grad) * (4 if b is None else 2)
        return grad * grad_a, None if grad_b is None else grad * grad_b, None, None
