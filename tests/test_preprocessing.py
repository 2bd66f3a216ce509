"""`EvalImages.for_model` gives the pixels of the model's own image processor or timm transform."""

import dataclasses
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from peft import get_peft_model
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from transformers import (  # fmt: skip
    AutoImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

import hfproj
from hfproj import EvalImages, ImageViews
from hfproj.backbones import ImagePreprocessing, image_preprocessing
from hfproj.backbones.preprocessing import OF_ADAPTER, channels_of, has_preprocessing, preprocessor_config, settings_of

SIZES = [(31, 57), (100, 333), (224, 223), (501, 97), (224, 224), (51, 51)]  # height, width
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 224}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
EFFICIENTNET = {"size": {"height": 99, "width": 99}, "resample": 0, **IMAGENET}


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 7 + 1, width // 7 + 1, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height)))
    return Image.fromarray((smooth + rng.integers(-40, 41, smooth.shape)).clip(0, 255).astype(np.uint8))


PICTURES = [picture(*size) for size in SIZES]


def vit():
    return ViTModel(ViTConfig(**SMALL, patch_size=32), add_pooling_layer=False)


def dinov2():
    return Dinov2Model(Dinov2Config(**SMALL, patch_size=56))


MODELS = {
    "vit": (vit, "ViTImageProcessor", {}),
    "dinov2": (dinov2, "BitImageProcessor", {"size": {"shortest_edge": 256}, **IMAGENET}),
    "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**SMALL, patch_size=32)), "CLIPImageProcessor", {}),
    "siglip": (lambda: SiglipVisionModel(SiglipVisionConfig(**SMALL, patch_size=32)), "SiglipImageProcessor", {}),
    "odd crop": (vit, "BitImageProcessor", {"size": {"shortest_edge": 61}, "crop_size": {"height": 40, "width": 40}}),
    "convnext": (vit, "ConvNextImageProcessor", {"size": {"shortest_edge": 96}}),
    "convnext 384": (vit, "ConvNextImageProcessor", {}),
    "poolformer": (vit, "PoolFormerImageProcessor", {}),
    "levit": (vit, "LevitImageProcessor", {}),
    "mobilevit": (vit, "MobileViTImageProcessor", {}),  # pads to its crop, takes blue, green, red
    "efficientnet": (vit, "EfficientNetImageProcessor", EFFICIENTNET),
    "efficientnet offset": (vit, "EfficientNetImageProcessor", {**EFFICIENTNET, "include_top": False,
                            "rescale_factor": 1 / 127.5, "rescale_offset": True}),
    "dinov3": (vit, "DINOv3ViTImageProcessor", {}),
    "pixels of 0 to 255": (vit, "ViTImageProcessor", {"do_rescale": False}),
    "not normalised": (vit, "ViTImageProcessor", {"do_normalize": False, "resample": 3}),
}  # fmt: skip


def largest(collate, expected):
    """Return the largest difference of pixels in grey levels; `expected` makes the normalised pixels of an image."""
    rows = [(collate([{"image": image}])["pixel_values"][0], expected(image)) for image in PICTURES]
    return max(((got - want).abs() * collate.std).max().item() * 255 for got, want in rows)


def saved(folder, name):
    make, kind, options = MODELS[name]
    make().save_pretrained(folder)
    processor = getattr(transformers, kind, None) or getattr(transformers, f"{kind}Fast")  # DINOv3's before 5.4
    processor(**options).save_pretrained(folder)
    return hfproj.load_backbone(str(folder))


