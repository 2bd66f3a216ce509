"""SwAV, and DeepCluster-v2 of the same repository: ResNet, projection head, prototypes.

z is the output of ``projection_head``, before it is scaled to unit length; scores are cosines, since training scales
the prototypes to unit length before each step (the file holds them as the last step left them, near that). Several
blocks of prototypes (``prototypes.prototypes0``, … of DeepCluster-v2) follow one another in one. Crops of all sizes go
through the head at once, so its BatchNorm is joint over views.

References:
    Caron et al. 2020, arXiv 2006.09882; facebookresearch/swav (04b8f43) ``src/resnet50.py``, ``main_swav.py``:
    a release is the state dict, ``module.conv1.weight`` … ``module.projection_head.*``, ``module.prototypes.weight``; a
    checkpoint of training has it below ``state_dict``.
"""

from hfproj.converters.family import Family, Layout
from hfproj.converters.mlp import MLP


def layouts(network: str) -> tuple[Layout, ...]:
    """Return the layout."""
    return (
        Layout(
            inside="state_dict",
            backbone="",
            head="projection_head.",
            structures=(MLP(norm=True, max_depth=2, batch_statistics="joint"), MLP(names=("",))),
            prototypes="prototypes.",
        ),
    )


FAMILY = Family(
    name="swav",
    line="SwAV and DeepCluster-v2 (ResNet): two layers, prototypes",
    source="facebookresearch/swav",
    layouts=layouts,
)
