"""What every function of this package does first: refuse a head without a Jacobian, and run it in float64 as it is."""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hfproj.errors import UsageError
from hfproj.functional.rows import full_precision

Map = Callable[[Tensor], Tensor]

_OWN = ("hfproj", "contextlib", "jaxtyping", "beartype")  # modules of frames that are no code of the caller


def check_rows(h: Tensor, what: str = "h") -> None:
    """Refuse what is no `[rows, dim]` matrix of finite floating-point numbers.

    Raises:
        UsageError: wrong shape or dtype, no row, or rows with NaN or infinity (which are named).
    """
    if h.ndim != 2 or not h.is_floating_point() or not h.numel():
        raise UsageError(
            f"Expected {what} as floating-point numbers of shape [rows, dim], got {h.dtype} of shape {list(h.shape)}. "
            "Views are rows here: h.flatten(0, 1)."
        )
    bad = (~torch.isfinite(h).all(1)).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(map(str, bad[:10])) + (", …" if len(bad) > 10 else "")
        raise UsageError(
            f"{len(bad)} of {len(h)} rows of {what} are NaN or infinite: row{'s' * (len(bad) != 1)} {shown}. "
            "Look at these inputs, or at the model: its training may have diverged."
        )


def check_eval(head: object) -> None:
    """Refuse a head that couples rows or draws random numbers, and warn of a BatchNorm that is none yet.

    BatchNorm is told by its attributes, since there are several classes of it.

    Raises:
        UsageError: a BatchNorm or Dropout in training mode, or a BatchNorm without running statistics.
    """
    if not isinstance(head, nn.Module):
        return
    fresh = []
    for name, module in head.named_modules():
        where = f"{name!r} ({type(module).__name__})" if name else type(module).__name__
        if is_batch_norm(module):
            if module.training or module.running_mean is None:
                cure = "call head.eval() first" if module.training else "make it with track_running_stats=True"
                raise UsageError(
                    f"{where} normalises with the statistics of the batch: z of a row then depends on all rows, and "
                    f"a Jacobian per sample does not exist. Expected running statistics: {cure}."
                )
            if module.num_batches_tracked is not None and int(module.num_batches_tracked) == 0:
                untouched = not module.running_mean.any() and bool((module.running_var == 1).all())
                fresh += [where] if untouched else []
        elif module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise UsageError(f"{where} drops entries at random in training mode: call head.eval() first.")
    if fresh:
        level, frame = 1, sys._getframe()
        while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _OWN:
            level, frame = level + 1, frame.f_back  # up to the code that called this package
        warnings.warn(
            f"The statistics of {', '.join(fresh)} have seen no data, so that it normalises nothing: this is not the "
            "geometry of the head in use. Run the head once in training mode on its usual, raw h.",
            stacklevel=level,
        )


def is_batch_norm(module: nn.Module) -> bool:
    """Tell whether a module is a BatchNorm: torch's, or one with its buffers, such as that of our heads."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return False
    return all(hasattr(module, name) for name in ("running_mean", "running_var", "num_batches_tracked"))


@contextmanager
def frozen(head: Map, dtype: torch.dtype) -> Iterator[Map]:
    """Give the head as a function of h alone, in `dtype`, in eval mode; the head is left as it was.

    Its parameters and buffers are detached copies where `dtype` differs, so that neither gradients nor counters of the
    head change.

    Raises:
        UsageError: as `check_eval`, the head fails on h, or z is no `[rows, out_dim]`.
    """
    check_eval(head)
    modules = list(head.modules()) if isinstance(head, nn.Module) else []
    training = [module.training for module in modules]
    tensors: Mapping[str, Tensor] = {}
    if isinstance(head, nn.Module):
        named = [*head.named_parameters(), *head.named_buffers()]
        tensors = {name: _cast(t, dtype) for name, t in named}
        head.eval()

    def run(h: Tensor) -> Tensor:
        try:
            with full_precision(h):
                z = functional_call(head, dict(tensors), (h,)) if isinstance(head, nn.Module) else head(h)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UsageError(
                f"The head cannot work on h of shape {list(h.shape)}, {h.dtype}, on {h.device}: {error}. Expected a "
                "head from [rows, in_dim] to [rows, out_dim]; a function's own tensors need the dtype of h."
            ) from error
        if not isinstance(z, Tensor) or z.ndim != 2 or len(z) != len(h):
            came = f"shape {list(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
            raise UsageError(f"Expected z = head(h) of shape [{len(h)}, out_dim] for h {list(h.shape)}, got {came}.")
        return z.to(dtype)

    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield run
    finally:
        for module, mode in zip(modules, training):
            module.training = mode


def as_input(h: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `h` as a constant of `dtype`, on the CPU where the device has no such type."""
    h = h.detach()
    if dtype == torch.float64 and h.device.type == "mps":  # Apple's GPUs have no float64
        h = h.cpu()
    return h.to(dtype, copy=True)


def check_rowwise(run: Map, h: Tensor) -> None:
    """Refuse a function whose z of a row depends on chance or on other rows.

    Raises:
        UsageError: so it does.
    """
    with torch.no_grad():
        row = h[:1].detach()
        alone, beside = run(row), run(torch.cat([row, 2 * row + 1]))[:1]
    tolerance = 1e3 * torch.finfo(h.dtype).eps
    if not torch.allclose(alone, beside, rtol=tolerance, atol=tolerance * float(alone.abs().max())):
        raise UsageError(
            "The head gives a row another z when a second row stands beside it, or at a second call: it couples rows "
            "or is random, so that a Jacobian per sample does not exist. Switch that off (head.eval()) first."
        )


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return tensor
    return (tensor.cpu() if dtype == torch.float64 and tensor.device.type == "mps" else tensor).to(dtype)
