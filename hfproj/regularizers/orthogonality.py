"""Orthogonality of one layer: its singular values are pulled to 1, so that no direction is lost there.

    L = ‖W Wᵀ − I‖_F²,    W ``[out, fan_in]`` the weight of the last linear layer.

Its minimum is 0 only if out ≤ fan_in, and out − fan_in otherwise; ``side="auto"`` takes ‖Wᵀ W − I‖_F² in that case,
which has the same gradient, 4 (W Wᵀ − I) W, and the minimum 0.

References:
    OpenReview PD532fs8b1, eq. 11 (coefficient 1): the projector's last layer, or without one the encoder's.

Deviations:
    None with ``side="WWt"``; the paper does not say how a convolution is flattened: ``[out, in·kh·kw]`` here.

Notes:
    At the usual initialisations it is large beside a contrastive loss of about 5: Linear 2048 → 128: 58; 512 → 512:
    284; a ResNet-18's last convolution: 742. Lower the weight, or take ``reduction="mean"``. Before a BatchNorm the
    scale of W does not show in z. Keep weight decay off the layer when the weight is large: the two pull apart.
"""

from jaxtyping import Float
from torch import Tensor, nn

from hfproj.errors import check_choice
from hfproj.functional.matrices import SIDES, Side, orthogonality_gap
from hfproj.functional.overflow import OverflowGuard
from hfproj.registry import ShowsOptions
from hfproj.regularizers.weights import effective_weight, layers_of
from hfproj.typing import OneOf, Scalar

Reduction = OneOf["sum", "mean"]


def orthogonality_penalty(
    weight: Float[Tensor, "out fan_in"], *, side: Side = "auto", reduction: Reduction = "sum"
) -> Scalar:
    """Return ‖W Wᵀ − I‖_F² or ‖Wᵀ W − I‖_F²; the options are those of `Orthogonality`.

    Raises:
        UsageError: If the side or the reduction is unknown.

    Example:
        >>> import torch
        >>> orthogonality_penalty(2 * torch.eye(3, 5)).item()  # three singular values of 2: 3·(4 − 1)²
        27.0
    """
    check_choice("reduction", reduction, ("sum", "mean"))
    gap = orthogonality_gap(weight, side=side)
    if reduction == "sum":
        return gap
    out, fan_in = weight.shape
    return gap / {"auto": min(out, fan_in), "WWt": out, "WtW": fan_in}[side] ** 2


class Orthogonality(ShowsOptions, nn.Module):
    """The orthogonality term of one layer's weight.

    Args:
        side: ``"WWt"`` (the paper), ``"WtW"``, or ``"auto"`` for the one whose minimum is 0.
        layer: ``"head"`` for the last linear layer of the head, or of the encoder where the head has none;
            ``"encoder"`` for that of the encoder.
        reduction: ``"sum"`` (the paper), or ``"mean"`` over the entries of the matrix, which depends less on widths.

    Raises:
        UsageError: If an option is unknown; on call, if the model has no such layer, or it is not trained.

    Example:
        >>> import torch
        >>> head = nn.Linear(3, 2)
        >>> _ = nn.init.orthogonal_(head.weight)
        >>> round(Orthogonality()(head).item(), 6)
        0.0
    """

    def __init__(self, *, side: Side = "auto", layer: OneOf["head", "encoder"] = "head", reduction: Reduction = "sum"):
        super().__init__()
        check_choice("side", side, SIDES)
        check_choice("layer", layer, ("head", "encoder"))
        check_choice("reduction", reduction, ("sum", "mean"))
        self.side, self.layer, self.reduction = side, layer, reduction

    def forward(self, model: nn.Module, h: object = None, z: object = None, *, step: object = None) -> Scalar:
        """Return the term of the model's weights as they are now.

        Raises:
            UsageError: If the model has no such layer.
        """
        layers = layers_of(model, "last" if self.layer == "head" else "encoder")
        last = list(layers.values())[-1]
        guard = OverflowGuard("Orthogonality")
        weight = effective_weight(last, guard)
        return guard.loss(orthogonality_penalty(weight, side=self.side, reduction=self.reduction))
