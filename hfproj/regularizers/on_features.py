"""Terms on features: h, z or both.

Values are those of the global batch of all processes by default, each view by itself where nothing else is said; with
``gather=False``, where a term has it, those of each process, as in most official codes.
"""

import math

import torch
from torch import nn

from hfproj.errors import UsageError, check_choice
from hfproj.functional.distributions import (
    check_alpha,
    matrix_mutual_information,
    random_directions,
    sigreg,
    wasserstein_to_uniform,
)
from hfproj.functional.moments import covariance_penalty, variance_hinge
from hfproj.functional.rows import full_precision, gather_views, generator_of, unit_rows
from hfproj.registry import ShowsOptions
from hfproj.regularizers.base import Projections, Representations, check_on, check_views, features
from hfproj.typing import Features, HasGenerator, Scalar


class Bottleneck(ShowsOptions, nn.Module):
    """Information bottleneck: the head is trained to carry less of h, by the mutual information of h and z in nats.

        L = I_α(h; z) = S_α(K_h) + S_α(K_z) − S_α(K_h ∘ K_z)

    with K_h, K_z the cosine similarities of all n = views · batch rows; a positive weight *minimises* it, and its
    gradient reaches encoder and head. It lies below the smaller of the two entropies and, unless α = 1, may be
    negative. Memory is O(n²).

    Args:
        alpha: α, order of the entropies. 2 (the paper) needs no eigenvalues.
        gather: Whether rows of other processes belong to the batch.

    Raises:
        UsageError: If alpha is not a positive finite number; on call, if h and z have different numbers of rows.

    Example:
        >>> h = torch.eye(8).view(2, 4, 8)
        >>> round(Bottleneck()(nn.Identity(), h, h).exp().item(), 4)  # z tells 8 orthogonal rows apart
        8.0

    References:
        Ouyang et al. 2025, arXiv 2503.00507, section 4; PKU-ML/Projector_Theory (5c2e7d1) ``methods/simclr.py``: α = 2
        in all its configurations; weights are not published.

    Deviations:
        float32 or better, where the official code trains in 16 bits; no NaN at α = 1, see
        `hfproj.functional.distributions`.
    """

    def __init__(self, *, alpha: float = 2.0, gather: bool = True):
        super().__init__()
        check_alpha(alpha)
        self.alpha, self.gather = alpha, gather

    def forward(self, model: object, h: Representations, z: Projections, *, step: object = None) -> Scalar:
        """Return I_α(h; z)."""
        h, z = check_views("h", h), check_views("z", z)
        if self.gather:
            h, z = gather_views(h), gather_views(z)
        h, z = h.flatten(0, 1), z.flatten(0, 1)
        return matrix_mutual_information(h, z, alpha=self.alpha)


def koleo_loss(f: Features, *, eps: float = 1e-8) -> Scalar:
    """Return KoLeo of the rows of one view, at least two, in float32 or better; a norm up to ε counts as zero.

    Raises:
        UsageError: If there are fewer than two rows.

    Example:
        >>> bool(koleo_loss(torch.eye(4)).isclose(-torch.tensor(2.0).log() / 2))
        True
    """
    if len(f) < 2:
        raise UsageError(f"KoLeo needs at least 2 rows to find a neighbour among, got {len(f)}; use a larger batch.")
    with full_precision(f):
        u = unit_rows(f, eps=eps)
        with torch.no_grad():
            similarity = u @ u.mT
            nearest = similarity.fill_diagonal_(-torch.inf).argmax(1)
        difference = u - u[nearest]
        # The gradient of ‖0 + ε‖ would point along (1, …, 1), with a length of up to 1/ε.
        difference = torch.where((difference == 0).all(1, keepdim=True), 0, difference)
        distance = torch.linalg.vector_norm(difference + eps, dim=1)
        return -(distance + eps).log().mean()


