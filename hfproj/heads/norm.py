"""Norms of heads; batch statistics are those of the global batch of all processes.

BatchNorm normalises each feature with the mean and the (biased) variance of the batch,

    y = γ (x − μ) / √(σ² + ε) + β,

and keeps running averages (of the unbiased variance) for evaluation. Over processes, with n_r rows on rank r,

    n = Σ n_r,    μ = Σ n_r μ_r / n,    σ² = Σ (M_r + n_r (μ_r − μ)²) / n,    M_r = Σ_i (x_i − μ_r)²,

which is exact for uneven shards, free of the cancellation of E[x²] − μ², and costs one gather forward and one reduction
backward.

References:
    Ioffe, Szegedy 2015, arXiv 1502.03167, algorithm 1.
    Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".

Deviations:
    Unlike ``torch.nn.SyncBatchNorm`` it works on CPU (gloo) too, and views of one batch get statistics of their own, as
    in reference codes that run the head once per view.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hfproj import distributed
from hfproj.errors import UsageError, check_choice
from hfproj.functional.moments import joint_moments
from hfproj.heads.parts import check_input, check_positive
from hfproj.registry import ShowsOptions
from hfproj.typing import OneOf

Norm = OneOf["batch", "layer"]
Affine = bool | OneOf["scale"]
Statistics = OneOf["per_view", "joint"]


class BatchNorm(ShowsOptions, nn.Module):
    """BatchNorm over the global batch of all processes, per view by default.

    The state dict has the keys of ``torch.nn.BatchNorm1d``, so either loads the other's. Statistics are computed in
    float32 or better whatever the input's dtype and autocast say; the result has the input's dtype.

    Args:
        dim: Number of features.
        eps: ε, added to the variance: a collapsed batch maps to β, not to NaN.
        momentum: Weight of the newest batch in the running statistics, in (0, 1].
        affine: True learns γ and β; ``"scale"`` learns γ alone; False neither.
        statistics: Of an input ``[views, batch, dim]``: ``"per_view"`` normalises each view by itself and updates the
            running statistics view after view, as separate passes would; ``"joint"`` takes all views as one batch.

    Raises:
        UsageError: If `dim` is below 1, `eps` is not positive, `momentum` is outside (0, 1], or a choice is unknown.

    Example:
        >>> norm = BatchNorm(4)
        >>> z = norm(torch.randn(2, 32, 4))
        >>> bool((z.mean(1).abs() < 1e-6).all())  # each view is centred by itself
        True
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, dim: int, *, eps: float = 1e-5, momentum: float = 0.1, affine: Affine = True,
        statistics: Statistics = "per_view",
    ):  # fmt: skip
        super().__init__()
        check_choice("affine", affine, (True, False, "scale"))
        check_choice("statistics", statistics, ("per_view", "joint"))
        if not eps > 0 or not 0 < momentum <= 1:
            raise UsageError(f"BatchNorm needs eps > 0 and 0 < momentum <= 1, got eps={eps}, momentum={momentum}.")
        self.dim = check_positive("dim", dim)
        self.eps, self.momentum, self.affine, self.statistics = eps, momentum, affine, statistics
        self.register_parameter("weight", nn.Parameter(torch.ones(dim)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(dim)) if affine is True else None)
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, h: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Normalise ``[batch, dim]`` or ``[views, batch, dim]``.

        Raises:
            UsageError: If h has another shape, or a training batch has one row over all processes.
        """
        check_input(self, h, self.dim)
        x = h.to(torch.promote_types(h.dtype, torch.float32))
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        if not self.training:
            y = F.batch_norm(
                x.flatten(0, -2), self.running_mean.to(x), self.running_var.to(x), weight, bias, eps=self.eps
            )
            return y.view_as(x).to(h.dtype)
        groups = x if x.ndim == 3 and self.statistics == "per_view" else x.reshape(1, -1, self.dim)
        if distributed.world_size() > 1:
            y = self._normalise_jointly(groups, weight, bias)
        else:
            self._check_rows(groups.shape[1])
            y = self._normalise_fused(groups, weight, bias)
        self.num_batches_tracked += len(groups)
        return y.reshape(x.shape).to(h.dtype)

    def _normalise_fused(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Normalise ``[groups, rows, dim]`` by torch's kernel, group after group."""
        mean, var = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
        y = [F.batch_norm(group, mean, var, weight, bias, True, self.momentum, self.eps) for group in x]
        if mean is not self.running_mean:  # a half-precision module: the kernel updated copies
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)
        return torch.stack(y) if len(y) > 1 else y[0]

    def _normalise_jointly(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Normalise ``[groups, rows, dim]`` with the statistics of all processes."""
        n, mean, var = joint_moments(x)
        if x.shape[1] < 2:  # more local rows settle it without waiting for the device
            self._check_rows(int(n))
        with torch.no_grad():
            unbiased = var * (n / (n - 1))
            for group in range(len(x)):
                self.running_mean.lerp_(mean[group].to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(unbiased[group].to(self.running_var.dtype), self.momentum)
        scale = (var + self.eps).rsqrt()
        if weight is not None:
            scale = scale * weight
        y = (x - mean.unsqueeze(1)) * scale.unsqueeze(1)
        return y if bias is None else y + bias

    def _check_rows(self, rows: int) -> None:
        if rows < 2:
            hint = "use a larger batch, drop the last incomplete batch, or make the head with norm=None or norm='layer'"
            raise UsageError(f"BatchNorm needs at least 2 rows to train on, got {rows} over all processes: {hint}.")


def create_norm(
    name: Norm | None, dim: int, *, affine: Affine = True, statistics: Statistics = "per_view"
) -> nn.Module | None:
    """Return a norm by its name, ``"batch"`` (:class:`BatchNorm`, with its options) or ``"layer"``, or None for None.

    Raises:
        UsageError: If the name or a choice is unknown.

    Example:
        >>> sum(p.numel() for p in create_norm("layer", 8, affine="scale").parameters())
        8
    """
    check_choice("norm", name, (None, "batch", "layer"))
    check_choice("affine", affine, (True, False, "scale"))
    check_choice("statistics", statistics, ("per_view", "joint"))
    if name == "batch":
        return BatchNorm(dim, affine=affine, statistics=statistics)
    if name == "layer":
        return nn.LayerNorm(dim, elementwise_affine=bool(affine), bias=affine is True)
    return None
