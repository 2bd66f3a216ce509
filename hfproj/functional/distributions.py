"""How evenly rows are spread: on the sphere by distances, moments or entropy, in space by their distance from N(0, I).

**Uniformity** of unit rows ẑ, 0 at collapse to a point (its largest value), −2t where all rows are orthogonal to each
other, near −t·2 + 2t²/D for rows spread evenly over a sphere in many dimensions D:

    U = log mean_{i<j} exp(−t ‖ẑ_i − ẑ_j‖²).

**Wasserstein distance** of unit rows ẑ ``[n, D]`` from a uniform distribution on the sphere, both taken as Gaussians:
with mean μ and covariance Σ (with 1/n) of the rows, against N(0, I/D),

    W2 = √( ‖μ‖² + 1 + tr Σ − (2/√D) tr Σ^{1/2} )  ∈  [0, √2].

Since ‖μ‖² + tr Σ = 1, it is √(2 − (2/√D) tr Σ^{1/2}): √2 at collapse to a point, 0 for isotropic rows, √(2 − 2√(r/D))
for rows that are isotropic in r of D dimensions; duplicated rows change nothing.

**SIGReg** measures how far rows are from N(0, I) along random directions, by their characteristic functions. With unit
directions a_j, y_ij = ⟨z_i, a_j⟩, φ(t) = exp(−t²/2) and frequencies t_l on [0, t_max],

    T_j = N Σ_l w_l φ(t_l) [ (mean_i cos(t_l y_ij) − φ(t_l))² + (mean_i sin(t_l y_ij))² ],    SIGReg(z) = mean_j T_j,

the Epps-Pulley statistic by the trapezoid rule, weights w_l doubled for the negative frequencies. Its expectation under
N(0, I) is Σ_l w_l φ(t_l) (1 − φ(t_l)²), whatever N. At z = 0 the gradient is zero, but the point is a saddle.

**Entropy** and mutual information of order α from the similarities of unit rows f̂ ``[n, dim]``, K = f̂ f̂ᵀ (K/n has
trace 1):

    S_α(K) = log tr[(K/n)^α] / (1 − α),    S_1(K) = −tr[(K/n) log(K/n)],    S_2(K) = −log ‖K/n‖_F²,
    I_α(h; z) = S_α(K_h) + S_α(K_z) − S_α(K_h ∘ K_z),    ∘ the product entry by entry.

S lies in [0, log n] and exp(S) counts the directions that rows take up. I_α ≤ min(S_α(K_h), S_α(K_z)); I_1 ≥ 0, but for
other α, 2 included, I_α can be negative.

References:
    Uniformity: Wang & Isola 2020, arXiv 2005.10242, eq. 3; lightly-ai/lightly (e8d317fc) ``loss/hypersphere_loss.py``.
    Wasserstein: Fang et al. 2024, arXiv 2403.00642; statsle/WassersteinSSL ``code/BarlowTwins/metric.py``.
    SIGReg: Balestriero, LeCun 2025, "LeJEPA", arXiv 2511.08544; rbalestr-lab/lejepa
    ``lejepa/univariate/epps_pulley.py``, ``lejepa/multivariate/slicing.py``, ``MINIMAL.md``.
    Entropy: Ouyang et al. 2025, arXiv 2503.00507, and its code PKU-ML/Projector_Theory (5c2e7d1) ``methods/simclr.py``;
    Sanchez Giraldo, Rao, Principe 2015, arXiv 1211.2459 (the definitions).

Deviations:
    Uniformity: distances come from products of rows, in blocks, instead of ``torch.pdist``.
    Wasserstein: eigenvalues by ``eigvalsh`` (official: ``eig``), of the Gram matrix of centred rows where there are
    fewer rows than dimensions (the same but for zeros). SIGReg: over processes, N and the means are those of the global
    batch, also where shards differ in size.
    Entropy: eigenvalues are clamped, so that 0·log 0 = 0; the official code takes the logarithm of zero singular values
    (NaN) at α = 1. Rows without a direction (zeros) count as one direction: all rows zero is a collapsed batch.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.distributed import all_reduce_sum
from hfproj.errors import UsageError
from hfproj.functional.matrices import eigvalsh
from hfproj.functional.rows import at_least_float32, full_precision, unit_rows
from hfproj.typing import Features, Scalar

_Directions = Float[Tensor, "dim slices"]


def uniformity(f: Features, *, kernel_scale: float = 2.0, block_rows: int = 1024) -> Scalar:
    """Return U, differentiable.

    Args:
        f: At least two rows of any length, which it normalises; a zero row stays zero.
        kernel_scale: t. 2: Wang & Isola, and the usual metric; 1: lightly's loss.
        block_rows: Rows whose distances to all others are held at once; memory O(block_rows · rows) without a gradient.

    Raises:
        UsageError: If there are fewer than two rows.

    Example:
        >>> uniformity(torch.eye(8)).item()
        -4.0
    """
    count = len(f)
    if count < 2:
        raise UsageError(f"Uniformity compares rows with each other and needs at least 2, got {count}.")
    rows = unit_rows(f)
    square = rows.square().sum(1)
    with full_precision(rows):
        blocks = []
        for start in range(0, count - 1, block_rows):
            block, later = slice(start, min(start + block_rows, count - 1)), slice(start + 1, None)
            distance = square[block, None] + square[later] - 2 * rows[block] @ rows[later].T
            pairs = torch.ones_like(distance, dtype=torch.bool).triu()  # each pair once, no row with itself
            blocks.append((-kernel_scale * distance[pairs]).logsumexp(0))
    return torch.stack(blocks).logsumexp(0) - math.log(count * (count - 1) / 2)


def wasserstein_to_uniform(z: Features, *, floor: float = 1e-12) -> Scalar:
    """Return W2, between 0 (uniform) and √2 (collapsed to a point); differentiable.

    Args:
        z: Rows of the global batch, which it normalises, then centres. A row of zeros stays zero.
        floor: Eigenvalues of Σ below it count as `floor`: 1e-12 as a loss, whose gradient would be infinite at a rank
            deficiency (shifts the value at collapse by about √D·1e-6/√2); 0 as a metric, without a gradient.

    Example:
        >>> round(wasserstein_to_uniform(torch.ones(8, 4)).item() ** 2, 3)
        2.0
    """
    with full_precision(z):
        u = unit_rows(z)
        rows, dim = u.shape
        mean = u.mean(0)
        centred = u - mean
        covariance = (centred.mT @ centred if dim <= rows else centred @ centred.mT) / rows
        root_trace = eigvalsh(covariance).clamp_min(floor).sqrt().sum()
        square = mean.square().sum() + 1 + centred.square().sum() / rows - 2 / dim**0.5 * root_trace
        # Rounding can bring 0 below 0; the clamp also keeps the root's gradient finite there.
        return square.clamp_min(torch.finfo(u.dtype).eps ** 2).sqrt()


def sigreg(z: Features, *, directions: _Directions, knots: int = 17, t_max: float = 3.0) -> Scalar:
    """Return SIGReg of the rows of all processes: about 1.05 under N(0, I), 0.402·N if all rows are zero.

    Args:
        z: Rows of this process.
        directions: Unit columns, the same on all processes: :func:`random_directions`, drawn anew in each step.
        knots: Number of frequencies from 0 to `t_max`, both included.
        t_max: Highest frequency.

    Raises:
        UsageError: If there are fewer than two knots or `t_max` is not positive.

    Example:
        >>> round(sigreg(torch.zeros(10, 4), directions=torch.eye(4)).item(), 2)
        4.02
    """
    check_knots(knots, t_max)
    z = at_least_float32(z)
    t = torch.linspace(0, t_max, knots, dtype=z.dtype, device=z.device)
    gaussian = (-t.square() / 2).exp()
    weight = torch.full_like(t, 2 * t_max / (knots - 1))
    weight[[0, -1]] /= 2
    with full_precision(z):
        angle = (z @ directions.to(z)).unsqueeze(-1) * t
    sums = torch.stack([angle.cos().sum(0), angle.sin().sum(0)]).flatten()
    *sums, n = all_reduce_sum(torch.cat([sums, sums.new_full((1,), len(z))])).split([sums.numel(), 1])
    cosine, sine = (sums[0] / n).view(2, -1, knots)
    distance = (cosine - gaussian).square() + sine.square()
    return (n * (distance * (weight * gaussian)).sum(-1).mean()).squeeze()  # no product that autocast would round


def check_knots(knots: int, t_max: float) -> None:
    """Raise a UsageError if SIGReg has fewer than two knots, or `t_max` is not positive."""
    if knots < 2 or not 0 < t_max < math.inf:
        raise UsageError(f"SIGReg needs at least 2 knots and a positive t_max, got knots={knots}, t_max={t_max}.")


def random_directions(z: Features, slices: int, *, generator: torch.Generator | None = None) -> _Directions:
    """Draw unit columns, uniform on the sphere, for rows with the width, device and type of `z`.

    The generator must be in the same state on all processes; None is torch's own.

    Raises:
        UsageError: If `slices` is below 1.

    Example:
        >>> random_directions(torch.zeros(2, 8), 5).square().sum().round()
        tensor(5.)
    """
    if slices < 1:
        raise UsageError(f"SIGReg needs at least 1 slice (256 to 1024 are usual), got {slices}.")
    device = z.device if generator is None else generator.device
    normal = torch.randn(slices, z.shape[-1], generator=generator, device=device)
    return unit_rows(normal.to(z.device, torch.promote_types(z.dtype, torch.float32))).T


def matrix_entropy(f: Features, *, alpha: float = 2.0) -> Scalar:
    """Return S_α of the rows' similarities, in nats, between 0 (all rows parallel) and log(rows) (orthogonal).

    Differentiable; the cost is that of the smaller of ``rows`` and ``dim``.

    Args:
        f: Features of the global batch (h, z or p), which are not centred.
        alpha: α, positive. 2 needs no eigenvalues. Below 1, the rounding of zero eigenvalues shows.

    Raises:
        UsageError: If `alpha` is not a positive finite number.

    Example:
        >>> round(matrix_entropy(torch.eye(8)).exp().item(), 4)
        8.0
    """
    check_alpha(alpha)
    with full_precision(f):
        u = _directions(f)
        gram = u @ u.mT if u.shape[0] <= u.shape[1] else u.mT @ u  # the same eigenvalues but for zeros
        return _entropy(gram / u.shape[0], alpha)


def matrix_mutual_information(
    h: Float[Tensor, "rows in_dim"], z: Float[Tensor, "_ out_dim"], *, alpha: float = 2.0
) -> Scalar:
    """Return I_α(h; z) in nats of the same rows of the global batch, not centred; differentiable in both.

    Widths may differ. Memory is O(rows²). Not bounded below by 0 unless α = 1; α = 2 needs no eigenvalues.

    Raises:
        UsageError: If h and z have different numbers of rows or `alpha` is not a positive finite number.

    Example:
        >>> round(matrix_mutual_information(torch.eye(4), torch.eye(4)).exp().item(), 4)
        4.0
    """
    check_alpha(alpha)
    if len(h) != len(z):
        raise UsageError(f"Mutual information needs the same rows of both, got {len(h)} rows of h and {len(z)} of z.")
    with full_precision(h):
        a, b = _directions(h), _directions(z)
        k_h, k_z = a @ a.mT / len(a), b @ b.mT / len(b)
        return _entropy(k_h, alpha) + _entropy(k_z, alpha) - _entropy(len(a) * k_h * k_z, alpha)


def check_alpha(alpha: float) -> None:
    """Raise a UsageError if `alpha`, the order of an entropy, is not a positive finite number."""
    if not 0 < alpha < math.inf:
        wanted = "alpha, the order of the entropy, to be a positive number (1 or 2 is usual)"
        raise UsageError(f"Expected {wanted}, got {alpha}.")


def _directions(f: Tensor) -> Tensor:
    """Return unit rows with a column more, which is the direction of rows that have none."""
    u = unit_rows(f)
    return torch.cat([u, (u == 0).all(1, keepdim=True).to(u.dtype)], dim=1)


def _entropy(density: Tensor, alpha: float) -> Tensor:
    """S_α of a positive semidefinite matrix of trace 1."""
    if alpha == 2:
        return -density.square().sum().log()
    # Clamped to where the derivatives of λ log λ and λ^α are finite still; below, the gradient is 0.
    eigenvalues = eigvalsh(density).clamp_min(torch.finfo(density.dtype).tiny)
    if alpha == 1:
        return torch.special.entr(eigenvalues).sum()
    return eigenvalues.pow(alpha).sum().log() / (1 - alpha)
