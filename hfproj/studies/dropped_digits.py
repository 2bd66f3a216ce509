"""An augmentation that destroys a feature: does the projection head keep the loss of it from the representation?

Digits are blended onto the images of CIFAR-10, so that each has two labels: its class and its digit. SimCLR training
drops the digit from a view with probability p. At p = 0 both views show it; at p = 0.5 half of the pairs disagree about
it, and the loss asks to forget it; at p = 1 it is never seen. Three heads of paper 2: an MLP, the fixed reweighting
head (κ = 1.05) and none (z = h), on the pretrained vit_nano with LoRA. Linear probes and a 20-NN read digit and class
from h and from z, of images that all have their digit, and from h of the backbone before training.

References:
    Xue, Gan, Ni, Joshi, Mirzasoleiman 2024, "Investigating the Benefits of Projection Head for Representation
    Learning", arXiv 2403.11391, section 5: MNIST on CIFAR-10, dropped digits.

Deviations: scikit-learn's digits, 28 pixels wide in the middle of the image, opacity 0.7; a pretrained backbone with
LoRA and a short training, so that this says what forgets a feature that is there, not what learns it.
"""

import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import set_seed

from hfproj import plots
from hfproj.backbones import load_backbone
from hfproj.data import load_image_dataset
from hfproj.features import extract_features
from hfproj.files import command_line, installed_versions, measured_once, write_atomic, write_json
from hfproj.presets import get_preset
from hfproj.probes.knn import KNNProbe
from hfproj.probes.linear import LinearProbe
from hfproj.results import Interval
from hfproj.shifts.composites import DigitsOnImages, DigitViews, Split
from hfproj.studies.pooled import pooled_interval
from hfproj.training import ProjectionTrainer, ProjectionTrainingArguments
from hfproj.tuner import ProjectionHeadConfig

Row = dict[str, Any]  # of one run: head, drop_probability, seed, and accuracies by name
HEADS = {"MLP": "mlp", "reweighting": "reweight", "no head": "no_head"}  # name → of the preset reweighting_simclr_…
PROBABILITIES = (0.0, 0.5, 1.0)
SEEDS = (0, 1, 2)
LABELS, PROBES = ("digit", "class"), ("linear", "20-NN")
PASTED: dict[str, Any] = {"size": 28, "place": "center", "opacity": 0.7}
TRAINING: dict[str, Any] = {
    "max_steps": 50, "per_device_train_batch_size": 128, "learning_rate": 2e-3, "patch_dropout": 0.5,
}  # fmt: skip
VIEWS: dict[str, Any] = {
    "scale": (0.6, 1.0), "flip_probability": 0.0, "color_jitter_strength": 0.5, "grayscale_probability": 0.2,
}  # fmt: skip
LORA_RANK = 8
TRAIN_IMAGES, TEST_IMAGES = 4_000, 1_500
L2 = 1e-3  # of the linear probes: one strength, that all runs are compared under


def study(images: str, runs: Path, out: Path) -> None:
    """Run what is not finished, and write the results as JSON, as a table and as figures.

    Args:
        images: CIFAR-10, as `hfproj.load_image_dataset` takes it.
        runs: Folder where finished runs are kept.
        out: The files without their suffix: ``out.json``, ``out.md``, ``out_class_linear.png`` and so on.
    """
    pasted = pasted_images(images)
    before = measured_once(runs / "before.json", lambda: probed(load_backbone("vit_nano"), pasted))
    rows: list[Row] = []
    for seed in SEEDS:
        for probability in PROBABILITIES:
            for head in HEADS:
                work = partial(trained_and_probed, pasted, head, probability, seed, runs / "trainer")
                found = measured_once(runs / f"{HEADS[head]}-{probability:g}-{seed}.json", work)
                rows.append({"head": head, "drop_probability": probability, "seed": seed, **found})
                print(rows[-1], flush=True)
    settings = {"pasted": PASTED, "training": TRAINING, "views": VIEWS, "lora_rank": LORA_RANK, "l2": L2}
    settings |= {"train_images": TRAIN_IMAGES, "test_images": TEST_IMAGES}
    content = {"command": command_line(), "versions": installed_versions(), "settings": settings, "before": before}
    write_json(out.with_suffix(".json"), {**content, "runs": rows})
    _draw(rows, out)
    write_atomic(out.with_suffix(".md"), document(before, rows, out.name).encode())


def pasted_images(name: str) -> dict[str, DigitsOnImages]:
    """Return the images of both splits, with digits on them."""
    limits: dict[Split, int] = {"train": TRAIN_IMAGES, "test": TEST_IMAGES}
    return {
        split: DigitsOnImages(load_image_dataset(name, split=split, limit=limit), split=split, **PASTED)
        for split, limit in limits.items()
    }


def probed(model: nn.Module, images: dict[str, DigitsOnImages]) -> dict[str, float]:
    """Return accuracies by name: "linear: digit of h" and so on."""
    features = {split: extract_features(model, data) for split, data in images.items()}
    labels: dict[str, Any] = {
        split: {"digit": images[split].digit_labels, "class": f.labels} for split, f in features.items()
    }
    return {
        f"{name}: {label} of {layer}": probe.fit(f, labels["train"][label]).score(
            features["test"].by_name()[layer], labels["test"][label]
        )
        for name, probe in (("linear", LinearProbe(l2=L2)), ("20-NN", KNNProbe(k=20)))
        for layer, f in features["train"].by_name().items()
        for label in LABELS
    }


