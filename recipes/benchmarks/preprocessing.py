"""Does `EvalImages.for_model` prepare images as the model's own processor does?

    python recipes/benchmarks/preprocessing.py    # no downloads, a minute on 2 CPU cores

Models are small and have random weights; their processors are those of the published models (`AutoImageProcessor` from
a folder; `timm.data.create_transform`). Writes the largest difference of any pixel, in grey levels of 0 to 255 before
mean and std, for each model and image size to recipes/benchmarks/results/preprocessing.json and .md.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
import transformers
from PIL import Image
from torch import Tensor

import hfproj
from hfproj.files import installed_versions, write_atomic, write_json

OUT = Path(__file__).resolve().parent / "results" / "preprocessing"
SIZES = [(31, 57), (100, 333), (224, 223), (501, 97), (768, 1024), (224, 224)]  # height, width
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
WIDTHS = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
# model → (class of the model, of its processor, the published processor's settings where the class has others)
TRANSFORMERS = {
    "ViT": ("ViT", "ViTImageProcessor", {}),
    "DINOv2": ("Dinov2", "BitImageProcessor", {"size": {"shortest_edge": 256}, **IMAGENET}),
    "CLIP": ("CLIPVision", "CLIPImageProcessor", {}),
    "SigLIP": ("SiglipVision", "SiglipImageProcessor", {}),
    "DINOv3": ("ViT", "DINOv3ViTImageProcessor", {}),
    "BEiT": ("ViT", "BeitImageProcessor", {}),
    "ConvNeXT": ("ViT", "ConvNextImageProcessor", {"size": {"shortest_edge": 224}, **IMAGENET}),
    "ConvNeXT 384": ("ViT", "ConvNextImageProcessor", IMAGENET),
    "EfficientNet": ("ViT", "EfficientNetImageProcessor", {"size": {"height": 224, "width": 224}, "resample": 0}),
    "LeViT": ("ViT", "LevitImageProcessor", {}),
    "MobileNetV2": ("ViT", "MobileNetV2ImageProcessor", {}),
    "MobileViT": ("ViT", "MobileViTImageProcessor", {"size": {"shortest_edge": 288}}),
    "PoolFormer": ("ViT", "PoolFormerImageProcessor", {}),
    "Segformer": ("ViT", "SegformerImageProcessor", {}),
    "FLAVA": ("ViT", "FlavaImageProcessor", {}),
}
TIMM = ("resnet18", "vit_tiny_patch16_224", "tf_efficientnet_lite0", "convnext_atto", "nfnet_f0", "mobilevitv2_050",
        "xcit_nano_12_p8_224", "inception_v3", "vit_base_patch14_dinov2", "vit_base_patch16_siglip_224")  # fmt: skip


Prepared = tuple[hfproj.EvalImages, Callable[[Image.Image], Tensor]]


def picture(height: int, width: int) -> Image.Image:
    """Return smooth shapes with noise, from edge to edge of the range."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 7 + 1, width // 7 + 1, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height)))
    return Image.fromarray((smooth + rng.integers(-40, 41, smooth.shape)).clip(0, 255).astype(np.uint8))


def of_transformers(name: str) -> Prepared:
    """Return our collator and the model's own processor."""
    kind, processor, options = TRANSFORMERS[name]
    config = getattr(transformers, f"{kind}Config")(**WIDTHS, image_size=224, patch_size=56)
    with tempfile.TemporaryDirectory() as folder:
        getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
        getattr(transformers, processor)(**options).save_pretrained(folder)
        own = transformers.AutoImageProcessor.from_pretrained(folder)
        collate = hfproj.EvalImages.for_model(hfproj.load_backbone(folder))
    return collate, lambda image: torch.as_tensor(own(image, return_tensors="pt")["pixel_values"][0])


def of_timm(name: str) -> Prepared:
    """Return our collator and timm's transform."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    own = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return hfproj.EvalImages.for_model(model), own


def differences(make: Callable, name: str) -> dict[str, float]:
    """Return the largest difference for each size."""
    collate, own = make(name)
    found = {}
    for height, width in SIZES:
        image = picture(height, width)
        difference = (collate([{"image": image}])["pixel_values"][0] - own(image)).abs() * collate.std * 255
        found[f"{height} x {width}"] = round(difference.max().item(), 2)
    return found


def table(found: dict) -> str:
    """Return the results as markdown."""
    sizes = list(next(iter(found["largest"].values())))
    lines = [f"| model | {' | '.join(sizes)} |", "|---" * (len(sizes) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{v:g}' for v in row.values())} |" for name, row in found["largest"].items()]
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "transformers", "timm"))
    head = "Largest difference of a pixel between `EvalImages.for_model` and the model's own processor, in grey levels"
    return "\n".join(
        ["# Preprocessing", "", f"{head} of 255,\nby height x width of the image. {versions}.", "", *lines, ""]
    )


if __name__ == "__main__":
    ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args()
    largest = {name: differences(of_transformers, name) for name in TRANSFORMERS}
    largest |= {f"timm {name}": differences(of_timm, name) for name in TIMM}
    command = "python recipes/benchmarks/preprocessing.py"
    results = {"command": command, "versions": installed_versions(), "largest": largest}
    write_json(OUT.with_suffix(".json"), results)
    write_atomic(OUT.with_suffix(".md"), table(results).encode())
    print(table(results))
