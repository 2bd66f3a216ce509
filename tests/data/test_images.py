import inspect
import io
import pickle

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from PIL import Image

import hfproj
from hfproj import UsageError
from hfproj.backbones import ImagePreprocessing
from hfproj.data import Augmentation, EvalImages, ImageViews, IndexedDataset, images, to_rgb_tensor

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 6, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 6), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (5, 6), dtype=np.uint8)
TEXT = "Column 'image' holds no image: expected .*, got"


def encoded(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def over_white(rgb, alpha):
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


def grey3(array):
    return np.repeat(np.asarray(array)[..., None], 3, axis=-1)


def palette():
    image = Image.fromarray(RGB).quantize(16)
    return image, np.array(image.convert("RGB"))


CASES = {
    "RGB": (Image.fromarray(RGB), RGB, 0),
    "L": (Image.fromarray(GREY), grey3(GREY), 0),
    "1": (Image.fromarray(GREY > 99), grey3((GREY > 99) * 255), 0),
    "P": (*palette(), 0),
    "RGBA": (Image.fromarray(np.dstack((RGB, ALPHA))), over_white(RGB, ALPHA), 1),
    "LA": (Image.fromarray(np.dstack((GREY, ALPHA)), "LA"), over_white(grey3(GREY), ALPHA), 1),
    "CMYK": (Image.fromarray(RGB).convert("CMYK"), RGB, 0),
    "HSV": (Image.fromarray(RGB).convert("HSV"), RGB, 9),
    "I;16": (Image.fromarray(GREY.astype(np.uint16) * 257), grey3(GREY), 0),
    "I": (Image.fromarray(GREY.astype(np.int32) * 257), grey3(GREY), 0),
    "F": (Image.fromarray((GREY / 255).astype(np.float32)), grey3(GREY), 0),
    "png bytes": ({"bytes": encoded(Image.fromarray(RGB)), "path": None}, RGB, 0),
    "16-bit png": ({"bytes": encoded(Image.fromarray(GREY.astype(np.uint16) * 257)), "path": None}, grey3(GREY), 0),
    "uint8": (RGB, RGB, 0),
    "channels first": (RGB.transpose(2, 0, 1), RGB, 0),
    "grey array": (GREY, grey3(GREY), 0),
    "grey array with a channel": (GREY[..., None], grey3(GREY), 0),
    "RGBA array": (np.dstack((RGB, ALPHA)), over_white(RGB, ALPHA), 1),
    "float64": (RGB / 255, RGB, 0),
    "int64": (RGB.astype(np.int64), RGB, 0),
    "bool": (GREY > 99, grey3((GREY > 99) * 255), 0),
    "tensor": (torch.from_numpy(RGB).permute(2, 0, 1), RGB, 0),
    "float tensor": (torch.from_numpy(RGB).permute(2, 0, 1) / 255, RGB, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_any_image_becomes_rgb(name):
    image, expected, tolerance = CASES[name]
    got = to_rgb_tensor(image)
    assert got.dtype == torch.uint8
    assert got.shape == (3, 5, 6)
    assert np.abs(got.permute(1, 2, 0).numpy().astype(float) - expected).max() <= tolerance


def test_transparent_palette_is_laid_over_white():
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.info["transparency"] = 0
    assert to_rgb_tensor(image).flatten(1).T.tolist() == [[255] * 3, [40, 50, 60]]


def test_a_turned_photograph_is_turned_back():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    stored = {"bytes": encoded(Image.fromarray(RGB), "png", exif=exif), "path": None}
    assert np.array_equal(to_rgb_tensor(stored).permute(1, 2, 0), np.rot90(RGB, -1))


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        ("a cat", f"{TEXT} str 'a cat'.*--image_column"),
        (3, f"{TEXT} int 3"),
        (None, f"{TEXT} NoneType"),
        ([[1, 2]], f"{TEXT} list"),
        ({"a": 1}, f"{TEXT} dict"),
        (np.zeros((2, 3, 4, 5)), r"shape \(2, 3, 4, 5\)"),
        (np.zeros((5, 5, 2)), "shape"),
        (np.zeros((0, 5, 3)), "shape"),
        (np.full((4, 4), 16.0), "from 16.0 to 16.0"),
        (np.full((4, 4), np.nan), "nan"),
        (np.full((4, 4), -1), "from 0 to 255"),
        (Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)), "0 to 65535"),
        ({"bytes": b"no image", "path": None}, "cannot be decoded"),
        ({"bytes": CASES["png bytes"][0]["bytes"][:60], "path": None}, "cannot be decoded"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        ({"bytes": None, "path": "/no/such.png"}, "/no/such.png"),
    ],
)
def test_what_is_no_image_is_refused(thing, message):
    with pytest.raises(UsageError, match=message):
        to_rgb_tensor(thing)


