"""DirectCLR and its baselines: ResNet-50 with a projector, or none: then z is the first d0 entries of h.

A file shows whether there is a projector (modes ``simclr`` and ``single``). Without one nothing tells d0: give the
``--dim`` of training as ``d0`` (its default there is 360; ``baseline`` is the width of h). Left out: ``online_head``, a
classifier that was trained on labels beside.

References:
    Jing et al. 2021, arXiv 2110.09348; facebookresearch/directclr (48399f4) ``directclr/main.py``: ``checkpoint.pth``
    is ``{"epoch", "model", "optimizer"}`` with ``module.backbone.*``, ``module.online_head.*`` and
    ``module.projector.*`` below ``model``, the final file ``{"backbone", "head"}`` with the classifier as head.
"""

from hfproj.converters.family import Family, Layout
from hfproj.converters.mlp import MLP


def layouts(network: str, d0: int) -> tuple[Layout, ...]:
    """Return the layouts: with a projector, without, and of the final file."""
    classifier = "trained on labels"
    bare = ("subvector", {"d0": d0})
    return (
        Layout(inside="model", backbone="backbone.", head=None, fixed=bare, ignored={"online_head.": classifier}),
        Layout(
            inside="model",
            backbone="backbone.",
            head="projector.",
            structures=(
                MLP(bias=False, norm=True, last_bias=False, last_norm=True, max_depth=2),
                MLP(last_bias=False, names=("",)),
            ),
            ignored={"online_head.": classifier},
        ),
        Layout(backbone="backbone.", head=None, fixed=bare, ignored={"head.": classifier}),
    )


FAMILY = Family(
    name="directclr",
    line="DirectCLR (ResNet-50): the first d0 entries of h, or a projector of its baselines",
    source="facebookresearch/directclr",
    layouts=layouts,
    options={"d0": 360},
)
