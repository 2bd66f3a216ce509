"""The models that are compared: the paper's head on vit_nano, trained with SimCLR in two regimes, or not at all.

"lora" trains the head and a LoRA on the backbone, for some steps on images; "head" trains the head alone for long, on
cached views of the frozen backbone. An untrained head is the control.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import set_seed

from hfproj.backbones import FeatureBackbone, image_preprocessing, load_backbone
from hfproj.data import EvalImages, ImageViews
from hfproj.data.image_ops import rotate_translate
from hfproj.errors import UsageError
from hfproj.export import detach
from hfproj.features import CachedFeatures, FeatureViews, cache_features, extract_features
from hfproj.hub import from_pretrained
from hfproj.studies.head_geometry.study import Study, tensor_once
from hfproj.training import ProjectionTrainer, ProjectionTrainingArguments
from hfproj.tuner import ProjectionHeadConfig

HEAD = {"hidden_dim": 512, "activation": "silu"}  # the paper's at a quarter of its width; BatchNorm in all layers
OUT_DIM = 512
TEMPERATURE, LORA_R = 0.1, 8
VIEWS: dict[str, Any] = {"scale": (0.4, 1.0), "color_jitter_strength": 0.5, "grayscale_probability": 0.2}
TRAINING: dict[str, dict[str, Any]] = {
    "lora": {"steps": 80, "batch": 64, "learning_rate": 1e-3, "patch_dropout": 0.5},
    "head": {"steps": 1000, "batch": 256, "learning_rate": 1e-3, "passes": 4},
}
CALIBRATION_IMAGES = 500  # whose h gives an untrained head its BatchNorm statistics


class Model(NamedTuple):
    """Depth of the head, degrees by which views are turned at most (45 in the paper's code), and what is trained."""

    depth: int
    degrees: float
    trained: str | None


MODELS = {
    "rotated views": Model(2, 45.0, "lora"),
    "upright views": Model(2, 0.0, "lora"),
    "rotated views, head only": Model(2, 45.0, "head"),
    "upright views, head only": Model(2, 0.0, "head"),
    "all rotations, head only": Model(2, 180.0, "head"),
    "untrained": Model(2, 0.0, None),
    "depth 1": Model(1, 45.0, "lora"),
    "depth 3": Model(3, 45.0, "lora"),
    "depth 1, head only": Model(1, 45.0, "head"),
    "depth 3, head only": Model(3, 45.0, "head"),
}
COMPARED = tuple(name for name, of in MODELS.items() if of.depth == 2)
DEPTHS = tuple(name for name, of in MODELS.items() if of.degrees == 45.0)


def train(study: Study) -> None:
    """Train and save the adapter of every model and seed that is not there yet."""
    images = study.images("train")
    for seed in study.seeds:
        for name, of in MODELS.items():
            folder = adapter_folder(study, name, seed)
            if of.trained is not None and not (folder / "adapter_model.safetensors").is_file():
                _train_one(study, name, seed, images, folder)
                print("trained", name, seed, flush=True)


def _train_one(study: Study, name: str, seed: int, images: datasets.Dataset, folder: Path) -> None:
    of = MODELS[name]
    settings, data = TRAINING[str(of.trained)], images
    model = attach(name, seed)
    options = {**VIEWS, "rotation_degrees": of.degrees, "flip_probability": study.flip_probability}
    collator: Any = ImageViews.for_model(model, seed=seed, **options)
    if of.trained == "head":
        data = _cached_views(study, model, of.degrees, images, collator)
        model, collator = attach(name, seed, FeatureBackbone.of(model)), FeatureViews(seed=seed)
    arguments = ProjectionTrainingArguments(
        output_dir=str(folder),
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch"],
        learning_rate=settings["learning_rate"],
        patch_dropout=settings.get("patch_dropout", 0.0),
        seed=seed,
        logging_strategy="no",
        log_representation=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    objective = {"name": "nt_xent", "temperature": TEMPERATURE}
    trainer = ProjectionTrainer(model, arguments, objective=objective, train_dataset=data, data_collator=collator)
    trainer.train()
    trainer.save_model(str(folder))


def _cached_views(
    study: Study, model: nn.Module, degrees: float, images: datasets.Dataset, views: ImageViews
) -> CachedFeatures:
    """Return the representations of augmented views, the same for all seeds."""
    passes = TRAINING["head"]["passes"]
    file = study.folder / "h" / f"views-{degrees:g}.pt"
    return CachedFeatures(tensor_once(file, lambda: cache_features(model, images, views, passes=passes).features))


def attach(name: str, seed: int, backbone: nn.Module | None = None) -> PeftModel:
    """Return a backbone, vit_nano by default, with the head of a model before training."""
    set_seed(seed)
    of = MODELS[name]
    config = ProjectionHeadConfig(
        head="geometry_mlp",
        head_options={**HEAD, "depth": of.depth},
        out_dim=OUT_DIM,
        trainable="head" if of.trained == "head" else "adapter",
        backbone_adapter=LoraConfig(r=LORA_R, lora_alpha=LORA_R) if of.trained == "lora" else None,
    )
    return get_peft_model(load_backbone("vit_nano") if backbone is None else backbone, config)


def load(study: Study, name: str, seed: int) -> tuple[nn.Module, nn.Module]:
    """Return a model and its head; an untrained head's BatchNorm has seen the raw h of training images.

    Raises:
        UsageError: If the model was not trained yet.
    """
    if MODELS[name].trained:
        folder = adapter_folder(study, name, seed)
        if not folder.is_dir():
            raise UsageError(f"There is no adapter {str(folder)!r}: run `recipes/geometry.py train` first.")
        model = from_pretrained(folder)
        return model, detach(model).eval()
    model = attach(name, seed).eval()
    head = detach(model).train()
    x, _ = pixels(model, study.images("train", CALIBRATION_IMAGES))
    h = kept_features(study, model, x, name, seed, "calibration")
    with torch.no_grad():
        for _ in range(50):  # running statistics move by a tenth of the way each time
            head(h)
    return model, head.eval()


def adapter_folder(study: Study, name: str, seed: int) -> Path:
    """Return where the adapter of a model and seed is kept."""
    return study.folder / "adapters" / f"{name.replace(' ', '_')}-{seed}"


def pixels(model: nn.Module, images: datasets.Dataset) -> tuple[Tensor, Tensor | None]:
    """Return images at the size of the backbone, in [0, 1], and their labels if they have any."""
    batch = EvalImages.for_model(model, mean=(0.0,) * 3, std=(1.0,) * 3)([images[i] for i in range(len(images))])
    return batch["pixel_values"], batch.get("labels")


def turned(x: Tensor, degrees: Sequence[float]) -> Tensor:
    """Return each image under each rotation, ``[images, rotations, 3, size, size]``; corners are black."""
    zero = torch.zeros(len(x))
    return torch.stack([rotate_translate(x, zero + angle, zero, zero) for angle in degrees], 1)


def features(model: nn.Module, x: Tensor) -> Tensor:
    """Return h of images in [0, 1], ``[…, 3, size, size]`` → ``[…, dim]``."""
    own = image_preprocessing(model)
    mean, std = (torch.tensor(values)[:, None, None] for values in (own.mean, own.std))
    found = extract_features(
        model, x.flatten(0, -4), collator=lambda rows: {"pixel_values": (torch.stack(rows) - mean) / std}
    )
    return found.h.unflatten(0, x.shape[:-3])


def kept_features(study: Study, model: nn.Module, x: Tensor, name: str, seed: int, what: str) -> Tensor:
    """Return `features`, kept on disk under what the images are; models with a frozen backbone share them."""
    whose = f"{name.replace(' ', '_')}-{seed}" if MODELS[name].trained == "lora" else "frozen"
    return tensor_once(study.folder / "h" / f"{whose}-{what}.pt", lambda: features(model, x))