class KoLeo(ShowsOptions, nn.Module):
    """KoLeo: each row is pushed from its nearest neighbour, by the Kozachenko-Leonenko estimate of the entropy.

        L = Σ_v −mean_i log( ‖f̂_i − f̂_{nn(i)} + ε‖ + ε ),    nn(i) = argmax_{j≠i} ⟨f̂_i, f̂_j⟩,

    within each view v, never between views of an image, and without a gradient through the choice of the neighbour.
    Orthonormal rows give −½ log 2 per view; all rows alike −log(ε(√D + 1)). Gradients of near duplicates are large (of
    order 1e5 at a distance of 1e-6): clip them (``max_grad_norm``).

    Args:
        on: ``"h"`` (DINOv2) or ``"z"``.
        gather: Whether neighbours are searched among rows of other processes, too; DINOv2 does not.
        eps: ε. 1e-8: DINOv2.

    Raises:
        UsageError: If `on` is unknown or `eps` is not in (0, 1); on call, if the batch has one image.

    Example:
        >>> h = torch.eye(4).expand(2, 4, 4)
        >>> round(KoLeo()(nn.Identity(), h, h).item(), 4)  # −log 2, half from each view
        -0.6931

    References:
        Sablayrolles et al. 2018, "Spreading vectors for similarity search", arXiv 1806.03198, eq. 2.
        facebookresearch/dinov2 ``dinov2/loss/koleo_loss.py``, ``train/ssl_meta_arch.py`` (the representation of each
        global crop, weight 0.1).

    Deviations:
        Rows that coincide exactly get no gradient from each other. Where three or more do, the official code has one of
        up to 1e7, which comes from ε alone.
    """

    def __init__(self, *, on: str = "h", gather: bool = True, eps: float = 1e-8):
        super().__init__()
        check_on(on)
        if not 0 < eps < 1:
            raise UsageError(f"eps must be a small positive number (1e-8 is usual), got {eps}.")
        self.on, self.gather, self.eps = on, gather, eps

    def forward(self, model: object, h: Representations, z: Projections, *, step: object = None) -> Scalar:
        """Return the sum over views."""
        x = features(self.on, h, z, gather=self.gather)
        return torch.stack([koleo_loss(view, eps=self.eps) for view in x]).sum()


class SIGReg(ShowsOptions, nn.Module):
    """SIGReg beside another objective: features are pulled to N(0, I), as seen along random directions.

        L = mean_v SIGReg(z_v); see `hfproj.functional.distributions` for the statistic.

    Features are not normalised: about 1.05 under N(0, I), 0.402 times the number of images if all are zero. LeJEPA
    itself, with its invariance term, is an objective.

    Args:
        on: ``"z"`` or ``"h"``.
        slices: Number of random directions, drawn anew in each step. 1024: LeJEPA's README, lightly; 256: its minimal
            example.
        knots: Number of frequencies. 17: LeJEPA.
        t_max: Highest frequency. 3: LeJEPA.

    Raises:
        UsageError: If `on` is unknown, a count is too small or `t_max` is not positive and finite; on call, if there is
            no step on several processes.

    Example:
        >>> z = torch.zeros(2, 10, 4)
        >>> round(SIGReg()(nn.Identity(), z, z).item(), 2)
        4.02

    References:
        Balestriero, LeCun 2025, "LeJEPA", arXiv 2511.08544; rbalestr-lab/lejepa ``MINIMAL.md``.
    """

    def __init__(self, *, on: str = "z", slices: int = 1024, knots: int = 17, t_max: float = 3.0):
        super().__init__()
        check_on(on)
        if slices < 1 or knots < 2 or not 0 < t_max < float("inf"):
            what = "SIGReg needs at least 1 slice, 2 knots and a positive t_max"
            raise UsageError(f"{what}, got slices={slices}, knots={knots}, t_max={t_max}.")
        self.on, self.slices, self.knots, self.t_max = on, slices, knots, t_max

    def forward(self, model: object, h: Representations, z: Projections, *, step: HasGenerator | None = None) -> Scalar:
        """Return the mean over views."""
        x = features(self.on, h, z)
        directions = random_directions(x[0], self.slices, generator=generator_of(step))
        with full_precision(x):
            views = [sigreg(view, directions=directions, knots=self.knots, t_max=self.t_max) for view in x]
        return torch.stack(views).mean()


