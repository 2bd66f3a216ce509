"""A stand-in for a frozen backbone whose representations are cached: heads train on the cache."""

from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from hfproj.backbones.structure import READING
from hfproj.checking import checked
from hfproj.errors import UsageError
from hfproj.typing import Pooling


class FeatureBackbone(nn.Module):
    """Takes representations h and returns them, so that a head can be attached to cached features.

    An adapter trained on it has the width, the pooling, the layer and the source of the real backbone in its config:
    saved, it loads onto the real backbone like any other.

    Args:
        in_dim: Width of the representation.
        pooling: How the real backbone was pooled.
        layer: Which of its blocks was read; -1 for its final output.
        reading: Version of the rules by which it was read, see `hfproj.backbones.reading`.
        source: ``{"library", "id", "kwargs"}`` of the real backbone, if known.
        fingerprint: That of the real backbone, if known: ``model.peft_config["default"].fingerprint``.

    Example:
        >>> import torch
        >>> FeatureBackbone(4)(torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """

    @checked
    def __init__(
        self, in_dim: int, *, pooling: Pooling = "cls", layer: int = -1, source: dict[str, Any] | None = None,
        reading: int = READING, fingerprint: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_dim, self.pooling, self.layer, self.reading = in_dim, pooling, layer, reading
        self.fingerprint = fingerprint
        self.__dict__["hfproj_source"] = source

    @classmethod
    def of(cls, model: PeftModel) -> "FeatureBackbone":
        """Return the stand-in for the backbone of `model`, whose active adapter is a head.

        Raises:
            UsageError: If the adapter changes the backbone, so that its representations can't be cached.
        """
        if not isinstance(model, PeftModel):
            hint = "attach one by peft.get_peft_model, or make FeatureBackbone(width) by hand"
            raise UsageError(f"Expected a PeftModel with a projection head, got {type(model).__name__}; {hint}.")
        config = model.peft_config[model.active_adapter]
        if config.trains_backbone or (config.backbone_adapter and config.trainable != "head"):
            raise UsageError(
                "The adapter trains the backbone too, so its representations change with every step and can't be "
                "cached; attach a head with trainable='head' and no backbone_adapter."
            )
        how = {"pooling": config.pooling, "layer": config.layer, "reading": config.reading}
        return cls(config.in_dim, **how, source=config.backbone, fingerprint=config.fingerprint)

    def check(self, pooling: Pooling | None, layer: int) -> None:
        """Refuse a head that would read the backbone in another place than the cached features come from.

        Raises:
            UsageError: If `pooling` or `layer` is another than that of the features.
        """
        if pooling not in (None, self.pooling) or layer != self.layer:
            raise UsageError(
                f"The cached features are those of pooling={self.pooling!r}, layer={self.layer}; pass these to "
                f"ProjectionHeadConfig instead of pooling={pooling!r}, layer={layer}, or cache other features."
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        return x
