"""Which checkpoint is best? How far measures that need no labels rank checkpoints as a k-NN with labels does.

    python recipes/benchmarks/checkpoint_ranking.py train    # 6 runs of recipes/simclr_vit.py; 25 minutes of one core
    python recipes/benchmarks/checkpoint_ranking.py table    # 24 checkpoints; 4 minutes

Checkpoints of four ages, from three learning rates (one too low, one too high) and two seeds, on scikit-learn's digits.
Each is measured by `hfproj.evaluate(…, labels=None)`, and by the 20-NN accuracy of h, whose bank is the training set.
Writes checkpoint_ranking.json and .md below recipes/benchmarks/results: Spearman's rank correlation of each measure
with the accuracy, with a bootstrap interval over the runs. Runs are kept below runs/ranking.
"""

import argparse
import os
import re
import subprocess
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a shared CPU spinning threads cost more than they save

from functools import partial
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

import hfproj
from hfproj import cli
from hfproj.files import installed_versions, measured_once, write_atomic, write_json

RUNS = Path("runs/ranking")
OUT = Path(__file__).resolve().parent / "results" / "checkpoint_ranking"
RECIPE = Path(__file__).resolve().parents[1] / "simclr_vit.py"
RATES, SEEDS, EVERY = (2e-4, 2e-3, 2e-2), (0, 1), 12
DRAWS = 2000
# measure of a layer → +1 where more should be better, −1 where less should
EXPECTED = {
    "rankme": 1,
    "lidar": 1,
    "alpha_req": -1,
    "alignment": -1,
    "uniformity": -1,
    "knn_overlap": 1,
    "cka": 1,
}


def train() -> None:
    for rate in RATES:
        for seed in SEEDS:
            folder = RUNS / f"{rate:g}-{seed}"
            if not (folder / "results.json").is_file():
                flags = {"learning_rate": rate, "seed": seed, "output_dir": folder, "save_steps": EVERY}
                flags |= {"save_strategy": "steps", "save_total_limit": 10, "watch_every": 0, "disable_tqdm": True}
                command = [sys.executable, str(RECIPE)]
                for name, value in flags.items():
                    command += [f"--{name}", str(value)]
                subprocess.run(command, check=True)


def measured(checkpoint: Path) -> dict:
    """Return what was measured of h and z of a checkpoint, with labels and without."""
    model = hfproj.from_pretrained(checkpoint)
    images = {split: hfproj.load_image_dataset("digits", split=split) for split in ("train", "test")}
    # As in the recipe that trained it.
    views = hfproj.ImageViews.for_model(
        model, seed=0, scale=(0.4, 1.0), flip_probability=0.0, color_jitter_strength=0.5, grayscale_probability=0.2
    )
    without = hfproj.evaluate(model, test=images["test"], labels=None, views=views)
    labelled = hfproj.evaluate(model, **images, probes=[hfproj.KNNProbe(k=20)])
    found = {f"{m.name}_{m.layer}": m.value for m in [*without.measurements, *labelled.measurements]}
    rate, seed = checkpoint.parent.name.rsplit("-", 1)
    return {"learning_rate": float(rate), "seed": int(seed), "step": _step(checkpoint), **found}


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def table() -> None:
    checkpoints = sorted(
        (folder for folder in RUNS.glob("*/checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)),
        key=lambda folder: (folder.parent.name, _step(folder)),
    )
    if len(checkpoints) < 12:
        raise hfproj.UsageError(f"{len(checkpoints)} checkpoints below {RUNS}; run `train` first.")
    rows = [
        measured_once(RUNS / "measured" / f"{folder.parent.name}-{_step(folder)}.json", partial(measured, folder))
        for folder in checkpoints
    ]
    accuracy = np.array([row["knn_h"] for row in rows])
    runs = [f"{row['learning_rate']:g}-{row['seed']}" for row in rows]
    ranked = []
    for name, sign in EXPECTED.items():
        for layer in ("h", "z"):
            values = sign * np.array([row[f"{name}_{layer}"] for row in rows])
            low, high = interval(values, accuracy, runs)
            best = int(values.argmax())
            ranked.append(
                {
                    "measure": name,
                    "layer": layer,
                    "expected": "more is better" if sign > 0 else "less is better",
                    "spearman": float(spearmanr(values, accuracy).statistic),
                    "low": low,
                    "high": high,
                    "accuracy_of_its_best": float(accuracy[best]),
                }
            )
    ranked.sort(key=lambda row: -row["spearman"])
    content = {"checkpoints": rows, "ranking": ranked, "versions": installed_versions()}
    write_json(OUT.with_suffix(".json"), content)
    lines = markdown(rows, ranked)
    write_atomic(OUT.with_suffix(".md"), ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


def interval(values: np.ndarray, accuracy: np.ndarray, runs: list[str]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the rank correlation; runs are drawn, since their checkpoints are alike."""
    generator = np.random.default_rng(0)
    groups = [np.array([i for i, of in enumerate(runs) if of == run]) for run in dict.fromkeys(runs)]
    drawn = []
    for _ in range(DRAWS):
        rows = np.concatenate([groups[i] for i in generator.integers(len(groups), size=len(groups))])
        if np.ptp(accuracy[rows]) > 0 and np.ptp(values[rows]) > 0:
            drawn.append(spearmanr(values[rows], accuracy[rows]).statistic)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def markdown(rows: list[dict], ranked: list[dict]) -> list[str]:
    accuracy = [row["knn_h"] for row in rows]
    runs = len({(row["learning_rate"], row["seed"]) for row in rows})
    lines = ["# Ranking checkpoints without labels", "", "Written by `recipes/benchmarks/checkpoint_ranking.py table`."]
    lines += [
        "",
        f"{len(rows)} checkpoints of {runs} runs of SimCLR on digits (learning rates "
        f"{', '.join(f'{rate:g}' for rate in sorted({row['learning_rate'] for row in rows}))}; "
        f"{len({row['seed'] for row in rows})} seeds; steps "
        f"{', '.join(map(str, sorted({row['step'] for row in rows})))}). 20-NN accuracy of h from {min(accuracy):.4f} "
        f"to {max(accuracy):.4f}, on average {np.mean(accuracy):.4f}.",
        "",
        "Spearman's rank correlation with that accuracy: 1 is the same order, 0 none, below 0 the measure misleads. "
        "Intervals: 95 %, bootstrap over runs. The last column is the accuracy of the checkpoint that the measure "
        "would choose.",
        "",
        "| measure | of | expected | rank correlation | interval | accuracy of its choice |",
        "|---|---|---|---:|---:|---:|",
    ]
    for row in ranked:
        lines.append(
            f"| {row['measure']} | {row['layer']} | {row['expected']} | {row['spearman']:+.2f} | {row['low']:+.2f} to "
            f"{row['high']:+.2f} | {row['accuracy_of_its_best']:.4f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "table"))
    {"train": train, "table": table}[parser.parse_args().what]()


if __name__ == "__main__":
    cli.run(main)
