"""WERank: every layer's weight is kept close to having orthonormal columns, which keeps the features from losing rank.

    L = Σ_l α_l ‖W_lᵀ W_l − I‖_F,    W_l ``[out, fan_in]`` the weight of layer l.

References:
    Pasand et al. 2024, "WERank: Towards Rank Degradation Prevention for Self-Supervised Learning Using Weight
    Regularization", arXiv 2402.09586 (norm not squared, WᵀW, all layers). As the baseline of OpenReview PD532fs8b1:
    "WeRank" is ``layers="all"``, "Full Enc." is ``layers="encoder"``.

Deviations:
    The paper's α_l are not known: all 1 by default, times the regularizer's weight. At an exact minimum the gradient of
    the norm, which has none there, is 0.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hfproj.errors import UsageError, check_choice, unknown
from hfproj.functional.matrices import SIDES, Side, orthogonality_gap
from hfproj.functional.overflow import OverflowGuard
from hfproj.registry import ShowsOptions
from hfproj.regularizers.weights import effective_weight, layers_of
from hfproj.typing import OneOf, Scalar


def werank_penalty(
    weights: Sequence[Tensor], *, alphas: Sequence[float] | None = None, side: Side = "WtW", squared: bool = False
) -> Scalar:
    """Return Σ_l α_l ‖W_lᵀ W_l − I‖_F over at least one W_l ``[out, fan_in]``, with α_l = 1 where there are none.

    The other options are those of `WERank`.

    Raises:
        UsageError: If the side is unknown.

    Example:
        >>> werank_penalty([3 * torch.eye(4), torch.eye(2)]).item()  # ‖8 I‖_F of the first, 0 of the second
        16.0
    """
    gaps = torch.stack([orthogonality_gap(w, side=side, squared=squared) for w in weights])
    return gaps.sum() if alphas is None else (gaps * gaps.new_tensor(alphas)).sum()


class WERank(ShowsOptions, nn.Module):
    """The WERank term of the model's weights.

    Args:
        layers: ``"all"`` (linear and convolution layers of the encoder that are trained, and the head's),
            ``"encoder"``, ``"head"`` or ``"last"``.
        squared: Whether norms are squared; the paper's are not.
        side: ``"WtW"`` (the paper), ``"WWt"``, or ``"auto"`` for the one whose minimum is 0.
        alpha: α_l: one number for all layers, or a dict from names of layers, or how they begin (``"head"``,
            ``"encoder.blocks.3"``; the longest that fits counts), to numbers; layers that it leaves out are not
            regularized. `hfproj.regularizers.weights.layers_of` gives the names.

    Raises:
        UsageError: If an option is unknown or a weight is not finite; on call, if the model has no such layers, none of
            them is trained, or `alpha` names one that it does not have.

    Example:
        >>> head = nn.Linear(2, 2, bias=False)
        >>> head.weight.data = 2 * torch.eye(2)
        >>> round(WERank(alpha={"head": 0.5})(head).item(), 4)  # half of ‖3 I‖_F
        2.1213
    """

    def __init__(
        self, *, layers: OneOf["all", "last", "head", "encoder"] = "all", squared: bool = False, side: Side = "WtW",
        alpha: float | dict[str, float] = 1.0,
    ):  # fmt: skip
        super().__init__()
        check_choice("layers", layers, ("all", "last", "head", "encoder"))
        check_choice("side", side, SIDES)
        for value in alpha.values() if isinstance(alpha, Mapping) else [alpha]:
            if not math.isfinite(value):
                raise UsageError(f"Expected alpha to be a finite number, or a dict of finite numbers, got {alpha}.")
        self.layers, self.squared, self.side, self.alpha = layers, squared, side, alpha

    def forward(self, model: nn.Module, h: object = None, z: object = None, *, step: object = None) -> Scalar:
        """Return the term of the model's weights as they are now.

        Raises:
            UsageError: If the model has no such layer, or `alpha` names another one.
        """
        layers = layers_of(model, self.layers)
        alphas = _alphas(self.alpha, list(layers))
        guard = OverflowGuard("WERank")
        weights = [effective_weight(layers[name], guard) for name in alphas]
        loss = werank_penalty(weights, alphas=list(alphas.values()), side=self.side, squared=self.squared)
        return guard.loss(loss)


def _alphas(given: float | Mapping[str, float], names: list[str]) -> dict[str, float]:
    """Return α by the layer's full name, without the layers that no key fits."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)

    def fits(key: str, name: str) -> bool:
        return f"{name}.".startswith(f"{key}.")

    for key in given:
        if not any(fits(key, name) for name in names):
            raise unknown("layer in alpha:", key, names)
    keys = {name: max((k for k in given if fits(k, name)), key=len, default=None) for name in names}
    return {name: given[key] for name, key in keys.items() if key is not None}
