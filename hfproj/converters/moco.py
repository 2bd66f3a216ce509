"""MoCo v1 and v2: a ResNet whose ``fc`` is the head.

v1: one linear layer, v2 (``--mlp``): Linear-ReLU-Linear with biases, both to 128. Left out: the other encoder and the
queue of keys.

References:
    He et al. 2019, arXiv 1911.05722; Chen et al. 2020, arXiv 2003.04297; facebookresearch/moco (4397a04)
    ``moco/builder.py``, ``main_moco.py``: ``{"state_dict": {"module.encoder_q.*", "module.encoder_k.*",
    "module.queue", "module.queue_ptr"}}``.
"""

from functools import partial

from hfproj.converters.family import Family, Layout
from hfproj.converters.mlp import MLP

_ENCODERS = {"query": "encoder_q.", "key": "encoder_k."}


def layouts(network: str, structure: MLP) -> tuple[Layout, ...]:
    """Return the layouts of a file with `network`."""
    own = _ENCODERS[network]
    ignored = {prefix: f"of network={name!r}" for name, prefix in _ENCODERS.items() if name != network}
    return (
        Layout(
            inside="state_dict",
            backbone=own,
            head=f"{own}fc.",
            structures=(structure,),
            ignored={**ignored, "queue": "keys of past batches"},
        ),
    )


V1 = Family(
    name="moco_v1",
    line="MoCo v1 (ResNet): one linear layer",
    source="facebookresearch/moco",
    networks=("query", "key"),
    layouts=partial(layouts, structure=MLP(names=("",))),
)
V2 = Family(
    name="moco_v2",
    line="MoCo v2 (ResNet): two layers, no norm",
    source="facebookresearch/moco",
    networks=("query", "key"),
    layouts=partial(layouts, structure=MLP(max_depth=2)),
)
