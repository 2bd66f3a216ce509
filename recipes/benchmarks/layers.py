"""Where is the representation best? Probes of every layer of adapters, before and after training.

    python recipes/benchmarks/layers.py runs/vit_nano_digits_simclr/0 runs/vit_nano_digits_simclr/1 …

The adapters are those of `recipes/benchmarks/seeds.py`, one a seed, on one data set. "Before" is the backbone with the
adapter disabled. Writes layers.json, .md and two figures below recipes/benchmarks/results; three minutes of one core.
"""

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a shared CPU spinning threads cost more than they save

from dataclasses import replace
from functools import reduce
from pathlib import Path

import hfproj
from hfproj import cli, plots
from hfproj.files import write_atomic
from hfproj.results import WHENS

OUT = Path(__file__).resolve().parent / "results"
FIGURES = {"knn": "20-NN accuracy", "linear": "linear accuracy"}


def measured(folder: Path, seed: int, dataset: str) -> hfproj.Results:
    """Return probes of all layers of one adapter, with and without it."""
    model = hfproj.from_pretrained(folder)
    images = {split: hfproj.load_image_dataset(dataset, split=split) for split in ("train", "test")}
    probes = [hfproj.KNNProbe(k=20), hfproj.LinearProbe(), hfproj.create_probe("mlp")]
    options = {"probes": probes, **images, "layers": "all", "dataset": dataset, "seed": seed}
    after = hfproj.evaluate(model, **options, when="after")
    with model.disable_adapter():
        before = hfproj.evaluate(model, **options, when="before")
    return before.merge(after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", type=Path)
    parser.add_argument("--dataset", default="digits", help="What hfproj.load_image_dataset takes.")
    options = parser.parse_args()
    runs = [measured(folder, seed, options.dataset) for seed, folder in enumerate(options.adapters)]
    results = reduce(lambda first, other: first.merge(other), runs)
    results.command = "python recipes/benchmarks/layers.py " + " ".join(map(str, options.adapters))
    # Answers row by row are of use in the report of one run.
    results.measurements = [replace(measurement, outcomes="") for measurement in results.measurements]
    results.save(OUT / "layers.json")
    keys = {key[0]: key for key in results.names("accuracy")}
    for name, label in FIGURES.items():
        curves = {
            f"{when} training": {
                layer: pair for layer in results.layers if (pair := results.mean_std(keys[name], layer, when))
            }
            for when in WHENS
        }
        plots.plot_layers(curves, label, OUT / f"layers_{name}.png")
    lines = [
        "# Probes, layer by layer",
        "",
        "Written by `recipes/benchmarks/layers.py`.",
        "",
        results.to_markdown(),
        "",
    ]
    lines += [f"![{label} of every layer](layers_{name}.png)" for name, label in FIGURES.items()]
    write_atomic(OUT / "layers.md", ("\n".join(lines) + "\n").encode())
    print(results.table())


if __name__ == "__main__":
    cli.run(main)
