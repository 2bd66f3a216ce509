"""Transforms of views at two strengths, beside views that are made with nothing else switched on."""

import pytest
import torch
from torch.nn import functional as F

import hfproj
from hfproj.data import Augmentation
from hfproj.data.transforms import TransformedImages, transforms_of
from hfproj.errors import UsageError

PLAIN = {"size": 12, "mean": (0.0,) * 3, "std": (1.0,) * 3}
ALL = {
    "scale": (0.2, 1.0), "flip_probability": 0.5, "rotation_degrees": 40, "translation": 0.25,
    "solarize_probability": 0.2, "blur_probability": 0.5,
}  # fmt: skip


def images(rows=3, side=12, wide=None):
    """Images of 8 bits, as they are read."""
    x = torch.rand(rows, 3, side, wide or side, generator=torch.Generator().manual_seed(0))
    return (x * 255).round() / 255


def made(name, end, *, x=None, **options):
    x = images() if x is None else x
    collate = TransformedImages(hfproj.ImageViews(**{**PLAIN, **ALL, **options}), name, end)
    return collate([{"image": image, "label": i} for i, image in enumerate(x)])["pixel_values"]


def test_every_part_of_an_augmentation_is_a_transform():
    names = "crop flip rotation shift brightness contrast saturation hue grey blur solarization"
    assert list(transforms_of(hfproj.ImageViews(**PLAIN, **ALL))) == names.split()
    off = hfproj.ImageViews(**PLAIN, augmentation=Augmentation.none())
    assert transforms_of(off) == {}


def test_ends_in_words():
    found = transforms_of(hfproj.ImageViews(**PLAIN, **ALL))
    assert found["crop"].ends == ("80% of the area", "40% of the area")
    assert found["brightness"].ends == ("×0.6", "×1.4")
    assert found["rotation"].ends == ("−20°", "+20°")
    assert found["shift"].ends == ("−1.5 pixels", "+1.5 pixels")
    assert found["hue"].ends == ("−0.1 turns", "+0.1 turns")
    assert found["blur"].ends == ("without", "σ = 1.05 pixels")


def test_closed_forms():
    x = images()
    assert torch.allclose(made("flip", 0), x, atol=1e-5)
    assert torch.allclose(made("flip", 1), x.flip(-1), atol=1e-5)
    assert torch.allclose(made("brightness", 1), (1.4 * x).clamp(0, 1), atol=1e-5)
    grey = (x * torch.tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True).expand_as(x)
    assert torch.allclose(made("grey", 1), grey, atol=1e-5)
    assert torch.allclose(made("saturation", 0), (0.6 * x + 0.4 * grey).clamp(0, 1), atol=1e-5)
    assert torch.allclose(made("solarization", 1), torch.where(x >= 0.5, 1 - x, x), atol=1e-5)
    side = round(12 * 0.4**0.5)
    start = (12 - side) // 2
    part = x[..., start : start + side, start : start + side]
    expected = F.interpolate(part, size=(12, 12), mode="bilinear", align_corners=False)
    assert torch.allclose(made("crop", 1), expected, atol=1e-5)


def test_pairs_lie_on_both_sides():
    x = images()
    for name in ("rotation", "shift", "hue"):
        assert not torch.allclose(made(name, 0), made(name, 1), atol=1e-2)
    assert torch.allclose(made("hue", 0, x=made("hue", 1)), x, atol=0.02)  # two roundings to 8 bits, in a hue
    assert not torch.allclose(made("hue", 1, x=made("hue", 1)), x, atol=0.1)


def test_the_rest_is_the_central_square_and_normalised_as_the_views_are():
    x = images(2, wide=20)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 2.0])
    found = made("flip", 0, x=x, mean=tuple(mean.tolist()), std=tuple(std.tolist()), flip_channels=True)
    expected = (x[..., 4:16].flip(1) - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_widest_of_different_views_and_images_without_colours():
    weak, strong = (Augmentation.none(color_jitter_probability=p, brightness=b) for p, b in ((1.0, 0.2), (0.1, 0.6)))
    views = hfproj.ImageViews(**PLAIN, augmentation=[weak, strong])
    assert transforms_of(views)["brightness"].ends == ("×0.7", "×1.3")
    with pytest.warns(UserWarning, match="no colours"):
        grey = hfproj.ImageViews(size=12, mean=(0.5,), std=(0.5,), **ALL)
    assert not {"saturation", "hue", "grey", "solarization"} & set(transforms_of(grey))


def test_refusals_and_keys():
    views = hfproj.ImageViews(**PLAIN, **ALL)
    with pytest.raises(UsageError, match="Did you mean 'rotation'"):
        TransformedImages(views, "rotatoin", 0)
    with pytest.raises(UsageError, match="end to be 0"):
        TransformedImages(views, "flip", 2)
    keys = {TransformedImages(views, name, end).cache_key for name in ("flip", "grey") for end in (0, 1)}
    assert len(keys) == 4
    assert TransformedImages(views, "flip", 0).cache_key == TransformedImages(views, "flip", 0).cache_key
    labels = TransformedImages(views, "flip", 0)([{"image": images()[0], "label": 7, "index": 3}])
    assert labels["labels"].tolist() == [7]
    assert labels["index"].tolist() == [3]
