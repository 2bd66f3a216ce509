"""Data sets with a shift that is known: corruptions, digits and patches on images, coarse classes.

What a model has learned is read where it was not asked for: on other classes than those of its training, on images with
a feature more, on images that are worse. Item i is the same in any order, on any process. Of the rooms it imports
`data` and what lies below it.
"""

from hfproj.shifts.coarse import CIFAR100_SUPERCLASSES, coarse_labels, with_coarse_labels
from hfproj.shifts.composites import DigitsOnImages, DigitViews, SpuriousMixture
from hfproj.shifts.corruptions import CorruptedDataset, corrupt, list_corruptions

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
