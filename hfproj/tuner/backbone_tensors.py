"""Tensors of the backbone itself that belong to adapters (``trainable="full"`` or a number of blocks).

The values in use are always in the backbone's own parameters and buffers. Those of adapters that are not in use, and
the originals, are kept on the CPU; switching copies values in place, so that optimizers and DDP keep their parameters.
"""

import torch
from torch import Tensor, nn

from hfproj.backbones import bare_tensors


class BackboneTensors:
    """Which backbone tensors each adapter trains, and their values while it is not in use."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}  # adapter → its own tensors, named as by `hfproj.backbones.bare_tensors`
        self.originals: dict[str, Tensor] = {}  # the values before any adapter was trained
        self.in_use: str | None = None  # the adapter whose values are in the backbone; None for the originals
        self._waiting: dict[str, dict[str, Tensor]] = {}

    def add(self, backbone: nn.Module, adapter: str, names: list[str], *, keep_original: bool) -> None:
        """Give the tensors `names` to `adapter`."""
        self.names[adapter] = names
        if keep_original:  # a name that another adapter trains was kept before it changed
            tensors = bare_tensors(backbone)
            self.originals |= _on_cpu({n: tensors[n] for n in names if n not in self.originals})

    @torch.no_grad()
    def use(self, backbone: nn.Module, adapter: str | None) -> None:
        """Put the values of `adapter` (None: the originals) into the backbone."""
        if adapter is not None and not self.names.get(adapter):
            adapter = None
        if adapter == self.in_use:
            return
        tensors = bare_tensors(backbone)
        if self.in_use is not None:
            leaving = self.names[self.in_use]
            self._waiting[self.in_use] = _on_cpu({n: tensors[n] for n in leaving})
            _copy({n: self.originals[n] for n in leaving if n in self.originals}, tensors)
        if adapter is not None:
            _copy(self._waiting.pop(adapter, {}), tensors)
        self.in_use = adapter

    def values(self, backbone: nn.Module, adapter: str) -> dict[str, Tensor]:
        """Return the current values of the tensors of `adapter`, in use or not."""
        found = bare_tensors(backbone)
        if self.in_use != adapter:
            found |= self.originals | self._waiting.get(adapter, {})
        return {name: found[name] for name in self.names.get(adapter, ())}

    @torch.no_grad()
    def load(self, backbone: nn.Module, adapter: str, values: dict[str, Tensor]) -> None:
        """Set the values of the tensors of `adapter`."""
        if self.in_use == adapter:
            _copy(values, bare_tensors(backbone))
        elif values:
            self._waiting[adapter] = _on_cpu(values)

    def forget(self, adapter: str) -> None:
        """Drop an adapter that is not in use, and the originals that no other adapter needs."""
        self.names.pop(adapter, None)
        self._waiting.pop(adapter, None)
        needed = {name for names in self.names.values() for name in names}
        self.originals = {name: value for name, value in self.originals.items() if name in needed}


def _copy(values: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for name, value in values.items():
        tensors[name].copy_(value)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
