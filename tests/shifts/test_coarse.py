import datasets
import numpy as np
import pytest
import torch

from hfproj import UsageError
from hfproj.shifts.coarse import CIFAR100_SUPERCLASSES, coarse_labels, with_coarse_labels

# The coarse label of fine label 0, 1, 2, … in CIFAR-100's own files.
OFFICIAL = (
    "4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5 5 "
    "19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9 13 15 "
    "13 16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13 "
)
NAMES = sorted(fine for members in CIFAR100_SUPERCLASSES.values() for fine in members)


def cifar(names, labels):
    features = datasets.Features({"label": datasets.ClassLabel(names=names), "note": datasets.Value("string")})
    return datasets.Dataset.from_dict({"label": labels, "note": ["x"] * len(labels)}, features=features)


def test_the_table_is_cifars():
    assert coarse_labels(range(100)).tolist() == [int(number) for number in OFFICIAL.split()]
    assert coarse_labels(range(100)).bincount().tolist() == [5] * 20
    assert len(NAMES) == len(set(NAMES)) == 100
    assert list(CIFAR100_SUPERCLASSES) == sorted(CIFAR100_SUPERCLASSES)


def test_a_data_set_gets_a_column():
    data = cifar(NAMES, [99, 0, 2, 88]).select([0, 3, 1])
    got = with_coarse_labels(data)
    assert got["coarse_label"][:] == [13, 8, 4]
    assert got["label"][:] == [99, 88, 0]
    feature = got.features["coarse_label"]
    assert [feature.int2str(i) for i in got["coarse_label"]] == [
        "non-insect_invertebrates",
        "large_carnivores",
        "fruit_and_vegetables",
    ]
    assert with_coarse_labels(got)["coarse_label"][:] == [13, 8, 4]
    assert coarse_labels(data).tolist() == [13, 8, 4]


@pytest.mark.parametrize("fine", [torch.tensor([0, 91]), np.array([0, 91], dtype=np.uint8), [0, 91]])
def test_labels_of_any_kind(fine):
    got = coarse_labels(fine)
    assert got.dtype == torch.int64
    assert got.tolist() == [4, 1]
    assert coarse_labels([]).tolist() == []


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 100], "0 to 99, got 0 to 100"),
        ([-1], "0 to 99"),
        ([0.5], "float64"),
        ([[1]], r"shape \[1, 1\]"),
        (cifar(["cat", "dog"], [0, 1]), "column 'label' has 2 classes, cat, dog"),
        (cifar(NAMES[::-1], [0, 1]), "has 100 classes, worm"),
    ],
)
def test_what_is_not_cifar100_is_refused(labels, message):
    with pytest.raises(UsageError, match=message):
        coarse_labels(labels)
    with pytest.raises(UsageError, match="no column 'fine'; it has label, note"):
        coarse_labels(cifar(NAMES, [0]), label_column="fine")
