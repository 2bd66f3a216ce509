"""What the layers of a head give, for any head, by hooks: how a head is looked at from inside.

A layer is a linear map with what follows it up to the next one: norm, activation, and functions that are no modules
(a symmetric ReLU, a top-k). Layer i of a head with L of them is named ``head.i``, i = 0 … L − 1, in the order in which
its linear maps run:

    head.i = what linear map i + 1 takes in,    head.{L−1} = what the last module after the last linear map gives,

which for an MLP are the activations a_1 … a_{depth−1} and z before unit rows. What a head does after its last module
(unit rows, quantization, a bias added) is in z alone. A head inside a head counts, predictor and prototypes do not.
Heads without a linear map (identity, subvector, reweight) have no layers.

References:
    Bordes et al. 2022, Guillotine Regularization, arXiv 2206.13378 (layers of a projector as representations).

Deviations:
    Of linear maps that take in the same tensor (branches), each gives its own output.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hfproj.errors import UsageError
from hfproj.functional.modes import evaluating

T = TypeVar("T")
ALL = "head"  # what stands for all layers of the head in `layers`


def layer_name(index: int) -> str:
    """Return how layer `index` of a head is called.

    Example:
        >>> layer_name(0)
        'head.0'
    """
    return f"{ALL}.{index}"


def is_layer_name(name: object) -> bool:
    """Tell whether a name is one of a head's layers: ``head.0``, ``head.1``, …

    Example:
        >>> is_layer_name("head.12"), is_layer_name("head"), is_layer_name("head.norm")
        (True, False, False)
    """
    stem, _, number = name.partition(".") if isinstance(name, str) else ("", "", "")
    return stem == ALL and number.isascii() and number.isdigit()


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear map: ``nn.Linear``, or one with a matrix as its weight and no modules inside.

    Example:
        >>> is_linear(nn.Linear(2, 2)), is_linear(nn.LayerNorm(2)), is_linear(nn.Sequential(nn.Linear(2, 2)))
        (True, False, False)
    """
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd | nn.Bilinear):
        return True
    inside = any(True for _ in module.children())
    return not inside and any(p.ndim > 1 for p in module._parameters.values() if p is not None)


def split_layers(layers: Sequence[int | str] | str) -> tuple[Sequence[str], Sequence[int | str] | str]:
    """Return which of the layers asked for are the head's, and which the backbone's.

    Raises:
        UsageError: If they are h or z.

    Example:
        >>> split_layers(["head.0", 3]), split_layers("head"), split_layers("all")
        ((['head.0'], [3]), ('head', []), ([], 'all'))
    """
    if {"h", "z"} & {*([layers] if isinstance(layers, str) else layers)}:
        raise UsageError(f"Expected layers such as ['head.0'], got {layers!r:.80}; h and z are there anyway.")
    if isinstance(layers, str):
        return (layers, []) if layers == ALL else ([], layers)
    of_head = [name for name in layers if isinstance(name, str) and is_layer_name(name)]
    return ALL if ALL in layers else of_head, [name for name in layers if name != ALL and name not in of_head]


def chosen_layers(found: Mapping[str, T], layers: Sequence[str]) -> dict[str, T]:
    """Return h, the chosen layers and z, in the order of `found`.

    Raises:
        UsageError: If a chosen layer is not there.

    Example:
        >>> list(chosen_layers({"h": 1, "head.0": 2, "head.1": 3, "z": 4}, ["head.1"]))
        ['h', 'head.1', 'z']
    """
    inside = [name for name in found if is_layer_name(name)]
    if lost := [name for name in layers if layers != ALL and name not in inside]:
        raise UsageError(f"Expected layers of the active head, got {lost[0]!r}; it has {', '.join(inside) or 'none'}.")
    return {name: f for name, f in found.items() if name not in inside or layers == ALL or name in layers}


class LayerTrace:
    """A context manager that keeps what each layer of a head gives, while the head runs.

    After each run of the head `outputs` holds one tensor per layer, in the order of the forward pass, with its graph.

    Args:
        head: Any module; nothing of it changes but its hooks, which are taken away again.

    Example:
        >>> from hfproj.heads import create_head
        >>> head = create_head("mlp", in_dim=4, hidden_dim=[8, 6], depth=3, out_dim=2).eval()
        >>> with LayerTrace(head) as trace:
        ...     z = head(torch.randn(5, 4))
        >>> [tuple(f.shape) for f in trace.outputs], torch.equal(trace.outputs[-1], z)
        ([(5, 8), (5, 6), (5, 2)], True)
    """

    def __init__(self, head: nn.Module):
        self.head = head
        self.outputs: list[Tensor] = []
        self._open: Any = None  # what the linear map of the layer that runs took in
        self._last: Any = None  # what the last module gave
        self._handles: list[Any] = []

    def __enter__(self) -> "LayerTrace":
        self._handles.append(self.head.register_forward_pre_hook(self._begin))
        for part in dict.fromkeys(_parts(self.head)):  # one that is used twice once
            if is_linear(part):
                self._handles.append(part.register_forward_pre_hook(self._next))
            self._handles.append(part.register_forward_hook(self._gave))
        self._handles.append(self.head.register_forward_hook(self._end))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._open = self._last = None

    def _begin(self, module: nn.Module, inputs: tuple) -> None:
        self.outputs, self._open, self._last = [], None, None

    def _next(self, module: nn.Module, inputs: tuple) -> None:
        given = inputs[0] if inputs else None
        if self._open is not None:
            self._close(self._last if given is self._open else given)
        self._open = given

    def _gave(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        self._last = output

    def _end(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        if self._open is not None:
            self._close(self._last)
        self._open = self._last = None

    def _close(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self.outputs.append(value)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield linear maps, and modules without any inside: what a head computes with."""
    children = list(module.children())
    if is_linear(module) or not children:
        yield module
    else:
        for child in children:
            yield from _parts(child)


@torch.no_grad()
def layer_widths(head: nn.Module) -> list[int]:
    """Return the width of each layer of a head with `in_dim`, which is run once on zeros in eval mode; may be empty.

    Example:
        >>> from hfproj.heads import create_head
        >>> layer_widths(create_head("mlp", in_dim=4, hidden_dim=8, out_dim=2)), layer_widths(nn.Identity())
        ([8, 2], [])
    """
    if not any(is_linear(module) for module in head.modules()):
        return []
    like = next(p for p in head.parameters() if p.is_floating_point() and p.ndim > 1)
    h = torch.zeros(2, int(getattr(head, "in_dim", like.shape[-1])), device=like.device, dtype=like.dtype)
    with evaluating(head), LayerTrace(head) as trace:
        head(h)
    return [int(f.shape[-1]) for f in trace.outputs]
