"""Patch dropout: in training a ViT sees a random part of each image's patches, which saves time and regularizes.

References:
    Liu et al. 2022, "PatchDropout", arXiv 2208.07220; Li et al. 2023, "FLIP", arXiv 2212.00794.
Deviations:
    The kept patches are drawn from (seed, epoch, image, view), so that any number of processes sees the same ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from hfproj.data.philox import uniforms
from hfproj.errors import UsageError

_STREAM = 2**15  # a view number that no augmentation uses


class PatchDropout:
    """Drops patches behind a ViT's embeddings while `using` is active.

    Args:
        backbone: A `transformers` or timm ViT.
        rate: Share of the patches that is dropped.
        prefix_tokens: Tokens before the patches, which stay.
        seed: Seed of the choice.

    Raises:
        UsageError: the backbone has no token embeddings to drop from.
    """

    def __init__(self, backbone: nn.Module, *, rate: float, prefix_tokens: int, seed: int = 0):
        self.rate, self.prefix_tokens, self.seed = rate, prefix_tokens, seed
        self._rows: tuple[np.ndarray, int, int] | None = None
        model = getattr(backbone, "timm_model", backbone)
        target = getattr(model, "patch_drop", None) or getattr(model, "embeddings", None)
        if not isinstance(target, nn.Module) or getattr(backbone, "main_input_name", "pixel_values") == "input_ids":
            raise UsageError(f"patch_dropout={rate} needs a vision transformer; {type(backbone).__name__} has no patch embeddings. "
                             "Set patch_dropout=0.")
        self._handle = target.register_forward_hook(self._hook)

    @contextmanager
    def using(self, index: Tensor, epoch: int, num_views: int) -> Iterator[None]:
        """Drop patches in forward passes over `num_views` stacked views of the images `index` ``[batch]``."""
        self._rows = (index.cpu().numpy(), epoch, num_views)
        try:
            yield
        finally:
            self._rows = None

    def remove(self) -> None:
        """Disconnect from the backbone."""
        self._handle.remove()

    def _hook(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if self._rows is None or not torch.is_grad_enabled():
            return output
        index, epoch, num_views = self._rows
        patches = output.shape[1] - self.prefix_tokens
        keep = max(1, round(patches * (1 - self.rate)))
        epochs = np.full(len(index), epoch)
        noise = np.concatenate([
            uniforms(patches, seed=self.seed, epoch=epochs, index=index, view=_STREAM + v) for v in range(num_views)
        ])
        chosen = np.sort(np.argpartition(noise, keep - 1, axis=1)[:, :keep], axis=1) + self.prefix_tokens
        chosen = torch.from_numpy(chosen).to(output.device)
        kept = output.gather(1, chosen.unsqueeze(-1).expand(-1, -1, output.shape[-1]))
        return torch.cat([output[:, : self.prefix_tokens], kept], dim=1)
