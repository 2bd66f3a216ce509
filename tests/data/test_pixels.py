"""Images of any number of channels as tensors, and photographs turned upright on every road."""

import io
import warnings

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import hfproj
from hfproj import UsageError
from hfproj.data import Augmentation, EvalImages, ImageViews, StreamDataset, to_rgb_tensor
from hfproj.data.pixels import to_image_tensor, upright
from hfproj.features.cache_key import data_identity, digest
from hfproj.probes import RotatedImages

RNG = np.random.default_rng(3)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
BANDS = RNG.integers(0, 256, (6, 9, 7), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)
ALPHA = np.full((6, 9), 128, dtype=np.uint8)
LUMA = np.asarray(Image.fromarray(RGB).convert("L"))
OVER_WHITE = GREY * (128 / 255) + 127


def png(image, **options):
    image.save(buffer := io.BytesIO(), "png", **options)
    return {"bytes": buffer.getvalue(), "path": None}


def palette():
    image = Image.fromarray(RGB).quantize(16)
    return image, np.asarray(image.convert("RGB").convert("L"))


ONE = {  # image, its grey levels of 0 to 255, tolerance
    "L": (Image.fromarray(GREY), GREY, 0),
    "1": (Image.fromarray(GREY > 99), (GREY > 99) * 255, 0),
    "I;16": (Image.fromarray(DEEP), DEEP / 257, 1e-4),
    "I": (Image.fromarray(DEEP.astype(np.int32)), DEEP / 257, 1e-4),
    "F": (Image.fromarray((DEEP / 65535).astype(np.float32)), DEEP / 257, 1e-4),
    "LA": (Image.fromarray(np.dstack((GREY, ALPHA)), "LA"), OVER_WHITE, 1),
    "RGB": (Image.fromarray(RGB), LUMA, 0),
    "RGBA": (Image.fromarray(np.dstack((GREY, GREY, GREY, ALPHA))), OVER_WHITE, 1),
    "P": (*palette(), 0),
    "16-bit png": (png(Image.fromarray(DEEP)), DEEP / 257, 1e-4),
    "array": (GREY, GREY, 0),
    "array of a channel": (GREY[..., None], GREY, 0),
    "channel first": (torch.from_numpy(GREY)[None], GREY, 0),
    "16-bit array": (DEEP, DEEP / 257, 1e-4),
    "big-endian array": (DEEP.astype(">u2"), DEEP / 257, 1e-4),
    "float64": (DEEP / 65535, DEEP / 257, 1e-4),
    "int64": (GREY.astype(np.int64), GREY, 0),
    "bool": (GREY > 99, (GREY > 99) * 255, 0),
    "colours": (RGB, LUMA, 0),
    "colours first": (torch.from_numpy(RGB).permute(2, 0, 1) / 255, LUMA, 0),
}


@pytest.mark.parametrize("name", ONE)
def test_any_image_becomes_grey(name):
    image, expected, tolerance = ONE[name]
    got = to_image_tensor(image, 1)
    assert got.shape == (1, 6, 9)
    levels = got[0].double() * (255 if got.is_floating_point() else 1)
    assert np.abs(levels.numpy() - expected).max() <= tolerance


