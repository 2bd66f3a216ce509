"""Means and variances over the rows of all processes, exact for shards of different size."""

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj import distributed
from hfproj.errors import UsageError
from hfproj.typing import Scalar


def joint_moments(
    x: Float[Tensor, "groups rows dim"],
) -> tuple[Scalar, Float[Tensor, "groups dim"], Float[Tensor, "groups dim"]]:
    """Return the number of rows per group, the mean and the biased variance, over the rows of all processes.

    Example:
        >>> n, mean, var = joint_moments(torch.tensor([[[1.0], [3.0]]]))
        >>> n.item(), mean.item(), var.item()
        (2.0, 2.0, 1.0)
    """
    rows, dim = x.shape[1:]
    mean = x.sum(1) / max(rows, 1)  # a rank may hold no row
    squares = (x - mean.unsqueeze(1)).square().sum(1)
    shard = torch.cat([mean, squares, x.new_full((len(x), 1), rows)], dim=-1)
    shards = distributed.gather_rows(shard.unsqueeze(0), counts=[1] * distributed.world_size())
    means, squares, counts = shards.split([dim, dim, 1], dim=-1)
    n = counts[:, 0, 0].sum()
    mean = (counts * means).sum(0) / n
    return n, mean, (squares + counts * (means - mean).square()).sum(0) / n


def joint_centred(
    x: Float[Tensor, "groups rows dim"],
) -> tuple[Scalar, Float[Tensor, "groups rows dim"], Float[Tensor, "groups dim"]]:
    """Return the number of rows per group, the rows less their mean, and the biased variance, over all processes.

    For those who need the centred rows anyway: what :func:`joint_moments` centres by the local mean would be a copy.

    Example:
        >>> n, centred, var = joint_centred(torch.tensor([[[1.0], [3.0]]]))
        >>> n.item(), centred.flatten().tolist(), var.item()
        (2.0, [-1.0, 1.0], 1.0)
    """
    sums = torch.cat([x.sum(1), x.new_full((len(x), 1), x.shape[1])], dim=1)
    sums = distributed.all_reduce_sum(sums)
    n = sums[0, -1]
    centred = x - (sums[:, :-1] / n).unsqueeze(1)
    return n, centred, distributed.all_reduce_sum(centred.square().sum(1)) / n


def joint_mean(values: Float[Tensor, "*shape"]) -> Scalar:
    """Return the mean of all entries that all processes hold, not the mean of their means.

    Example:
        >>> joint_mean(torch.tensor([[1.0, 2.0], [3.0, 6.0]])).item()
        3.0
    """
    total, count = distributed.all_reduce_sum(torch.stack([values.sum(), values.new_full((), values.numel())]))
    return total / count


def check_rows(what: str, here: int, n: Scalar, *, fewest: int = 2) -> None:
    """Refuse a global batch that is too small for statistics.

    Args:
        what: What needs the rows, the first words of the message.
        here: Rows of this process: if they suffice, there is no wait for the device that holds `n`.
        n: Rows of all processes.
        fewest: How many it takes.

    Raises:
        UsageError: If there are fewer.
    """
    if here < fewest and int(n) < fewest:
        raise UsageError(
            f"{what} needs at least {fewest} images, got {int(n)} over all processes: use a larger batch, or drop the "
            "last incomplete batch."
        )
