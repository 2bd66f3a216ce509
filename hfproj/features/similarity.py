"""How much two representations of the same rows have in common, whatever their widths: linear CKA, mutual neighbours.

With A `[n, d]` and B `[n, e]`, columns centred, K = AAᵀ and L = BBᵀ,

    CKA = HSIC(K, L)/√(HSIC(K, K) HSIC(L, L)),    HSIC(K, L) ∝ tr(KL) = ‖AᵀB‖_F²,

or with the unbiased HSIC, K̃ and L̃ without their diagonals,

    HSIC₁(K, L) ∝ tr(K̃L̃) + 1ᵀK̃1 · 1ᵀL̃1/((n − 1)(n − 2)) − 2 · 1ᵀK̃L̃1/(n − 2).

Mutual k-NN, with N_k(i) the k nearest other rows by cosine in either space:

    m = (1/n) Σ_i |N_k^a(i) ∩ N_k^b(i)|/k,    k/(n − 1) by chance.

References:
    Kornblith et al. 2019, arXiv 1905.00414 (linear CKA). Song et al. 2012, "Feature Selection via Dependence
    Maximization", JMLR 13, Eq. 4 (HSIC₁); Nguyen, Raghu, Kornblith 2021, arXiv 2010.15327 (CKA with it). Huh et al.
    2024, arXiv 2405.07987, "The Platonic Representation Hypothesis", appendix A (mutual k-NN; k = 10 there).

Deviations:
    No Gram matrix is held: tr(KL) comes from d × e products, or from blocks of K and L where rows are few, and the
    other terms of HSIC₁ from norms of rows and sums of columns. CKA with a representation without variance is 0.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.checking import checked
from hfproj.errors import UsageError
from hfproj.features.neighbours import NeighbourBank, check_k
from hfproj.functional.feature_rows import check_features, double
from hfproj.functional.rows import full_precision

_ELEMENTS = 2**22  # entries of float64 blocks: 32 MiB


@torch.no_grad()
@checked
def linear_cka(a: Float[Tensor, "rows dim"], b: Float[Tensor, "_ other_dim"], *, unbiased: bool = False) -> float:
    """Return the linear CKA of two representations of the same rows, in [0, 1]; 1 if they are equal.

    Invariant to rotations, offsets and isotropic scales of either. The biased value grows with the dimensions when rows
    are few (near 1 for independent features of more dimensions than rows); the unbiased one of independent features is
    0 on average, and may be negative. Computed in float64; memory beyond float64 copies is the smaller of
    dim · other_dim and blocks of rows.

    Args:
        a: One representation, such as h before training.
        b: The other, of the same rows in the same order.
        unbiased: HSIC₁ in place of HSIC; at least four rows.

    Raises:
        UsageError: If the numbers of rows differ or are below two (unbiased: four), or if rows are not finite.

    Example:
        >>> a = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
        >>> round(linear_cka(a, 3 * a.flip(1) - 1), 6)
        1.0
    """
    _check_rows(a, b, "CKA", 4 if unbiased else 2)
    a, b = _centred(a), _centred(b.to(a.device))
    with full_precision(a):
        hsic = _unbiased_hsic if unbiased else _energy
        joint, own = hsic(a, b), (hsic(a, a), hsic(b, b))
    if min(own) <= 0:
        return 0.0
    return max(-1.0, min(1.0, joint / math.sqrt(own[0]) / math.sqrt(own[1])))  # outside by rounding


@torch.no_grad()
@checked
def mutual_knn(a: Float[Tensor, "rows dim"], b: Float[Tensor, "_ other_dim"], *, k: int = 10) -> float:
    """Return the mean fraction of a row's k nearest others that are the same in both representations, in [0, 1].

    Invariant to rotations of either and to scales of its rows. Of equally near rows the first count, so that collapsed
    representations all agree with each other.

    Args:
        a: One representation.
        b: The other, of the same rows in the same order.
        k: Neighbours; capped at rows − 1. 10 as in Huh et al.

    Raises:
        UsageError: If the numbers of rows differ or are below two, if rows are not finite, or if k < 1.

    Example:
        >>> a = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
        >>> mutual_knn(a, 3 * a.flip(1))
        1.0
    """
    _check_rows(a, b, "Mutual k-NN", 2)
    k = min(check_k(k), len(a) - 1)
    common = 0
    for (_, near_a), (_, near_b) in zip(NeighbourBank(a).chunks_within(k), NeighbourBank(b).chunks_within(k)):
        both = torch.cat([near_a.rows, near_b.rows], 1).sort(1).values  # a row that is in both stands there twice
        common += int((both[:, 1:] == both[:, :-1]).sum())
    return common / (k * len(a))


def _check_rows(a: Tensor, b: Tensor, what: str, minimum: int) -> None:
    check_features(a, minimum=minimum, what="features a")
    check_features(b, minimum=minimum, what="features b")
    if len(a) != len(b):
        raise UsageError(f"{what} compares the same rows in two representations, got {len(a)} of a and {len(b)} of b.")


def _centred(f: Tensor) -> Tensor:
    """Return a float64 copy with columns of mean 0, scaled to a largest entry of 1; exactly 0 if all rows are equal."""
    f = double(f.detach())
    f = f - f[0]  # the mean of equal numbers is not always that number
    f -= f.mean(0)
    largest = f.abs().amax()
    return f / largest if largest > 0 else f


def _energy(a: Tensor, b: Tensor) -> float:
    """Return ‖AᵀB‖_F² = tr(AAᵀBBᵀ), by whichever of the two products is cheaper."""
    rows, dims = len(a), (a.shape[1], b.shape[1])
    if dims[0] * dims[1] <= rows * sum(dims):
        return (a.T @ b).square().sum().item()
    step = max(1, _ELEMENTS // rows)
    return sum(((x @ a.T) * (y @ b.T)).sum().item() for x, y in zip(a.split(step), b.split(step)))


def _unbiased_hsic(a: Tensor, b: Tensor) -> float:
    n = len(a)
    # The three sums, without a Gram matrix: K̃1 = A(Aᵀ1) − diag(K), and Aᵀ1 is 0 but for rounding.
    diagonals = [f.square().sum(1) for f in (a, b)]
    sums = [f @ f.sum(0) - diagonal for f, diagonal in zip((a, b), diagonals)]
    trace = _energy(a, b) - (diagonals[0] @ diagonals[1]).item()
    total = (sums[0].sum() * sums[1].sum()).item()
    value = trace + total / ((n - 1) * (n - 2)) - 2 * (sums[0] @ sums[1]).item() / (n - 2)
    # What is left of cancelling terms is 0: simplices, such as one-hot rows, have nothing off the diagonal.
    scale = (diagonals[0].sum() * diagonals[1].sum()).item()
    return value if abs(value) > 1e-14 * scale else 0.0
