"""SparseHead: whole input features of the head are switched off, by a group-sparse (L2,1) penalty or to a target.

    L = Σ_l Σ_i ‖W_l[:, i]‖₂,    W_l ``[out, in]`` the weight of layer l of the head.

One group is a column: what leaves one entry of h; with ``group="output"`` a row, with ``"weight"`` a single weight (the
L1 norm). With a share a of L1 (`l1`) it is the sparse-group penalty (1 − a) Σ_i ‖W[:, i]‖₂ + a Σ_ij |W_ij|. A
subgradient step shrinks columns but never reaches zero; the proximal step

    W[:, i] ← W[:, i] · max(0, 1 − ηλ / ‖W[:, i]‖),    η the learning rate, λ the weight,

after each optimizer step does (with L1, after W_ij ← sign(W_ij) · max(0, |W_ij| − aηλ) and ηλ ← (1 − a)ηλ).

λ has no scale that carries over to another head or learning rate: below some λ nothing happens, above another one all
of the head is zero. A target has: with ``sparsity`` s* there is no λ, and after each optimizer step the
⌈s(t)·d⌉ smallest of the d groups are set to zero, never all of them, where at the fraction t of training

    s(t) = s* · (1 − (1 − u)³),    u = 2t − 1/2 clipped to [0, 1].

A group that was zero may come back until t = 3/4; from then on it stays.

References:
    Song et al. 2023, SparseHead, arXiv 2307.08913: the L2,1 norm on the head's weights.
    Zhu and Gupta 2017, arXiv 1710.01878, eq. 1: the cubic schedule.
    Simon et al. 2013, A sparse-group lasso: the penalty with L1, and its proximal map.

Deviations:
    Ours, for want of a source: groups by input feature, the first layer only, both optimizers, λ = 1e-4 to begin with
    (then 1e-5 … 1e-2), and all of the target. No √(size of a group) as in Simon et al.: groups of a layer are of one
    size.
"""

import math
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hfproj import distributed
from hfproj.errors import UsageError, check_choice
from hfproj.functional.overflow import OverflowGuard
from hfproj.functional.rows import full_precision
from hfproj.registry import ShowsOptions
from hfproj.regularizers.weights import effective_weight, head_of, layers_of
from hfproj.typing import OneOf, Scalar

Group = OneOf["input", "output", "weight"]
_GROUPS = {"input": 0, "output": 1, "weight": None}  # the dimension of [out, in] that a group runs along
_OFF = 1e-3  # a group whose norm is no larger than this fraction of the largest is switched off
_END = 0.75  # of the training, when the schedule of a target ends


def group_norms(weight: Float[Tensor, "out fan_in"], *, group: Group = "input") -> Float[Tensor, " groups"]:
    """Return the norm of each column, row (``"output"``) or single weight; at a group of zeros its gradient is 0.

    Example:
        >>> group_norms(torch.tensor([[3.0, 0.0], [4.0, 0.0]])).tolist()
        [5.0, 0.0]
    """
    return _norms(weight, group).flatten()


def _norms(weight: Tensor, group: Group) -> Tensor:
    """Return norms that broadcast to the weight."""
    check_choice("group", group, _GROUPS)
    dim = _GROUPS[group]
    return weight.abs() if dim is None else torch.linalg.vector_norm(weight, dim=dim, keepdim=True)


def shrink_groups(
    weight: Float[Tensor, "out fan_in"], threshold: float, *, group: Group = "input", l1: float = 0.0
) -> Float[Tensor, "out fan_in"]:
    """Return the proximal map of ``threshold · ((1 − l1) Σ_i ‖W[:, i]‖ + l1 Σ_ij |W_ij|)``.

    Without L1 norms fall by `threshold`, those below it to zero.

    Raises:
        UsageError: If the threshold is negative.

    Example:
        >>> shrink_groups(torch.tensor([[3.0, 0.1], [4.0, 0.1]]), 0.5).tolist()  # norms 5 → 4.5 and 0.14 → 0
        [[2.6999..., 0.0], [3.5999..., 0.0]]
    """
    if not threshold >= 0:
        raise UsageError(f"Expected a threshold of at least 0, by which norms fall, got {threshold}.")
    if l1:
        weight = weight.sign() * (weight.abs() - l1 * threshold).relu()
    norms, threshold = _norms(weight, group), (1 - l1) * threshold
    return weight * torch.where(norms > threshold, 1 - threshold / norms, 0)