def trained_and_probed(
    images: dict[str, DigitsOnImages], head: str, probability: float, seed: int, folder: Path
) -> dict[str, float]:
    """Train one head with digits dropped with a probability, and return what `probed` reads afterwards."""
    preset = get_preset(f"reweighting_simclr_{HEADS[head]}")
    set_seed(seed)
    lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK)
    config = ProjectionHeadConfig(head=preset.head, head_options=preset.head_options, backbone_adapter=lora)
    model = get_peft_model(load_backbone("vit_nano"), config)
    arguments = ProjectionTrainingArguments(
        output_dir=str(folder), seed=seed, save_strategy="no", report_to="none", disable_tqdm=True, **TRAINING
    )
    views = DigitViews.for_model(model, drop_probability=probability, seed=seed, **VIEWS)
    trainer = ProjectionTrainer(
        model, arguments, objective=preset.objective, train_dataset=images["train"], data_collator=views
    )
    trainer.train()
    return probed(model, images)


def document(before: Mapping[str, float], rows: list[Row], name: str = "dropped_digits") -> str:
    """Return the Markdown of what the JSON file holds; `name` is what the names of the figures begin with."""
    header = ["", *(f"p = {p:g}" for p in PROBABILITIES)]
    parts = [
        "# Digits dropped from views",
        "Written by `recipes/dropped_digits.py`: mean ± std over three seeds; chance is 0.1. To a linear probe, which "
        "scales every dimension to unit variance first, z of the reweighting head is h; to a 20-NN it is not.",
    ]
    for probe in PROBES:
        for label in LABELS:
            table = [header, ["---"] * len(header)]
            for head, layer in _places():
                cells = (_values(rows, head, p, f"{probe}: {label} of {layer}") for p in PROBABILITIES)
                table.append([f"{layer}, {head}", *(f"{mean:.3f} ± {std:.3f}" for mean, std in cells)])
            lines = "\n".join(f"| {' | '.join(line)} |" for line in table)
            picture = f"![{probe} accuracy of the {label} over the drop probability]({name}_{label}_{probe}.png)"
            at_first = before[f"{probe}: {label} of h"]
            parts += [f"## {probe} accuracy of the {label} (h before training: {at_first:.3f})", lines, picture]
    parts += ["## What it says", *said(before, rows)]
    return "\n\n".join(parts) + "\n"


def said(before: Mapping[str, float], rows: list[Row]) -> list[str]:
    """Return what dropping digits from half of the views did to h, probe by probe, by `pooled_interval`."""
    lines = []
    for probe in PROBES:
        for label in LABELS:
            lost = []
            for head in HEADS:
                gap = compared(before, rows, probe, label, head)
                lost.append(f"{head} {gap.difference:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], {_SENSES[_sense(gap)]}")
            lines.append(f"- h after training with p = 0.5 against before, {probe}, {label}: {'; '.join(lost)}.")
            gap = compared(before, rows, probe, label, "MLP", "no head")
            lines[-1] += (
                f" An MLP head against no head: {gap.difference:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], "
                f"{_KEPT[_sense(gap)]}."
            )
    rule = f"Intervals: 95 %, other seeds and other {TEST_IMAGES:,} test images (`hfproj.studies.pooled`)."
    return ["\n".join(lines), rule]


def compared(
    before: Mapping[str, float], rows: list[Row], probe: str, label: str, head: str, other: str = "", p: float = 0.5
) -> Interval:
    """Return how much more a probe reads of a label from h with one head than with another, or than before training."""
    what = f"{probe}: {label} of h"
    values = {
        f"{name} {q:g}": [row[what] for row in rows if (row["head"], row["drop_probability"]) == (name, q)]
        for name in HEADS
        for q in PROBABILITIES
    }
    against = f"{other} {p:g}" if other else "before"
    return pooled_interval({**values, "before": [before[what]]}, f"{head} {p:g}", against, rows=TEST_IMAGES)


def _sense(gap: Interval) -> int:
    return 1 if gap.low > 0 else -1 if gap.high < 0 else 0


_SENSES = {1: "gained", -1: "lost", 0: "cannot be judged"}
_KEPT = {1: "the head keeps it", -1: "the head loses it", 0: "cannot be judged"}


def _values(rows: list[Row], head: str, probability: float, what: str) -> tuple[float, float]:
    """Return mean and standard deviation over seeds."""
    of = [row[what] for row in rows if (row["head"], row["drop_probability"]) == (head, probability)]
    return statistics.mean(of), statistics.stdev(of)


def _places() -> list[tuple[str, str]]:
    """Return (head, layer) of every curve; without a head z is h."""
    return [(head, layer) for head in HEADS for layer in (("h",) if head == "no head" else ("h", "z"))]


def _draw(rows: list[Row], out: Path) -> None:
    for probe in PROBES:
        for label in LABELS:
            curves = {}
            for head, layer in _places():
                mean, std = zip(*(_values(rows, head, p, f"{probe}: {label} of {layer}") for p in PROBABILITIES))
                curves[f"{layer}, {head}"] = (PROBABILITIES, mean, std)
            y_label = f"{probe} accuracy of the {label}"
            plots.plot_curves(curves, "drop probability of the digit", y_label, f"{out}_{label}_{probe}.png")
