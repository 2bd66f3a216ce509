"""Did training help, where there are no labels? Measures of h before and after, with intervals, and what they say.

Three measures ranked checkpoints as a k-NN with labels did, with an interval of the rank correlation that leaves out 0
(`RANKS`; `recipes/benchmarks/checkpoint_ranking.py`): the decay α-ReQ, the alignment of views and the uniformity. Rank,
and how many neighbours are left, did not. That was seen on one data set: a sign, and no proof.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj import diagnostics
from hfproj.checking import checked
from hfproj.errors import NotMeasurableError, UsageError
from hfproj.results import Change, Interval

Rows = Float[Tensor, "rows dim"]
OtherRows = Float[Tensor, "_ _"]
Views = Float[Tensor, "views images width"]
OtherViews = Float[Tensor, "_ _ _"]


class Ranks(NamedTuple):
    """Spearman's rank correlation of a measure of h, signed so that more is better, with the 20-NN accuracy of h."""

    correlation: float
    low: float
    high: float


# Of 24 checkpoints on digits; all three are better where they are lower.
RANKS = {
    "alpha_req": Ranks(0.85, 0.26, 0.96), "alignment": Ranks(0.73, 0.27, 0.88), "uniformity": Ranks(0.60, 0.01, 0.94),
}  # fmt: skip


@checked
def unlabelled_changes(
    before: Rows, after: OtherRows, *, views: tuple[Views, OtherViews] | None = None, level: float = 0.95,
    draws: int = 200, seed: int = 0,
) -> list[Change]:  # fmt: skip
    """Return what training did to α-ReQ and uniformity of h and, with `views`, to alignment: less of each is better.

    A measure that such features have no value of (α-ReQ of fewer than eight dimensions) is left out.

    The interval comes from `draws` random halves of the images, of which the difference is measured again, about the
    difference of all: of halves without replacement it varies as that of all images does from sample to sample (the
    delete-half jackknife). A bootstrap would draw images twice, which these measures take for collapse.

    Args:
        before: h of held-out images before training.
        after: h of the same images, in the same order, after it.
        views: h of two or more augmented views of images before and after training; at least four images.
        level: Probability that an interval is meant to cover.
        draws: Random halves.
        seed: Of the halves.

    Raises:
        UsageError: If rows do not pair or are fewer than 16, level is outside (0, 1), draws < 2, or as the measures.

    References:
        Shao, Wu 1989, Annals of Statistics 17(3), "A general theory for jackknife variance estimation".

    Example:
        >>> f = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> flatter = f / torch.linspace(1, 4, 8), f
        >>> [(change.name, change.sense) for change in unlabelled_changes(*flatter)]
        [('alpha_req', 'better'), ('uniformity', 'better')]
    """
    if before.shape[0] != after.shape[0] or len(before) < 16:
        raise UsageError(f"Expected the same images before and after, 16 or more, got {len(before)} and {len(after)}.")
    if not 0 < level < 1 or draws < 2:
        raise UsageError(f"Expected 0 < level < 1 and draws ≥ 2, got level={level} and draws={draws}.")
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        "alpha_req": (lambda f: diagnostics.alpha_req(f).alpha, before, after, 0),
        "uniformity": (diagnostics.uniformity, before, after, 0),
    }
    if views is not None:
        if views[0].shape[:2] != views[1].shape[:2] or views[0].shape[1] < 4:
            shapes = [tuple(v.shape[:2]) for v in views]
            raise UsageError(f"Expected the same views of 4 or more images before and after, got {shapes}.")
        pairs["alignment"] = (diagnostics.alignment, *views, 1)
    found = []
    for name, (measure, first, last, dim) in pairs.items():
        count, halves = first.shape[dim], []
        try:
            was, became = measure(first), measure(last)
            for _ in range(draws):
                rows = torch.randperm(count, generator=generator)[: count // 2].to(first.device)
                halves.append(measure(last.index_select(dim, rows)) - measure(first.index_select(dim, rows)))
        except NotMeasurableError:
            continue
        of_halves = torch.tensor(halves, dtype=torch.float64)
        ends = (of_halves - of_halves.mean()).quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]).double())
        low, high = (became - was + ends).tolist()
        found.append(Change(name, was, became, Interval(became - was, low, high)))
    return found
