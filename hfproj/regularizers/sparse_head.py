"""SparseHead: whole input features of the head are switched off by a group-sparse (L2,1) penalty on its weights.

    L = Σ_l Σ_i ‖W_l[:, i]‖₂,    W_l ``[out, in]`` the weight of layer l of the head.

One group is a column: what leaves one entry of h, or with ``group="output"`` a row. A subgradient step shrinks columns
but never reaches zero; the proximal step

    W[:, i] ← W[:, i] · max(0, 1 − ηλ / ‖W[:, i]‖),    η the learning rate, λ the weight,

after each optimizer step does.

References:
    Song et al. 2023, SparseHead, arXiv 2307.08913: the L2,1 norm on the head's weights.

Deviations:
    Ours, for want of a source: groups by input feature, the first layer only, both optimizers, λ = 1e-4 to begin with
    (then 1e-5 … 1e-2).
"""

import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hfproj.errors import UsageError, check_choice
from hfproj.functional.overflow import OverflowGuard
from hfproj.functional.rows import full_precision
from hfproj.registry import ShowsOptions
from hfproj.regularizers.weights import effective_weight, head_of, layers_of
from hfproj.typing import OneOf, Scalar

Group = OneOf["input", "output"]
_GROUPS = {"input": 0, "output": 1}  # the dimension of [out, in] that a group runs along
_OFF = 1e-3  # a group whose norm is no larger than this fraction of the largest is switched off


def group_norms(weight: Float[Tensor, "out fan_in"], *, group: Group = "input") -> Float[Tensor, " groups"]:
    """Return the norm of each column, or of each row for ``group="output"``; at a group of zeros its gradient is 0.

    Example:
        >>> group_norms(torch.tensor([[3.0, 0.0], [4.0, 0.0]])).tolist()
        [5.0, 0.0]
    """
    check_choice("group", group, _GROUPS)
    return torch.linalg.vector_norm(weight, dim=_GROUPS[group])


def shrink_groups(
    weight: Float[Tensor, "out fan_in"], threshold: float, *, group: Group = "input"
) -> Float[Tensor, "out fan_in"]:
    """Return the proximal map of ``threshold · Σ_i ‖W[:, i]‖``: norms fall by `threshold`, those below it to zero.

    Example:
        >>> shrink_groups(torch.tensor([[3.0, 0.1], [4.0, 0.1]]), 0.5).tolist()  # norms 5 → 4.5 and 0.14 → 0
        [[2.6999..., 0.0], [3.5999..., 0.0]]
    """
    norms = group_norms(weight, group=group).unsqueeze(_GROUPS[group])
    return weight * torch.where(norms > threshold, 1 - threshold / norms, 0)


def sparsity(weight: Float[Tensor, "out fan_in"], *, group: Group = "input") -> float:
    """Return the fraction of groups that are switched off: norm at most 1e-3 of the largest; 1 if all are zero.

    Example:
        >>> sparsity(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
        0.5
    """
    norms = group_norms(weight, group=group)
    return (norms <= _OFF * norms.max()).double().mean().item()


class SparseHead(ShowsOptions, nn.Module):
    """The L2,1 norm of the head's weights, biases excluded.

    It warns once where a BatchNorm follows a layer that is not normalised.

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
    """

    def __init__(
        self, *, method: OneOf["subgradient", "proximal"] = "subgradient", group: Group = "input",
        layers: OneOf["first", "all"] = "first", normalise: bool = False,
    ):  # fmt: skip
        super().__init__()
        check_choice("method", method, ("subgradient", "proximal"))
        check_choice("group", group, _GROUPS)
        check_choice("layers", layers, ("first", "all"))
        if normalise and method == "proximal":
            raise UsageError("normalise=True has no proximal step of this form; use method='subgradient' with it.")
        self.method, self.group, self.layers, self.normalise = method, group, layers, normalise
        self._warned = normalise

    def forward(self, model: nn.Module, h: object = None, z: object = None, *, step: object = None) -> Scalar:
        """Return the term of the head's weights as they are now; without a gradient if the method is proximal.

        Raises:
            UsageError: If the model has no head whose layers can be penalised.
        """
        layers = self._layers(model)
        self._warn_of_batch_norm(model, layers)
        guard = OverflowGuard("SparseHead")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.method == "subgradient"):
            weights = [effective_weight(layer, guard) for layer in layers.values()]
            return guard.loss(torch.stack([self._penalty(weight) for weight in weights]).sum())

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
