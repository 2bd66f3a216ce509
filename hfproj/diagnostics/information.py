"""Entropy and mutual information of features from the similarities of their rows, and the bounds built on them.

With K the matrix of cosines of rows, S_α the matrix entropy of order α, I_α the matrix mutual information (definitions:
:mod:`hfproj.functional.distributions`), Y a downstream label and R the target of self-supervision, Y → x → h → z → R,

    I(Y; h) ≥ I(h; R) − I(h; z) + I(R; Y)        (theorem 3.1)
    I(Y; h) ≤ I(Y; z) − I(h; z) + H(h)           (theorem 3.2, H(h) the Shannon entropy)

and the estimates I(h; z) ≈ I_α(h; z), H(h) ≈ S_α(K_h), I(h; R) ≈ −L, L the NT-Xent loss of h.

References:
    Ouyang et al. 2025, arXiv 2503.00507, and its code PKU-ML/Projector_Theory (5c2e7d1) ``methods/simclr.py``.

Deviations:
    Eigenvalues come from the singular values of unit rows, so that orders below 1 see no rounding. Rows of zeros count
    as one direction of their own.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.checking import checked
from hfproj.diagnostics._factors import RowFactor, row_factor
from hfproj.diagnostics.views import check_views
from hfproj.errors import UsageError
from hfproj.functional import distributions as functional
from hfproj.functional.contrastive import tiled_nt_xent
from hfproj.functional.feature_rows import check_features, double_rows
from hfproj.typing import Features


@torch.no_grad()
@checked
def matrix_entropy(f: Features, *, alpha: float = 2.0) -> float:
    """Return S_α of the rows' cosines in nats, between 0 (all parallel) and log(min(rows, dim)).

    `alpha` is α > 0; below 1 the rounding of zero eigenvalues shows. Does not centre. exp(S_1) is the effective
    rank, on eigenvalues, of the unit rows.

    Raises:
        UsageError: If `f` has fewer than two rows, or rows that are not finite, or alpha is not positive.

    Example:
        >>> round(math.exp(matrix_entropy(torch.eye(8))), 6)
        8.0
    """
    functional.check_alpha(alpha)
    return entropy(row_factor(f, normalize=True), alpha)


@torch.no_grad()
@checked
def matrix_mutual_information(
    h: Float[Tensor, "rows in_dim"], z: Float[Tensor, "_ out_dim"], *, alpha: float = 2.0
) -> float:
    """Return I_α(h; z) in nats, at most min(S_α(K_h), S_α(K_z)) ≤ log(rows).

    Not bounded below by 0 unless α = 1. Does not centre. Memory is O(rows²): take some thousand rows. It compares all
    pairs and so can't be streamed. `h` and `z` are features of the same rows, of any dimensions; `alpha` is α > 0.

    Raises:
        UsageError: If h or z has fewer than two or non-finite rows, numbers of rows differ, or alpha is not positive.

    Example:
        >>> h = torch.eye(4)
        >>> round(math.exp(matrix_mutual_information(h, h)), 6)
        4.0
    """
    check_features(h, what="features h")
    check_features(z, what="features z")
    rows = [double_rows(f, normalize=True) for f in (h, z)]
    return functional.matrix_mutual_information(*rows, alpha=alpha).item()


class InformationBounds(NamedTuple):
    """What Ouyang et al. log about a head.

    Attributes:
        mutual_information: I_α(h; z), the estimate of I(h; z).
        entropy: S_α(K_h), the estimate of H(h).
        target_information: −L, the estimate of I(h; R).
        lower: −L − I_α(h; z): the lower bound of I(Y; h) without the I(R; Y) that the head does not move.
        upper: S_α(K_h) − I_α(h; z): the upper bound of I(Y; h) without the I(Y; z) that needs labels.
    """

    mutual_information: float
    entropy: float
    target_information: float
    lower: float
    upper: float


@torch.no_grad()
@checked
def information_bounds(
    h: Float[Tensor, "views batch in_dim"], z: Float[Tensor, "_ _ out_dim"], *, alpha: float = 2.0,
    temperature: float = 0.2,
) -> InformationBounds:  # fmt: skip
    """Return the estimates and bounds of how much h tells about a downstream label, in nats.

    They compare checkpoints or heads on the same rows and are no bounds in themselves: both leave out a term that is
    unknown without labels; −L is negative and lacks the logarithm of the number of negatives that an InfoNCE bound has;
    the matrix entropy is not the Shannon entropy, and theorem 3.2 holds for discrete variables. Does not centre.

    Args:
        h: Representations `[views, batch, in_dim]`.
        z: Projections of the same rows, `[views, batch, out_dim]`.
        alpha: α, positive.
        temperature: That of the NT-Xent loss of h, positive; 0.2 is that of the paper's SimCLR.

    Raises:
        UsageError: If there are fewer than two views or samples, or rows that are not finite, or h and z hold different
            numbers of views or samples, or alpha or temperature is not positive.

    Example:
        >>> h = torch.eye(4).expand(2, 4, 4)  # two equal views of four orthogonal rows
        >>> bounds = information_bounds(h, h)
        >>> round(math.exp(bounds.entropy), 6), abs(round(bounds.upper, 6))
        (4.0, 0.0)
    """
    if not 0 < temperature < math.inf:
        raise UsageError(f"Expected temperature to be a positive number, got {temperature}.")
    check_views(h)
    if h.shape[:2] != z.shape[:2]:
        raise UsageError(f"h and z must hold the same views and samples, got {list(h.shape)} and {list(z.shape)}.")
    information = matrix_mutual_information(h.flatten(0, 1), z.flatten(0, 1), alpha=alpha)
    whole = matrix_entropy(h.flatten(0, 1), alpha=alpha)
    unit = torch.stack([double_rows(view, normalize=True) for view in h])
    target = -tiled_nt_xent(unit, temperature=temperature, gather=False)[0].item()
    return InformationBounds(information, whole, target, target - information, whole - information)


def entropy(rows: RowFactor, alpha: float) -> float:
    """Return S_α of unit rows."""
    sigma = rows.resolved(center=False) if alpha < 1 else rows.singular_values(center=False)  # orders below 1 raise it
    values = sigma.square() / rows.size
    zeros = 1 - float(values.sum())  # the fraction of rows without a direction
    if zeros > 0.5 / rows.size:
        values = torch.cat([values, values.new_tensor([zeros])])
    values = values[values > 0]
    if alpha == 1:
        return torch.special.entr(values).sum().item()
    return values.pow(alpha).sum().log().item() / (1 - alpha)
