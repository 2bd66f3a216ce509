"""Whether what an adapter holds can be computed with: a file's numbers in the dtype they are used in, and a head."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfproj.errors import AdapterFileError

LARGEST = (
    1e9  # of a weight: the product of three and of a scaling stays below 3e38, and none that was trained is larger
)
LARGEST_NUMBER = 1e6  # of an option, such as lora_alpha


def problem_of(name: str, tensor: Tensor, dtype: torch.dtype = torch.float32) -> str | None:
    """Return what is wrong with a tensor of a file that is used in `dtype`, or None."""
    if not tensor.is_floating_point():
        return None
    used = tensor if torch.finfo(tensor.dtype).max <= torch.finfo(dtype).max else tensor.to(dtype)
    low, high = used.aminmax() if used.numel() else (torch.zeros(()), torch.zeros(()))  # NaN comes through
    if not bool(low.isfinite() & high.isfinite()):
        return "NaN or infinity"
    last = name.rpartition(".")[2]
    if last == "running_var" and bool(low < 0):
        return "a negative variance"
    largest = max(-float(low), float(high))
    return f"numbers beyond {LARGEST:.0e}" if largest > LARGEST and not last.startswith("running_") else None


def check_sound(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse tensors of a file that can't be computed with in the dtype of the model's `own` tensors."""
    found = ((name, problem_of(name, t, own[name].dtype if name in own else t.dtype)) for name, t in tensors.items())
    bad = [f"{problem} in {name}" for name, problem in found if problem]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        what = f"The saved tensors hold {', '.join(bad[:3])}{more}"
        raise AdapterFileError(f"{what}: their training diverged or the file is damaged; take an earlier checkpoint.")


@torch.no_grad()
def check_head(modules: Any, tensors: Mapping[str, Tensor], in_dim: Any) -> None:
    """Refuse a head that gives NaN or infinity for representations of ordinary size.

    `modules` are its `HeadModules`, computed with `tensors` in place of their own.
    """
    state = [*modules.parameters(), *modules.buffers()]
    if any(t.is_meta for t in state) or not state:
        return
    like = next((t for t in state if t.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(4, in_dim, generator=generator).to(like.device, like.dtype)
    training = {module: module.training for module in modules.modules()}
    try:
        given = {
            n: t.to(like.device, like.dtype) if t.is_floating_point() else t.to(like.device) for n, t in tensors.items()
        }
        out = torch.func.functional_call(modules.eval(), given, (h,), strict=False)
    finally:
        for module, mode in training.items():
            module.training = mode
    bad = [name for name, value in out.items() if not bool(value.isfinite().all())]
    if bad:
        what = f"The head gives NaN or infinity ({', '.join(bad)}) for a representation of ordinary size"
        raise AdapterFileError(f"{what}: its weights or options are damaged; take an earlier checkpoint.")


def kept_tensors(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
    """Return references to the values of tensors, by which `restore_rewritten` sees whether they were replaced."""
    return {name: (tensor.detach(), tensor._version) for name, tensor in tensors.items()}


def restore_rewritten(kept: Mapping[str, tuple[Tensor, int]], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of `tensors` that were given other values since they were kept, and take that back.

    Values that were replaced (as PEFT's initialisations do) are restored; one that was changed in place is lost.
    """
    changed = []
    for name, (value, version) in kept.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.is_meta:
            continue
        if tensor.data_ptr() != value.data_ptr() or tensor.dtype != value.dtype:
            if not torch.equal(tensor.detach(), value):
                changed.append(name)
            if isinstance(tensor, nn.Parameter):
                tensor.data = value
        elif tensor._version != version:
            changed.append(name)
    return changed
