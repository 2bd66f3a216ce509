"""Multi-crop: local views after the others, each decided by (seed, epoch, index, view); sizes that backbones take."""

import pickle

import numpy as np
import pytest
import timm
import torch
import torchvision.transforms.v2.functional as tvf
from PIL import Image
from transformers import ViTConfig, ViTModel

import hfproj
from hfproj import UsageError
from hfproj.data import Augmentation, ImageViews, IndexedDataset, to_rgb_tensor

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3), dtype=np.uint8)
DATASET = IndexedDataset([{"image": Image.fromarray(p), "label": i} for i, p in enumerate(PIXELS)])


def collate(**options):
    return ImageViews(**{"size": 12, "mean": MEAN, "std": STD, "local_views": 3, "local_size": 8, **options})


def batch(collator, *index, epoch=2):
    return collator([DATASET[epoch, i] for i in index])


def view_of(index, view, size, seed=0, epoch=2, **options):
    image = to_rgb_tensor(DATASET[index]["image"])
    x = Augmentation(**options)([image], size=size, seed=seed, epoch=epoch, index=[index], view=view)[0]
    return tvf.normalize(x, MEAN, STD)


def test_local_views_come_after_the_others():
    views = batch(collate(), 4, 1)["views"]
    assert [tuple(view.shape) for view in views] == [(2, 3, 12, 12)] * 2 + [(2, 3, 8, 8)] * 3
    for first, second in ((2, 3), (2, 4), (3, 4)):
        assert not torch.equal(views[first], views[second])


def test_views_are_the_augmentations_numbered_through():
    views = batch(collate(seed=5, scale=(0.4, 1.0), local_scale=(0.05, 0.14)), 4, 1)["views"]
    for number, view in enumerate(views):
        size, scale = (12, (0.4, 1.0)) if number < 2 else (8, (0.05, 0.14))
        for row, index in enumerate((4, 1)):
            expected = view_of(index, number, size, seed=5, scale=scale)
            torch.testing.assert_close(view[row], expected)


def test_local_views_do_not_change_the_others():
    with_them, without = batch(collate(), 3), batch(collate(local_views=0, local_size=None), 3)
    assert len(without["views"]) == 2
    for a, b in zip(with_them["views"], without["views"]):
        assert torch.equal(a, b)


def test_rows_do_not_depend_on_their_batch_and_pickling_changes_nothing():
    whole, one = batch(collate(), *range(6)), batch(pickle.loads(pickle.dumps(collate())), 3)
    for a, b in zip(whole["views"], one["views"], strict=True):
        assert torch.equal(a[3], b[0])


def test_local_views_show_smaller_parts():
    """A picture of its own coordinates: the range of values is the part of it that shows."""
    ramp = np.broadcast_to(np.linspace(0, 1, 64)[:, None], (64, 64))
    options = {"augmentation": Augmentation.none(scale=(0.5, 1.0)), "local_scale": (0.05, 0.3), "num_views": 1}
    collator = ImageViews(size=32, mean=(0, 0, 0), std=(1, 1, 1), local_views=1, local_size=16, **options)
    shown = [
        [(view.amax() - view.amin()).item() for view in collator([{"image": ramp, "index": i}])["views"]]
        for i in range(40)
    ]
    whole, local = torch.tensor(shown).T
    assert whole.min() > (0.5 * 3 / 4) ** 0.5 - 0.05
    assert local.max() < (0.3 * 4 / 3) ** 0.5 + 0.05
    assert local.mean() < whole.mean() - 0.3


def test_augmentations_of_their_own():
    """DINO's three: the first large view blurred, the second solarized, the small ones neither."""
    off = Augmentation.none()
    large = [Augmentation.none(blur_probability=1), Augmentation.none(solarize_probability=1)]
    views = batch(collate(size=20, local_size=20, augmentation=large, local_augmentation=off), 0)["views"]
    plain = tvf.normalize(to_rgb_tensor(DATASET[0]["image"]) / 255, MEAN, STD)
    equal = [torch.allclose(view[0], plain, atol=1e-5) for view in views]
    assert equal == [False, False, True, True, True]
    each = [off, Augmentation.none(flip_probability=1), off]
    views = batch(collate(size=20, local_size=20, augmentation=off, local_augmentation=each), 0)["views"]
    torch.testing.assert_close(views[3], views[2].flip(-1))
    # Without one of their own they are like the first large view, from smaller parts.
    assert collate(augmentation=large).augmentations[2] == Augmentation.none(blur_probability=1, scale=(0.05, 0.4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_size": None}, "got local_views=3 and local_size=None"),
        ({"local_views": 0}, r"local_views=6, local_size=96 .* got local_views=0 and local_size=8"),
        ({"local_views": -1}, "local_views=-1"),
        ({"local_size": 0}, "local_size=0"),
        ({"local_scale": (0.5, 0.1)}, r"scale to be \(low, high\)"),
        ({"local_augmentation": [Augmentation()]}, "each of local_views=3 views, got 1"),
        ({"augmentation": [Augmentation()]}, "each of num_views=2 views, got 1"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        collate(**options)


def vit():
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    return ViTModel(config, add_pooling_layer=False)


PLAIN = {"mean": MEAN, "std": STD, "size": 16, "local_views": 2}


@pytest.mark.filterwarnings("ignore:ViTModel has no preprocessor_config")
def test_for_model_tries_the_local_size():
    backbone = vit().train()
    next(backbone.children()).eval()
    modes = [module.training for module in backbone.modules()]
    views = ImageViews.for_model(backbone, local_size=8, **PLAIN)
    assert views.sizes == [16, 16, 8, 8]
    with pytest.raises(UsageError, match=r"ViTModel takes no views of local_size=3 \(RuntimeError.*another"):
        ImageViews.for_model(backbone, local_size=3, **PLAIN)
    assert [module.training for module in backbone.modules()] == modes


@pytest.mark.filterwarnings("ignore:ViTModel has no preprocessor_config")
def test_for_model_with_a_head_leaves_its_statistics():
    from peft import get_peft_model

    model = get_peft_model(vit(), hfproj.ProjectionHeadConfig(head_options={"hidden_dim": 4}, out_dim=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ImageViews.for_model(model, local_size=8, **PLAIN)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({}, 16, r"made for images of 32 × 32 pixels, got 16 × 16; make it with dynamic_img_size=True"),
        ({"dynamic_img_size": True}, 20, "should be divisible by patch size"),
        ({"dynamic_img_size": True}, 16, None),
    ],
)
def test_for_model_with_timm(options, size, message):
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 1, "num_classes": 0}
    model = timm.models.VisionTransformer(**small, **options)
    model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": MEAN, "std": STD}
    if message is None:
        assert ImageViews.for_model(model, local_views=1, local_size=size).sizes == [32, 32, size]
    else:
        with pytest.raises(UsageError, match=message):
            ImageViews.for_model(model, local_views=1, local_size=size)
