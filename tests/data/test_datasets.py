import gzip
import struct

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from hfproj import UsageError
from hfproj.data import load_image_dataset, split_off
from hfproj.data.datasets import read_idx

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 5), dtype=np.uint8)
LABELS = np.array([0, 2, 1, 2, 0, 1], dtype=np.uint8)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def table(n=8, **columns):
    images = [Image.fromarray(PIXELS[i % 6]) for i in range(n)]
    data = {"picture": images, "kind": [i % 2 for i in range(n)], "note": ["x"] * n, **columns}
    features = {
        "picture": datasets.Image(),
        "kind": datasets.ClassLabel(names=["a", "b"]),
        "note": datasets.Value("string"),
        **{name: datasets.Value("int64") for name in columns},
    }
    return datasets.Dataset.from_dict(data, features=datasets.Features(features))


@pytest.fixture
def folder(tmp_path):
    table(8).to_parquet(tmp_path / "train.parquet")
    table(3).to_parquet(tmp_path / "test-00000-of-00002.parquet")
    table(2).to_parquet(tmp_path / "test-00001-of-00002.parquet")
    return tmp_path


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_digits_are_scikit_learns():
    train, test = (load_image_dataset("digits", split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1200, 597)
    got = sorted((np.array(row["image"]).tobytes(), row["label"]) for data in (train, test) for row in data)
    digits = load_digits()
    expected = np.rint(digits.images * 255 / 16).astype(np.uint8)
    assert got == sorted((image.tobytes(), int(label)) for image, label in zip(expected, digits.target))
    for data in (train, test):  # stratified
        counts = np.bincount(data["label"]) / len(data)
        np.testing.assert_allclose(counts, np.bincount(digits.target) / 1797, atol=0.002)
    assert load_image_dataset("digits")["label"][:20] == train["label"][:20]


def test_parquet_by_file_and_by_folder(folder):
    assert len(load_image_dataset(str(folder))) == 8
    test = load_image_dataset(str(folder), split="test")
    assert len(test) == 5
    assert test.column_names == ["image", "label"]
    assert np.array_equal(test[1]["image"], PIXELS[1])
    assert load_image_dataset(str(folder / "train.parquet"))["label"][:3] == [0, 1, 0]


def test_encoded_images_without_a_type_are_read(tmp_path):
    pq.write_table(table().data.table.replace_schema_metadata(None), tmp_path / "train.parquet")
    got = load_image_dataset(str(tmp_path), image_column="picture")
    assert np.array_equal(got[2]["image"], PIXELS[2])


def test_image_folder(tmp_path):
    for i, name in enumerate(("cat", "dog", "dog")):
        (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[i]).save(tmp_path / "train" / name / f"{i}.png")
    data = load_image_dataset(str(tmp_path))
    assert data.features["label"].names == ["cat", "dog"]
    assert sorted(data["label"]) == [0, 1, 1]


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress])
def test_idx_folder(tmp_path, pack):
    ending = ".gz" if pack is gzip.compress else ""
    for prefix, rows in (("train", slice(4)), ("t10k", slice(4, 6))):
        (tmp_path / f"{prefix}-images-idx3-ubyte{ending}").write_bytes(pack(idx(PIXELS[rows])))
        (tmp_path / f"{prefix}-labels-idx1-ubyte{ending}").write_bytes(pack(idx(LABELS[rows])))
    train, test = (load_image_dataset(str(tmp_path), split=split) for split in ("train", "test"))
    assert train["label"][:] == [0, 2, 1, 2]
    assert np.array_equal(np.stack([np.array(image) for image in test["image"]]), PIXELS[4:])
    with pytest.raises(UsageError, match="no split 'val'"):
        load_image_dataset(str(tmp_path), split="val")


def test_idx_folder_whose_parts_disagree(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(PIXELS))
    with pytest.raises(UsageError, match="neither train-labels-idx1-ubyte nor"):
        load_image_dataset(str(tmp_path))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:5]))
    with pytest.raises(UsageError, match="6 images and 5 labels"):
        load_image_dataset(str(tmp_path))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(PIXELS))
    with pytest.raises(UsageError, match=r"Expected 1 dimensions in .*, got 3"):
        load_image_dataset(str(tmp_path))


