"""VICReg: a ResNet and an expander whose last layer has no bias.

References:
    Bardes, Ponce, LeCun 2021, arXiv 2105.04906; facebookresearch/vicreg ``main_vicreg.py`` (08c8c0c), ``resnet.py``
    (373b81c): ``{"epoch", "model": {"module.backbone.*", "module.projector.*"}, "optimizer"}``. Its ResNet pads before
    and in the first convolution, 3 pixels together, which is torchvision's.
"""

from hfproj.converters.family import Family, Layout
from hfproj.converters.mlp import MLP


def layouts(network: str) -> tuple[Layout, ...]:
    """Return the layout."""
    return (
        Layout(
            inside="model",
            backbone="backbone.",
            head="projector.",
            structures=(MLP(norm=True, last_bias=False),),
        ),
    )


FAMILY = Family(
    name="vicreg",
    line="VICReg (ResNet): three layers, the last without bias",
    source="facebookresearch/vicreg",
    layouts=layouts,
    full_file="resnet50_fullckpt.pth",
)
