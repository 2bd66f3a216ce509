"""What every function of this package does first: validate head, h and loss, and run the head in float64 as it is."""

import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hfproj.errors import UsageError
from hfproj.functional.feature_rows import check_features
from hfproj.functional.rows import full_precision

Map = Callable[[Tensor], Tensor]

_OWN = ("hfproj", "contextlib", "jaxtyping", "beartype")  # modules whose frames are not the caller's code


def tensors_of(parameters: Any) -> list[Tensor]:
    """Return parameters as a list; raise `UsageError` if something else is among them."""
    found = parameters if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable) else list(parameters)
    if not isinstance(found, list) or not all(isinstance(tensor, Tensor) for tensor in found):
        got = next((x for x in found if not isinstance(x, Tensor)), found) if isinstance(found, list) else found
        raise UsageError(f"Expected a module or a list of tensors, got {type(got).__name__}; pass model.parameters().")
    return found


def check_eval(head: object) -> None:
    """Refuse a head that couples rows or draws random numbers, and warn of a BatchNorm that has seen no data."""
    if not isinstance(head, nn.Module):
        return
    fresh = []
    for name, module in head.named_modules():
        where = f"{name!r} ({type(module).__name__})" if name else type(module).__name__
        if is_batch_norm(module):
            if module.training or module.running_mean is None:
                hint = "call head.eval() first" if module.training else "make it with track_running_stats=True"
                problem = "normalises by statistics of the batch, so that z of a row depends on all rows"
                raise UsageError(f"{where} {problem}; expected running statistics: {hint}.")
            if module.num_batches_tracked is not None and int(module.num_batches_tracked) == 0:
                untouched = not module.running_mean.any() and bool((module.running_var == 1).all())
                fresh += [where] if untouched else []
        elif module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise UsageError(f"{where} drops entries at random in training mode: call head.eval() first.")
    if fresh:
        level, frame = 1, sys._getframe()
        while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _OWN:
            level, frame = level + 1, frame.f_back  # up to the code that called this package
        hint = "this is not the geometry of the head in use. Run it once in training mode on its usual, raw h."
        warnings.warn(f"The statistics of {', '.join(fresh)} have seen no data: {hint}", stacklevel=level)


def is_batch_norm(module: nn.Module) -> bool:
    """Tell whether a module is a BatchNorm: torch's, or one with its buffers, such as that of our heads."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return False
    return all(hasattr(module, name) for name in ("running_mean", "running_var", "num_batches_tracked"))


@contextmanager
def frozen(head: Map, dtype: torch.dtype) -> Iterator[Map]:
    """Give the head as a function of h alone, in `dtype` and eval mode; its gradients and counters do not change."""
    check_eval(head)
    training: dict[nn.Module, bool] = {}
    tensors: dict[str, Tensor] = {}
    if isinstance(head, nn.Module):
        training = {module: module.training for module in head.modules()}
        tensors = {n: _cast(t, dtype) for n, t in itertools.chain(head.named_parameters(), head.named_buffers())}
        head.eval()

    def run(h: Tensor) -> Tensor:
        try:
            with full_precision(h):
                z = functional_call(head, tensors, (h,)) if isinstance(head, nn.Module) else head(h)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            place = f"h of shape {list(h.shape)}, {h.dtype}, on {h.device}"
            hint = "Expected a head from [rows, in_dim] to [rows, out_dim], its tensors of the dtype of h."
            raise UsageError(f"The head cannot work on {place}: {error}. {hint}") from error
        if not isinstance(z, Tensor) or z.ndim != 2 or len(z) != len(h):
            wanted = f"z = head(h) of shape [{len(h)}, out_dim] for h {list(h.shape)}"
            raise UsageError(f"Expected {wanted}, got {describe(z)}.")
        return z.to(dtype)

    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield run
    finally:
        for module, mode in training.items():
            module.training = mode


def as_input(h: Tensor, dtype: torch.dtype, what: str = "representations h") -> Tensor:
    """Return finite rows `[rows, dim]` as a constant of `dtype`, on the CPU where the device has no such type."""
    check_features(h, minimum=1, what=what)
    return _cast(h, dtype).clone()


def check_rowwise(run: Map, h: Tensor) -> None:
    """Refuse a function whose z of a row depends on chance or on other rows."""
    with torch.no_grad():
        row = h[:1].detach()
        alone, beside = run(row), run(torch.cat([row, 2 * row + 1]))[:1]
    tolerance = 1e3 * torch.finfo(h.dtype).eps
    if not torch.allclose(alone, beside, rtol=tolerance, atol=tolerance * float(alone.abs().max())):
        seen = "z of a row changed beside a second row or at a second call"
        raise UsageError(f"The head couples rows or is random: {seen}. Switch that off (head.eval()) first.")


def check_loss(loss: object, of: str) -> Tensor:
    """Return a loss that is one number and depends on what `of` names."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UsageError(f"Expected the loss as one number, got {describe(loss)}.")
    if not loss.requires_grad:
        raise UsageError(f"The loss does not depend on {of}: was it detached?")
    return loss


def row_jacobian(y: Tensor, x: Tensor) -> Tensor:
    """Return ∂y[row, i]/∂x[row] by one backward pass for each i: rows do not interact, so a sum serves them all."""
    if not y.requires_grad:
        return x.new_zeros(len(x), y.shape[1], x.shape[1])
    sums = y.sum(0)
    return torch.stack([torch.autograd.grad(s, x, retain_graph=True, materialize_grads=True)[0] for s in sums], dim=1)


def describe(value: object) -> str:
    """Return for messages what came in place of a tensor of another shape."""
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return tensor
    return (tensor.cpu() if dtype == torch.float64 and tensor.device.type == "mps" else tensor).to(dtype)
