"""The EMA teacher (momentum encoder, target network) of MoCo, BYOL, DINO and others.

After each optimizer step, θ̄ ← m θ̄ + (1 − m) θ for the trained parameters, where m goes from `start` to `end` along

    m_t = end − (end − start) (1 + cos(π t / T)) / 2.

BatchNorm statistics are the teacher's own, from its own forward passes. What is frozen is shared, not copied. (torch's
``AveragedModel`` would copy the frozen backbone too, and average its buffers.)

References:
    He et al. 2020, arXiv 1911.05722, eq. 2; Grill et al. 2020, arXiv 2006.07733, section 3.2; facebookresearch/dino.
Deviations:
    MoCo v3 updates at the start of the next forward pass: the same up to one step of the schedule.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hfproj import filenames
from hfproj.backbones.loading import bare_backbone
from hfproj.errors import AdapterFileError, UsageError
from hfproj.tuner.backbone_tensors import BackboneTensors
from hfproj.tuner.layer import CHILD
from hfproj.tuner.views import forward_views


class EMA:
    """A copy of a ``PeftModel`` that follows it; `momentum` is m of the first and of the last step, in [0, 1]."""

    def __init__(self, model: nn.Module, momentum: Sequence[float]):
        start, end = momentum
        if not (0 <= start <= 1 and 0 <= end <= 1):
            raise UsageError(f"The momentum of the EMA teacher must lie in [0, 1], got {start} to {end}.")
        self.start, self.end = start, end
        shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
        for module in model.modules():  # values that are kept on the CPU: the copy never switches adapters
            shared |= {id(v): v for v in vars(module).values() if isinstance(v, BackboneTensors)}
        # It keeps requires_grad, by which a backbone's BatchNorm knows that it is trained; its passes have no gradient.
        self.module = copy.deepcopy(model, shared)
        self.module.train()

    def momentum(self, progress: float) -> float:
        """Return m at `progress` in [0, 1] of the training."""
        return self.end - (self.end - self.start) * (1 + math.cos(math.pi * progress)) / 2

    @torch.no_grad()
    def update(self, model: nn.Module, progress: float) -> None:
        """Move the copy towards `model`."""
        for copied, parameter in zip(self.module.parameters(), model.parameters(), strict=True):
            if copied is not parameter:
                copied.lerp_(parameter.to(copied.dtype), 1 - self.momentum(progress))

    @torch.no_grad()
    def targets(self, views: Sequence[Any], output: str, count: int | None) -> Any:
        """Return ``"projection"`` or ``"scores"`` ``[views, batch, dim]`` of the first `count` views (None: of all)."""
        out = forward_views(self.module, views[:count])
        return out.scores if output == "scores" else out.z

    def _own(self) -> dict[str, Tensor]:
        """Return what is not shared: trained parameters and all buffers."""
        tensors = self.module.state_dict(keep_vars=True)
        return {n: t for n, t in tensors.items() if not isinstance(t, nn.Parameter) or t.requires_grad}

    def save(self, folder: Path) -> None:
        """Write the copy into `folder`."""
        tensors = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in self._own().items()}
        save_file(tensors, folder / filenames.EMA, metadata={"format": "pt"})

    def load(self, folder: Path, *, hint: str) -> None:
        """Read the copy from `folder`, where its adapter may have had another name; `hint` ends messages of errors."""
        try:
            saved, own = load_file(folder / filenames.EMA), self._own()
            names = self._names_in(saved)
            if any(names[n] not in saved or saved[names[n]].shape != t.shape for n, t in own.items()):
                raise ValueError("its tensors are those of another adapter")
        except (OSError, ValueError, SafetensorError) as error:
            said = f"{folder} holds no EMA teacher of this model in {filenames.EMA} ({error}); {hint}."
            raise AdapterFileError(said) from error
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[names[name]])

    def _names_in(self, saved: dict[str, Tensor]) -> dict[str, str]:
        """Return own name → name in a file, which differ where the adapter had another name there."""
        own = self._own()
        names, renamed = {name: name for name in own}, {}
        active = getattr(bare_backbone(self.module), CHILD).active_name
        for path, module in self.module.named_modules():
            for name in module.state_dict() if isinstance(module, BaseTunerLayer) else ():
                container, adapter, *rest = name.split(".")
                if adapter == active and f"{path}.{name}" in own:
                    renamed[f"{path}.{name}"] = (f"{path}.{container}.", "".join(f".{part}" for part in rest))
        # The file may hold buffers of other adapters, so a trained parameter tells what the adapter was called.
        trained = [n for n in renamed if isinstance(own[n], nn.Parameter) and own[n].requires_grad]
        if trained and trained[0] not in saved:
            start, end = renamed[trained[0]]
            called = [n[len(start) : len(n) - len(end)] for n in saved if n.startswith(start) and n.endswith(end)]
            if called:
                names |= {n: f"{start}{called[0]}{end}" for n, (start, end) in renamed.items()}
        return names
