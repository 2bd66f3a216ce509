"""Terms on weights ``W`` ``[out, fan_in]``, which `hfproj.regularizers.weights` finds in a model."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hfproj.errors import UsageError, check_choice, unknown
from hfproj.functional.matrices import SIDES, orthogonality_gap
from hfproj.functional.rows import full_precision
from hfproj.registry import ShowsOptions
from hfproj.regularizers.weights import effective_weight, head_of, layers_of
from hfproj.typing import Scalar

Weight = Float[Tensor, "out fan_in"]
_GROUPS = {"input": 0, "output": 1}  # the dimension of [out, in] that a group runs along
_OFF = 1e-3  # a group whose norm is no larger than this fraction of the largest is switched off


def orthogonality_penalty(weight: Weight, *, side: str = "auto", reduction: str = "sum") -> Scalar:
    """Return ‖W Wᵀ − I‖_F² or ‖Wᵀ W − I‖_F²; the options are those of `Orthogonality`.

    Raises:
        UsageError: If the side or the reduction is unknown.

    Example:
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
    """Orthogonality of one layer: its singular values are pulled to 1, so that no direction is lost there.

        L = ‖W Wᵀ − I‖_F²,    W the weight of the last linear layer.

    Its minimum is 0 only if out ≤ fan_in, and out − fan_in otherwise; ``side="auto"`` takes ‖Wᵀ W − I‖_F² in that case,
    which has the same gradient, 4 (W Wᵀ − I) W, and the minimum 0.

    At the usual initialisations it is large beside a contrastive loss of about 5: Linear 2048 → 128: 58; 512 → 512:
    284; a ResNet-18's last convolution: 742. Lower the weight, or take ``reduction="mean"``. Before a BatchNorm the
    scale of W does not show in z. Keep weight decay off the layer when the weight is large: the two pull apart.

    Args:
        side: ``"WWt"`` (the paper), ``"WtW"``, or ``"auto"`` for the one whose minimum is 0.
        layer: ``"head"`` for the last linear layer of the head, or of the encoder where the head has none;
            ``"encoder"`` for that of the encoder.
        reduction: ``"sum"`` (the paper), or ``"mean"`` over the entries of the matrix, which depends less on widths.

    Raises:
        UsageError: If an option is unknown; on call, if the model has no such layer, or it is not trained.

    Example:
        >>> head = nn.Linear(3, 2)
        >>> _ = nn.init.orthogonal_(head.weight)
        >>> round(Orthogonality()(head).item(), 6)
        0.0

    References:
        OpenReview PD532fs8b1, eq. 11 (coefficient 1): the projector's last layer, or without one the encoder's.

    Deviations:
        The paper does not say how a convolution is flattened: ``[out, in·kh·kw]`` here.
    """

    def __init__(self, *, side: str = "auto", layer: str = "head", reduction: str = "sum"):
        super().__init__()
        check_choice("side", side, SIDES)
        check_choice("layer", layer, ("head", "encoder"))
        check_choice("reduction", reduction, ("sum", "mean"))
        self.side, self.layer, self.reduction = side, layer, reduction

    def forward(self, model: nn.Module, h: object = None, z: object = None, *, step: object = None) -> Scalar:
        """Return the term of the model's weights as they are now."""
        layers = layers_of(model, "last" if self.layer == "head" else "encoder")
        last = list(layers.values())[-1]
        return orthogonality_penalty(effective_weight(last), side=self.side, reduction=self.reduction)


def group_norms(weight: Weight, *, group: str = "input") -> Float[Tensor, " groups"]:
    """Return the norm of each column, or of each row for ``group="output"``; at a group of zeros its gradient is 0.

    Example:
        >>> group_norms(torch.tensor([[3.0, 0.0], [4.0, 0.0]])).tolist()
        [5.0, 0.0]
    """
    check_choice("group", group, _GROUPS)
    return torch.linalg.vector_norm(weight, dim=_GROUPS[group])