def items(n=6, side=12):
    rng = np.random.default_rng(1)
    return [
        {"image": Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)), "label": i} for i in range(n)
    ]


DATASET = IndexedDataset(items())


def collate(**options):
    return ImageViews(**{"size": 12, "mean": MEAN, "std": STD, **options})


def test_batch_is_the_contract():
    batch = collate(num_views=3)([DATASET[2, i] for i in (4, 1)])
    assert list(batch) == ["views", "index", "labels"]
    assert [view.shape for view in batch["views"]] == [(2, 3, 12, 12)] * 3
    assert {view.dtype for view in batch["views"]} == {torch.float32}
    assert batch["index"].tolist() == batch["labels"].tolist() == [4, 1]
    assert batch["index"].dtype == batch["labels"].dtype == torch.int64
    assert not torch.equal(batch["views"][0], batch["views"][1])


def test_views_are_the_augmentations_normalised():
    """Row by row from `Augmentation`, so seed, epoch, index and view arrive."""
    batch = collate(seed=5)([DATASET[2, 4], DATASET[3, 1]])
    for view in (0, 1):
        for row, (epoch, index) in enumerate([(2, 4), (3, 1)]):
            image = to_rgb_tensor(DATASET[index]["image"])
            x = Augmentation()([image], size=12, seed=5, epoch=epoch, index=[index], view=view)[0]
            torch.testing.assert_close(batch["views"][view][row], tvf.normalize(x, MEAN, STD))


def test_rows_do_not_depend_on_their_batch_and_pickling_changes_nothing():
    whole = collate()([DATASET[1, i] for i in range(6)])
    one = pickle.loads(pickle.dumps(collate()))([DATASET[1, 3]])
    for a, b in zip(whole["views"], one["views"]):
        assert torch.equal(a[3], b[0])


def test_all_off_is_evaluation():
    batch = collate(augmentation=Augmentation.none(), num_views=1)([DATASET[0], DATASET[1]])
    plain = EvalImages(size=12, mean=MEAN, std=STD)([DATASET[0], DATASET[1]])
    torch.testing.assert_close(batch["views"][0], plain["pixel_values"], atol=1e-5, rtol=0)


def test_an_augmentation_for_each_view():
    batch = collate(augmentation=[Augmentation.none(), Augmentation.none(solarize_probability=1)])([DATASET[0]])
    x = tvf.normalize(to_rgb_tensor(DATASET[0]["image"]) / 255, MEAN, STD)
    torch.testing.assert_close(batch["views"][0][0], x, atol=1e-5, rtol=0)
    assert not torch.allclose(batch["views"][1][0], x)