def sparsity(weight: Float[Tensor, "out fan_in"], *, group: Group = "input") -> float:
    """Return the fraction of groups that are switched off: norm at most 1e-3 of the largest; 1 if all are zero.

    Example:
        >>> sparsity(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
        0.5
    """
    norms = group_norms(weight, group=group)
    return (norms <= _OFF * norms.max()).double().mean().item()


def sparsity_at(progress: float, target: float) -> float:
    """Return s(t) of a `target`: 0 in the first quarter of training, cubic in the middle half, then the target.

    Example:
        >>> [sparsity_at(progress, 0.8) for progress in (0.25, 0.5, 0.75)]
        [0.0, 0.7000000000000001, 0.8]
    """
    done = min(max(2 * progress - 0.5, 0.0), 1.0)
    return target * (1 - (1 - done) ** 3)


def smallest(
    norms: Float[Tensor, "*sizes n"], share: float, *, first: Bool[Tensor, "*sizes n"] | None = None
) -> Bool[Tensor, "*sizes n"]:
    """Return where the ⌈share · n⌉ smallest of the last dimension are, at most n − 1; those of `first` before others.

    Example:
        >>> smallest(torch.tensor([3.0, 1.0, 2.0, 1.0]), 0.3).tolist()
        [False, True, False, True]
    """
    n = norms.shape[-1]
    count = min(math.ceil(share * n - 1e-9), n - 1)  # 0.7 · 10 is above 7
    order = norms if first is None else torch.where(first, -1, norms)
    found = order.argsort(dim=-1, stable=True)[..., :count]  # equal norms: the first, on every process
    return torch.zeros_like(norms, dtype=torch.bool).scatter(-1, found, True)


def switched_off(
    weight: Float[Tensor, "out fan_in"], share: float, *, group: Group = "input", l1: float = 0.0,
    keep: Bool[Tensor, "out fan_in"] | None = None,
) -> Bool[Tensor, "out fan_in"]:  # fmt: skip
    """Return which weights a target sets to zero: those of the smallest groups, and with L1 the smallest in the others.

    Args:
        weight: Of one layer.
        share: Of the groups, ⌈share · groups⌉ but never all.
        group: As in `SparseHead`.
        l1: ⌈l1 · share · size⌉ of the weights of each other group are zero too, never all of them.
        keep: What was zero before; it comes first.

    Example:
        >>> switched_off(torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.1, 2.0]]), 0.3).tolist()
        [[False, True, False], [False, True, False]]
    """
    norms, dim = _norms(weight, group), _GROUPS[group]
    before = None if keep is None else (keep if dim is None else keep.all(dim, keepdim=True)).flatten()
    off = smallest(norms.flatten(), share, first=before).view_as(norms).expand_as(weight)
    if not l1 or dim is None:
        return off
    sizes, kept = (weight.abs(), keep) if dim == 1 else (weight.abs().T, None if keep is None else keep.T)
    inside = smallest(sizes, l1 * share, first=kept)
    return off | (inside if dim == 1 else inside.T)


