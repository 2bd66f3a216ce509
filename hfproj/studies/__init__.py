"""Studies: what belongs to single papers (their data sets, experiments, figures and the rows of their tables).

The top floor: a study may import every room, and no room imports a study. `hfproj` and the registry of presets reach
what is here by name, when it is asked for.
"""

from hfproj.studies.coarse import CIFAR100_SUPERCLASSES, coarse_labels, with_coarse_labels
from hfproj.studies.composites import DigitsOnImages, DigitViews, SpuriousMixture
from hfproj.studies.corruptions import CorruptedDataset, corrupt, list_corruptions

__all__ = [
    "CIFAR100_SUPERCLASSES",
    "CorruptedDataset",
    "DigitViews",
    "DigitsOnImages",
    "SpuriousMixture",
    "coarse_labels",
    "corrupt",
    "list_corruptions",
    "with_coarse_labels",
]
