"""Gradients beyond float16, whose largest number is 65,504: a finite loss whose gradient overflows is refused.

A loss of 16-bit projections is computed in float32, and its gradient returned in 16 bits. That of a loss of the lengths
of rows, or of whitened rows that were tiny, may be infinite there, although the loss is a usual number.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor

from hfproj.errors import NonFiniteLossError

Given = TypeVar("Given")
_HINT = (
    "give z in float32 or bfloat16 (bf16=True), rows of another length (l2_normalise=True of the head), or scale the "
    "loss (fp16=True does, and skips such a step)"
)


class OverflowGuard:
    """Refuses, in the backward pass of one loss, a float16 gradient that is not finite; other types are left alone.

    Gradients of a loss that comes multiplied by more than 1 pass: that is a loss scaler, which wants to see them.

    Example:
        >>> guard, z = OverflowGuard("Cubes"), torch.full((4,), 300.0, dtype=torch.float16, requires_grad=True)
        >>> loss = guard.loss(guard(z).float().pow(3).sum())
        >>> loss.backward()
        Traceback (most recent call last):
        hfproj.errors.NonFiniteLossError: The gradient of Cubes is beyond float16, though its loss is finite; ...
    """

    def __init__(self, who: str):
        self.who = who
        self._loss: Tensor | None = None
        self._weight: Tensor | None = None

    def __call__(self, x: Given, *, half: bool = False) -> Given:
        """Return what stands for `x`, an input of any type, in the computation of the loss.

        Its gradient is checked if it is a tensor of float16, or one in float32 of what ends there (`half`).
        """
        if not isinstance(x, Tensor) or not (half or x.dtype == torch.float16):
            return x
        if not (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return x
        seen: Any = x.view_as(x)  # of `x` itself, a hook would stay and see the gradients of other losses
        seen.register_hook(self._check)
        return seen

    def loss(self, loss: Tensor) -> Tensor:
        """Return the loss, whose gradient is then known to be multiplied by this much."""
        if loss.requires_grad and not torch.compiler.is_compiling():
            self._loss = loss.detach()
            loss.register_hook(self._note)
        return loss

    def _note(self, weight: Tensor | None) -> None:
        self._weight = None if weight is None else weight.detach()

    def _check(self, gradient: Tensor | None) -> None:  # None where autograd has an undefined one
        if (
            gradient is None
            or gradient.detach().half().isfinite().all()
            or self._loss is None
            or not self._loss.isfinite()
        ):
            return
        if self._weight is None or self._weight.abs() <= 1:
            what = f"The gradient of {self.who} is beyond float16, though its loss is finite"
            raise NonFiniteLossError(f"{what}; {_HINT}.")