NOISE = np.random.default_rng(0).integers(0, 256, (6, 40, 50), dtype=np.uint8)
DAMAGED_INSIDE = bytearray(gzip.compress(idx(NOISE), mtime=0))
DAMAGED_INSIDE[10] = 0xFF  # the head of the compressed block: zlib's own error, not gzip's


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "begins with nothing"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x00", "no IDX file of unsigned bytes: it begins with 00 00 0d 01"),
        (b"PNG?", "no IDX file"),
        (idx(PIXELS)[:10], "ends inside its header"),
        (idx(PIXELS)[:-1], "6 × 4 × 5 values, 136 bytes in all, got 135"),
        (idx(PIXELS) + b"\x00", "got 137"),
        (gzip.compress(idx(PIXELS), mtime=0)[:-12], "cannot be read"),
        (gzip.compress(idx(PIXELS), mtime=0)[:20] + b"\xff" * 40, "cannot be read"),
        (bytes(DAMAGED_INSIDE), "cannot be read .error: Error -3"),
        (struct.pack(">4B4I", 0, 0, 8, 4, *[2**32 - 1] * 4), "values"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, data, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=message):
        read_idx(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "img"}, "no column 'img' .image_column.. Available: picture, kind, note"),
        ({"label_column": "fine"}, "no column 'fine' .label_column."),
        ({"image_column": "note"}, "holds no images in column 'note'.*picture"),
        ({"split": "val"}, "no split 'val'. Available: test, train"),
        ({"limit": 0}, "limit to be at least 1"),
    ],
)
def test_columns_and_splits_that_do_not_exist(folder, options, message):
    with pytest.raises(UsageError, match=message):
        load_image_dataset(str(folder), **options)


def test_a_named_label_column_is_used(tmp_path):
    table(coarse=list(range(8)), label=[9] * 8).to_parquet(tmp_path / "train.parquet")
    data = load_image_dataset(str(tmp_path), label_column="coarse")
    assert data.column_names == ["image", "label"]
    assert data["label"][:] == list(range(8))


def test_without_images_or_labels(tmp_path):
    table().remove_columns("kind").to_parquet(tmp_path / "train.parquet")
    assert load_image_dataset(str(tmp_path)).column_names == ["image"]
    table().remove_columns("picture").to_parquet(tmp_path / "test.parquet")
    with pytest.raises(UsageError, match="no column of images; its columns are kind"):
        load_image_dataset(str(tmp_path), split="test")


@pytest.mark.parametrize("name", ["no-such/dataset", "nosuch", "no/such/path", "/nowhere", "a b"])
def test_unknown_names_say_in_one_line_what_works(name):
    with pytest.raises(UsageError, match="Works: 'digits', a Hub id") as error:
        load_image_dataset(name)
    assert "\n" not in str(error.value)
    assert repr(name) in str(error.value)


def test_other_files_and_empty_folders(tmp_path):
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(UsageError, match="no data set that hfproj can read"):
        load_image_dataset(str(tmp_path / "table.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="Cannot load the split 'train'"):
        load_image_dataset(str(tmp_path / "empty"))
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(UsageError, match="Cannot load the split 'train'"):
        load_image_dataset(str(tmp_path / "broken.parquet"))


def test_limit_is_a_seeded_subset():
    some = load_image_dataset("digits", limit=50, seed=1)
    assert len(some) == 50
    assert some["label"][:] == load_image_dataset("digits", limit=50, seed=1)["label"][:]
    assert some["label"][:] != load_image_dataset("digits", limit=50, seed=2)["label"][:]
    assert len(load_image_dataset("digits", limit=5000)) == 1200


def test_split_off_divides():
    data = datasets.Dataset.from_dict({"x": range(20)})
    rest, held_out = split_off(data, 5, seed=3)
    assert (len(rest), len(held_out)) == (15, 5)
    assert sorted([*rest["x"], *held_out["x"]]) == list(range(20))
    assert held_out["x"][:] == split_off(data, 5, seed=3)[1]["x"][:]
    assert held_out["x"][:] != split_off(data, 5, seed=4)[1]["x"][:]
    for n in (0, 20, -1):
        with pytest.raises(UsageError, match=f"hold out {n} of 20"):
            split_off(data, n)


def test_cifar10_in_parquet(data_folder):
    data = load_image_dataset(str(data_folder / "cifar10"), split="test", limit=100)
    assert len(data) == 100
    assert data.features["label"].num_classes == 10
    assert data[0]["image"].size == (32, 32)
