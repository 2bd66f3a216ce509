"""W-MSE: views agree after each has been whitened, which rules out collapse without negatives or a target network.

The batch is cut at random into sub-batches of `w_size` images, the same ones for all views. Of each, with its mean μ
and covariance Σ (over w_size − 1),

    z̃ = (z − μ) L⁻ᵀ,    (1 − ε)Σ + εI = LLᵀ,    L = mean over pairs of views of 2 − 2 cos(z̃_a, z̃_b),

or the mean squared difference of entries. The cut is drawn anew `w_iter` times per step. The gradient flows through the
whitening of all views.

References:
    Ermolov et al. 2021, "Whitening for Self-Supervised Representation Learning", arXiv 2007.06346; htdt/self-supervised
    ``methods/w_mse.py``, ``methods/whitening.py``; lightly-ai/lightly (e8d317fc) ``loss/wmse_loss.py``.

Deviations:
    Sub-batches are cut from the global batch of all processes. A covariance that is singular within rounding is an
    error; the official code stops with one of LAPACK's, or goes on with noise.
"""

import torch

from hfproj.errors import UsageError
from hfproj.functional.matrices import cholesky_whiten
from hfproj.functional.rows import cross_view_cosines, gather_views, generator_of
from hfproj.objectives.base import Objective, ObjectiveOutput, Step, check_at_least
from hfproj.typing import Scalar, Views


def w_mse_loss(z: Views, *, w_size: int, eps: float = 0.0, l2_normalise: bool = True) -> Scalar:
    """Return W-MSE of one batch, cut into sub-batches of `w_size` images in their order; options as of :class:`WMSE`.

    Raises:
        UsageError: If a covariance is singular.

    Example:
        >>> z = torch.randn(16, 3)
        >>> bool(w_mse_loss(torch.stack([z, 2 * z + 1]), w_size=8).abs() < 1e-3)  # whitening undoes affine maps
        True
    """
    z = cholesky_whiten(z.unflatten(1, (-1, w_size)), eps=eps).flatten(1, 2)
    if l2_normalise:
        return 2 - 2 * cross_view_cosines(z, z).mean()
    return 2 * z.var(0).mean()  # twice the variance is the mean square over pairs


class WMSE(Objective):
    """W-MSE over the global batch, for two or more views; all pairs of views count.

    When to use: without negatives, predictor or teacher, with a narrow z (64): sub-batches must have twice its width.
    It cannot collapse, but a covariance that becomes singular ends the run; eps mends that.

    Args:
        w_size: Images per sub-batch: at least twice out_dim, and the batch must be divisible by it. 128: solo-learn on
            CIFAR; 256: lightly. None: the whole batch.
        w_iter: Random cuts into sub-batches per step.
        eps: ε, how much of the identity is mixed into a covariance. 0: all sources.
        l2_normalise: Whether to compare directions (2 − 2 cos) or entries (mean squared difference).

    Raises:
        UsageError: If an option is out of range; in a call, with fewer than two views, a batch that can't be cut into
            sub-batches that are large enough, a singular covariance, or without a step on several processes.

    Example:
        >>> z = torch.randn(16, 3)
        >>> bool(WMSE(w_size=8)(torch.stack([z, 2 * z + 1])).loss.abs() < 1e-3)
        True
    """

    def __init__(self, *, w_size: int | None = 128, w_iter: int = 1, eps: float = 0.0, l2_normalise: bool = True):
        super().__init__()
        check_at_least(2, w_size=w_size)
        check_at_least(1, w_iter=w_iter)
        if not 0 <= eps < 1:
            raise UsageError(f"Expected eps to be from 0 to below 1 (0 or 1e-3 is usual), got {eps}.")
        self.w_size, self.w_iter, self.eps, self.l2_normalise = w_size, w_iter, eps, l2_normalise

    def compute(self, z: Views, *, step: Step | None = None, **given: object) -> ObjectiveOutput:
        """Return the loss and ``positive_cosine`` of projections (not whitened); `step` draws the random cuts."""
        z = gather_views(z)
        images, out_dim = z.shape[1:]
        w_size = images if self.w_size is None else self.w_size
        if w_size < 2 * out_dim:
            raise UsageError(
                f"W-MSE whitens {out_dim} dimensions in sub-batches of at least twice as many images, got "
                f"w_size={w_size}: take w_size={2 * out_dim} or more, or a head with out_dim={w_size // 2} or less."
            )
        if images % w_size or not images:
            raise UsageError(
                f"W-MSE cuts the batch into sub-batches of w_size={w_size} images, and {images} (of all processes) is "
                "no multiple: take another batch size or w_size, and drop the last batch (dataloader_drop_last=True)."
            )
        generator = generator_of(step)
        device = z.device if generator is None else generator.device
        losses = []
        for _ in range(self.w_iter):
            order = torch.randperm(images, generator=generator, device=device).to(z.device)
            losses.append(w_mse_loss(z[:, order], w_size=w_size, eps=self.eps, l2_normalise=self.l2_normalise))
        cosine = cross_view_cosines(z.detach(), z.detach()).mean()
        return ObjectiveOutput(torch.stack(losses).mean(), {"positive_cosine": cosine})
