"""Barlow Twins: ResNet-50 and a projector of three layers without biases.

Left out: ``bn``, the BatchNorm without parameters behind z. It belongs to the loss, which normalises z by the
statistics of the batch.

References:
    Zbontar et al. 2021, arXiv 2103.03230; facebookresearch/barlowtwins (046eec3) ``main.py``:
    ``checkpoint.pth`` is ``{"epoch", "model", "optimizer"}`` with ``module.backbone.*``, ``module.projector.*`` and
    ``module.bn.*`` below ``model``.
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
            structures=(MLP(bias=False, norm=True, last_bias=False),),
            ignored={"bn.": "of the loss"},
        ),
    )


FAMILY = Family(
    name="barlow_twins",
    line="Barlow Twins (ResNet-50): three layers without biases",
    source="facebookresearch/barlowtwins",
    layouts=layouts,
    full_file="checkpoint.pth ('full checkpoint')",
)
