"""Zero-CL: whitened views agree feature by feature (Zero-FCL), image by image (Zero-ICL), or both.

Zero-FCL standardises each feature over the batch and whitens by ZCA, each view by its own matrix T without a gradient:

    T = U diag((s + ε)^−½) Uᵀ for zᵀz/N = U diag(s) Uᵀ,    z̃ = z sg(T),    L_F = Σ_j ( (1/N) Σ_i z̃_a,ij z̃_b,ij − 1 )².

Zero-ICL is the same with the roles of images and features exchanged. Variants of the two official scripts:

| | standardised by | covariance over | shrunk to | ε |
|---|---|---|---|---|
| imagenet | σ + 1e-4, σ unbiased | N | – | 0.01 |
| cifar | √(σ² + 1e-5), σ² biased | N − 1 | 0.9 Σ + 0.1 I | 1e-5 |

References:
    Zhang et al. 2022, "Zero-CL: Instance and Feature Decorrelation for Negative-Free Symmetric Contrastive Learning";
    Sherrylone/Zero-CL (c8dbadd) ``ImageNet-100/main.py``, (0a7a84d) ``cifar/main.py``.

Deviations:
    Statistics and whitening matrices are those of the global batch; the official ones are local, and their in-place
    ``all_reduce`` gives 1/world_size of the gradient. The official CIFAR script does not whiten unless told to. The
    official ImageNet script runs one mode at a time; ``"both"`` is the paper's sum.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.errors import UsageError, check_choice
from hfproj.functional.matrices import zca_matrix
from hfproj.functional.rows import at_least_float32, full_precision, gather_views, without_steep_rows
from hfproj.objectives.base import Objective, ObjectiveOutput, check_positive
from hfproj.typing import OneOf, Scalar, Views

MODES = ("feature", "instance", "both")
Mode = OneOf["feature", "instance", "both"]
Variant = OneOf["imagenet", "cifar"]
SHRINKAGE = {"imagenet": 0.0, "cifar": 0.1}
EPS = {"imagenet": 0.01, "cifar": 1e-5}


def zero_cl_loss(
    z: Float[Tensor, "2 rows dim"], *, variant: Variant = "imagenet", shrinkage: float | None = None,
    eps: float | None = None,
) -> Scalar:  # fmt: skip
    """Return Zero-FCL of two views, or Zero-ICL if rows are features and columns images (``z.mT``).

    `shrinkage` is the fraction of the identity in the covariance, `eps` is added to its eigenvalues; None: by variant.

    Example:
        >>> bool(zero_cl_loss(torch.randn(64, 4).expand(2, 64, 4), eps=1e-6) < 1e-4)  # identical views
        True
    """
    given, z = z.dtype, at_least_float32(z)
    shrinkage = SHRINKAGE[variant] if shrinkage is None else shrinkage
    rows, dim = z.shape[1:]
    z = _standardise(z, variant, given)
    with full_precision(z):
        covariance = z.mT @ z / (rows if variant == "imagenet" else rows - 1)
        covariance = (1 - shrinkage) * covariance + shrinkage * torch.eye(dim, dtype=z.dtype, device=z.device)
        a, b = z @ zca_matrix(covariance, eps=EPS[variant] if eps is None else eps)
    return ((a * b).mean(0) - 1).square().sum()


def _standardise(z: Tensor, variant: str, given: torch.dtype) -> Tensor:
    z = z - z.mean(1, keepdim=True)
    z = z - z.mean(1, keepdim=True)  # of equal rows the rounding of their mean is left, which 1/1e-4 would blow up
    if given == torch.float16:  # in which 1/1e-4 of a gradient has no room
        z = without_steep_rows(z, dim=1, dtype=given)
    if variant == "cifar":
        return z * (z.square().mean(1, keepdim=True) + 1e-5).rsqrt()
    variance = z.square().sum(1, keepdim=True) / (z.shape[1] - 1)
    # A constant column has no deviation to differentiate: clamped, its gradient is that of z/1e-4.
    return z / (variance.clamp_min(torch.finfo(z.dtype).tiny).sqrt() + 1e-4)


class ZeroCL(Objective):
    """Zero-CL over the global batch, for two views.

    When to use: without negatives, predictor or teacher, where batches are larger than z is wide. Each step decomposes
    an out_dim × out_dim (feature) or batch × batch (instance) matrix per view, which is slow for wide heads.

    Args:
        mode: ``"feature"``, ``"instance"`` or ``"both"``, their sum. ``"feature"``: both official scripts' default.
            Instances need out_dim of the order of the batch.
        variant: ``"imagenet"`` or ``"cifar"``, see above; the latter has the feature mode only.
        eps: ε, added to the eigenvalues; None: the variant's (0.01; 1e-5).

    Raises:
        UsageError: If an option is out of range; in a call, with other than two views, or fewer than two images
            (dimensions, for instances).

    Example:
        >>> bool(ZeroCL(eps=1e-6)(torch.randn(64, 4).expand(2, 64, 4)).loss < 1e-4)  # identical views
        True
    """

    views = (2, 2)

    def __init__(self, *, mode: Mode = "feature", variant: Variant = "imagenet", eps: float | None = None):
        super().__init__()
        check_choice("mode", mode, MODES)
        check_choice("variant", variant, EPS)
        if variant == "cifar" and mode != "feature":
            raise UsageError(f"The CIFAR variant has mode='feature' only, got {mode!r}: take variant='imagenet'.")
        if eps is not None:
            check_positive("eps", eps, usual=f"{EPS[variant]}, that of None,")
        self.mode, self.variant, self.eps = mode, variant, eps

    def compute(self, z: Views, **given: object) -> ObjectiveOutput:
        """Return the loss, and its parts ``feature`` and ``instance`` as far as the mode has them."""
        z = gather_views(z)
        images, out_dim = z.shape[1:]
        if images < 2:
            raise UsageError(f"Zero-CL needs at least 2 images, got {images} over all processes: use a larger batch.")
        if out_dim < 2 and self.mode != "feature":
            wanted = f"out_dim to be at least 2 for mode={self.mode!r}"
            raise UsageError(f"Expected {wanted}, got {out_dim}: it standardises features.")
        terms = {}
        if self.mode != "instance":
            terms["feature"] = zero_cl_loss(z, variant=self.variant, eps=self.eps)
        if self.mode != "feature":
            terms["instance"] = zero_cl_loss(z.mT, variant=self.variant, eps=self.eps)
        return ObjectiveOutput(torch.stack([*terms.values()]).sum(), {n: term.detach() for n, term in terms.items()})
