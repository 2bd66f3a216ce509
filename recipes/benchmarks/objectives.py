"""Every objective on its own and with a regularizer, on CIFAR-10 with vit_nano: 20-NN accuracy, RankMe, seconds.

    python recipes/benchmarks/objectives.py features --dataset path/to/cifar10    # heads on cached features: z
    python recipes/benchmarks/objectives.py lora --dataset path/to/cifar10        # six objectives with a LoRA: h and z
    python recipes/benchmarks/objectives.py images --dataset path/to/cifar10      # a few steps of each
    python recipes/benchmarks/objectives.py table

``features`` caches augmented views of the frozen backbone's representation once and trains heads on them; ``lora``
trains head and LoRA on images; both score by weighted 20-NN on images of the test part, searched among training images.
``images`` times a step of every objective on images. Runs are kept below runs/objectives: finished ones are not run
again. ``table`` writes recipes/benchmarks/results/objectives.json and .md, and the cost of a step into
docs/objectives.md; a difference from the plain objective counts where it is larger than one standard deviation over
seeds (of either, or of the difference), else it is "none". Time is CPU time.
"""

import argparse
import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import statistics
import time
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed

import hfproj
from hfproj.data import split_off
from hfproj.diagnostics import rankme
from hfproj.files import installed_versions, write_atomic, write_json
from hfproj.studies.pooled import pooled_interval

RUNS = Path("runs/objectives")
OUT = Path(__file__).resolve().parent / "results" / "objectives"
DOCS = Path(__file__).resolve().parents[2] / "docs" / "objectives.md"
SEEDS = (0, 1, 2)
OUT_DIM = 64
MLP = {"head": "mlp", "head_options": {"hidden_dim": 512}, "out_dim": OUT_DIM}
PREDICTOR = {"predictor": {"head": "mlp", "hidden_dim": 256}}
PROTOTYPES = {"prototypes": 300}

# name → options of the objective, what its adapter has beside an MLP head, options of the run
OBJECTIVES: dict[str, dict] = {
    "nt_xent": {},
    "info_nce": {},
    "dcl": {},
    "dclw": {"objective": {"name": "dcl", "weighted": True}},
    "supcon": {},
    "sigmoid": {"scales": True},
    "align_uniform": {},
    "spectral": {},
    "simcse": {},
    "moco": {"objective": {"queue_size": 4096}},
    "moco_v3": {"config": PREDICTOR},
    "nnclr": {"objective": {"queue_size": 4096}, "config": PREDICTOR},
    "byol": {"config": PREDICTOR},
    "simsiam": {"config": PREDICTOR},
    "barlow_twins": {},
    "vicreg": {},
    "w_mse": {"objective": {"w_size": 128}},
    "zero_cl": {},
    "lejepa": {},
    "swav": {"config": PROTOTYPES},
    "deepcluster_v2": {"objective": {"prototypes": [300]}},
    "dino": {"config": PROTOTYPES},
    "grouped": {},
}
TEACHERS = ("moco", "moco_v3", "byol", "dino")
UNTRAINED = "h, for comparison"  # of the backbone as it is
WITH_LORA = ("nt_xent", "byol", "simsiam", "barlow_twins", "vicreg", "dino")
REGULARIZERS: dict[str, dict] = {
    "plain": {},
    "+ last-layer orthogonality": {"orthogonality": 0.01},
    "+ SparseHead": {"sparse_head": 1e-3},
    "+ bottleneck": {"bottleneck": 0.1},
}
FEATURES = {"images": 5000, "test": 2000, "passes": 4, "steps": 200, "batch": 256, "learning_rate": 1e-3}
LORA = {"images": 5000, "bank": 2000, "test": 1000, "steps": 60, "batch": 64, "learning_rate": 3e-4, "lora_r": 8}
IMAGES = {"images": 640, "steps": 10, "batch": 128, "learning_rate": 3e-4, "lora_r": 8}
AUGMENTATION = {"scale": (0.08, 1.0), "color_jitter_strength": 1.0}


def adapter(backbone: torch.nn.Module, name: str, **config: object) -> torch.nn.Module:
    """Return `backbone` with the head, predictor, prototypes and scales that the objective asks for."""
    spec = OBJECTIVES[name]
    scales = {}
    if spec.get("scales"):
        scales = {"scales": hfproj.create_objective(name).scales}
    return get_peft_model(backbone, hfproj.ProjectionHeadConfig(**MLP, **spec.get("config", {}), **scales, **config))