@pytest.mark.parametrize("label_column", ["label", None])
def test_labels_are_optional(label_column):
    some = [{**DATASET[0], "label": 3}, DATASET[1]]
    assert ("labels" in collate(label_column=label_column)(some)) is (label_column is not None)
    del some[0]["label"]
    found = collate(label_column=label_column)(some).get("labels")
    assert (found is None) if label_column is None else (found.tolist() == [-1, 1])
    del some[1]["label"]
    assert "labels" not in collate(label_column=label_column)(some)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda item: item.pop("index"), "hfproj.IndexedDataset"),
        (lambda item: item.pop("image"), "no column 'image'; they have 'label', 'index', 'epoch'"),
        (lambda item: item.update(image="x.png"), r"holds no image.*\(item 0 of the data set\)"),
        (lambda item: item.update(label="cat"), "class numbers, got str 'cat'"),
        (lambda item: item.update(label=0.5), "got float 0.5. A score is no class"),
    ],
)
def test_items_that_cannot_work_are_refused(change, message):
    item = DATASET[0]
    change(item)
    with pytest.raises(UsageError, match=message):
        collate()([item])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_views": 0}, "num_views to be at least 1"),
        ({"flip_probabilty": 0}, "Did you mean 'flip_probability'"),
        ({"augmentation": Augmentation(), "hue": 0}, "not both"),
        ({"augmentation": [Augmentation()]}, "each of num_views=2 views, got 1"),
        ({"size": 0}, "size ≥ 1"),
        ({"std": (0, 1, 1)}, "std > 0"),
        ({"mean": (0.5,)}, "three values"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        collate(**options)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (61, 33), (16, 20), (5, 7)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_is_torchvisions_resize_and_crop(height, width, interpolation):
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    batch = EvalImages(size=16, resize=18, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation)(
        [{"image": image}]
    )
    mode = tvf.InterpolationMode(interpolation)
    expected = tvf.center_crop(tvf.resize(image, [18], interpolation=mode, antialias=True), [16, 16])
    difference = (batch["pixel_values"][0] * 255 - expected).abs()
    assert difference.max() < 1e-3


def test_evaluation_keeps_what_has_the_size():
    """To the bit: published numbers of vit_nano are of images that have its size."""
    batch = EvalImages(size=12, mean=MEAN, std=STD)([items()[2]])
    assert list(batch) == ["pixel_values", "labels"]
    expected = tvf.normalize(to_rgb_tensor(items()[2]["image"]) / 255, MEAN, STD)
    assert torch.equal(batch["pixel_values"][0], expected)
    nano = EvalImages.for_model(hfproj.load_backbone("vit_nano"))
    item = items(side=32)[0]
    plain = (to_rgb_tensor(item["image"]).float().div_(255)).sub_(nano.mean).div_(nano.std)
    assert torch.equal(nano([item])["pixel_values"][0], plain)
    assert EvalImages(size=12, mean=MEAN, std=STD)([DATASET[3]])["index"].tolist() == [3]


def test_evaluation_options():
    with pytest.raises(UsageError, match="10 < 12"):
        EvalImages(size=12, resize=10, mean=MEAN, std=STD)
    with pytest.raises(UsageError, match="Did you mean 'bicubic'"):
        EvalImages(size=12, mean=MEAN, std=STD, interpolation="bicubik")


@pytest.mark.parametrize("interpolation", ["bilinear", "lanczos"])
def test_for_model_asks_the_backbone(monkeypatch, interpolation):
    own = ImagePreprocessing(24, MEAN, STD, interpolation, 32, "exact", "down", True)
    model = torch.nn.Identity()
    monkeypatch.setattr(hfproj.backbones, "image_preprocessing", lambda given: {model: own}[given])
    views, plain = ImageViews.for_model(model, seed=3), EvalImages.for_model(model, resize=30)
    assert (views.size, views.seed, plain.size, plain.resize, plain.interpolation) == (24, 3, 24, 30, interpolation)
    assert (plain.resize_mode, plain.crop_rounding, plain.flip_channels, views.flip_channels) == (
        "exact", "down", True, True
    )  # fmt: skip
    torch.testing.assert_close(plain.mean.flatten(), torch.tensor(MEAN))
    assert ImageViews.for_model(model, size=16).size == 16
    assert EvalImages.for_model(model, size=48).resize == 64


def test_the_keywords_that_checkers_know_are_those_of_the_classes():
    """They stand twice: as options, and as what `for_model` hands on."""

    def options(cls):
        return {n for n, p in inspect.signature(cls).parameters.items() if p.kind is p.KEYWORD_ONLY}

    parts = set(Augmentation.__dataclass_fields__)
    assert set(images._Parts.__annotations__) == parts
    assert set(images._OfViews.__annotations__) == options(ImageViews) | parts
    assert set(images._OfEval.__annotations__) == options(EvalImages)


def test_an_encoded_file_as_plain_bytes():
    """As WebDataset and a torch data set of files hold them."""
    file = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(file, "PNG")
    expected = to_rgb_tensor({"bytes": file.getvalue(), "path": None})
    assert torch.equal(to_rgb_tensor(file.getvalue()), expected)
    with pytest.raises(hfproj.UsageError, match="it is of no format that Pillow knows"):
        to_rgb_tensor(b"no image")
