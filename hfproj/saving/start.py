"""What a training began with, kept in memory, for where no checkpoint was written before something went wrong."""

from collections.abc import Iterable

import torch
from torch import nn


class Start:
    """Copies, on the CPU, of what `modules` train (parameters that require a gradient) and of their buffers.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> start, before = Start([layer]), layer.weight.detach().clone()
        >>> _ = layer.weight.data.zero_()
        >>> start.put_back()
        >>> torch.equal(layer.weight, before)
        True
    """

    def __init__(self, modules: Iterable[nn.Module]):
        own: dict[int, torch.Tensor] = {}
        for module in modules:
            trained = (p for p in module.parameters() if p.requires_grad)
            own |= {id(tensor): tensor for tensors in (trained, module.buffers()) for tensor in tensors}
        self._kept = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in own.values()]

    @torch.no_grad()
    def put_back(self) -> None:
        """Give everything the values that it had."""
        for tensor, kept in self._kept:
            tensor.copy_(kept)