class SparseHead(ShowsOptions, nn.Module):
    """The L2,1 norm of the head's weights, biases excluded; or a target for the fraction of groups that are zero.

    It warns once where a BatchNorm follows a layer that is not normalised, and where all of a layer is zero.

    Args:
        sparsity: s* in [0, 1): the fraction of groups that are zero at the end of each layer, to 1 / groups. It has no
            weight, and adds nothing to the loss. None: the weight decides.
        method: ``"subgradient"`` (None): the term is a part of the loss. ``"proximal"``: its value carries no gradient,
            and `after_step`, called after each optimizer step, shrinks the weights; groups become exactly zero. With a
            target there is no penalty; leave it out.
        group: ``"input"`` (columns: features of what enters the layer), ``"output"`` (rows: its units) or ``"weight"``.
        layers: ``"first"`` or ``"all"`` linear layers of the head.
        normalise: Divide each layer's term by ‖W‖_F: invariant to the scale of W, which a BatchNorm after the layer
            would undo while the penalty shrinks all groups alike. For ``"subgradient"``.
        l1: a in [0, 1): the share of L1 beside L2,1; with a target, a·s(t) of the weights of each group that remains
            are zero too.
        shrink: ρ in [0, 1), for a target: until three quarters of the training, each step also shrinks the groups that
            remain by ρ times the largest norm of those that it sets to zero. 0: they keep their norms.

    Raises:
        UsageError: If an option is unknown or out of its range, or options do not go together; on call, if the head
            has no linear layer.

    Example:
        >>> head = nn.Linear(2, 2)
        >>> head.weight.data = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
        >>> SparseHead()(head).item(), SparseHead().report(head)
        (5.0, {'sparsity': 0.5})
    """

    def __init__(
        self, *, sparsity: float | None = None, method: OneOf["subgradient", "proximal"] | None = None,
        group: Group = "input", layers: OneOf["first", "all"] = "first", normalise: bool = False, l1: float = 0.0,
        shrink: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        if sparsity is not None and method == "subgradient":
            raise UsageError(
                "method='subgradient' has no effect with a target, held after each optimizer step; leave it out."
            )
        method = method or "subgradient"
        check_choice("method", method, ("subgradient", "proximal"))
        check_choice("group", group, _GROUPS)
        check_choice("layers", layers, ("first", "all"))
        for name, value in (("sparsity", sparsity), ("l1", l1), ("shrink", shrink)):
            if value is not None and not 0 <= value < 1:
                raise UsageError(f"Expected {name} of sparse_head in [0, 1), got {value}; for example 0.5.")
        if normalise and sparsity is not None:
            raise UsageError("normalise=True has no effect with a target, which compares norms; leave it out.")
        if shrink and sparsity is None:
            raise UsageError("shrink=… has no effect without a target; give sparsity=… too, or leave it out.")
        if l1 and group == "weight":
            raise UsageError("group='weight' is L1 already; leave l1 out, or use group='input' with it.")
        if normalise and method == "proximal":
            raise UsageError("normalise=True has no proximal step of this form; use method='subgradient' with it.")
        self.sparsity, self.method, self.group, self.layers = sparsity, method, group, layers
        self.normalise, self.l1, self.shrink = normalise, l1, shrink
        self.has_weight, self.shrinks = sparsity is None, method == "proximal"
        self._warned, self._dead = normalise or sparsity is not None, False
        self._zeros: dict[str, Tensor] = {}  # of each layer before the step, where a target is held

    def forward(self, model: nn.Module, h: object = None, z: object = None, *, step: object = None) -> Scalar:
        """Return the term of the head's weights as they are now; without a gradient if the method is proximal.

        Raises:
            UsageError: If the model has no head whose layers can be penalised.
        """
        layers = self._layers(model)
        self._warn_of_batch_norm(model, layers)
        guard = OverflowGuard("SparseHead")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.method == "subgradient" and self.has_weight):
            weights = [effective_weight(layer, guard) for layer in layers.values()]
            if self.sparsity:
                self._zeros = {name: weight == 0 for name, weight in zip(layers, weights, strict=True)}
            return guard.loss(torch.stack([self._penalty(weight) for weight in weights]).sum())

    def _penalty(self, weight: Tensor) -> Tensor:
        with full_precision(weight):
            norms = group_norms(weight, group=self.group)
            term = (1 - self.l1) * norms.sum() + self.l1 * weight.abs().sum() if self.l1 else norms.sum()
            if not self.normalise:
                return term
            # ‖W‖_F of norms; a layer of zeros has no scale to divide by
            return term / torch.linalg.vector_norm(norms).clamp_min(torch.finfo(norms.dtype).tiny)

    @torch.no_grad()
    def after_step(self, model: nn.Module, learning_rate: float, weight: float) -> None:
        """Apply the proximal step to the head's weights; does nothing for ``method="subgradient"`` and with a target.

        Args:
            model: As in `forward`.
            learning_rate: η, of the head's parameters at this step.
            weight: λ.

        Raises:
            UsageError: If the head has no linear layer, or it is reparametrized (weight norm).
        """
        if self.method != "proximal" or not self.has_weight:
            return
        for layer in self._settable(model).values():
            shrunk = shrink_groups(effective_weight(layer), learning_rate * weight, group=self.group, l1=self.l1)
            layer.weight.copy_(shrunk.view_as(layer.weight))

    @torch.no_grad()
    def follow(self, model: nn.Module, progress: float) -> None:
        """Set to zero what the target asks for at `progress` in [0, 1] of training; without a target do nothing.

        Raises:
            UsageError: As `after_step`, and under FSDP.
        """
        share = sparsity_at(progress, self.sparsity or 0.0)
        if not share:
            return
        held = progress >= _END
        for name, layer in self._settable(model).items():
            if hasattr(layer.weight, "full_tensor"):
                raise UsageError(f"FSDP splits {name}, whose smallest groups are wanted; train with DDP instead.")
            weight = effective_weight(layer)
            keep = self._zeros.get(name) if held else None
            off = switched_off(weight, share, group=self.group, l1=self.l1, keep=keep)
            if self.shrink and not held:
                groups = switched_off(weight, share, group=self.group)
                threshold = self.shrink * _norms(weight, self.group).expand_as(weight)[groups].max().item()
                layer.weight.copy_(shrink_groups(weight, threshold, group=self.group).view_as(layer.weight))
            layer.weight.masked_fill_(off.view_as(layer.weight), 0)

    @torch.no_grad()
    def report(self, model: nn.Module) -> dict[str, float]:
        """Return ``sparsity``, the fraction of groups that are switched off, over all the layers that are regularized.

        It warns, once, of a layer that is all zeros.

        Raises:
            UsageError: If the head has no linear layer.
        """
        weights = {name: effective_weight(layer) for name, layer in self._layers(model).items()}
        dead = [name for name, weight in weights.items() if not weight.any()]
        if dead and not self._dead and distributed.rank() == 0:
            warnings.warn(
                f"sparse_head switched off all of {', '.join(dead)} (sparsity 1): z no longer depends on the input. "
                "Start again with a smaller weight, or with a target: {'sparse_head': {'sparsity': 0.5}}.",
                stacklevel=2,
            )
        self._dead = self._dead or bool(dead)
        counts = [len(group_norms(w, group=self.group)) for w in weights.values()]
        off = sum(n * sparsity(w, group=self.group) for n, w in zip(counts, weights.values(), strict=True))
        return {"sparsity": off / sum(counts)}

    def _layers(self, model: nn.Module) -> dict[str, Any]:
        return layers_of(model, "first" if self.layers == "first" else "head")

    def _settable(self, model: nn.Module) -> dict[str, Any]:
        layers = self._layers(model)
        for name, layer in layers.items():
            if parametrize.is_parametrized(layer, "weight"):
                hint = "use method='subgradient', which has no target" if self.sparsity else "use method='subgradient'"
                raise UsageError(f"{name} is reparametrized (weight norm), so its weight can't be set; {hint}.")
        return layers

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
