import itertools
import pickle

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hfproj import UsageError
from hfproj.data import EvalImages, ImageViews, IndexedDataset, load_image_dataset
from hfproj.shifts.composites import DigitsOnImages, DigitViews, SpuriousMixture, paste

RNG = np.random.default_rng(0)
N = 400
PIXELS = RNG.integers(0, 256, (N, 32, 32, 3), dtype=np.uint8)
ITEMS = [{"image": Image.fromarray(pixels), "label": i % 5} for i, pixels in enumerate(PIXELS)]
BLACK = [{"image": np.zeros((24, 24), dtype=np.uint8), "label": i % 2} for i in range(N)]
PLAIN = {"size": 32, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}


def array(image):
    return np.asarray(image).astype(np.float64)


def scikit_learns(split):
    data = load_image_dataset("digits", split=split)
    return {(label, np.asarray(image).tobytes()) for label, image in zip(data["label"], data["image"])}


def test_paste_is_the_formula():
    image = torch.from_numpy(PIXELS[0]).permute(2, 0, 1)
    layer, before = RNG.integers(0, 256, (3, 9, 7), dtype=np.uint8), image.clone()
    mask = RNG.random((9, 7)) > 0.5
    got = paste(image, layer, mask, 5, 20, 0.7)
    m, v = np.zeros((32, 32)), np.zeros((3, 32, 32))
    m[5:14, 20:27], v[:, 5:14, 20:27] = mask, layer
    expected = image.numpy() * (1 - m) + m * (0.3 * image.numpy() + 0.7 * v)
    assert np.abs(got.numpy() - expected).max() <= 0.5 + 1e-4
    assert torch.equal(image, before)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_digit_is_one_of_scikit_learns(split):
    """Opaque on black at its own size: the pixels are the digit's, of the class that the label says."""
    data = DigitsOnImages(BLACK, opacity=1, size=8, place="center", split=split)
    known = scikit_learns(split)
    for item in itertools.islice(data, 60):
        digit = np.asarray(item["image"])[8:16, 8:16, 0]
        assert (item["digit_label"], digit.tobytes()) in known
        assert np.asarray(item["image"]).sum() == 3 * digit.sum(dtype=np.int64)
    assert not {pixels for _, pixels in scikit_learns("train")} & {pixels for _, pixels in scikit_learns("test")}


def test_digits_are_even_and_independent_of_the_class_and_lie_anywhere():
    data = DigitsOnImages(BLACK, opacity=1, size=8)
    digits = data.digit_labels
    assert digits.tolist() == [item["digit_label"] for item in data]
    assert (digits.bincount(minlength=10) - N / 10).abs().max() < 4 * (N * 0.09) ** 0.5
    table = np.zeros((10, 2))
    np.add.at(table, (digits.numpy(), np.arange(N) % 2), 1)
    expected = table.sum(1, keepdims=True) * table.sum(0) / N
    assert ((table - expected) ** 2 / expected).sum() < 27.9  # χ² of 9 degrees of freedom, level 0.001
    ink = sum(np.asarray(item["image"])[..., 0] > 0 for item in data)
    assert (ink[:, 1:-1].sum(0) > 0).all()  # the outer columns of scikit-learn's digits are almost always empty
    assert (ink.sum(1) > 0).all()


def test_items_keep_what_they_had_and_the_image_without_its_digit():
    data = DigitsOnImages([{**item, "note": "x"} for item in ITEMS[:5]], opacity=0.7)
    for i in range(5):
        item = data[i]
        assert sorted(item) == ["background", "digit_label", "image", "label", "note"]
        assert item["label"] == i
        assert np.array_equal(item["background"], PIXELS[i])
        changed = (array(item["image"]) != PIXELS[i]).any(-1)
        assert 0 < changed.sum() <= 20 * 20  # 5/8 of 32
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        assert np.ptp(rows) < 20
        assert np.ptp(columns) < 20
        grey = (array(item["image"]) - 0.3 * PIXELS[i]) / 0.7  # the layer: the same in all channels where it is laid
        assert np.ptp(grey[changed], axis=-1).max() <= 1 / 0.7 + 1e-9
    invisible = DigitsOnImages(ITEMS, opacity=0)[3]
    assert np.array_equal(invisible["image"], PIXELS[3])


