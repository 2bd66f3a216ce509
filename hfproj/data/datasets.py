"""Labelled image data sets by name: the Hub, parquet, folders of images, IDX files and scikit-learn's digits."""

import gzip
import io
import re
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from torch.utils.data import Subset

from hfproj.checking import checked
from hfproj.data.indexing import IndexedDataset
from hfproj.errors import UsageError
from hfproj.hints import nearest
from hfproj.typing import Data

_WORKS = (
    "Works: 'digits', a Hub id ('uoft-cs/cifar10'), a parquet file, a folder of parquet files named by split, an image "
    "folder, a folder with IDX files (Debian's dataset-fashion-mnist)."
)
_IDX_PREFIX = {"train": "train", "test": "t10k"}


@checked
def load_image_dataset(
    name: str, *, split: str = "train", image_column: str | None = None, label_column: str | None = None,
    limit: int | None = None, seed: int = 0,
) -> datasets.Dataset:  # fmt: skip
    """Return a data set with the column ``"image"`` and, if there are labels, ``"label"``; others are dropped.

    Args:
        name: ``"digits"`` (scikit-learn's 8×8 digits, 1,200 train and 597 test, a fixed stratified split), a Hub id, a
            parquet file, a folder of parquet files named by split (``train.parquet`` or
            ``train-00000-of-00002.parquet``), an image folder (a folder per class, optionally below a folder per
            split), or a folder with IDX files as Debian's dataset-fashion-mnist and MNIST ship them.
        split: Name of the split.
        image_column: Which column holds the images; None: the first of type ``datasets.Image``.
        label_column: Which column holds the class numbers; None: the first of type ``ClassLabel``, if there is one.
        limit: At most so many rows, a random subset.
        seed: Of that subset.

    Raises:
        UsageError: If a name, split or column does not exist, a column holds no images, or a file is damaged.

    Example:
        >>> digits = load_image_dataset("digits", split="test")
        >>> len(digits), digits[0]["image"].size, digits.features["label"].num_classes
        (597, (8, 8), 10)
    """
    if limit is not None and limit < 1:
        raise UsageError(f"Expected limit to be at least 1 (None for all rows), got {limit}.")
    dataset = _columns(_load(name, split), name, image_column, label_column)
    if limit is not None and limit < len(dataset):
        dataset = dataset.select(np.sort(_shuffled(len(dataset), seed)[:limit]))
    return dataset


