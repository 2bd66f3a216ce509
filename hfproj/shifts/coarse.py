"""CIFAR-100's 20 superclasses: coarse labels for images that carry fine ones, and the other way round.

Train with the coarse labels and probe the fine ones, and the question is what a representation keeps that its training
did not ask for. Superclasses are numbered alphabetically, as in CIFAR-100's own ``coarse_label_names``.

References:
    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, section 3.2 (the table).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import datasets
import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from hfproj.checking import checked
from hfproj.errors import UsageError

if TYPE_CHECKING:
    Labels: TypeAlias = datasets.Dataset | Tensor | np.ndarray | Sequence[int]
else:  # as in hfproj.typing
    Labels = Any

CIFAR100_SUPERCLASSES: dict[str, tuple[str, ...]] = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
_FINE = sorted(fine for members in CIFAR100_SUPERCLASSES.values() for fine in members)
_COARSE_OF = {fine: number for number, members in enumerate(CIFAR100_SUPERCLASSES.values()) for fine in members}
_TABLE = np.array([_COARSE_OF[fine] for fine in _FINE], dtype=np.int64)


@checked
def coarse_labels(labels: Labels, *, label_column: str = "label") -> Int64[Tensor, " images"]:
    """Return the superclass, 0 to 19, of fine labels 0 to 99.

    Args:
        labels: CIFAR-100 as a ``datasets.Dataset``, or its fine labels as a tensor, array or list.
        label_column: Column of the data set with the fine labels.

    Raises:
        UsageError: If the data set has other classes than CIFAR-100, or a label is not one of 0 to 99.

    Example (apple is a fruit, trout a fish):
        >>> names = list(CIFAR100_SUPERCLASSES)
        >>> [names[i] for i in coarse_labels([0, 91]).tolist()]
        ['fruit_and_vegetables', 'fish']
    """
    if isinstance(labels, datasets.Dataset):
        labels = _fine_labels(labels, label_column)
    fine = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if fine.size and (not np.issubdtype(fine.dtype, np.integer) or fine.ndim != 1):
        raise UsageError(f"Expected class numbers [images], got {fine.dtype} of shape {list(fine.shape)}.")
    if fine.size and not 0 <= fine.min() <= fine.max() < len(_FINE):
        raise UsageError(f"Expected fine labels of CIFAR-100, 0 to 99, got {fine.min()} to {fine.max()}.")
    return torch.from_numpy(_TABLE[fine.astype(np.int64)])


@checked
def with_coarse_labels(
    dataset: datasets.Dataset, *, label_column: str = "label", coarse_column: str = "coarse_label"
) -> datasets.Dataset:
    """Return CIFAR-100 with a further column of superclasses, a ``ClassLabel`` with their names.

    ``hfproj.EvalImages(…, label_column="coarse_label")`` and `hfproj.ImageViews` read it.

    Args:
        dataset: CIFAR-100, with fine labels.
        label_column: Column with the fine labels.
        coarse_column: Name of the new column; one of that name is replaced.

    Raises:
        UsageError: If it is another data set.
    """
    coarse = coarse_labels(dataset, label_column=label_column).tolist()
    if coarse_column in dataset.column_names:
        dataset = dataset.remove_columns(coarse_column)
    feature = datasets.ClassLabel(names=list(CIFAR100_SUPERCLASSES))
    return dataset.add_column(coarse_column, coarse, feature=feature)


def _fine_labels(dataset: datasets.Dataset, column: str) -> np.ndarray:
    if column not in dataset.column_names:
        raise UsageError(
            f"The data set has no column {column!r}; it has {', '.join(dataset.column_names)}. "
            "Name the one with the fine labels: label_column=…"
        )
    names = getattr(dataset.features[column], "names", None)
    if names is not None and [name.replace(" ", "_") for name in names] != _FINE:
        raise UsageError(
            f"Superclasses are those of CIFAR-100's 100 classes; column {column!r} has {len(names)} "
            f"classes, {', '.join(names[:3])}, …"
        )
    return np.asarray(dataset[column])