@pytest.mark.parametrize(("image", "channels", "expected"), [
    (BANDS, 7, BANDS),
    (BANDS.transpose(2, 0, 1), 7, BANDS),
    (torch.from_numpy(BANDS), 7, BANDS),
    (BANDS.astype(np.uint16) * 257, 7, BANDS / 255),
    (BANDS / 255, 7, BANDS / 255),
    (BANDS[:, :, :2], 2, BANDS[:, :, :2]),
    (Image.fromarray(BANDS[:, :, :2], "LA"), 2, BANDS[:, :, :2]),
    (Image.fromarray(BANDS[:, :, :4]), 4, BANDS[:, :, :4]),
    (Image.fromarray(BANDS[:, :, :4], "CMYK"), 4, BANDS[:, :, :4]),
    (torch.from_numpy(BANDS[:4, :, :4]), 4, BANDS[:4, :, :4].transpose(1, 2, 0)),  # both fit: a tensor's first axis
    (BANDS[:4, :, :4], 4, BANDS[:4, :, :4]),
    (RGB, 3, RGB),
])  # fmt: skip
def test_bands_are_kept(image, channels, expected):
    got = to_image_tensor(image, channels)
    assert got.is_floating_point() == (np.asarray(expected).dtype != np.uint8)
    np.testing.assert_allclose(got.permute(1, 2, 0).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(("image", "channels", "message"), [
    (BANDS, 5, r"shape \(6, 9, 7\); expected 5 channels"),
    (Image.fromarray(RGB), 4, "expected 4 channels"),
    (GREY, 4, "expected 4 channels"),
    (np.zeros((0, 4, 7)), 7, "expected 7 channels"),
    (np.zeros((2, 2, 2, 7)), 7, "expected 7 channels"),
    (BANDS * 1.0, 7, "from 0 to 1"),
    (BANDS.astype(np.int16) - 300, 7, "from 0 to 255"),
    (np.full((4, 4, 7), np.nan), 7, "nan"),
    (Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)), 1, "0 to 65535"),
    ("x.png", 7, "holds no image"),
    ([[1.0]], 1, "with_format"),
])  # fmt: skip
def test_other_bands_are_refused(image, channels, message):
    with pytest.raises(UsageError, match=message):
        to_image_tensor(image, channels)


# --- collators ---


def test_views_of_bands_leave_colours_out_and_say_so():
    settings = {"size": 8, "mean": (0.5,) * 7, "std": (0.5,) * 7}
    with pytest.warns(UserWarning, match="7 channels have no colours: saturation, hue, grayscale_probability are left"):
        collate = ImageViews(**settings, blur_probability=1, rotation_degrees=20, local_views=1, local_size=6)
    batch = collate([{"image": BANDS, "index": 3}, {"image": BANDS / 255, "index": 3}])
    assert [tuple(view.shape) for view in batch["views"]] == [(2, 7, 8, 8)] * 2 + [(2, 7, 6, 6)]
    torch.testing.assert_close(batch["views"][0][0], batch["views"][0][1], atol=1e-5, rtol=0)
    quiet = {"saturation": 0, "hue": 0, "grayscale_probability": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = ImageViews(**settings, **quiet, blur_probability=1, rotation_degrees=20)
        ImageViews(size=8, mean=(0.5,) * 3, std=(0.5,) * 3, solarize_probability=1)
    assert torch.equal(same([{"image": BANDS, "index": 3}])["views"][1], batch["views"][1][:1])


def test_grey_views_are_those_of_grey_colours():
    """Brightness, contrast, crops and flips of one channel are what they are of three equal ones."""
    options = {"size": 8, "index": [4], "epoch": 0}
    augment = Augmentation(saturation=0, hue=0, grayscale_probability=0)
    x = torch.from_numpy(GREY)[None]
    one, three = augment([x], **options), augment([x.expand(3, -1, -1)], **options)
    # The luminance's weights sum to 0.9999.
    torch.testing.assert_close(one.expand(-1, 3, -1, -1), three, atol=1e-3, rtol=0)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"])
@pytest.mark.parametrize("resizer", ["torch", "pil"])
def test_bands_are_measured_one_by_one(interpolation, resizer):
    options = {"size": 5, "resize": 7, "interpolation": interpolation, "resizer": resizer}
    whole = EvalImages(mean=[0.1] * 7, std=[0.3] * 7, **options)([{"image": BANDS}, {"image": BANDS / 255}])
    for band in range(7):
        one = EvalImages(mean=[0.1], std=[0.3], **options)([{"image": BANDS[..., band]}])["pixel_values"]
        assert torch.equal(whole["pixel_values"][:1, band], one[:, 0])
    eight_bits, unrounded = whole["pixel_values"]  # 8 bits are rounded and cut between height and width, too
    assert (eight_bits - unrounded).abs().mean() < 0.01


def test_a_border_has_the_colour_of_the_mean():
    collate = EvalImages(size=8, mean=(0.2, 0.4, 0.6), std=(1, 1, 1), resize_mode="longest")
    x = collate([{"image": RGB}])["pixel_values"][0]
    assert x[:, 0].abs().max() <= 0.5 / 255
    assert x[:, 4].abs().max() > 0.1


def test_channels_in_the_other_order():
    options = {"size": 6, "mean": (0.1, 0.2, 0.3), "std": (1, 2, 3)}
    swapped = EvalImages(**options, flip_channels=True)([{"image": RGB}])["pixel_values"]
    assert torch.equal(swapped, EvalImages(**options)([{"image": RGB[..., ::-1]}])["pixel_values"])
    views = ImageViews(**options, flip_channels=True, augmentation=Augmentation.none(), num_views=1)
    plain = ImageViews(size=6, mean=(0,) * 3, std=(1,) * 3, augmentation=Augmentation.none(), num_views=1)
    item = [{"image": RGB, "index": 0}]
    expected = plain(item)["views"][0].flip(1) - swapped.new_tensor(options["mean"])[:, None, None]
    torch.testing.assert_close(views(item)["views"][0], expected / swapped.new_tensor(options["std"])[:, None, None])


def test_rotated_images_have_the_channels_of_the_backbone():
    turned = RotatedImages([{"image": BANDS}], channels=7)[1]["image"]
    assert torch.equal(turned, torch.from_numpy(np.rot90(BANDS).copy()).permute(2, 0, 1))


# --- photographs ---

TURNS = {  # EXIF orientation → what the stored image looks like upright (EXIF 2.32, table 6)
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).transpose(1, 0, 2), 8: np.rot90,
}  # fmt: skip