@pytest.mark.parametrize("name", MODELS)
def test_transformers_pixels(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        collate = EvalImages.for_model(saved(tmp_path, name))
    own = AutoImageProcessor.from_pretrained(tmp_path)
    assert largest(collate, lambda image: torch.as_tensor(own(image, return_tensors="pt")["pixel_values"][0])) <= 2


@pytest.mark.parametrize("change", [
    {}, {"crop_pct": 0.8, "crop_mode": "squash"}, {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"},
    {"crop_mode": "border", "mean": (0.2, 0.5, 0.7)}, {"crop_pct": 1.0, "interpolation": "lanczos"},
    {"crop_pct": 0.93, "interpolation": "nearest"}, {"input_size": (3, 97, 97), "crop_mode": "border"},
])  # fmt: skip
def test_timms_pixels(change):
    with torch.device("meta"):
        model = timm.create_model("resnet18", num_classes=0)
    model.pretrained_cfg = {**model.pretrained_cfg, **change}
    assert largest(EvalImages.for_model(model), create_transform(**resolve_model_data_config(model))) <= 0.01


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "tf_efficientnet_lite0", "convnext_atto", "nfnet_f0",
                                  "xcit_nano_12_p8_224", "mobilevitv2_050"])  # fmt: skip
def test_timms_pixels_of_published_configurations(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    assert largest(EvalImages.for_model(model), create_transform(**resolve_model_data_config(model))) <= 0.01


def test_old_files_have_the_defaults_of_their_class():
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "resample": 3}
    assert (settings_of(old, "x").resize_mode, settings_of(old, "x").size) == ("shortest", 224)
    assert settings_of({"image_processor_type": "ViTImageProcessorFast", "size": 32}, "x").resize_mode == "exact"
    assert settings_of({"size": {"shortest_edge": 30}}, "x").resize_mode == "shortest"
    assert settings_of({"image_processor_type": "BitImageProcessor"}, "x").resize == 224
    for bad in ({"size": 10**9}, {"size": 8, "rescale_factor": 0}, {"size": {"height": True}}, {"size": "8"},
                {"size": 8, "do_center_crop": True, "crop_size": -1}):  # fmt: skip
        with pytest.raises(hfproj.UsageError, match="expected"):
            settings_of(bad, "x")


@pytest.mark.parametrize("extra", [{"size": {"shortest_edge": 8, "longest_edge": 9}}, {"do_pad": True},
                                   {"size": {"height": 8, "width": 9}}, {"size_divisor": 32},
                                   {"do_resize": False, "do_center_crop": True, "crop_size": 8},
                                   {"image_processor_type": "PerceiverImageProcessor"}])  # fmt: skip
def test_what_is_not_followed_is_said(extra):
    with pytest.warns(UserWarning, match="does not follow"):
        settings_of({"size": 8, **extra}, "The preprocessing")


def test_sides_that_differ_are_said():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(64, 32), depth=1)
    with pytest.warns(UserWarning, match=r"images of \(64, 32\)"):
        image_preprocessing(model)


@pytest.mark.parametrize("settings", [
    ImagePreprocessing(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 36),
    ImagePreprocessing(32, (0.1,) * 3, (0.4,) * 3, "lanczos", 32, "exact"),
    ImagePreprocessing(32, (0.1,) * 3, (0.4,) * 3, "bicubic", 40, "exact", "down", True),
    ImagePreprocessing(32, (0.1,) * 5, (0.4,) * 5, "bicubic", 32, "longest"),
])  # fmt: skip
def test_saved_settings_are_read_again(settings):
    """`crop_rounding` alone is not in the file: it is that of the library that reads it."""
    found = settings_of(json.loads(json.dumps(preprocessor_config(settings))), "x")
    assert dataclasses.replace(found, crop_rounding=settings.crop_rounding) == settings
    backbone = vit()
    backbone.__dict__[OF_ADAPTER] = preprocessor_config(dataclasses.replace(settings, mean=(0.1,) * 3, std=(0.4,) * 3))
    assert image_preprocessing(backbone).crop_rounding == "even"


def trainer_of(model, rows, views, folder):
    args = hfproj.ProjectionTrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    head = hfproj.ProjectionHeadConfig(head="linear", out_dim=4)
    return hfproj.ProjectionTrainer(get_peft_model(model, head), args, train_dataset=rows, data_collator=views)


