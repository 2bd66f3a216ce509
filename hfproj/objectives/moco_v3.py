"""MoCo v3: a prediction finds the moving-average copy's projection of the same image among those of the batch.

With unit rows p̂ of predictions, z̄ of the copy's projections (no gradient), and views a and b,

    L = 2τ · ( ℓ(p̂_a, z̄_b) + ℓ(p̂_b, z̄_a) ),    ℓ(q, k) = mean_i [ −⟨q_i, k_i⟩/τ + log Σ_j exp(⟨q_i, k_j⟩/τ) ].

The factor 2τ keeps the size of the gradient when τ changes. At collapse L = 4τ log N.

References:
    Chen, Xie, He 2021, "An Empirical Study of Training Self-Supervised Vision Transformers", arXiv 2104.02057,
    algorithm 1; facebookresearch/moco-v3 (0c5d00a) ``moco/builder.py``, ``CONFIG.md``.

Deviations:
    The copy moves after each optimizer step, in the official code before its next forward pass. With more views (small
    crops) every other view is a query against each of the first two: twice the mean over pairs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hfproj.functional.contrastive import check_images
from hfproj.functional.matching import joint_cosine, match_rows, unit_rows_own_first, view_pairs
from hfproj.functional.moments import joint_mean
from hfproj.objectives.base import ObjectiveOutput, check_call
from hfproj.objectives.checks import check_momentum, check_shape, check_temperature
from hfproj.typing import Scalar, Views


def moco_v3_loss(prediction: Views, target: Float[Tensor, "keys batch dim"], *, temperature: float = 0.2) -> Scalar:
    """Return MoCo v3's loss over the joint batch of all processes, with a gradient for the predictions alone.

    Args:
        prediction: p of all views, in any floating-point type; computed in float32 or better.
        target: z̄ of the first views.
        temperature: τ.

    Example:
        >>> p = torch.ones(2, 4, 8)  # collapsed
        >>> bool(moco_v3_loss(p, p, temperature=0.2).isclose(4 * 0.2 * torch.tensor(4.0).log()))
        True
    """
    keys = [unit_rows_own_first(view.detach()) for view in target]
    check_images(len(keys[0]), "MoCoV3")
    pairs = view_pairs(len(prediction), len(keys))
    losses = torch.stack([match_rows(prediction[q], keys[k], temperature=temperature) for q, k in pairs])
    return 2 * temperature * 2 * joint_mean(losses)


class MoCoV3(nn.Module):
    """MoCo v3 over the joint batch of all processes.

    Args:
        temperature: τ. 0.2: all ViT recipes; 1.0: the code's default, used for ResNet-50.
        ema_momentum: m of the moving average at the start and at the end. 0.99 to 1: the code (0.996 for 1000 epochs).

    Raises:
        UsageError: an option that cannot work.

    Example:
        >>> z = torch.eye(4).expand(2, 4, 4)
        >>> loss, terms = MoCoV3()(z, prediction=z, target=z)
        >>> terms["positive_cosine"].item()
        1.0
    """

    views = (2, None)
    needs = frozenset({"prediction", "target"})
    target_of = "projection"
    target_views = 2

    def __init__(self, *, temperature: float = 0.2, ema_momentum: Sequence[float] = (0.99, 1.0)):
        super().__init__()
        self.temperature, self.ema_momentum = check_temperature(temperature), check_momentum(ema_momentum)

    def forward(
        self, z: Views, *, prediction: Tensor | None = None, target: Tensor | None = None, **given: Any
    ) -> ObjectiveOutput:
        """Return the loss and ``positive_cosine``, the mean cosine of predictions and their keys.

        Args:
            z: Projections of at least two views, of which only the shape is used. Processes may hold batches of
                different sizes.
            prediction: p of the same views.
            target: z̄ of the first two views.
            given: Unused.

        Raises:
            UsageError: fewer than two views, no prediction or target or one of another shape, or one image over all
                processes.
        """
        check_call(self, z, prediction=prediction, target=target, **given)
        assert prediction is not None  # just checked
        assert target is not None
        check_shape(self, "prediction", prediction, z)
        check_shape(self, "target", target, z, views=2)
        target = target[:2]
        loss = moco_v3_loss(prediction, target, temperature=self.temperature)
        queries, keys = (list(views) for views in zip(*view_pairs(len(z), 2)))
        return ObjectiveOutput(loss, {"positive_cosine": joint_cosine(prediction[queries], target[keys])})

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return f"temperature={self.temperature}"
