"""An augmentation that destroys a feature: does the projection head keep the loss of it from the representation?

    python recipes/dropped_digits.py --images uoft-cs/cifar10

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

27 runs of a minute of one core each; finished ones are kept below --runs. Writes dropped_digits.json, .md
and four figures below recipes/benchmarks/results.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a shared CPU spinning threads cost more than they save

import statistics
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import set_seed

import hfproj
from hfproj import cli, plots
from hfproj.features import extract_features
from hfproj.files import command_line, installed_versions, measured_once, write_atomic, write_json
from hfproj.studies import DigitsOnImages, DigitViews

OUT = Path(__file__).resolve().parent / "benchmarks" / "results" / "dropped_digits"
HEADS = {"MLP": "mlp", "reweighting": "reweight", "no head": "no_head"}  # name → of the preset reweighting_simclr_…
PROBABILITIES = (0.0, 0.5, 1.0)
SEEDS = (0, 1, 2)
LABELS, PROBES = ("digit", "class"), ("linear", "20-NN")
PASTED = {"size": 28, "place": "center", "opacity": 0.7}
TRAINING = {
    "max_steps": 50,
    "per_device_train_batch_size": 128,
    "learning_rate": 2e-3,
    "patch_dropout": 0.5,
}
VIEWS = {"scale": (0.6, 1.0), "flip_probability": 0.0, "color_jitter_strength": 0.5, "grayscale_probability": 0.2}
LORA_RANK = 8
TRAIN_IMAGES, TEST_IMAGES = 4_000, 1_500
L2 = 1e-3  # of the linear probes: one strength, that all runs are compared under


@dataclass
class Recipe:
    """Flags of this recipe."""

    images: str = field(metadata={"help": "CIFAR-10: a Hub id, or a folder of parquet files."})
    runs: str = field(default="runs/dropped_digits", metadata={"help": "Finished runs are kept here."})


def images_of(name: str) -> dict[str, DigitsOnImages]:
    limits = {"train": TRAIN_IMAGES, "test": TEST_IMAGES}
    return {
        split: DigitsOnImages(hfproj.load_image_dataset(name, split=split, limit=limit), split=split, **PASTED)
        for split, limit in limits.items()
    }


def probed(model: Any, images: dict[str, DigitsOnImages]) -> dict[str, float]:
    """Return "linear: digit of h" and so on → accuracy."""
    features = {split: extract_features(model, data) for split, data in images.items()}
    labels = {split: {"digit": images[split].digit_labels, "class": f.labels} for split, f in features.items()}
    return {
        f"{name}: {label} of {layer}": probe.fit(f, labels["train"][label]).score(
            features["test"].by_name()[layer], labels["test"][label]
        )
        for name, probe in (("linear", hfproj.LinearProbe(l2=L2)), ("20-NN", hfproj.KNNProbe(k=20)))
        for layer, f in features["train"].by_name().items()
        for label in LABELS
    }


def run(images: dict[str, DigitsOnImages], head: str, probability: float, seed: int, folder: Path) -> dict[str, float]:
    preset = hfproj.get_preset(f"reweighting_simclr_{HEADS[head]}")
    set_seed(seed)
    model = get_peft_model(
        hfproj.load_backbone("vit_nano"),
        hfproj.ProjectionHeadConfig(
            head=preset.head,
            head_options=preset.head_options,
            backbone_adapter=LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK),
        ),
    )
    trainer = hfproj.ProjectionTrainer(
        model,
        hfproj.ProjectionTrainingArguments(
            output_dir=str(folder), seed=seed, save_strategy="no", report_to="none", disable_tqdm=True, **TRAINING
        ),
        objective=preset.objective,
        train_dataset=images["train"],
        data_collator=DigitViews.for_model(model, drop_probability=probability, seed=seed, **VIEWS),
    )
    trainer.train()
    return probed(model, images)


def main() -> None:
    (recipe,) = cli.parse(Recipe)
    runs, images = Path(recipe.runs), images_of(recipe.images)
    before = measured_once(runs / "before.json", lambda: probed(hfproj.load_backbone("vit_nano"), images))
    rows = []
    for seed in SEEDS:
        for probability in PROBABILITIES:
            for head in HEADS:
                work = partial(run, images, head, probability, seed, runs / "trainer")
                found = measured_once(runs / f"{HEADS[head]}-{probability:g}-{seed}.json", work)
                rows.append({"head": head, "drop_probability": probability, "seed": seed, **found})
                print(rows[-1], flush=True)
    settings = {"pasted": PASTED, "training": TRAINING, "views": VIEWS, "lora_rank": LORA_RANK, "l2": L2}
    settings |= {"train_images": TRAIN_IMAGES, "test_images": TEST_IMAGES}
    content = {"command": command_line(), "versions": installed_versions(), "settings": settings, "before": before}
    write_json(OUT.with_suffix(".json"), {**content, "runs": rows})
    draw(rows)
    write_atomic(OUT.with_suffix(".md"), document(before, rows).encode())


def values(rows: list[dict[str, Any]], head: str, probability: float, what: str) -> tuple[float, float]:
    """Return mean and standard deviation over seeds."""
    of = [row[what] for row in rows if (row["head"], row["drop_probability"]) == (head, probability)]
    return statistics.mean(of), statistics.stdev(of)


def places() -> list[tuple[str, str]]:
    """Return (head, layer) of every curve; without a head z is h."""
    return [(head, layer) for head in HEADS for layer in (("h",) if head == "no head" else ("h", "z"))]


def draw(rows: list[dict[str, Any]]) -> None:
    for probe in PROBES:
        for label in LABELS:
            curves = {}
            for head, layer in places():
                mean, std = zip(*(values(rows, head, p, f"{probe}: {label} of {layer}") for p in PROBABILITIES))
                curves[f"{layer}, {head}"] = (PROBABILITIES, mean, std)
            y_label = f"{probe} accuracy of the {label}"
            plots.plot_curves(curves, "drop probability of the digit", y_label, f"{OUT}_{label}_{probe}.png")


def document(before: dict[str, float], rows: list[dict[str, Any]]) -> str:
    """Return the Markdown of what dropped_digits.json holds."""
    header = ["", *(f"p = {p:g}" for p in PROBABILITIES)]
    parts = [
        "# Digits dropped from views",
        "Written by `recipes/dropped_digits.py`: mean ± std over three seeds; chance is 0.1. To a linear probe, which "
        "scales every dimension to unit variance first, z of the reweighting head is h; to a 20-NN it is not.",
    ]
    for probe in PROBES:
        for label in LABELS:
            table = [header, ["---"] * len(header)]
            for head, layer in places():
                cells = (values(rows, head, p, f"{probe}: {label} of {layer}") for p in PROBABILITIES)
                table.append([f"{layer}, {head}", *(f"{mean:.3f} ± {std:.3f}" for mean, std in cells)])
            lines = "\n".join(f"| {' | '.join(line)} |" for line in table)
            picture = f"![{probe} accuracy of the {label} over the drop probability]({OUT.name}_{label}_{probe}.png)"
            at_first = before[f"{probe}: {label} of h"]
            parts += [f"## {probe} accuracy of the {label} (h before training: {at_first:.3f})", lines, picture]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    cli.run(main)
