"""Does `recipes/adapt.py` say what is so? Digits, 2,000 JPEGs of clothes in a folder, and natural images.

    python recipes/benchmarks/adapt.py run --fashion path/to/idx-files --cifar path/to/parquet    # 20 minutes
    python recipes/benchmarks/adapt.py table

vit_nano was trained on natural images of the kind that CIFAR-10 has: there is nothing to gain there, and "cannot tell"
or "worse" is right. Fashion-MNIST's images are written into a folder as JPEGs, as people have them: without labels to
train on, and 1,000 others sorted by class to judge by. Each set is adapted with labels to judge by, without, and with a
backbone that learns from the first step on (no head warm-up); digits also at ten times the learning rate. `table`
writes adapt.json, adapt.md and adapt.png below recipes/benchmarks/results; runs are kept below runs/adapt, and finished
ones not run again.
"""

import argparse
import json
import os
import subprocess
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a shared CPU spinning threads cost more than they save

from pathlib import Path

from matplotlib.figure import Figure

import hfproj
from hfproj.files import installed_versions, write_atomic, write_json

RUNS = Path("runs/adapt")
OUT = Path(__file__).resolve().parent / "results" / "adapt"
RECIPE = Path(__file__).resolve().parents[1] / "adapt.py"
JPEGS = {"train": 2000, "test": 1000}
STEPS = {"eval_strategy": "steps", "eval_steps": 8, "disable_tqdm": True}
OF_LABELS = ("labelled", "bank_limit")  # refused where labels are not used
VARIANTS = {
    "labels": {},
    "no labels": {"use_labels": "false"},
    "no head warm-up": {"head_warmup_steps": 0},
    "rate × 10": {"learning_rate": 2e-2},
    "rate × 10, no head warm-up": {"learning_rate": 2e-2, "head_warmup_steps": 0},
}


def jpegs(source: str) -> tuple[Path, Path]:
    """Write clothes as JPEGs, those to train on without labels; return both folders."""
    plain, by_class = (RUNS.with_name("adapt_images") / name for name in ("plain", "sorted"))
    for split, count in JPEGS.items():
        images = hfproj.load_image_dataset(source, split=split, limit=count)
        for number, item in enumerate(images):
            folder = plain if split == "train" else by_class / str(item["label"])
            folder.mkdir(parents=True, exist_ok=True)
            if not (file := folder / f"{number:05}.jpg").exists():
                item["image"].save(file, quality=95)
    return plain, by_class


def run(fashion: str | None, cifar: str | None, only: list[str]) -> None:
    sets = {"digits": {"dataset": "digits"}}
    if fashion:
        plain, by_class = jpegs(fashion)
        sets["clothes"] = {"dataset": plain, "labelled": by_class, "color_jitter": 0.2}
    if cifar:
        sets["CIFAR-10"] = {"dataset": cifar, "train_limit": 2000, "bank_limit": 2000}
    for name, data in sets.items():
        if only and name not in only:
            continue
        for variant, flags in VARIANTS.items():
            folder = RUNS / name / variant
            if (folder / "seconds.json").is_file() or ("rate" in variant and name != "digits"):
                continue
            command = [sys.executable, str(RECIPE), "--output_dir", str(folder)]
            own = {flag: v for flag, v in data.items() if "use_labels" not in flags or flag not in OF_LABELS}
            for flag, value in {**own, **STEPS, **flags}.items():
                command += [f"--{flag}", str(value)]
            began = time.time()
            subprocess.run(command, check=True)
            write_json(folder / "seconds.json", {"seconds": round(time.time() - began)})


def finished() -> list[dict]:
    """Return what each run said, and its k-NN of h by step."""
    found = []
    for file in sorted(RUNS.glob("*/*/seconds.json")):
        results = hfproj.Results.load(file.parent)
        alarm = results.geometry.get("collapse", {})
        found.append({
            "data": file.parents[1].name,
            "run": file.parent.name,
            "verdict": next(note for note in results.notes if note.startswith("Verdict")),
            "notes": [note for note in results.notes if not note.startswith("Verdict")],
            "stopped by": alarm.get("metric"),
            "restored": alarm.get("restored"),
            "seconds": json.loads(file.read_text())["seconds"],
            "knn_h": {row["step"]: row["eval_knn_h"] for row in results.log if "eval_knn_h" in row},
            "overlap": {row["step"]: row["knn_overlap_h"] for row in results.history if "knn_overlap_h" in row},
        })  # fmt: skip
    return found


def draw(found: list[dict]) -> Figure:
    names = list(dict.fromkeys(row["data"] for row in found))
    figure = Figure(figsize=(3.4 * len(names), 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for row in found:
            if row["data"] == name and row["run"] != "no labels":
                steps = list(map(int, row["knn_h"]))
                axis.plot(
                    steps, row["knn_h"].values(), marker=".", label="as it is" if row["run"] == "labels" else row["run"]
                )
        axis.set(title=name, xlabel="step")
        axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=7)
    figure.axes[0].set_ylabel("20-NN accuracy of h")
    return figure


def table() -> None:
    found = finished()
    lines = [
        "# Does it say what is so?", "",
        "Written by `recipes/benchmarks/adapt.py table`. Seconds are of two cores that other jobs shared.", "",
        "| data | run | verdict | 20-NN of h | linear | stopped by | seconds |", "|---|---|---|---|---|---|---:|",
    ]  # fmt: skip
    for row in found:
        probes = {word: next((n for n in row["notes"] if f"{word} accuracy" in n), "") for word in ("20-NN", "linear")}
        said = [note.partition("went from ")[2].rstrip(".") for note in probes.values()]
        stopped = f"{row['stopped by']} → {row['restored']}" if row["stopped by"] else ""
        verdict, seconds = row["verdict"].removeprefix("Verdict: ").rstrip("."), row["seconds"] or "–"
        lines.append(f"| {row['data']} | {row['run']} | {verdict} | {said[0]} | {said[1]} | {stopped} | {seconds} |")
    lines += ["", "![20-NN accuracy of h over the steps](adapt.png)", "", "What each run said without labels:", ""]
    for row in found:
        lines += [f"- {row['data']}, {row['run']}:"]
        lines += [f"  - {note}" for note in row["notes"] if note.startswith("Without labels")]
    write_atomic(OUT.with_suffix(".md"), ("\n".join(lines) + "\n").encode())
    write_json(OUT.with_suffix(".json"), {"runs": found, "versions": installed_versions()})
    draw(found).savefig(OUT.with_suffix(".png"), dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--fashion", help="folder of Fashion-MNIST's IDX files")
    parser.add_argument("--cifar", help="folder of CIFAR-10's parquet files")
    parser.add_argument("--only", nargs="*", default=[], help="digits, clothes or CIFAR-10")
    args = parser.parse_args()
    run(args.fashion, args.cifar, args.only) if args.what == "run" else table()


if __name__ == "__main__":
    main()
