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
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hfproj.errors import UsageError, unknown
from hfproj.functional.rows import full_precision
from hfproj.regularizers.weights import effective_weight, head_of, layers_of
from hfproj.typing import Scalar

_GROUPS = {"input": 0, "output": 1}  # the dimension of [out, in] that a group runs along
_OFF = 1e-3  # a group whose norm is no larger than this share of the largest is switched off


def group_norms(weight: Float[Tensor, "out fan_in"], *, group: str = "input") -> Float[Tensor, " groups"]:
    """Return the norm of each column, or of each row for ``group="output"``; at a group of zeros its gradient is 0.

    Raises:
        UsageError: an unknown group.

    Example:
        >>> group_norms(torch.tensor([[3.0, 0.0], [4.0, 0.0]])).tolist()
        [5.0, 0.0]
    """
    if group not in _GROUPS:
        raise unknown("group", group, _GROUPS)
    return torch.linalg.vector_norm(weight, dim=_GROUPS[group])


def shrink_groups(
    weight: Float[Tensor, "out fan_in"], threshold: float, *, group: str = "input"
) -> Float[Tensor, "out fan_in"]:
    """Return the proximal map of ``threshold · Σ_i ‖W[:, i]‖``: norms fall by `threshold`, those below it to zero.

    Raises:
        UsageError: an unknown group.

    Example:
        >>> shrink_groups(torch.tensor([[3.0, 0.1], [4.0, 0.1]]), 0.5).tolist()  # norms 5 → 4.5 and 0.14 → 0
        [[2.6999..., 0.0], [3.5999..., 0.0]]
    """
    norms = group_norms(weight, group=group).unsqueeze(_GROUPS[group])
    return weight * torch.where(norms > threshold, 1 - threshold / norms, 0)


def sparsity(weight: Float[Tensor, "out fan_in"], *, group: str = "input") -> float:
    """Return the share of groups that are switched off: norm at most 1e-3 of the largest; 1 if all are zero.

    Raises:
        UsageError: an unknown group.

    Example:
        >>> sparsity(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
        0.5
    """
    norms = group_norms(weight, group=group)
    return (norms <= _OFF * norms.max()).double().mean().item()


class SparseHead(nn.Module):
    """The L2,1 norm of the head's weights, biases excluded.

    Args:
        method: ``"subgradient"``: the term is a part of the loss. ``"proximal"``: its value carries no gradient, and
            `after_step`, called after each optimizer step, shrinks the weights; groups become exactly zero.
        group: ``"input"`` (columns: features of what enters the layer) or ``"output"`` (rows: its units).
        layers: ``"first"`` or ``"all"`` linear layers of the head.
        normalise: Divide each layer's term by ‖W‖_F: invariant to the scale of W, which a BatchNorm after the layer
            would undo while the penalty shrinks all groups alike. For ``"subgradient"``.

    Raises:
        UsageError: an option that cannot work.

    Example:
        >>> head = nn.Linear(2, 2)
        >>> head.weight.data = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
        >>> SparseHead()(head).item(), SparseHead().report(head)
        (5.0, {'sparsity': 0.5})
    """

    def __init__(
        self, *, method: str = "subgradient", group: str = "input", layers: str = "first", normalise: bool = False
    ):
        super().__init__()
        if method not in ("subgradient", "proximal"):
            raise unknown("method", method, ("subgradient", "proximal"))
        if group not in _GROUPS:
            raise unknown("group", group, _GROUPS)
        if layers not in ("first", "all"):
            raise unknown("layers", layers, ("first", "all"))
        if normalise and method == "proximal":
            raise UsageError("normalise=True has no proximal step of this form; use method='subgradient' with it.")
        self.method, self.group, self.layers, self.normalise = method, group, layers, normalise
        self._warned = normalise

    def forward(self, model: nn.Module, h: Any = None, z: Any = None, *, step: Any = None) -> Scalar:
        """Return the term of the head's weights as they are now; without a gradient if the method is proximal.

        Warns once where a BatchNorm follows a layer, unless it is normalised.

        Args:
            model: A ``PeftModel`` with a projection head, or a bare head.
            h: Unused.
            z: Unused.
            step: Unused.

        Raises:
            UsageError: the head has no linear layer.
        """
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
            UsageError: the head has no linear layer, or it is reparametrized (weight norm).
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
        """Return ``sparsity``, the share of groups that are switched off, over all the layers that are regularized.

        Raises:
            UsageError: the head has no linear layer.
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
        leaves = list(_leaves(head_of(model)))
        followed = [name for name, layer in layers.items() if _is_batch_norm(leaves, leaves.index(layer) + 1)]
        if followed:
            self._warned = True
            warnings.warn(
                f"A BatchNorm follows {', '.join(followed)} and undoes a smaller scale of its weight, so "
                "sparse_head may shrink all groups alike instead of switching some off; use normalise=True, or a head "
                "without BatchNorm.",
                stacklevel=3,
            )

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return f"method={self.method!r}, group={self.group!r}, layers={self.layers!r}, normalise={self.normalise}"


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    children = [] if parametrize.is_parametrized(module) else list(module.children())
    if not children:
        yield module
    for child in children:
        yield from _leaves(child)


def _is_batch_norm(leaves: list[nn.Module], position: int) -> bool:
    return position < len(leaves) and "BatchNorm" in type(leaves[position]).__name__