@checked
def split_off(dataset: datasets.Dataset, n: int, seed: int = 0) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Hold out `n` random rows: return ``(rest, held_out)``.

    Raises:
        UsageError: If `n` leaves one of the two empty.

    Example:
        >>> rest, held_out = split_off(datasets.Dataset.from_dict({"x": range(10)}), 3)
        >>> len(rest), len(held_out), sorted([*rest["x"], *held_out["x"]]) == list(range(10))
        (7, 3, True)
    """
    if not isinstance(n, int):
        raise UsageError(f"Expected n as a number of rows of the {len(dataset)} there are, got {n!r}.")
    if not 0 < n < len(dataset):
        raise UsageError(f"Cannot hold out {n} of {len(dataset)} rows; choose 1 to {len(dataset) - 1}.")
    order = _shuffled(len(dataset), seed)
    return dataset.select(np.sort(order[n:])), dataset.select(np.sort(order[:n]))


@checked
def without_bad_images(
    dataset: Data, *, image_column: str = "image", channels: int | None = None
) -> tuple[Data, dict[int, str]]:
    """Return a data set without the images that can't be read, and index → reason of those: each is read once.

    For evaluation, where no image may take the place of another, as it does in training (``on_bad_image="skip"``).

    Args:
        dataset: With a length and integer indices.
        image_column: Entry of an item that holds the image.
        channels: Channels that the images must have; None: any that make RGB.

    Raises:
        UsageError: If none can be read.

    Example:
        >>> items = [{"image": np.zeros((2, 2))}, {"image": {"bytes": b"no image", "path": None}}]
        >>> kept, bad = without_bad_images(items)
        >>> len(kept), list(bad)
        (1, [1])
    """
    checking = IndexedDataset(dataset, on_bad_image="skip", image_column=image_column, channels=channels)
    bad: dict[int, str] = {}
    for index in range(len(checking)):
        try:
            checking.item(index)
        except UsageError as error:
            bad[index] = str(error)
    kept = [index for index in range(len(checking)) if index not in bad]
    if not kept:
        raise UsageError(f"None of {len(checking)} images can be read. The first one: {bad.get(0, 'there is none')}")
    select: Any = getattr(dataset, "select", None)
    return (dataset if not bad else select(kept) if select is not None else Subset(dataset, kept)), bad  # type: ignore[arg-type]


def read_idx(path: str | Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, plain or gzipped, and check that it is complete.

    Layout: two zero bytes, 0x08 (unsigned byte), the number of dimensions, each dimension as a big-endian 32-bit
    number, then the values.

    Raises:
        UsageError: If the file cannot be read, is of another type, or has fewer or more bytes than it announces.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"{path} cannot be read ({reason}). Download the file again.") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or data[3] == 0:
        raise UsageError(f"{path} is no IDX file of unsigned bytes: it begins with {data[:4].hex(' ') or 'nothing'}.")
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise UsageError(f"{path} ends inside its header ({len(data)} of {start} bytes). Download the file again.")
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    expected = start + int(np.prod(shape, dtype=object))
    if len(data) != expected:
        what = f"{path} announces {' × '.join(map(str, shape))} values, {expected} bytes in all, got {len(data)}"
        raise UsageError(f"{what}. Download the file again.")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)


def _load(name: str, split: str) -> datasets.Dataset:
    if name == "digits":
        return _digits(split)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".parquet":
        return _from_library(name, split, "parquet", data_files={split: str(path)})
    if path.is_dir():
        if list(path.glob("*-images-idx3-ubyte*")):
            return _idx_folder(path, split)
        if files := sorted(path.glob("**/*.parquet")):
            splits: dict[str, list[str]] = {}
            for file in files:
                splits.setdefault(re.sub(r"-\d+-of-\d+.*$", "", file.stem), []).append(str(file))
            _check_split(split, name, splits)
            return _from_library(name, split, "parquet", data_files={split: splits[split]})
        return _from_library(name, split, "imagefolder", data_dir=str(path))
    if path.exists():
        raise UsageError(f"{name!r} is no data set that hfproj can read. {_WORKS}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UsageError(f"There is no file or folder {name!r}. {_WORKS}")
    return _from_library(name, split, name)


def _from_library(name: str, split: str, *args: Any, **options: Any) -> datasets.Dataset:
    try:
        return datasets.load_dataset(*args, split=split, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        off = datasets.config.HF_HUB_OFFLINE and not Path(name).expanduser().exists()
        offline = " (the Hub is switched off: HF_HUB_OFFLINE)" if off else ""
        meant = " Did you mean 'digits'?" if name != "digits" and nearest(name, ["digits"]) else ""
        raise UsageError(f"Cannot load the split {split!r} of {name!r}: {reason}{offline}.{meant} {_WORKS}") from error


def _check_split(split: str, name: str, splits: Iterable[str]) -> None:
    if split not in splits:
        raise UsageError(f"{name!r} has no split {split!r}. Available: {', '.join(sorted(splits))}.")


def _digits(split: str) -> datasets.Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    _check_split(split, "digits", ("train", "test"))
    digits = load_digits()
    parts = train_test_split(
        np.arange(len(digits.target)), train_size=1200, test_size=597, stratify=digits.target, random_state=0
    )
    rows = parts[0 if split == "train" else 1]
    pixels = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)
    return _from_arrays(pixels, digits.target[rows], [str(digit) for digit in range(10)])


def _idx_folder(path: Path, split: str) -> datasets.Dataset:
    found = {name for name, prefix in _IDX_PREFIX.items() if list(path.glob(f"{prefix}-images-idx3-ubyte*"))}
    _check_split(split, str(path), found)
    parts = []
    for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
        stem = f"{_IDX_PREFIX[split]}-{kind}-ubyte"
        files = [file for file in (path / stem, path / f"{stem}.gz") if file.is_file()]
        if not files:
            raise UsageError(f"{path} has neither {stem} nor {stem}.gz.")
        parts.append(read_idx(files[0]))
        if parts[-1].ndim != dimensions:
            raise UsageError(f"Expected {dimensions} dimensions in {files[0]}, got {parts[-1].ndim}.")
    images, labels = parts
    if len(images) != len(labels) or not len(images):
        raise UsageError(f"{path} has {len(images)} images and {len(labels)} labels in its split {split!r}.")
    return _from_arrays(images, labels, [str(number) for number in range(int(labels.max()) + 1)])


def _from_arrays(pixels: np.ndarray, labels: np.ndarray, names: list[str]) -> datasets.Dataset:
    def png(image: np.ndarray) -> dict[str, Any]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "png", compress_level=1)
        return {"bytes": buffer.getvalue(), "path": None}

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"image": list(map(png, pixels)), "label": labels.tolist()}, features=features)


def _columns(
    dataset: datasets.Dataset, name: str, image_column: str | None, label_column: str | None
) -> datasets.Dataset:
    features = dataset.features
    for option, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None and column not in features:
            raise UsageError(f"{name!r} has no column {column!r} ({option}). Available: {', '.join(features)}.")
    image = image_column or _first(features, datasets.Image)
    label = label_column or _first(features, datasets.ClassLabel)
    kind = features.get(image)
    encoded = isinstance(kind, dict) and set(kind) == {"bytes", "path"}
    if not (encoded or isinstance(kind, datasets.Image)):
        wrong = "has no column of images" if image is None else f"holds no images in column {image!r}"
        columns = ", ".join(f"{n} ({getattr(f, 'dtype', type(f).__name__)})" for n, f in features.items())
        hint = "Name the right one (image_column, --image_column), or cast it: dataset.cast_column(…, datasets.Image())"
        raise UsageError(f"{name!r} {wrong}; its columns are {columns}. {hint}.")
    if encoded:
        dataset = dataset.cast_column(image, datasets.Image())
    renamed = {image: "image"} if label is None else {image: "image", label: "label"}
    dataset = dataset.select_columns(list(renamed))
    return dataset.rename_columns({old: new for old, new in renamed.items() if old != new})


def _first(features: datasets.Features, kind: type) -> str | None:
    return next((column for column, feature in features.items() if isinstance(feature, kind)), None)


def _shuffled(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed % 2**64).permutation(length)
