"""Objectives: what a head is trained on, one method a file, each an ``nn.Module`` with buffers only, made by name::

    objective(z, *, labels=None, target=None, prediction=None, scores=None, index=None, step=None) -> ObjectiveOutput

with projections ``z: [views, batch, dim]``. :mod:`hfproj.objectives.base` has what all of them share,
:mod:`~hfproj.objectives.queue` the memory of some, :mod:`~hfproj.objectives.buffers` their file beside a checkpoint.
This room imports ``functional`` and the floor below it.
"""

from typing import Any

from torch import nn

from hfproj.checking import checked
from hfproj.objectives.base import KEYWORDS
from hfproj.registry import Registry

__all__ = ["OBJECTIVES", "create_objective", "list_objectives", "register_objective"]

OBJECTIVES: Registry[nn.Module] = Registry(
    "objective",
    {
        "deepcluster_v2": ("hfproj.objectives.deepcluster_v2:DeepClusterV2", "Predict the cluster of the epoch before"),
        "dino": ("hfproj.objectives.dino:DINO", "Predict a teacher's distribution over prototypes, centred and sharp"),
        "barlow_twins": ("hfproj.objectives.barlow_twins:BarlowTwins", "Correlate dimensions with themselves only"),
        "byol": ("hfproj.objectives.byol:BYOL", "Predict the EMA target network's projection of the other view"),
        "lejepa": ("hfproj.objectives.lejepa:LeJEPA", "Views meet at their mean, projections become Gaussian"),
        "simsiam": ("hfproj.objectives.simsiam:SimSiam", "Predict the other view's projection, without its gradient"),
        "vicreg": ("hfproj.objectives.vicreg:VICReg", "Views agree, dimensions vary and do not covary"),
        "w_mse": ("hfproj.objectives.w_mse:WMSE", "Views agree after whitening"),
        "zero_cl": ("hfproj.objectives.zero_cl:ZeroCL", "Whitened views agree by features, images or both"),
        "nt_xent": ("hfproj.objectives.nt_xent:NTXent", "SimCLR: tell the views of an image from all other images"),
        "grouped": ("hfproj.objectives.grouped:Grouped", "Sum another objective over random groups of dimensions"),
        "info_nce": ("hfproj.objectives.info_nce:InfoNCE", "Find the other view of an image among that view's rows"),
        "cross_entropy": ("hfproj.objectives.cross_entropy:CrossEntropy", "Supervised: the class from logits"),
        "dcl": ("hfproj.objectives.dcl:DCL", "Decoupled contrastive: NT-Xent without the positive below the logarithm"),
        "dclw": ("hfproj.objectives.dcl:DCL", "DCL with weaker pull on pairs that agree", {"weighted": True}),
        "supcon": ("hfproj.objectives.supcon:SupCon", "Rows of the same class find each other; needs labels"),
        "sigmoid": ("hfproj.objectives.sigmoid:SigmoidContrastive", "SigLIP: judge each pair of rows alone"),
        "align_uniform": ("hfproj.objectives.align_uniform:AlignUniform", "Views close together, images spread evenly"),
        "spectral": ("hfproj.objectives.spectral:Spectral", "Spectral contrastive loss of rows with their lengths"),
        "simcse": ("hfproj.objectives.simcse:SimCSE", "Sentences under dropout, with or without hard negatives"),
        "moco": ("hfproj.objectives.moco:MoCo", "MoCo v2: find the EMA teacher's key of an image in a queue of keys"),
        "moco_v3": ("hfproj.objectives.moco_v3:MoCoV3", "Predict the EMA teacher's view of an image among the batch's"),
        "nnclr": ("hfproj.objectives.nnclr:NNCLR", "Predict the nearest neighbour of another view in a queue"),
        "swav": ("hfproj.objectives.swav:SwAV", "Predict the balanced prototype assignment of another view"),
    },
    base=nn.Module, needs=["forward"], calls=lambda cls: {"forward": ["z", *(f"{keyword}=" for keyword in KEYWORDS)]},
)  # fmt: skip


@checked
def create_objective(name: str, **options: Any) -> nn.Module:
    """Make an objective by its name, one of :func:`list_objectives`, with options of its constructor.

    Raises:
        UsageError: If no objective has this name, it has no such option, or a value is out of range.

    Example:
        >>> create_objective("nt_xent", temperature=0.5).temperature
        0.5
    """
    return OBJECTIVES.create(name, **options)


@checked
def list_objectives() -> dict[str, str]:
    """Return every objective's name with the line that describes it.

    Example:
        >>> "nt_xent" in list_objectives()
        True
    """
    return OBJECTIVES.list()


@checked
def register_objective(name: str, cls: type[nn.Module], line: str = "") -> None:
    """Add an objective class of your own; a checkpoint trained with it needs the same call before it is loaded.

    Args:
        name: What :func:`create_objective` will know it by.
        cls: Its constructor takes keywords only; it is called as the module docstring says.
        line: What it is; by default the first line of the class docstring.

    Raises:
        UsageError: If the name is taken, or the class is no ``nn.Module`` with a ``forward`` that takes z and every
            keyword.
    """
    OBJECTIVES.register(name, cls, line)