def train(model: torch.nn.Module, name: str, regularizers: dict, seed: int, settings: dict, data: dict) -> dict:
    """Train, and return losses and the CPU time of an epoch."""
    objective = {"name": name, **OBJECTIVES[name].get("objective", {})}
    run = hfproj.ProjectionTrainer(
        model,
        hfproj.ProjectionTrainingArguments(
            output_dir=str(RUNS / "trainer"),
            max_steps=settings["steps"],
            per_device_train_batch_size=settings["batch"],
            learning_rate=settings["learning_rate"],
            patch_dropout=settings.get("patch_dropout", 0.0),
            ema_momentum=0.99,  # a run of few steps: 0.996 and above would leave the copy where it started
            seed=seed,
            logging_steps=settings["steps"] // 5,
            log_representation=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        objective=objective,
        regularizers=regularizers,
        **data,
    )
    start = time.process_time()
    run.train()
    seconds = time.process_time() - start
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return {"losses": losses, "cpu_seconds_per_step": seconds / settings["steps"]}


def score(f: torch.Tensor, labels: torch.Tensor, bank: torch.Tensor, bank_labels: torch.Tensor) -> dict:
    return {"knn": hfproj.KNNProbe(k=20).fit(bank, bank_labels).score(f, labels), "rankme": rankme(f)}


def on_features(dataset: str) -> None:
    model = get_peft_model(hfproj.load_backbone("vit_nano"), hfproj.ProjectionHeadConfig(trainable="head"))
    _, images = split_off(hfproj.load_image_dataset(dataset, split="train"), FEATURES["images"], seed=0)
    test = hfproj.load_image_dataset(dataset, split="test", limit=FEATURES["test"])
    views = hfproj.ImageViews.for_model(model, **AUGMENTATION)
    plain = hfproj.EvalImages.for_model(model)
    cached = hfproj.cache_features(model, images, views, passes=FEATURES["passes"])
    bank, held_out = (hfproj.cache_features(model, part, plain) for part in (images, test))
    before = score(held_out.features[:, 0], held_out.labels, bank.features[:, 0], bank.labels)
    keep("features", UNTRAINED, "plain", 0, {"h": before})
    backbone = hfproj.FeatureBackbone.of(model)

    for name in OBJECTIVES:
        for added, regularizers in REGULARIZERS.items():
            for seed in SEEDS:
                if kept("features", name, added, seed):
                    continue
                set_seed(seed)
                made = adapter(hfproj.FeatureBackbone(backbone.in_dim), name)
                collators = {"data_collator": hfproj.FeatureViews(seed=seed), "eval_collator": hfproj.EvalFeatures()}
                row = train(made, name, regularizers, seed, FEATURES, {"train_dataset": cached, **collators})
                z, z_bank = (
                    hfproj.extract_features(made, d, collator=hfproj.EvalFeatures()).z for d in (held_out, bank)
                )
                row["z"] = score(z, held_out.labels, z_bank, bank.labels)
                row["cpu_seconds_per_epoch"] = row.pop("cpu_seconds_per_step") * (
                    FEATURES["images"] // FEATURES["batch"]
                )
                keep("features", name, added, seed, row)


def with_lora(dataset: str, seeds: list[int]) -> None:
    _, images = split_off(hfproj.load_image_dataset(dataset, split="train"), LORA["images"], seed=0)
    bank = split_off(images, LORA["bank"], seed=0)[1]
    test = hfproj.load_image_dataset(dataset, split="test", limit=LORA["test"])
    if not kept("lora", UNTRAINED, "plain", 0):
        model = get_peft_model(hfproj.load_backbone("vit_nano"), hfproj.ProjectionHeadConfig(trainable="head"))
        there, here = (hfproj.extract_features(model, part) for part in (bank, test))
        keep("lora", UNTRAINED, "plain", 0, {"h": score(here.h, here.labels, there.h, there.labels)})
    for seed in seeds:
        for name in WITH_LORA:
            for added, regularizers in REGULARIZERS.items():
                if kept("lora", name, added, seed):
                    continue
                set_seed(seed)
                lora = LoraConfig(r=LORA["lora_r"], lora_alpha=LORA["lora_r"])
                model = adapter(hfproj.load_backbone("vit_nano"), name, backbone_adapter=lora)
                views = hfproj.ImageViews.for_model(model, seed=seed, **AUGMENTATION)
                settings = {**LORA, "patch_dropout": 0.5}
                row = train(
                    model, name, regularizers, seed, settings, {"train_dataset": images, "data_collator": views}
                )
                there, here = (hfproj.extract_features(model, part) for part in (bank, test))
                for layer in ("h", "z"):
                    row[layer] = score(getattr(here, layer), here.labels, getattr(there, layer), there.labels)
                row["cpu_seconds_per_epoch"] = row.pop("cpu_seconds_per_step") * (LORA["images"] // LORA["batch"])
                keep("lora", name, added, seed, row)


def on_images(dataset: str) -> None:
    _, images = split_off(hfproj.load_image_dataset(dataset, split="train"), IMAGES["images"], seed=0)
    for name in OBJECTIVES:
        if kept("images", name, "plain", 0):
            continue
        set_seed(0)
        lora = LoraConfig(r=IMAGES["lora_r"], lora_alpha=IMAGES["lora_r"])
        model = adapter(hfproj.load_backbone("vit_nano"), name, backbone_adapter=lora)
        views = hfproj.ImageViews.for_model(model, **AUGMENTATION)
        row = train(model, name, {}, 0, IMAGES, {"train_dataset": images, "data_collator": views})
        keep("images", name, "plain", 0, row)


def path(kind: str, name: str, added: str, seed: int) -> Path:
    return RUNS / kind / f"{name}{added.replace(' ', '_').replace('+', '-')}-{seed}.json"


def kept(kind: str, name: str, added: str, seed: int) -> bool:
    return path(kind, name, added, seed).is_file()


def keep(kind: str, name: str, added: str, seed: int, row: dict) -> None:
    file = path(kind, name, added, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    row = {"objective": name, "regularizer": added, "seed": seed, **row}
    write_json(file, row)
    print(json.dumps({k: v for k, v in row.items() if k != "losses"}), flush=True)


def table() -> None:
    content: dict = {"settings": {"features": FEATURES, "lora": LORA, "images": IMAGES, "augmentation": AUGMENTATION}}
    content |= {"objectives": OBJECTIVES, "regularizers": REGULARIZERS, "head": MLP, "versions": installed_versions()}
    content |= {kind: runs_of(kind) for kind in ("features", "lora", "images")}
    write_json(OUT.with_suffix(".json"), content)
    write_atomic(OUT.with_suffix(".md"), document(content).encode())
    if content["images"]:
        fill(DOCS, "cost", cost(content["images"]))
    print(document(content))


def document(content: dict) -> str:
    """Return the Markdown of what the JSON file holds."""
    lines = ["# Objectives and regularizers on CIFAR-10 with vit_nano", ""]
    lines += ["Written by `recipes/benchmarks/objectives.py table`. Mean ± standard deviation over seeds.", ""]
    for kind, title, layers in (
        ("features", "Frozen backbone, heads on cached features", ("z",)),
        ("lora", "LoRA", ("h", "z")),
    ):
        if not content[kind]:
            continue
        settings = ", ".join(f"{k} {v}" for k, v in content["settings"][kind].items())
        lines += [f"## {title}", "", f"{settings}.", ""]
        lines += markdown(content[kind], layers)
        for layer in layers:
            lines += [said(content[kind], layer, asked=content["settings"][kind]["test"]), ""]
    return "\n".join([*lines, "## A step on images", "", *cost(content["images"])]) + "\n"


def said(rows: list[dict], layer: str, *, asked: int) -> str:
    """Return what differs in the 20-NN of a layer by more than the interval: objectives, and regularizers from plain.

    Args:
        rows: Runs of one kind.
        layer: "h" or "z".
        asked: Number of test rows.
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["objective"] in OBJECTIVES and layer in row:
            values.setdefault(f"{row['objective']} {row['regularizer']}", []).append(row[layer]["knn"])
    plain = [f"{name} plain" for name in OBJECTIVES if f"{name} plain" in values]
    means = [statistics.mean(values[name]) for name in plain]
    others = [(name, "nt_xent plain") for name in plain if name != "nt_xent plain"]
    added = [(name, f"{name.partition(' ')[0]} plain") for name in values if not name.endswith(" plain")]
    return (
        f"20-NN of {layer}, plain: {min(means):.3f} to {max(means):.3f}. By the 95 % interval of "
        f"`hfproj.studies.pooled` (other seeds, other {asked} test rows), {_apart(values, others, asked)} of "
        f"{len(others)} objectives differ from nt_xent, and {_apart(values, added, asked)} of {len(added)} regularized "
        "runs from plain. The order of the others cannot be judged."
    )


def _apart(values: dict[str, list[float]], pairs: list[tuple[str, str]], asked: int) -> str:
    """Return how many pairs differ by more than the interval, and by how much."""
    found = {first: pooled_interval(values, first, second, rows=asked) for first, second in pairs}
    apart = [
        f"{name.removesuffix(' plain')} {gap.difference:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
        for name, gap in found.items()
        if gap.low > 0 or gap.high < 0
    ]
    return f"{len(apart)} ({', '.join(apart)})" if apart else "none"


def runs_of(kind: str) -> list[dict]:
    """Return the runs below runs/; where there are none, those that the table was last made from."""
    rows = [json.loads(file.read_text()) for file in sorted((RUNS / kind).glob("*.json"))]
    if not rows and OUT.with_suffix(".json").is_file():
        rows = json.loads(OUT.with_suffix(".json").read_text()).get(kind, [])
    return rows


def cost(rows: list[dict]) -> list[str]:
    """Return the table of what a step on images costs, and what can be said of one run each."""
    lines = [f"vit_nano on the CPU: {', '.join(f'{k} {v}' for k, v in IMAGES.items())}. One run each.", ""]
    lines += ["| objective | CPU s / step | against nt_xent | loss, first and last |", "|---|---:|---:|---:|"]
    seconds = {row["objective"]: row["cpu_seconds_per_step"] for row in rows}
    ratios = {name: value / seconds["nt_xent"] for name, value in seconds.items()} if "nt_xent" in seconds else {}
    for row in sorted(rows, key=lambda r: list(OBJECTIVES).index(r["objective"])):
        name, (first, *_, last) = row["objective"], row["losses"]
        ratio = f"{ratios[name]:.2f}" if ratios else ""
        lines.append(f"| {name} | {seconds[name]:.2f} | {ratio} | {first:.3f} → {last:.3f} |")
    return [*lines, "", slower(ratios)] if ratios else lines


def slower(ratios: dict[str, float]) -> str:
    """Return how much a teacher costs, if all objectives that have one are slower than all others."""
    teachers = [ratio for name, ratio in ratios.items() if name in TEACHERS]
    others = [ratio for name, ratio in ratios.items() if name not in TEACHERS]
    if not teachers or min(teachers) <= max(others):
        return "One run has no interval: these times are not told apart."
    return (
        f"A second forward pass costs: the {len(teachers)} with an EMA teacher took {min(teachers):.2f} to "
        f"{max(teachers):.2f} times as long as nt_xent, the {len(others)} others {min(others):.2f} to "
        f"{max(others):.2f}. One run each has no interval, and no order among those is claimed."
    )


def fill(file: Path, name: str, lines: list[str]) -> None:
    """Put `lines` between the markers `name` of a text."""
    before, start, rest = file.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not (start and end):
        raise SystemExit(f"{file} has no place for it: <!-- {name} --> and <!-- /{name} -->, each on a line.")
    write_atomic(file, (before + start + "\n".join(lines) + "\n" + end + after).encode())


def markdown(rows: list[dict], layers: tuple[str, ...]) -> list[str]:
    columns = ["objective", "", "seeds"]
    for layer in layers:
        columns += [f"20-NN {layer}", "against plain", f"RankMe {layer}"]
    lines = ["| " + " | ".join([*columns, "CPU s / epoch"]) + " |", "|---|---" + "|---:" * (len(columns) - 1) + "|"]
    names = [n for n in [UNTRAINED, *OBJECTIVES] if any(r["objective"] == n for r in rows)]
    for name in names:
        plain = {r["seed"]: r for r in rows if r["objective"] == name and r["regularizer"] == "plain"}
        for added in REGULARIZERS:
            found = [r for r in rows if (r["objective"], r["regularizer"]) == (name, added)]
            if not found:
                continue
            cells = [name, added, str(len(found))]
            for layer in layers if name in OBJECTIVES else ("h",):
                accuracy = [r[layer]["knn"] for r in found]
                same = [plain[r["seed"]][layer]["knn"] for r in found if r["seed"] in plain]
                against = "" if added == "plain" else difference(same, accuracy)
                cells += [mean_std(accuracy, 3), against, mean_std([r[layer]["rankme"] for r in found], 1)]
            cells += [""] * (len(columns) - len(cells))
            seconds = [r["cpu_seconds_per_epoch"] for r in found if "cpu_seconds_per_epoch" in r]
            lines.append("| " + " | ".join([*cells, f"{statistics.mean(seconds):.2f}" if seconds else ""]) + " |")
    return [*lines, ""]


def difference(plain: list[float], added: list[float]) -> str:
    """Return the mean difference of the same seeds, or none where it is within one standard deviation."""
    if len(added) < 2:
        return "one seed"
    pairs = [b - a for a, b in zip(plain, added)]
    mean, std = statistics.mean(pairs), max(statistics.stdev(values) for values in (plain, added, pairs))
    return "none" if abs(mean) <= std else f"{mean:+.3f}"


def mean_std(values: list[float], digits: int) -> str:
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("features", "lora", "images", "table"))
    parser.add_argument("--dataset", help="Where CIFAR-10 is: as for simclr_vit.py.")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS), help="For lora: only these seeds.")
    options = parser.parse_args()
    if options.what == "table":
        table()
        return
    if not options.dataset:
        parser.error(f"{options.what} needs --dataset")
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*|.*lr_scheduler.step.*")
    if options.what == "features":
        on_features(options.dataset)
    elif options.what == "images":
        on_images(options.dataset)
    else:
        with_lora(options.dataset, options.seeds)


if __name__ == "__main__":
    main()
