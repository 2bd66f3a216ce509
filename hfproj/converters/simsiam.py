"""SimSiam: a ResNet whose ``fc`` is a projector of three layers, and a predictor.

The last linear layer of the projector has a bias that the official code freezes, since the BatchNorm behind it (without
scale and shift) cancels it. It is kept: in eval mode the running mean holds it.

References:
    Chen, He 2020, arXiv 2011.10566; facebookresearch/simsiam (39ac33e) ``simsiam/builder.py``, ``main_simsiam.py``:
    ``{"state_dict": {"module.encoder.*", "module.encoder.fc.*", "module.predictor.*"}}``.
"""

from hfproj.converters.family import Family, Layout
from hfproj.converters.mlp import MLP


def layouts(network: str) -> tuple[Layout, ...]:
    """Return the layout."""
    return (
        Layout(
            inside="state_dict",
            backbone="encoder.",
            head="encoder.fc.",
            structures=(MLP(bias=False, norm=True, last_norm=True, last_affine=False, min_depth=3, max_depth=3),),
            predictor="predictor.",
            predictor_structures=(MLP(bias=False, norm=True, max_depth=2),),
        ),
    )


FAMILY = Family(
    name="simsiam",
    line="SimSiam (ResNet): three layers, last BatchNorm without parameters, predictor",
    source="facebookresearch/simsiam",
    layouts=layouts,
)
