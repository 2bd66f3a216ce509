"""BYOL: PyTorch ports.

yaox12's (``online_network.encoder.4.…`` are the children of a ResNet in their order, the projector is spelled
``projetion``) runs both views at once, so that its BatchNorm is joint over them; lucidrains' takes any network, of
which a ResNet is read, and has SimSiam's projector where it was made with ``use_momentum=False``.

Left out: the target network, which has no predictor (``network="target"`` reads it), and in lucidrains' the second copy
``net`` of the online one and the classifier ``fc`` behind the layer that is read.

DeepMind's own files are pickles of JAX arrays and are not read; yaox12's released file is of an older layout whose
names its code does not show.

References:
    Grill et al. 2020, arXiv 2006.07733; yaox12/BYOL-PyTorch (edefc01) ``model/basic_modules.py``, ``byol_model.py``,
    ``trainer/byol_trainer.py``: ``{"model": {"online_network.*", "target_network.*", "predictor.*"}}``;
    lucidrains/byol-pytorch (0095aa4) ``byol_pytorch/byol_pytorch.py``: the state dict, ``online_encoder.net.*``,
    ``online_encoder.projector.*``, ``target_encoder.*``, ``online_predictor.*``, ``net.*``.
"""

from typing import Any

from hfproj.converters.family import Family, Layout
from hfproj.converters.mlp import MLP

_CHILDREN = ((r"^0\.", "conv1."), (r"^1\.", "bn1."), *((rf"^{i + 3}\.", f"layer{i}.") for i in range(1, 5)))
_NAMED = MLP(norm=True, names=("l1", "bn1", "", "l2"), batch_statistics="joint")
_PLAIN = MLP(norm=True, max_depth=2)
_SIMSIAM = MLP(bias=False, norm=True, last_bias=False, last_norm=True, last_affine=False, min_depth=3, max_depth=3)


def layouts(network: str) -> tuple[Layout, ...]:
    """Return the layouts of a file with `network`: yaox12's and lucidrains'."""
    other = {"online": "target", "target": "online"}[network]
    why = f"of network={other!r}"

    def predictor(prefix: str, structure: MLP) -> dict[str, Any]:
        return {"predictor": prefix, "predictor_structures": (structure,)} if network == "online" else {}

    return (
        Layout(
            inside="model",
            backbone=f"{network}_network.encoder.",
            head=f"{network}_network.projetion.",
            structures=(_NAMED,),
            ignored={f"{other}_network.": why, "predictor.": why},
            rename=_CHILDREN,
            **predictor("predictor.predictor.", _NAMED),
        ),
        Layout(
            backbone=f"{network}_encoder.net.",
            head=f"{network}_encoder.projector.",
            structures=(_PLAIN, _SIMSIAM),
            ignored={
                f"{other}_encoder.": why,
                "net.": "a second copy of the online network",
                f"{network}_encoder.net.fc.": "behind the layer that is read",
                **({} if network == "online" else {"online_predictor.": why}),
            },
            **predictor("online_predictor.", _PLAIN),
        ),
    )


FAMILY = Family(
    name="byol",
    line="BYOL, PyTorch ports (ResNet): two layers, predictor",
    source="yaox12/BYOL-PyTorch, lucidrains/byol-pytorch",
    networks=("online", "target"),
    layouts=layouts,
)
