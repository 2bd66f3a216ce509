"""Each operation against torchvision's own, image by image; then what decides a view, and what must not."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as tv
import torchvision.transforms.v2.functional as tvf

from hfproj import UsageError
from hfproj.data import Augmentation, image_ops
from hfproj.data.augment import crop_boxes
from hfproj.data.philox import philox4x32, uniforms

N = 7


@pytest.fixture
def x():
    x = torch.rand(N, 3, 17, 20)
    x[0] = x[0, :1]  # grey: no hue
    x[1] = 0
    x[2, :, :8] = x[2, :, :8].round()  # pure colours and ties between channels
    return x


def each(operation, x, *parameters):
    return torch.stack([operation(x[i], *(p[i].item() for p in parameters)) for i in range(len(x))])


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        (image_ops.adjust_brightness, tvf.adjust_brightness, 0, 1.8),
        (image_ops.adjust_contrast, tvf.adjust_contrast, 0, 1.8),
        (image_ops.adjust_saturation, tvf.adjust_saturation, 0, 1.8),
        (image_ops.adjust_hue, tvf.adjust_hue, -0.5, 0.5),
        (image_ops.gaussian_blur, lambda x, sigma: tvf.gaussian_blur(x, [5, 5], [sigma, sigma]), 0.1, 2),
    ],
)
def test_operation_is_torchvisions(x, ours, theirs, low, high):
    factor = torch.linspace(low, high, N)
    extra = (5,) if ours is image_ops.gaussian_blur else ()
    torch.testing.assert_close(ours(x.clone(), factor, *extra), each(theirs, x, factor), atol=1e-5, rtol=0)


def test_grayscale_and_solarize_are_torchvisions(x):
    torch.testing.assert_close(image_ops.grayscale(x), tvf.rgb_to_grayscale(x, 3), atol=1e-6, rtol=0)
    assert torch.equal(image_ops.solarize(x, 0.5), tvf.solarize(x, 0.5))


@pytest.mark.parametrize("size", [8, 17, 20, 32, 224])
def test_resized_crop_is_torchvisions_antialiased(x, size):
    top, left = torch.tensor([0, 1, 2, 3, 4, 16, 0]), torch.tensor([0, 3, 2, 9, 0, 19, 5])
    height, width = torch.tensor([17, 5, 15, 1, 13, 1, 9]), torch.tensor([20, 17, 1, 11, 20, 1, 6])
    expected = each(lambda *a: tvf.resized_crop(*a, [size, size], antialias=True), x, top, left, height, width)
    torch.testing.assert_close(image_ops.resized_crop(x, top, left, height, width, size), expected, atol=1e-5, rtol=0)


def test_rotation_and_shift_are_torchvisions(x):
    degrees, right, down = torch.linspace(-40, 90, N), torch.arange(N) - 3.0, torch.arange(N) * 1.0
    bilinear = tv.InterpolationMode.BILINEAR

    def theirs(image, angle, u, v):  # torchvision's affine counts degrees clockwise
        return tvf.affine(image, -angle, [u, v], 1.0, [0.0, 0.0], interpolation=bilinear)

    expected = each(theirs, x, degrees, right, down)
    torch.testing.assert_close(image_ops.rotate_translate(x, degrees, right, down), expected, atol=1e-4, rtol=0)


def test_sum_of_pixels():
    for shape in ((1, 1), (3, 5), (8, 8), (7, 13)):
        x = torch.rand(4, *shape)
        torch.testing.assert_close(image_ops.sum_pixels(x), x.sum((1, 2)))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers of Random123, the library of Philox's authors
        ((0,) * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert [f"{w:08x}" for w in philox4x32(np.array(counter, dtype=np.uint64), key)] == words.split()


def test_uniforms_differ_in_every_coordinate_and_are_uniform():
    def draw(seed=0, epoch=0, index=0, view=0):
        return uniforms(60, seed=seed, epoch=np.array([epoch]), index=np.array([index]), view=view)[0]

    rows = [draw(), draw(seed=1), draw(seed=2**32), draw(epoch=1), draw(index=1), draw(index=2**32), draw(view=1)]
    assert len(np.unique(np.concatenate(rows))) == 60 * len(rows)
    u = uniforms(60, seed=0, epoch=np.zeros(2000, int), index=np.arange(2000), view=0)
    assert 0 < u.min() < u.max() < 1
    np.testing.assert_allclose(u.mean(0), 0.5, atol=0.04)  # 6 standard errors of 2,000 numbers
    np.testing.assert_allclose(np.corrcoef(u.T) - np.eye(60), 0, atol=0.14)


def test_crop_boxes_have_the_distribution_of_torchvision():
    n, height, width, scale, ratio = 4000, 40, 60, (0.08, 1.0), (3 / 4, 4 / 3)
    u = np.random.default_rng(0).random((n, 40))
    ours = crop_boxes(u, np.full(n, height), np.full(n, width), scale=scale, ratio=ratio)
    top, left, h, w = ours
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    image = torch.zeros(3, height, width)
    theirs = np.array([tv.RandomResizedCrop.make_params(tv.RandomResizedCrop(8), [image]) for _ in range(n)], object)
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in theirs]).T
    for a, b in zip(ours, theirs):
        distance = np.abs(np.searchsorted(np.sort(a), range(61)) - np.searchsorted(np.sort(b), range(61))).max() / n
        assert distance < 1.95 * math.sqrt(2 / n)  # Kolmogorov-Smirnov, level 0.001


@pytest.mark.parametrize(("height", "width"), [(10, 200), (200, 10)])
def test_crop_falls_back_to_the_centre_where_nothing_fits(height, width):
    u = np.full((1, 40), 0.5)
    box = crop_boxes(u, np.array([height]), np.array([width]), scale=(1, 1), ratio=(3 / 4, 4 / 3))[:, 0]
    image = torch.zeros(3, height, width)
    theirs = tv.RandomResizedCrop(8, scale=(1, 1)).make_params([image])
    assert box.tolist() == [theirs[name] for name in ("top", "left", "height", "width")]


def test_jitter_applies_the_factors_in_the_drawn_order():
    """One view by hand, from the same uniform numbers through torchvision's functions in their order."""
    image = torch.rand(3, 16, 16)
    augment = Augmentation.none(color_jitter_probability=1.0, color_jitter_strength=0.5)
    orders = set()
    for index in range(30):
        u = uniforms(60, seed=2, epoch=np.array([3]), index=np.array([index]), view=1)[0]
        operations = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)
        factors = [0.6 + 0.8 * u[9], 0.6 + 0.8 * u[10], 0.6 + 0.8 * u[11], -0.1 + 0.2 * u[12]]
        expected = image
        for number in np.argsort(u[13:17]):
            expected = operations[number](expected, factors[number])
        orders.add(tuple(np.argsort(u[13:17])))
        got = augment([image], size=16, seed=2, epoch=3, index=[index], view=1)[0]
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    assert len(orders) > 12


