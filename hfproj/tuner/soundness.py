"""Whether what an adapter holds can be computed with: a file's numbers in the dtype they are used in, and a head."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfproj.backbones.fingerprint import samples_of
from hfproj.errors import AdapterFileError

LARGEST = (
    1e9  # of a weight: the product of three and of a scaling stays below 3e38, and none that was trained is larger
)


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


class Kept:
    """The values of tensors before something is done that must not change them.

    Values are not copied: what replaces a tensor's values (as most of PEFT's initialisations do) can be taken back, and
    what changes them in place is only seen, by samples.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.values = {name: t.detach() for name, t in tensors.items() if t.is_floating_point() and not t.is_meta}
        self.samples = samples_of(self.values)

    def restore(self, tensors: Mapping[str, Tensor]) -> tuple[list[str], bool]:
        """Return the names of `tensors` that have other values now, and whether all have their old ones again."""
        there = {name: tensors[name] for name in self.values if name in tensors and not tensors[name].is_meta}
        now, lost = samples_of(there), samples_of(self.values)
        changed = [name for name in now if not np.array_equal(now[name], self.samples[name])]
        for name in changed:
            there[name].data = self.values[name]
        return changed, all(np.array_equal(lost[name], self.samples[name]) for name in changed)
