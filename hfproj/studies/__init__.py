"""Studies: what belongs to single papers (the rows of their tables, what is claimed of them, experiments and figures).

The top floor: a study may import every room, and no room imports a study. `hfproj`, the registry of presets and
`hfproj.reproduction` reach what is here by name, when it is asked for. The data sets that were here are
`hfproj.shifts`.
"""

from hfproj.shifts import (
    CIFAR100_SUPERCLASSES, CorruptedDataset, DigitsOnImages, DigitViews, SpuriousMixture, coarse_labels, corrupt,
    list_corruptions, with_coarse_labels,
)  # fmt: skip

__all__ = [
    "CIFAR100_SUPERCLASSES", "CorruptedDataset", "DigitViews", "DigitsOnImages", "SpuriousMixture", "coarse_labels",
    "corrupt", "list_corruptions", "with_coarse_labels",
]  # fmt: skip