def shrink_groups(weight: Weight, threshold: float, *, group: str = "input") -> Weight:
    """Return the proximal map of ``threshold · Σ_i ‖W[:, i]‖``: norms fall by `threshold`, those below it to zero.

    Example:
        >>> shrink_groups(torch.tensor([[3.0, 0.1], [4.0, 0.1]]), 0.5).tolist()  # norms 5 → 4.5 and 0.14 → 0
        [[2.6999..., 0.0], [3.5999..., 0.0]]
    """
    norms = group_norms(weight, group=group).unsqueeze(_GROUPS[group])
    return weight * torch.where(norms > threshold, 1 - threshold / norms, 0)


def sparsity(weight: Weight, *, group: str = "input") -> float:
    """Return the fraction of groups that are switched off: norm at most 1e-3 of the largest; 1 if all are zero.

    Example:
        >>> sparsity(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
        0.5
    """
    norms = group_norms(weight, group=group)
    return (norms <= _OFF * norms.max()).double().mean().item()


class SparseHead(ShowsOptions, nn.Module):
    """SparseHead: whole input features of the head are switched off, by the L2,1 norm of its weights without biases.

        L = Σ_l Σ_i ‖W_l[:, i]‖₂,    W_l the weight of layer l of the head.

    One group is a column: what leaves one entry of h, or with ``group="output"`` a row. A subgradient step shrinks
    columns but never reaches zero; the proximal step

        W[:, i] ← W[:, i] · max(0, 1 − ηλ / ‖W[:, i]‖),    η the learning rate, λ the weight,

    after each optimizer step does. It warns once where a BatchNorm follows a layer that is not normalised.

    Args:
        method: ``"subgradient"``: the term is a part of the loss. ``"proximal"``: its value carries no gradient, and
            `after_step`, called after each optimizer step, shrinks the weights; groups become exactly zero.
        group: ``"input"`` (columns: features of what enters the layer) or ``"output"`` (rows: its units).
        layers: ``"first"`` or ``"all"`` linear layers of the head.
        normalise: Divide each layer's term by ‖W‖_F: invariant to the scale of W, which a BatchNorm after the layer
            would undo while the penalty shrinks all groups alike. For ``"subgradient"``.

    Raises:
        UsageError: If an option is unknown, or `normalise` is combined with the proximal method; on call, if the head
            has no linear layer.

    Example:
        >>> head = nn.Linear(2, 2)
        >>> head.weight.data = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
        >>> SparseHead()(head).item(), SparseHead().report(head)
        (5.0, {'sparsity': 0.5})

    References:
        Song et al. 2023, SparseHead, arXiv 2307.08913: the L2,1 norm on the head's weights.

    Deviations:
        Ours, for want of a source: groups by input feature, the first layer only, both optimizers, λ = 1e-4 to begin
        with (then 1e-5 … 1e-2).
    """

    def __init__(
        self, *, method: str = "subgradient", group: str = "input", layers: str = "first", normalise: bool = False
    ):
        super().__init__()
        check_choice("method", method, ("subgradient", "proximal"))
        check_choice("group", group, _GROUPS)
        check_choice("layers", layers, ("first", "all"))
        if normalise and method == "proximal":
            raise UsageError("normalise=True has no proximal step of this form; use method='subgradient' with it.")
        self.method, self.group, self.layers, self.normalise = method, group, layers, normalise
        self._warned = normalise

    def forward(self, model: nn.Module, h: object = None, z: object = None, *, step: object = None) -> Scalar:
        """Return the term of the head's weights as they are now; without a gradient if the method is proximal."""
        layers = self._layers(model)
        self._warn_of_batch_norm(model, layers)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.method == "subgradient"):
            return torch.stack([self._penalty(effective_weight(layer)) for layer in layers.values()]).sum()

    def _penalty(self, weight: Tensor) -> Tensor:
        with full_precision(weight):
            norms = group_norms(weight, group=self.group)
            if not self.normalise:
                return norms.sum()
            # ‖W‖_F of norms; a layer of zeros has no scale to divide by
            return norms.sum() / torch.linalg.vector_norm(norms).clamp_min(torch.finfo(norms.dtype).tiny)

    @torch.no_grad()
    def after_step(self, model: nn.Module, learning_rate: float, weight: float) -> None:
        """Apply the proximal step to the head's weights; does nothing for ``method="subgradient"``.

        Args:
            model: As in `forward`.
            learning_rate: η, of the head's parameters at this step.
            weight: λ.

        Raises:
            UsageError: If the head has no linear layer, or it is reparametrized (weight norm).
        """
        if self.method != "proximal":
            return
        for name, layer in self._layers(model).items():
            if parametrize.is_parametrized(layer, "weight"):
                raise UsageError(
                    f"{name} is reparametrized (weight norm), so its weight can't be set; use method='subgradient'."
                )
            shrunk = shrink_groups(effective_weight(layer), learning_rate * weight, group=self.group)
            layer.weight.copy_(shrunk.view_as(layer.weight))

    @torch.no_grad()
    def report(self, model: nn.Module) -> dict[str, float]:
        """Return ``sparsity``, the fraction of groups that are switched off, over all the layers that are regularized.

        Raises:
            UsageError: If the head has no linear layer.
        """
        weights = [effective_weight(layer) for layer in self._layers(model).values()]
        counts = [w.shape[1 - _GROUPS[self.group]] for w in weights]
        off = sum(n * sparsity(w, group=self.group) for n, w in zip(counts, weights, strict=True))
        return {"sparsity": off / sum(counts)}

    def _layers(self, model: nn.Module) -> dict[str, Any]:
        return layers_of(model, "first" if self.layers == "first" else "head")

    def _warn_of_batch_norm(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        if self._warned:
            return
        leaves = _leaves(head_of(model))
        before_norm = {leaf for leaf, after in pairwise(leaves) if "BatchNorm" in type(after).__name__}
        followed = [name for name, layer in layers.items() if layer in before_norm]
        if followed:
            self._warned = True
            warnings.warn(
                f"A BatchNorm follows {', '.join(followed)} and undoes a smaller scale of its weight, so "
                "sparse_head may shrink all groups alike instead of switching some off; use normalise=True, or a head "
                "without BatchNorm.",
                stacklevel=3,
            )


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    children = [] if parametrize.is_parametrized(module) else list(module.children())
    if not children:
        yield module
    for child in children:
        yield from _leaves(child)


def werank_penalty(
    weights: Sequence[Tensor], *, alphas: Sequence[float] | None = None, side: str = "WtW", squared: bool = False
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
    """WERank: every layer's weight is kept close to having orthonormal columns, which keeps features from losing rank.

        L = Σ_l α_l ‖W_lᵀ W_l − I‖_F,    W_l the weight of layer l.

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

    References:
        Pasand et al. 2024, "WERank: Towards Rank Degradation Prevention for Self-Supervised Learning Using Weight
        Regularization", arXiv 2402.09586 (norm not squared, WᵀW, all layers). As the baseline of OpenReview PD532fs8b1:
        "WeRank" is ``layers="all"``, "Full Enc." is ``layers="encoder"``.

    Deviations:
        The paper's α_l are not known: all 1 by default, times the regularizer's weight. At an exact minimum the
        gradient of the norm, which has none there, is 0.
    """

    def __init__(
        self, *, layers: str = "all", squared: bool = False, side: str = "WtW", alpha: float | dict[str, float] = 1.0
    ):
        super().__init__()
        check_choice("layers", layers, ("all", "last", "head", "encoder"))
        check_choice("side", side, SIDES)
        for value in alpha.values() if isinstance(alpha, Mapping) else [alpha]:
            if not math.isfinite(value):
                raise UsageError(f"alpha must be a finite number, or a dict of finite numbers, got {alpha}.")
        self.layers, self.squared, self.side, self.alpha = layers, squared, side, alpha

    def forward(self, model: nn.Module, h: object = None, z: object = None, *, step: object = None) -> Scalar:
        """Return the term of the model's weights as they are now."""
        layers = layers_of(model, self.layers)
        alphas = _alphas(self.alpha, list(layers))
        weights = [effective_weight(layers[name]) for name in alphas]
        return werank_penalty(weights, alphas=list(alphas.values()), side=self.side, squared=self.squared)


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
