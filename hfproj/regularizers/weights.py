"""Which weights of a model a regularizer reaches, and what they are.

| part | weights |
|---|---|
| ``last`` | of the last linear layer of the active head; of the last layer of the encoder where the head has none |
| ``first`` | of the first linear layer of the active head |
| ``head`` | of all linear layers of the active head |
| ``encoder`` | of all linear and convolution layers of the backbone that are trained |
| ``all`` | of the encoder and of the head; of a bare head, its own |

Layers come in the order in which their modules were defined. Predictors, prototypes, norms, biases, embeddings and
other adapters' heads are never reached, and a layer used twice is reached once.

The weight is the one that the forward pass uses, ``[out, fan_in]`` in float32 or better: that of a weight-normalised
layer after its norm, that of a convolution flattened to ``[out, in·kh·kw]``, that of a layer with LoRA, LoHa or LoKr
with the low-rank change added, W + s·BA, and with DoRA m ⊙ (W + s·BA)/‖W + s·BA‖ by rows. Gradients reach what is
trained of it.

Deviations:
    DoRA's own forward takes the norm in the denominator as a constant; here it is differentiated.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hfproj.errors import UsageError, check_choice
from hfproj.functional.overflow import OverflowGuard
from hfproj.functional.rows import full_precision
from hfproj.typing import OneOf

Part = OneOf["all", "encoder", "first", "head", "last"]

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_CHILD = "hfproj"  # where the tuner keeps its heads in a backbone


def layers_of(model: nn.Module, part: Part) -> dict[str, Any]:
    """Return the layers of `part` of a model, by names such as ``head.last.linear`` and ``encoder.blocks.0.mlp.fc1``.

    Args:
        model: A ``PeftModel`` with a projection head, its backbone, or a bare head; what wraps it (DDP,
            ``torch.compile``) is opened.
        part: See the table above.

    Raises:
        UsageError: If the part is unknown, no head is active, the part has no such layers, or no layer of the encoder
            is trained.

    Example:
        >>> head = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> list(layers_of(head, "last"))
        ['head.2']
    """
    check_choice("part of a model", part, ("all", "encoder", "first", "head", "last"))
    backbone, head = _parts_of(model)
    in_head = dict(_layers(head, "head", set()))
    if backbone is None and part == "all":
        part = "head"
    if not in_head and part in ("first", "head"):
        hint = "use a head that has (head='mlp'), or regularize the encoder (layers='encoder')"
        raise UsageError(f"The head, {type(head).__name__}, has no linear layer; {hint}.")
    if part in ("first", "head") or (part == "last" and in_head):
        names = list(in_head)
        return {name: in_head[name] for name in {"first": names[:1], "head": names, "last": names[-1:]}[part]}
    if backbone is None:
        hint = "pass the PeftModel that holds it, or regularize the head only (layers='head')"
        raise UsageError(f"The encoder is asked for, but {type(head).__name__} is a bare head: {hint}.")
    in_encoder = {name: layer for name, layer in _layers(backbone, "encoder", set()) if _is_trained(layer)}
    if not in_encoder:
        raise UsageError(
            "No linear layer of the encoder is trained, so a term on its weights would have no gradient. Train it "
            "(ProjectionHeadConfig(backbone_adapter=LoraConfig(r=8)) or trainable='full'), or regularize a head with "
            "linear layers (layers='head')."
        )
    if part == "last":
        return dict([in_encoder.popitem()])
    return in_encoder | in_head if part == "all" else in_encoder


def effective_weight(layer: Any, guard: OverflowGuard | None = None) -> Float[Tensor, "out fan_in"]:
    """Return the weight that a layer of `layers_of` multiplies with, differentiable in what is trained of it.

    Its gradient is watched by a `guard`.

    Raises:
        UsageError: If the weight that a PEFT method makes is not known here, or the weight is quantized.

    Example:
        >>> effective_weight(nn.Conv2d(3, 8, kernel_size=2)).shape
        torch.Size([8, 12])
    """
    if guard is not None:
        half = any(p.dtype == torch.float16 and p.requires_grad for p in layer.parameters())
        return guard(effective_weight(layer), half=half)
    if not isinstance(layer, BaseTunerLayer):
        return _matrix(layer.weight)
    weight = _matrix(layer.get_base_layer().weight)
    for adapter in layer.active_adapters:
        if any(adapter in getattr(layer, name) for name in layer.adapter_layer_names):
            weight = _adapted(layer, adapter, weight)
    return weight


def weights_of(model: nn.Module, part: Part) -> dict[str, Float[Tensor, "out fan_in"]]:
    """Return `effective_weight` of each of `layers_of`."""
    return {name: effective_weight(layer) for name, layer in layers_of(model, part).items()}


def head_of(model: nn.Module) -> nn.Module:
    """Return the head that is active in `model`, or `model` itself where it is a bare head.

    Raises:
        UsageError: If a ``PeftModel`` has no projection head, or all adapters are disabled.
    """
    return _parts_of(model)[1]


def _parts_of(model: nn.Module) -> tuple[nn.Module | None, nn.Module]:
    """Return the backbone (None for a bare head) and the active head."""
    while (parallel := isinstance(model, _PARALLEL)) or hasattr(model, "_orig_mod"):  # the latter by torch.compile
        model = model.module if parallel else model._orig_mod  # type: ignore[assignment]
    peft_model = hasattr(model, "get_base_model")
    backbone: Any = model.get_base_model() if peft_model else model  # type: ignore[operator]
    heads: Any = getattr(backbone, _CHILD, None)
    if heads is None:
        if peft_model:
            hint = "attach one with get_peft_model(backbone, ProjectionHeadConfig(…))"
            raise UsageError(f"This {type(model).__name__} has no projection head; {hint}.")
        return None, model
    if heads.active_name is None:
        raise UsageError("No head is active: all adapters are disabled; call model.enable_adapters() first.")
    return backbone, heads.projection_head_modules[heads.active_name].head


def _layers(module: Any, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if module in seen:
        return
    seen.add(module)
    wraps = isinstance(module, BaseTunerLayer)  # whose own small layers (lora_A, …) are no layers of the model
    if isinstance(module.get_base_layer() if wraps else module, _LINEAR):
        yield name, module
    elif not wraps:
        for child_name, child in module.named_children():
            if child_name != _CHILD:
                yield from _layers(child, f"{name}.{child_name}", seen)


def _is_trained(layer: nn.Module) -> bool:
    return any(p.requires_grad for n, p in layer.named_parameters() if n.rpartition(".")[2] != "bias")


def _matrix(weight: Tensor) -> Tensor:
    if not weight.is_floating_point():
        hint = "load the backbone without quantization, or regularize the head only (layers='head')"
        raise UsageError(f"A weight of type {weight.dtype} is quantized and can't be regularized; {hint}.")
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(1)


def _adapted(layer: Any, adapter: str, weight: Tensor) -> Tensor:
    """Return `weight` as changed by one adapter of a PEFT layer."""
    variant = layer.lora_variant.get(adapter) if isinstance(layer, LoraLayer) else None
    variant = "" if variant is None else getattr(variant, "__name__", type(variant).__name__)
    dora = variant.startswith(("Dora", "_Dora"))
    if not isinstance(layer, LoraLayer | LycorisLayer) or (variant and not dora):
        raise UsageError(
            f"What {variant or f'{type(layer).__module__}.{type(layer).__name__}'} makes of a weight is not known "
            "here; use LoRA, DoRA, LoHa or LoKr as backbone_adapter, or regularize the head only (layers='head')."
        )
    with full_precision(weight):
        weight = weight + _matrix(layer.get_delta_weight(adapter))
        if dora:
            magnitude = layer.lora_magnitude_vector[adapter].weight.to(weight.dtype).reshape(-1, 1)
            weight = magnitude * weight / torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    return weight