def test_an_item_depends_on_seed_and_row_alone():
    data = DigitsOnImages(ITEMS)
    expected = {i: np.asarray(data[i]["image"]) for i in (7, 3, 399)}
    copy = pickle.loads(pickle.dumps(DigitsOnImages(ITEMS)))
    for i in (399, 3, 7, 3):
        assert np.array_equal(copy[i]["image"], expected[i])
    assert np.array_equal(copy[-1]["image"], expected[399])
    assert not np.array_equal(DigitsOnImages(ITEMS, seed=1)[3]["image"], expected[3])
    assert not torch.equal(DigitsOnImages(ITEMS, seed=1).digit_labels, data.digit_labels)
    with pytest.raises(IndexError):
        data[N]


def test_both_labels_reach_the_collator():
    data = IndexedDataset(DigitsOnImages(ITEMS))
    items = [data[i] for i in range(6)]
    assert EvalImages(**PLAIN)(items)["labels"].tolist() == [0, 1, 2, 3, 4, 0]
    assert EvalImages(**PLAIN, label_column="digit_label")(items)["labels"].equal(data.dataset.digit_labels[:6])


def views(kind, items, **options):
    return kind(**PLAIN, seed=3, **options)(items)["views"]


def numbered(data, rows, epoch=0):
    indexed = IndexedDataset(data)
    return [indexed[epoch, i] for i in rows]


@pytest.mark.parametrize("extra", [{}, {"local_views": 2, "local_size": 16}, {"num_views": 3}])
def test_a_view_is_that_of_the_image_with_or_without_its_digit(extra):
    items = numbered(DigitsOnImages(ITEMS), range(40), epoch=2)
    clean = [{**item, "image": item["background"]} for item in items]
    with_digit, without = views(ImageViews, items, **extra), views(ImageViews, clean, **extra)
    assert all(map(torch.equal, views(DigitViews, items, drop_probability=0, **extra), with_digit))
    assert all(map(torch.equal, views(DigitViews, items, drop_probability=1, **extra), without))
    for got, a, b in zip(views(DigitViews, items, drop_probability=0.4, **extra), with_digit, without):
        assert got.shape == a.shape
        assert all(torch.equal(row, one) or torch.equal(row, other) for row, one, other in zip(got, a, b))


def test_views_drop_the_digit_apart_from_each_other():
    rows, probability = range(N), 0.3
    items = numbered(DigitsOnImages(BLACK, opacity=1), rows)
    options = {"scale": None, "flip_probability": 0, "color_jitter_probability": 0, "grayscale_probability": 0}
    collate = DigitViews(size=24, mean=(0,) * 3, std=(1,) * 3, drop_probability=probability, **options)
    first, second = ((view.flatten(1).amax(1) == 0).double() for view in collate(items)["views"])
    error = (probability * (1 - probability) / N) ** 0.5
    assert abs(first.mean() - probability) < 4 * error
    assert abs(second.mean() - probability) < 4 * error
    assert abs((first != second).double().mean() - 2 * probability * (1 - probability)) < 4 * (0.42 * 0.58 / N) ** 0.5
    later = numbered(DigitsOnImages(BLACK, opacity=1), rows, epoch=1)
    assert ((collate(later)["views"][0].flatten(1).amax(1) == 0).double() != first).any()
    again = pickle.loads(pickle.dumps(collate))([items[i] for i in (9, 2)])["views"]
    assert all(torch.equal(view, whole[[9, 2]]) for view, whole in zip(again, collate(items)["views"]))


def test_dropping_is_nested_in_the_probability():
    """A view without digit at p has none at any larger p, so that runs along p differ in nothing else."""
    items = numbered(DigitsOnImages(ITEMS), range(60))
    clean = views(ImageViews, [{**item, "image": item["background"]} for item in items])[0]
    dropped = [
        (views(DigitViews, items, drop_probability=p)[0] == clean).flatten(1).all(1) for p in (0.0, 0.3, 0.6, 1.0)
    ]
    assert all((few <= many).all() for few, many in itertools.pairwise(dropped))
    assert dropped[1].sum() < dropped[2].sum() < 60


