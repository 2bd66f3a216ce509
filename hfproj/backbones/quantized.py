"""Weights kept in fewer bits (bitsandbytes, torchao): which they are, what values they stand for, how they are copied.

Nothing of either package is imported: what they have made is told by the attributes of its tensors.
"""

from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

METHODS = ("bitsandbytes", "torchao")  # quantizations whose layers are known here; PEFT knows more
REPACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' layers
_BIAS = "_hfproj_bias"  # in a layer's __dict__ while it runs


def is_quantized(tensor: Tensor) -> bool:
    """Return whether a weight is kept in fewer bits, so that its entries are codes."""
    codes = isinstance(tensor, nn.Parameter) and not (tensor.is_floating_point() or tensor.is_complex())
    return codes or type(tensor).__module__.startswith("torchao.") or hasattr(tensor, "quant_state")


def is_quantized_linear(module: nn.Module) -> bool:
    """Return whether `module` is a linear layer whose weight is kept in fewer bits."""
    return isinstance(module, nn.Linear) and is_quantized(module.weight)


def quantized_names(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of those of `tensors` that are kept in fewer bits."""
    return [name for name, tensor in tensors if is_quantized(tensor)]


def is_repacked(tensor: Tensor) -> bool:
    """Return whether bitsandbytes has put a 4-bit weight into the order of its kernel for inference on the CPU."""
    return bool(getattr(getattr(tensor, "quant_state", None), "packing_format_for_cpu", False))


class Held:
    """Keeps the layers of bitsandbytes in `backbone` from changing its tensors when they run, until `release`.

    In eval mode on the CPU 4-bit weights would be repacked for another kernel: in the training after an evaluation that
    one cuts off the gradients, and ``state_dict()``, which puts the weights back into their order, puts the scales of
    their blocks into a wrong one (seen in bitsandbytes 0.50.2). And biases would be rounded to the type of the input.
    """

    def __init__(self, backbone: nn.Module):
        self.handles: list[Any] = []
        self.repacking: list[Any] = [m for m in backbone.modules() if getattr(m, REPACKS, False)]
        for layer in self.repacking:
            setattr(layer, REPACKS, False)
        for module in backbone.modules():
            if is_quantized_linear(module) and type(module).__module__.startswith("bitsandbytes."):
                self.handles.append(module.register_forward_pre_hook(_keep_bias))
                self.handles.append(module.register_forward_hook(_restore_bias, always_call=True))

    def release(self) -> None:
        """Let the layers be as they were."""
        for layer in self.repacking:
            setattr(layer, REPACKS, True)
        for handle in self.handles:
            handle.remove()


def _keep_bias(module: Any, args: Any) -> None:
    module.__dict__[_BIAS] = None if module.bias is None else module.bias.data


def _restore_bias(module: Any, args: Any, output: Any) -> None:
    bias = module.__dict__.pop(_BIAS, None)
    if bias is not None and module.bias.dtype != bias.dtype:
        module.bias.data = bias


def sampled(weight: Any, module: nn.Module | None, places: np.ndarray) -> np.ndarray | None:
    """Return the values that the entries `places` of a quantized weight stand for; None where they can't be told.

    Args:
        weight: The weight.
        module: The layer that holds it.
        places: Indices into the weight as a row-major ``[out_features, in_features]``.
    """
    at = torch.from_numpy(places).to(weight.device)
    with torch.no_grad():
        if (state := getattr(weight, "quant_state", None)) is not None:
            values = _of_4_bit(weight.data, state, at)
        elif hasattr(weight, "dequantize") and type(weight).__module__.startswith("torchao."):
            values = weight.dequantize().reshape(-1)[at]
        else:
            scale = _row_scales(weight, module)
            if scale is None or weight.ndim != 2:
                return None
            values = weight.data.reshape(-1)[at].float() * scale.to(at.device)[at // weight.shape[1]] / 127
    return values.to("cpu", torch.float32).nan_to_num().double().numpy()


def rounding_of(weight: Any, module: nn.Module | None, values: np.ndarray, width: int) -> float:
    """Return the root mean square error of rounding to codes, relative to the weight's own.

    Args:
        weight: The quantized weight.
        module: The layer that holds it.
        values: What `sampled` gave for it.
        width: Number of its columns.
    """
    if (step := _step(weight, module)) is not None:
        square = float(step.float().square().mean())
    else:  # codes that are not evenly spaced: the gaps between the first values of one scale
        state = getattr(weight, "quant_state", None)
        span = (getattr(weight, "block_size", None) or [32])[-1] if state is None else state.blocksize
        values = cast(np.ndarray, sampled(weight, module, np.arange(min(width, span, 512))))
        there = np.unique(values)
        if len(there) < 2:
            return 1.0
        square = np.square(np.diff(there)[np.minimum(np.searchsorted(there, values), len(there) - 2)]).mean()
    return float(np.sqrt(square / 12 / max(np.square(values).mean(), 1e-30)))


def _step(weight: Any, module: nn.Module | None) -> Tensor | None:
    """Return the distances of neighbouring values of a weight whose codes are whole numbers, or None."""
    codes, scale = getattr(weight, "qdata", None), getattr(weight, "scale", None)  # of torchao
    if isinstance(codes, Tensor) and isinstance(scale, Tensor):
        return None if codes.is_floating_point() else scale
    scale = _row_scales(weight, module)
    return None if scale is None else scale / 127


def _row_scales(weight: Any, module: nn.Module | None) -> Tensor | None:
    """Return the scales of an int8 weight of bitsandbytes, which move into the layer's state when it has run."""
    scale = getattr(weight, "SCB", None)
    return getattr(getattr(module, "state", None), "SCB", None) if scale is None else scale


def _of_4_bit(data: Tensor, state: Any, at: Tensor) -> Tensor:
    """Return entries of a 4-bit weight of bitsandbytes: two codes a byte, one scale a block, the code's value."""
    codes, scales = data.reshape(-1).view(torch.uint8), state.absmax
    if state.nested:  # the scales are codes, too
        inner = state.state2
        blocks = torch.arange(scales.numel(), device=scales.device) // inner.blocksize
        scales = inner.code[scales.reshape(-1).int()] * inner.absmax[blocks] + state.offset
    byte = codes[at // 2]
    code = torch.where(at % 2 == 0, byte >> 4, byte & 15)
    return state.code[code.int()] * scales.reshape(-1)[at // state.blocksize].float()


class LinearOnMeta(nn.Linear):
    """A linear layer without values, which like the quantized one that it stands for takes every dtype."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """Return what has the shape of the layer's output."""
        return nn.functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class SharedLinear(nn.Linear):
    """A quantized linear layer run in place, for a copy of a model; copies of the layer itself have own values."""

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)  # without making tensors
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.__dict__["layer"] = layer  # not a submodule

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        held = Held(self.__dict__["layer"])
        try:
            return self.__dict__["layer"](x)
        finally:
            held.release()
