"""Jacobians of MLP heads without automatic differentiation, in half the time (recipes/benchmarks/results/geometry.md).

Such a head is a chain of affine maps, entrywise functions and norms. At a sample each step is a matrix, so that

    J = W_L D_{L−1} W_{L−1} … D_1 W_1,    D_l the diagonal of σ'(a_l) (times the scale of a BatchNorm in eval mode),

multiplied from the shorter side, for a block of samples by one matrix product a layer. Columns where D is 0 (inactive
units of a ReLU) are left out. LayerNorm and unit rows are a projection each, (I − Σ_q v_q v_qᵀ)·scale.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfproj.functional.rows import unit_rows
from hfproj.geometry._head import is_batch_norm

_ENTRYWISE = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6,
    nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanh,
)  # fmt: skip
_NOTHING = (nn.Identity, nn.Dropout, nn.AlphaDropout)  # in eval mode
_BLOCK_ELEMENTS = 2**20  # of an intermediate product: 8 MiB of float64 stay in cache
_SPARSE = 0.7  # below this fraction of active units, skipping the others pays for picking them


class Projection(NamedTuple):
    """A symmetric step, (I − Σ_q v_q v_qᵀ)·scale: `v` `[rows, q, width]`, `scale` `[rows, 1]`."""

    v: Tensor
    scale: Tensor


class Affine(NamedTuple):
    """A linear step, z = W h + b: W `[out, in]` and Wᵀ, each with contiguous rows."""

    weight: Tensor
    transposed: Tensor


Step = Tensor | Projection | Affine  # a tensor holds the derivatives of an entrywise step, `[1 or rows, width]`
Layer = Callable[[Tensor], tuple[Tensor, Sequence[Step]]]


class Chain:
    """An MLP head, layer after layer, in one dtype: built by `read_chain`."""

    def __init__(self, modules: list[tuple[str, nn.Module | None]], dtype: torch.dtype, device: torch.device):
        self.names = [name for name, _ in modules]
        self.layers = [_prepare(module, dtype, device) for _, module in modules]
        linear = [module for _, module in modules if isinstance(module, nn.Linear)]
        self.in_dim, self.out_dim = linear[0].in_features, linear[-1].out_features
        self.widest = max(max(m.in_features, m.out_features) for m in linear)

    def __call__(self, h: Tensor) -> Tensor:
        """Return z."""
        for layer in self.layers:
            h, _ = layer(h)
        return h

    def jacobians(self, h: Tensor) -> Iterator[Tensor]:
        """Yield J `[rows of the block, out_dim, in_dim]`; of stride 0 where it is the same for all rows."""
        backwards = self.out_dim <= self.in_dim
        for block in self._blocks(h):
            steps: list[Step] = []
            x = block
            for layer in self.layers:
                x, found = layer(x)
                steps += found
            product = _multiply(None, steps[::-1] if backwards else steps, transposed=not backwards)
            assert product is not None  # a chain has a linear layer
            yield (product if backwards else product.mT).expand(len(block), -1, -1)

    def prefixes(self, h: Tensor) -> Iterator[list[Tensor]]:
        """Yield, a block of rows at a time, Jᵀ `[rows, in_dim, width]` after each layer in turn."""
        for block in self._blocks(h):
            x: Tensor = block
            transposed: Tensor | None = None
            found: list[Tensor] = []
            for layer in self.layers:
                x, steps = layer(x)
                transposed = _multiply(transposed, steps, transposed=True)
                at_h = torch.eye(self.in_dim, dtype=h.dtype, device=h.device).unsqueeze(0)
                found.append((at_h if transposed is None else transposed).expand(len(block), -1, -1))
            yield found

    def _blocks(self, h: Tensor) -> tuple[Tensor, ...]:
        return h.split(max(1, _BLOCK_ELEMENTS // (min(self.out_dim, self.in_dim) * self.widest)))


def read_chain(head: object, dtype: torch.dtype, device: torch.device) -> Chain | None:
    """Return the head as a chain, or None if it is anything else.

    Known are ``nn.Sequential`` and modules with the parts of our MLP and linear heads; every leaf must be known, and
    none may have hooks or a parametrisation. A class with the same parts may have another forward: compare values.
    """
    modules = _flatten(head, "") if isinstance(head, nn.Module) else None
    known = modules is not None and any(isinstance(module, nn.Linear) for _, module in modules)
    return Chain(modules, dtype, device) if modules and known else None


def _flatten(module: nn.Module, name: str) -> list[tuple[str, nn.Module | None]] | None:
    """Return the leaves in the order of the forward pass (None for a last step to unit rows), or None if unknown."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return None
    children = dict(module.named_children())
    if children and (module._parameters or module._buffers):
        return None  # it has tensors of its own, for a purpose unknown
    unit_length = False
    if type(module) is nn.Sequential:
        parts = list(children)
    elif set(children) == {"hidden", "last"} and isinstance(getattr(module, "l2_normalise", None), bool):
        parts, unit_length = ["hidden", "last"], bool(module.l2_normalise)
    elif set(children) in ({"linear"}, {"linear", "norm"}):
        parts = [part for part in ("linear", "norm") if part in children]
    else:
        known = type(module) in (*_ENTRYWISE, *_NOTHING, nn.Linear, nn.LayerNorm) or is_batch_norm(module)
        return [(name, module)] if known and not children else None
    leaves: list[tuple[str, nn.Module | None]] = []
    for part in parts:
        found = _flatten(children[part], f"{name}.{part}" if name else part)
        if found is None:
            return None
        leaves += found
    return [*leaves, (f"{name}.unit_rows" if name else "unit_rows", None)] if unit_length else leaves


