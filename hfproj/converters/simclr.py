"""SimCLR: PyTorch ports of v1, and v2 as converted from Google's files.

v1 are ports that train themselves: Spijkervet's (``encoder``, ``projector`` without biases or norms) and sthalles'
(``backbone`` whose ``fc`` is Linear-ReLU-Linear with biases). v2 is what Separius' converter makes of Google's
TensorFlow files: three layers without biases and with BatchNorm over both views, the last without shift (the port keeps
one of zeros), and a ResNet with names of its own. Its networks with selective kernels or of another width are in no
library: the head alone can be read with ``backbone=hfproj.FeatureBackbone(width)``.

Left out: the linear classifier ``fc`` of v2. tonylins/simclr-converter keeps no head, so there is nothing to convert.

References:
    Chen et al. 2020, arXiv 2002.05709 and 2006.10029; Spijkervet/SimCLR (b844b01) ``simclr/simclr.py``, ``model.py``:
    the state dict itself; sthalles/SimCLR (081e55b) ``models/resnet_simclr.py`` (the line of the head is a comment
    there), ``simclr.py``: ``{"state_dict"}``; Separius/SimCLRv2-Pytorch (46ad293) ``convert.py``: ``{"resnet",
    "head"}``, its ``resnet.py`` as copied in kaipak/SimCLRv2-PyTorch (126a5b4) ``simclr/modules/resnet_v2.py``;
    tonylins/simclr-converter (59bee34) ``convert.py``.
"""

from hfproj.converters.family import Family, Layout
from hfproj.converters.mlp import MLP

_RESNET_V2 = (
    (r"^net\.0\.0\.", "conv1."),
    (r"^net\.0\.1\.0\.", "bn1."),
    (r"^net\.(\d+)\.blocks\.(\d+)\.net\.0\.", r"layer\1.\2.conv1."),
    (r"^net\.(\d+)\.blocks\.(\d+)\.net\.1\.0\.", r"layer\1.\2.bn1."),
    (r"^net\.(\d+)\.blocks\.(\d+)\.net\.2\.", r"layer\1.\2.conv2."),
    (r"^net\.(\d+)\.blocks\.(\d+)\.net\.3\.0\.", r"layer\1.\2.bn2."),
    (r"^net\.(\d+)\.blocks\.(\d+)\.net\.4\.", r"layer\1.\2.conv3."),
    (r"^net\.(\d+)\.blocks\.(\d+)\.net\.5\.0\.", r"layer\1.\2.bn3."),
    (r"^net\.(\d+)\.blocks\.(\d+)\.projection\.shortcut\.", r"layer\1.\2.downsample.0."),
    (r"^net\.(\d+)\.blocks\.(\d+)\.projection\.bn\.0\.", r"layer\1.\2.downsample.1."),
)


def layouts(network: str) -> tuple[Layout, ...]:
    """Return the layouts of v1: Spijkervet's and sthalles'."""
    return (
        Layout(backbone="encoder.", head="projector.", structures=(MLP(bias=False, last_bias=False, max_depth=2),)),
        Layout(inside="state_dict", backbone="backbone.", head="backbone.fc.", structures=(MLP(max_depth=2),)),
    )


def layouts_v2(network: str) -> tuple[Layout, ...]:
    """Return the layout of v2."""
    structure = MLP(bias=False, norm=True, last_bias=False, last_norm=True, last_shift=False, batch_statistics="joint")
    return (
        Layout(
            backbone="resnet.",
            head="head.layers.",
            structures=(structure,),
            ignored={"resnet.fc.": "trained on labels"},
            rename=_RESNET_V2,
        ),
    )


V1 = Family(
    name="simclr",
    line="SimCLR v1, PyTorch ports (ResNet): two layers, no norm",
    source="Spijkervet/SimCLR, sthalles/SimCLR",
    layouts=layouts,
)
V2 = Family(
    name="simclr_v2",
    line="SimCLR v2 of Google by a PyTorch port (ResNet): three layers, BatchNorm over both views",
    source="Separius/SimCLRv2-Pytorch",
    layouts=layouts_v2,
    full_file="the converter's file with 'resnet' and 'head'",
)