def photograph(orientation, kind="png"):
    image = Image.fromarray(RGB)
    (exif := image.getexif())[0x0112] = orientation
    image.save(buffer := io.BytesIO(), kind, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", TURNS)
def test_photographs_are_upright_on_every_road(orientation, tmp_path):
    content = photograph(orientation)
    expected = torch.from_numpy(TURNS[orientation](RGB).copy()).permute(2, 0, 1)
    (tmp_path / "folder" / "class").mkdir(parents=True)
    (file := tmp_path / "folder" / "class" / "x.png").write_bytes(content)
    opened = Image.open(file)
    table = datasets.Dataset.from_dict({"image": [str(file)]})
    roads = {
        "PIL": opened,
        "PIL after convert": opened.convert("RGB"),
        "bytes": {"bytes": content, "path": None},
        "path": {"bytes": None, "path": str(file)},
        "datasets": table.cast_column("image", datasets.Image())[0]["image"],
        "datasets, not decoded": table.cast_column("image", datasets.Image(decode=False))[0]["image"],
        "torchvision": ImageFolder(str(tmp_path / "folder"))[0][0],
        "stream": next(iter(StreamDataset([{"image": Image.open(file)}])))["image"],
        "load_image_dataset": hfproj.load_image_dataset(str(tmp_path / "folder"), split="train")[0]["image"],
    }
    for road, image in roads.items():
        assert torch.equal(to_rgb_tensor(image), expected), road
    assert torch.equal(RotatedImages([{"image": opened}])[0]["image"], expected)
    assert torch.equal(to_image_tensor(opened.convert("RGBA"), 4)[:3], expected)
    grey = Image.fromarray(expected.permute(1, 2, 0).numpy()).convert("L")
    assert np.array_equal(to_image_tensor(opened.convert("L"), 1)[0], grey)
    collate = EvalImages(size=6, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert torch.equal(collate([{"image": opened}])["pixel_values"], collate([{"image": expected}])["pixel_values"])


def test_caches_tell_photographs_of_other_orientations_apart():
    """The stored bytes of 1, 2, 3 and 4 are equal, and so is the size."""
    keys = [digest(data_identity([{"image": Image.open(io.BytesIO(photograph(turn)))}])) for turn in TURNS]
    assert len(set(keys)) == 8
    assert keys[0] == digest(data_identity([{"image": Image.fromarray(RGB)}]))


def test_a_photograph_is_turned_once_and_broken_metadata_do_no_harm():
    image = Image.open(io.BytesIO(photograph(6, "jpeg")))
    assert upright(upright(image)).size == upright(image).size == (6, 9)
    broken = Image.fromarray(RGB)
    broken.info["exif"] = b"Exif\x00\x00no TIFF"
    assert torch.equal(to_rgb_tensor(broken), torch.from_numpy(RGB.transpose(2, 0, 1).copy()))
    odd = Image.fromarray(RGB)
    odd.getexif()[0x0112] = 0
    assert upright(odd).size == (9, 6)