EVERYTHING = Augmentation(
    blur_probability=0.5, solarize_probability=0.3, rotation_degrees=20.0, translation=0.1, grayscale_probability=0.3
)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("side", "size"), [(32, 32), (48, 33), (8, 32), (100, 224)])
def test_view_does_not_depend_on_its_batch_or_on_threads(side, size, threads):
    n = 64 if size < 64 else 9
    images = list(torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8))
    images[3] = torch.randint(0, 256, (3, side + 9, side), dtype=torch.uint8)  # sizes may differ in a batch
    images[5] = images[5].float() / 255
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = EVERYTHING(images, size=size, seed=1, epoch=2, index=range(n), view=1)
        torch.set_num_threads(threads)
        alone = [EVERYTHING([images[i]], size=size, seed=1, epoch=2, index=[i], view=1)[0] for i in range(n)]
        threes = [
            EVERYTHING([images[i] for i in rows], size=size, seed=1, epoch=2, index=rows, view=1)
            for rows in torch.randperm(n)[: n // 3 * 3].view(-1, 3).tolist()
        ]
        rows = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
        shuffled = EVERYTHING([images[i] for i in rows], size=size, seed=1, epoch=[2] * n, index=rows, view=1)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, torch.stack(alone))
    assert torch.equal(together[rows], shuffled)
    assert all(any(torch.equal(row, one) for one in together) for part in threes for row in part)


def test_chunks_do_not_show(monkeypatch):
    images = list(torch.randint(0, 256, (50, 3, 16, 16), dtype=torch.uint8))
    whole = EVERYTHING(images, size=16, index=range(50))
    monkeypatch.setattr("hfproj.data.augment._CHUNK", 7)
    assert torch.equal(whole, EVERYTHING(images, size=16, index=range(50)))