def test_what_a_trainer_saves_is_how_its_model_is_measured(tmp_path):
    """Another size keeps the ratio of resize and crop; mean and std are the collator's."""
    model = saved(tmp_path, "dinov2")
    assert image_preprocessing(model).at(112).resize == EvalImages.for_model(model, size=112).resize == 128
    views = ImageViews.for_model(model, size=112, mean=(0.1, 0.2, 0.3))
    found = trainer_of(model, [{"image": PICTURES[0]}] * 4, views, tmp_path / "run")._preprocessing()
    assert (found.size, found.resize, found.resize_mode, found.mean) == (112, 128, "shortest", (0.1, 0.2, 0.3))


# --- channels ---


def convnet(channels):
    return timm.create_model("resnet10t", num_classes=0, in_chans=channels)


@pytest.mark.parametrize(("channels", "mean"), [
    (1, [(0.485 + 0.456 + 0.406) / 3]), (4, [0.485, 0.456, 0.406, 0.485]), (2, [0.485, 0.456]),
])  # fmt: skip
def test_mean_and_std_of_other_channels_are_guessed_with_a_warning(channels, mean):
    model = convnet(channels)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.485, 0.456, 0.406), "std": (0.2, 0.3, 0.4)}
    with pytest.warns(UserWarning, match=f"takes images of {channels} channels, but mean and std are known of 3"):
        found = image_preprocessing(model)
    np.testing.assert_allclose(found.mean, mean)
    assert len(found.std) == channels == channels_of(model)
    assert not has_preprocessing(model)
    given = {"mean": (0.3,) * channels, "std": (0.1,) * channels}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(EvalImages.for_model(model, **given).mean) == channels
    model.__dict__[OF_ADAPTER] = preprocessor_config(ImagePreprocessing(64, **given))
    found = image_preprocessing(model)
    assert (found.mean, found.size, found.resize) == (given["mean"], 64, EvalImages.for_model(model, size=64).resize)


def test_channels_of_transformers_and_plain_modules():
    model = ViTModel(ViTConfig(**SMALL, patch_size=32, num_channels=6))
    with pytest.warns(UserWarning, match="no preprocessor_config"):
        assert len(image_preprocessing(model).mean) == channels_of(model) == 6
    assert channels_of(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))) == 3


@pytest.mark.filterwarnings("ignore:.*channels")
@pytest.mark.parametrize("channels", [1, 5])
def test_a_model_of_other_channels_is_trained_and_measured(channels, tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"image": rng.integers(0, 65536, (40, 48, channels), dtype=np.uint16), "label": i % 2} for i in range(8)]
    model = convnet(channels)
    run = trainer_of(model, rows, ImageViews.for_model(model, size=32), tmp_path)
    assert np.isfinite(run.train().training_loss)
    with pytest.warns(UserWarning, match="`train` and `test` are the same data"):
        found = hfproj.evaluate(run.bare_model(), probes=[{"name": "knn", "k": 1}], train=rows, test=[*rows])
    assert "1.0" in str(found.table())
    assert run._preprocessing().mean == pytest.approx(image_preprocessing(model).mean, abs=1e-6)


def test_the_page_on_images_runs():
    text = (Path(__file__).resolve().parents[1] / "docs" / "images.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/images.md", "exec"), {})


@pytest.mark.parametrize("file", [None, {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 256}])
def test_patches_of_images_of_any_size_are_left_to_their_processor(file, tmp_path):
    config = Siglip2VisionConfig(**{n: v for n, v in SMALL.items() if n != "image_size"})
    backbone = Siglip2VisionModel(config)
    backbone.save_pretrained(tmp_path)
    if file:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(file))
    with pytest.raises(hfproj.UsageError, match=r"Siglip2VisionModel takes images of any size as patches.*processor"):
        EvalImages.for_model(Siglip2VisionModel.from_pretrained(tmp_path))
