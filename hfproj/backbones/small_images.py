"""ResNets of timm for images of 32 pixels, of any width: what is published on CIFAR has no other backbone.

Where ImageNet's stem halves an image twice before the first block, this one is a 3×3 convolution of stride 1 without
max-pool. `width` scales the channels of every stage, so that a run fits a small machine; the stem keeps its 64.

References:
    Chen et al. 2020, arXiv 2002.05709, appendix B.9 (the stem); vturrisi/solo-learn (9187ea3), which does the same.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from hfproj.errors import UsageError, check_choice

CHANNELS = (64, 128, 256, 512)
STEMS = ("imagenet", "cifar")
OPTIONS = ("stem", "width")  # of `hfproj.load_backbone`, beside those of timm


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return those of `options` that are ours, and timm's, with the channels that `width` means.

    Raises:
        UsageError: If a value is out of its range, or a width is asked of pretrained weights.

    Example:
        >>> split_options({"width": 0.25, "pretrained": False})[1]
        {'pretrained': False, 'channels': (16, 32, 64, 128)}
    """
    own = {name: options[name] for name in OPTIONS if options.get(name) is not None}
    timms = {name: value for name, value in options.items() if name not in OPTIONS}
    check_choice("stem", own.get("stem", "imagenet"), STEMS)
    width: Any = own.get("width", 1.0)
    number = isinstance(width, int | float) and not isinstance(width, bool)
    if not number or not 1 / 64 <= width <= 16:
        raise UsageError(f"Expected width to be a number from 1/64 to 16, a multiple of the usual one, got {width!r}.")
    if own and timms.get("pretrained", True):
        raise UsageError(
            f"There are no pretrained weights for {', '.join(f'{n}={v!r}' for n, v in own.items())}; pass "
            "pretrained=False and train the whole backbone, trainable='full'."
        )
    if width != 1:
        channels = tuple(max(1, round(width * channel)) for channel in CHANNELS)
        timms["channels"] = channels
    return own, timms


def with_stem(model: nn.Module, own: Mapping[str, Any], name: str) -> nn.Module:
    """Return the model with the stem that `own` asks for, of new weights.

    Raises:
        UsageError: If it is no ResNet with a 7×7 stem.
    """
    if own and type(model).__name__ != "ResNet":
        what = " and ".join(own)
        raise UsageError(f"Expected a ResNet of timm for {what}, got {name!r}, a {type(model).__name__}; leave it out.")
    if own.get("stem") == "cifar":
        old: Any = model.get_submodule("conv1")
        if not isinstance(old, nn.Conv2d):
            raise UsageError(f"Expected a ResNet whose stem is one convolution, got {name!r}; take 'timm/resnet18'.")
        new = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")  # as timm begins its convolutions
        model.conv1, model.maxpool = new, nn.Identity()
    return model
