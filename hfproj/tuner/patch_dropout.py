"""Patch dropout: in training a ViT sees a random part of each image's patches, which saves time and regularizes.

References:
    Liu et al. 2022, "PatchDropout", arXiv 2208.07220; Li et al. 2023, "FLIP", arXiv 2212.00794.
Deviations:
    The kept patches are drawn from (seed, epoch, image, view), so that any number of processes sees the same ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from hfproj.backbones import main_input_of
from hfproj.data.philox import uniforms
from hfproj.errors import UsageError
from hfproj.tuner.layer import CHILD

_STREAM = 2**15  # a view number that no augmentation uses
# Attention that places tokens by their position on the full grid: without some patches it would fail or misplace them.
_GRID = ("rope", "rotary", "relativeposition", "window")


class PatchDropout:
    """Drops patches behind a ViT's embeddings, in forward passes inside `using`, between `attach` and `remove`.

    `rate` is the fraction of the patches that is dropped; the `prefix_tokens` before them stay. A backbone that is no
    `transformers` or timm ViT with absolute positions is a UsageError.
    """

    def __init__(self, backbone: nn.Module, *, rate: float, prefix_tokens: int, seed: int = 0):
        self.rate, self.prefix_tokens, self.seed = rate, prefix_tokens, seed
        self._images: tuple[np.ndarray, np.ndarray] | None = None
        self._view, self._name = 0, type(backbone).__name__
        self._handle: Any = None
        model = getattr(backbone, "timm_model", backbone)
        target = getattr(model, "patch_drop", None) or getattr(model, "embeddings", None)
        if not isinstance(target, nn.Module) or main_input_of(backbone) == "input_ids":
            raise self._refusal("has no patch embeddings")
        if any(word in type(m).__name__.lower() for m in model.modules() for word in _GRID):
            raise self._refusal("places patches by rotary, relative or windowed positions")
        self._target = target

    @classmethod
    def for_model(cls, model: PeftModel, *, rate: float, seed: int) -> "PatchDropout":
        """Return one for the backbone of `model`, whose active head says where patches begin."""
        backbone = model.get_base_model()
        layer = getattr(backbone, CHILD)
        return cls(backbone, rate=rate, prefix_tokens=layer.points[layer.active_name].prefix_tokens, seed=seed)

    def attach(self) -> None:
        """Connect to the backbone."""
        self.remove()
        self._handle = self._target.register_forward_hook(self._hook)

    def remove(self) -> None:
        """Disconnect from the backbone."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    @contextmanager
    def using(self, index: Tensor, epoch: int) -> Iterator[None]:
        """Drop patches in forward passes over views of the images `index` ``[batch]``, view after view from view 0."""
        self._images, self._view = (index.cpu().numpy(), np.full(len(index), epoch)), 0
        try:
            yield
        finally:
            self._images = None

    @torch.compiler.disable
    def _hook(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self._images is None or not torch.is_grad_enabled():
            return output
        if not isinstance(output, Tensor) or output.ndim != 3:
            raise self._refusal("embeds images as feature maps")
        index, epoch = self._images
        first, self._view = self._view, self._view + len(output) // len(index)
        patches = output.shape[1] - self.prefix_tokens
        keep = max(1, round(patches * (1 - self.rate)))
        streams = range(_STREAM + first, _STREAM + self._view)
        noise = np.concatenate([uniforms(patches, seed=self.seed, epoch=epoch, index=index, view=v) for v in streams])
        chosen = np.sort(np.argpartition(noise, keep - 1, axis=1)[:, :keep], axis=1) + self.prefix_tokens
        rows = torch.from_numpy(chosen).to(output.device).unsqueeze(-1)
        kept = output.gather(1, rows.expand(-1, -1, output.shape[-1]))
        return torch.cat([output[:, : self.prefix_tokens], kept], dim=1)

    def _refusal(self, reason: str) -> UsageError:
        return UsageError(
            f"patch_dropout={self.rate} needs a vision transformer with absolute positions; {self._name} {reason}. "
            "Set patch_dropout=0."
        )