def test_view_is_a_function_of_seed_epoch_index_and_view():
    image = torch.rand(3, 24, 24)

    def view(seed=0, epoch=0, index=0, view=0):
        return EVERYTHING([image], size=24, seed=seed, epoch=epoch, index=[index], view=view)

    assert torch.equal(view(3, 1, 4, 1), view(3, 1, 4, 1))
    for other in (view(seed=1), view(epoch=1), view(index=1), view(view=1)):
        assert not torch.equal(view(), other)


def test_global_generators_are_left_alone():
    image = torch.rand(3, 8, 8)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    EVERYTHING([image], size=8, index=[0])
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002


@pytest.mark.parametrize("side", [16, 40])
@pytest.mark.parametrize("zero", [None, 0])
def test_all_off_is_a_plain_resize(side, zero):
    off = Augmentation(
        scale=None,
        flip_probability=zero,
        color_jitter_probability=zero,
        grayscale_probability=zero,
        blur_probability=zero,
        solarize_probability=zero,
        rotation_degrees=zero,
        translation=zero,
    )
    images = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8)
    expected = tvf.resize(images / 255, [16, 16], antialias=True)
    torch.testing.assert_close(off(list(images), size=16, index=range(4)), expected, atol=1e-5, rtol=0)
    assert Augmentation.none()(list(images), size=16, index=range(4)).equal(off(list(images), size=16, index=range(4)))


@pytest.mark.parametrize(
    ("part", "operation"),
    [
        ({"flip_probability": 1.0}, tvf.horizontal_flip),
        ({"grayscale_probability": 1}, lambda x: tvf.rgb_to_grayscale(x, 3)),
        ({"solarize_probability": 1}, lambda x: tvf.solarize(x, 0.5)),
        (
            {"blur_probability": 1, "blur_sigma": (1, 1)},
            lambda x: tvf.gaussian_blur(x, [5, 5], [1.0, 1.0]),  # 40 // 20 = 2 taps either side
        ),
        ({"color_jitter_probability": 1, "color_jitter_strength": 0}, lambda x: x),
        ({"color_jitter_probability": 1, "brightness": 0, "contrast": None, "saturation": 0, "hue": None}, lambda x: x),
    ],
)
def test_each_part_alone(part, operation):
    images = torch.rand(3, 3, 40, 40)
    got = Augmentation.none(**part)(list(images), size=40, index=range(3))
    torch.testing.assert_close(got, operation(images), atol=1e-5, rtol=0)


def test_switching_a_part_off_leaves_the_others():
    images = list(torch.rand(20, 3, 16, 16))
    with_flip = Augmentation(color_jitter_probability=0, grayscale_probability=0)(images, size=16, index=range(20))
    crop = Augmentation.none(scale=(0.08, 1.0))(images, size=16, index=range(20))
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(with_flip, crop)]
    kept = [torch.equal(a, b) for a, b in zip(with_flip, crop)]
    assert all(a != b for a, b in zip(flipped, kept))
    assert 3 < sum(flipped) < 17


def test_blur_is_automatic_above_64_pixels():
    for size, same in ((64, True), (65, False)):
        images = list(torch.rand(6, 3, size, size))
        plain = Augmentation.none()(images, size=size, index=range(6))
        assert torch.equal(plain, Augmentation.none(blur_probability="auto")(images, size=size, index=range(6))) is same


def test_values_stay_in_range():
    out = EVERYTHING(list(torch.rand(40, 3, 24, 24)), size=32, index=range(40))
    assert out.min() >= 0
    assert out.max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip_probability": 1.5}, "flip_probability to be from 0 to 1"),
        ({"brightness": -1}, "brightness to be at least 0"),
        ({"scale": (0.5, 0.1)}, "low ≤ high"),
        ({"scale": (0.5, 1.1)}, "at most 1"),
        ({"hue": 0.6}, "hue"),
        ({"translation": 1}, "translation"),
        ({"flip_probability": float("nan")}, "flip_probability to be from 0 to 1"),
        ({"blur_sigma": (0.0, 1.0)}, r"blur_sigma to be \(low, high\)"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Augmentation(**options)


def test_images_of_other_types_and_of_several_numbers_of_channels_are_refused():
    with pytest.raises(UsageError, match="to_rgb_tensor"):
        Augmentation()([torch.rand(1, 8, 8), torch.rand(3, 8, 8)], size=8, index=[0, 1])
    with pytest.raises(UsageError, match="to_rgb_tensor"):
        Augmentation()([torch.zeros(3, 8, 8, dtype=torch.int32)], size=8, index=[0])