class VICRegTerms(ShowsOptions, nn.Module):
    """VICReg's variance and covariance terms beside another objective, which brings views together.

        L = μ · mean_v v(z_v) + ν · Σ_v c(z_v),

    v the hinge on each feature's standard deviation, c the squared covariances between features; see
    `hfproj.functional.moments`.

    Args:
        on: ``"z"`` or ``"h"``.
        variance_weight: μ. 25: VICReg.
        covariance_weight: ν. 1: VICReg.
        variance_reduction: ``"mean"`` over views (official, lightly) or ``"sum"`` (solo-learn).
        target: Standard deviation from which on a feature adds nothing. 1: VICReg.
        eps: Added to the variance. 1e-4: VICReg.

    Raises:
        UsageError: If `on` or the reduction is unknown, a weight is negative or not finite, or `target` or `eps` is not
            positive; on call, if the batch has one image.

    Example:
        >>> z = torch.ones(2, 4, 8)  # collapsed: 25·(1 − √1e-4), no covariance
        >>> round(VICRegTerms()(nn.Identity(), z, z).item(), 4)
        24.75

    References:
        Bardes, Ponce, LeCun 2022, "VICReg", arXiv 2105.04906, eqs. 1 to 4, 6; facebookresearch/vicreg
        ``main_vicreg.py``, lightly-ai/lightly (e8d317fc) ``loss/vicreg_loss.py``.
    """

    def __init__(
        self, *, on: str = "z", variance_weight: float = 25.0, covariance_weight: float = 1.0,
        variance_reduction: str = "mean", target: float = 1.0, eps: float = 1e-4,
    ):  # fmt: skip
        super().__init__()
        check_on(on)
        check_choice("variance_reduction", variance_reduction, ("mean", "sum"))
        if not (0 <= variance_weight < math.inf and 0 <= covariance_weight < math.inf and target > 0 and eps > 0):
            raise UsageError(
                "VICReg's terms need weights of 0 or more and positive target and eps, got "
                f"variance_weight={variance_weight}, covariance_weight={covariance_weight}, target={target}, eps={eps}."
            )
        self.on, self.variance_weight, self.covariance_weight = on, variance_weight, covariance_weight
        self.variance_reduction, self.target, self.eps = variance_reduction, target, eps

    def forward(self, model: object, h: Representations, z: Projections, *, step: object = None) -> Scalar:
        """Return the weighted sum of both terms."""
        x = features(self.on, h, z)
        variance = torch.stack([variance_hinge(view, eps=self.eps, target=self.target) for view in x])
        covariance = torch.stack([covariance_penalty(view) for view in x])
        variance = variance.mean() if self.variance_reduction == "mean" else variance.sum()
        return self.variance_weight * variance + self.covariance_weight * covariance.sum()


class Wasserstein(ShowsOptions, nn.Module):
    """Wasserstein uniformity: unit rows are pulled to a uniform distribution on the sphere, in all dimensions.

        L = W2(ẑ) = √( 2 − (2/√D) tr Σ^{1/2} ),    Σ the covariance of all views' unit rows together,

    between 0 and √2. Unlike the pairwise uniformity of Wang and Isola it sees dimensional collapse, and does not see
    duplicates.

    Args:
        on: ``"z"`` (the paper) or ``"h"``.
        gather: Whether rows of other processes belong to the batch.

    Raises:
        UsageError: If `on` is unknown.

    Example:
        >>> z = torch.stack([torch.eye(4), -torch.eye(4)])
        >>> Wasserstein()(nn.Identity(), z, z).item() < 1e-3  # evenly spread
        True

    References:
        Fang et al. 2024, arXiv 2403.00642; statsle/WassersteinSSL ``code/BarlowTwins/metric.py``. Weights there: 1.0
        with MoCo v2; 30.0 falling linearly to 0 with Barlow Twins (``schedule="linear"`` of the weight).
    """

    def __init__(self, *, on: str = "z", gather: bool = True):
        super().__init__()
        check_on(on)
        self.on, self.gather = on, gather

    def forward(self, model: object, h: Representations, z: Projections, *, step: object = None) -> Scalar:
        """Return W2."""
        return wasserstein_to_uniform(features(self.on, h, z, gather=self.gather).flatten(0, 1))