def test_items_without_background_are_refused():
    with pytest.raises(UsageError, match=r"'background'.*with 'image', 'label', 'index', 'epoch'; .*DigitsOnImages"):
        DigitViews(**PLAIN)(numbered(ITEMS, [0]))
    with pytest.raises(UsageError, match=r"drop_probability to be a number from 0 to 1, got 1\.5"):
        DigitViews(**PLAIN, drop_probability=1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opacity": 1.2}, "opacity to be a number from 0"),
        ({"size": 0}, "size to be at least 1"),
        ({"place": "centre"}, "Did you mean 'center'"),
        ({"split": "val"}, "Available: test, train"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        DigitsOnImages(ITEMS, **options)
    with pytest.raises(UsageError, match=message):
        SpuriousMixture(ITEMS, classes=(0, 1), **options)


def test_an_image_smaller_than_the_digit_is_refused():
    with pytest.raises(
        UsageError, match=r"size=33 does not fit an image of 32 × 32 pixels. \(item 2 of the data set\)"
    ):
        DigitsOnImages(ITEMS, size=33)[2]


@pytest.mark.parametrize(
    ("correlation", "counts"),
    [(0.95, [76, 4, 4, 76]), (0.5, [40, 40, 40, 40]), (1, [80, 0, 0, 80]), (0, [0, 80, 80, 0]), (0.99, [79, 1, 1, 79])],
)
def test_group_counts_are_exact(correlation, counts):
    data = SpuriousMixture(ITEMS, classes=(1, 3), correlation=correlation, size=8)
    assert len(data) == 160
    assert data.group_counts == counts
    items = list(data)
    assert np.bincount([item["group"] for item in items], minlength=4).tolist() == counts
    assert data.groups.tolist() == [item["group"] for item in items]
    assert all(item["group"] == 2 * item["label"] + item["attribute"] for item in items)
    rows = [i for i in range(N) if i % 5 in (1, 3)]
    assert [item["label"] for item in items] == [int(row % 5 == 3) for row in rows]
    assert all(np.array_equal(item["background"], PIXELS[row]) for item, row in zip(items, rows))


def test_the_attribute_is_what_is_seen():
    known = scikit_learns("train")
    data = SpuriousMixture(BLACK, classes=(1, 0), digits=(7, 2), opacity=1, size=8, place="center", correlation=0.8)
    for item in itertools.islice(data, 40):
        digit = np.asarray(item["image"])[8:16, 8:16, 0]
        assert ((7, 2)[item["attribute"]], digit.tobytes()) in known
    patches = SpuriousMixture(BLACK, classes=(1, 0), attribute="patch", opacity=1, size=6, correlation=0.8)
    for item in itertools.islice(patches, 40):
        red, green, _ = array(item["image"]).sum((0, 1))
        assert (green > red) == item["attribute"]
        assert (array(item["image"]).sum(-1) > 0).sum() == 36
    assert patches.groups.equal(data.groups)
    assert patches[0]["label"] == 1  # BLACK[0] is of class 0, the second of the two


def test_mixture_depends_on_the_seed_alone():
    options = {"classes": (0, 1), "correlation": 0.8}
    data, again, other = (SpuriousMixture(ITEMS, seed=seed, **options) for seed in (0, 0, 1))
    assert data.groups.equal(again.groups)
    assert not data.groups.equal(other.groups)
    copy = pickle.loads(pickle.dumps(again))
    for i in (50, 3):
        assert np.array_equal(copy[i]["image"], data[i]["image"])
        assert copy[i]["group"] == data.groups[i]
    dropped = DigitViews(**PLAIN, drop_probability=1)(numbered(data, [4]))
    assert dropped["views"][0].shape == (1, 3, 32, 32)


def test_classes_by_name_and_number():
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog", "owl"])})
    images = [Image.fromarray(pixels) for pixels in PIXELS[:30]]
    data = datasets.Dataset.from_dict({"image": images, "kind": [i % 3 for i in range(30)]}, features=features)
    by_name = SpuriousMixture(data, classes=("owl", "cat"), label_column="kind", correlation=0.7)
    by_number = SpuriousMixture(data, classes=(2, 0), label_column="kind", correlation=0.7)
    assert by_name.classes == by_number.classes == (2, 0)
    assert by_name.groups.equal(by_number.groups)
    assert by_name.group_counts == [7, 3, 3, 7]
    assert by_name[0]["label"] == 1
    for classes, message in [
        (("cat", "dot"), "Unknown class 'dot'. Did you mean 'dog'"),
        ((0, 0), r"two different classes of the images, got \(0, 0\); the images have 0, 1, 2"),
        ((0, 3), r"got \(0, 3\)"),
    ]:
        with pytest.raises(UsageError, match=message):
            SpuriousMixture(data, classes=classes, label_column="kind")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"digits": (1, 1)}, "two different digits"),
        ({"digits": (1, 10)}, "from 0 to 9"),
        ({"correlation": -0.1}, "correlation to be a fraction"),
        ({"attribute": "patches"}, "Did you mean 'patch'"),
        ({"label_column": "kind"}, "class numbers in 'kind', got None"),
        ({"label_column": "image"}, "class numbers in 'image'"),
    ],
)
def test_impossible_mixtures_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        SpuriousMixture(ITEMS, classes=(0, 1), **options)