def _prepare(module: nn.Module | None, dtype: torch.dtype, device: torch.device) -> Layer:
    def cast(tensor: Any) -> Any:
        return None if tensor is None else tensor.detach().to(device, dtype)

    if module is None:
        return _to_unit_rows
    if type(module) in _NOTHING:
        return lambda x: (x, ())
    if isinstance(module, nn.Linear):
        weight, bias = cast(module.weight), cast(module.bias)
        affine = Affine(weight, weight.T.contiguous())
        return lambda x: (F.linear(x, weight, bias), (affine,))
    if isinstance(module, nn.LayerNorm):
        return partial(_layer_norm, weight=cast(module.weight), bias=cast(module.bias), eps=module.eps)
    if is_batch_norm(module):
        mean, variance, weight, bias = map(cast, (module.running_mean, module.running_var, module.weight, module.bias))
        scale = (variance + float(module.eps)).rsqrt() * (1 if weight is None else weight)  # type: ignore[arg-type]
        return lambda x: ((x - mean) * scale + (0 if bias is None else bias), (scale.unsqueeze(0),))
    return partial(_entrywise, module)


def _entrywise(function: nn.Module, a: Tensor) -> tuple[Tensor, Sequence[Step]]:
    with torch.inference_mode(False), torch.enable_grad():
        a = a.detach().clone().requires_grad_()
        x = function(a.clone())  # a clone: the function may work in place
        (slope,) = torch.autograd.grad(x.sum(), a)
    return x.detach(), (slope,)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Sequence[Step]]:
    centred = x - x.mean(1, keepdim=True)
    scale = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    y = centred * scale
    v = torch.stack([torch.ones_like(y), y], dim=1) / x.shape[1] ** 0.5
    steps: list[Step] = [Projection(v, scale)]
    if weight is not None:
        y, steps = y * weight, [*steps, weight.unsqueeze(0)]
    return y if bias is None else y + bias, steps


def _to_unit_rows(y: Tensor) -> tuple[Tensor, Sequence[Step]]:
    z = unit_rows(y)
    norm = torch.linalg.vector_norm(y, dim=1, keepdim=True)
    return z, (Projection(z.unsqueeze(1), torch.where(z.any(1, keepdim=True), 1 / norm, 0)),)


def _multiply(product: Tensor | None, steps: Sequence[Step], *, transposed: bool) -> Tensor | None:
    """Multiply `[1 or rows, q, width]` (None: identity) by the steps from the right: by Wᵀ if `transposed`, else W."""
    slope: Tensor | None = None
    columns: Tensor | None = None  # the product with its last two dimensions swapped, where that is at hand
    for step in steps:
        if isinstance(step, Tensor):
            slope = step if slope is None else slope * step
            continue
        if isinstance(step, Affine):
            matrix, other = (step.transposed, step.weight) if transposed else (step.weight, step.transposed)
            if product is not None:
                product, columns = _product(product, columns, slope, matrix), None
            elif slope is None:
                product, columns = matrix.unsqueeze(0), other.unsqueeze(0)
            else:
                product = slope.unsqueeze(2) * matrix
        else:
            if product is None:
                product = torch.eye(step.v.shape[2], dtype=step.v.dtype, device=step.v.device).unsqueeze(0)
            product = product if slope is None else product * slope.unsqueeze(1)
            product, columns = (product - (product @ step.v.mT) @ step.v) * step.scale.unsqueeze(1), None
        slope = None
    if slope is None:
        return product
    return torch.diag_embed(slope) if product is None else product * slope.unsqueeze(1)


def _product(product: Tensor, columns: Tensor | None, slope: Tensor | None, matrix: Tensor) -> Tensor:
    """Return `product · diag(slope) · matrix`, leaving out units whose slope is 0 where these are many."""
    if slope is None:
        return product @ matrix
    active = slope != 0
    if len(slope) == 1 or active.to(slope.dtype).mean() > _SPARSE:
        scaled = product * slope.unsqueeze(1)
        return (scaled.flatten(0, 1) @ matrix).unflatten(0, scaled.shape[:2])
    out = product.new_empty(len(slope), product.shape[1], matrix.shape[1])
    columns = product.mT.contiguous() if columns is None else columns
    for row in range(len(slope)):
        units = active[row].nonzero().squeeze(1)
        picked = columns[row if len(columns) > 1 else 0].index_select(0, units)
        torch.mm((picked * slope[row, units].unsqueeze(1)).T, matrix.index_select(0, units), out=out[row])
    return out
