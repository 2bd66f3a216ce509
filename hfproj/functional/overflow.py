"""A finite loss whose gradient is not: it is refused.

A loss of 16-bit projections is computed in float32, and its gradient returned in 16 bits. That of a loss of the lengths
of rows, or of whitened rows that were tiny, may be beyond 65,504 there, although the loss is a usual number. In float32
it takes rows of 1e38 or a temperature of 1e-30.
"""

from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from hfproj.errors import NonFiniteLossError

Given = TypeVar("Given")
_HINT = "rows of another length (l2_normalise=True of the head), or other options"
_HINT_16 = (
    f"give z in float32 or bfloat16 (bf16=True), {_HINT}, or scale the loss (fp16=True does, and skips such a step)"
)


class OverflowGuard:
    """Refuses, in the backward pass of one loss, a gradient that is not finite.

    On other devices than CPUs only in float16, since a look at it waits for the device; the step of other types is
    refused by `ProjectionTrainer` there. Gradients of a loss that comes multiplied by more than 1 pass: that is a loss
    scaler, which wants to see them.

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

        Its gradient is checked as one of float16 if it is of that type, or ends there (`half`), else in its own.
        """
        if not isinstance(x, Tensor) or not (half or x.dtype == torch.float16 or x.device.type == "cpu"):
            return x
        if not (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return x
        seen: Any = x.view_as(x)  # of `x` itself, a hook would stay and see the gradients of other losses
        seen.register_hook(partial(self._check, dtype=torch.float16 if half else x.dtype))
        return seen

    def loss(self, loss: Tensor) -> Tensor:
        """Return the loss, whose gradient is then known to be multiplied by this much."""
        if loss.requires_grad and not torch.compiler.is_compiling():
            self._loss = loss.detach()
            loss.register_hook(self._note)
        return loss

    def _note(self, weight: Tensor | None) -> None:
        self._weight = None if weight is None else weight.detach()

    def _check(self, gradient: Tensor | None, dtype: torch.dtype) -> None:  # None where autograd has an undefined one
        loss, weight = self._loss, self._weight
        if gradient is None or loss is None or gradient.detach().to(dtype).isfinite().all() or not loss.isfinite():
            return
        if weight is None or weight.abs() <= 1:
            name = str(dtype).removeprefix("torch.")
            what = f"The gradient of {self.who} is beyond {name}, though its loss is finite"
            hint = _HINT_16 if dtype == torch.float16 else f"give it {_HINT}"
            raise NonFiniteLossError(f"{what}; {hint}.")
