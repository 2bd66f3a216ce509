"""Regularizers by target: is the sparsity of a head reached, what does it do to h and z; where does a weight act?

    python recipes/benchmarks/sparsity.py targets     # sparsity × objective × BatchNorm, 3 seeds
    python recipes/benchmarks/sparsity.py sweep       # the weight instead: from no effect to a dead head
    python recipes/benchmarks/sparsity.py nats        # mutual information of h and z kept at a target
    python recipes/benchmarks/sparsity.py nats_bound  # the same as a bound
    python recipes/benchmarks/sparsity.py nats_head   # the bound where only the head is trained
    python recipes/benchmarks/sparsity.py compare     # regularizers at strengths that act
    python recipes/benchmarks/sparsity.py table

On scikit-learn's digits, the features of a frozen vit_nano for 8 augmented views of each image; a residual MLP on them,
which is trained, is the backbone, its output h. Scored on the test part: RankMe, and 20-NN accuracy searched among
training images; differences from the same seeds without a regularizer, with their 95 % interval over test images
(`hfproj.results.paired_interval`). Runs are kept below runs/sparsity, and finished ones are not run again; ``table``
writes recipes/benchmarks/results/sparsity.json and the section "By target" of docs/regularizers.md. On a CPU core
``targets`` takes 6 minutes, ``sweep`` 3 and ``nats`` 4.
"""

import argparse
import json
import os
import statistics
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from peft import get_peft_model
from torch import nn
from transformers import set_seed

import hfproj
from hfproj.diagnostics import rankme
from hfproj.files import installed_versions, write_atomic, write_json
from hfproj.results.verdict import paired_interval

RUNS = Path("runs/sparsity")
OUT = Path(__file__).resolve().parent / "results" / "sparsity.json"
DOCS = Path(__file__).resolve().parents[2] / "docs" / "regularizers.md"
SEEDS = (0, 1, 2)
TARGETS = (0.0, 0.25, 0.5, 0.75, 0.9)
OBJECTIVES = {"nt_xent": {}, "byol": {"predictor": {"head": "mlp", "hidden_dim": 128}}, "barlow_twins": {}}
NORMS = {"BatchNorm": "batch", "none": None}
SETTINGS = {"views": 8, "hidden": 256, "out_dim": 64, "steps": 300, "batch": 128, "learning_rate": 1e-3}
# form of the weight → options of the regularizer, norm of the head; the weights are half a power of ten apart
FORMS = {
    "subgradient": ({"method": "subgradient"}, "none"),
    "subgradient, normalised": ({"method": "subgradient", "normalise": True}, "BatchNorm"),
    "proximal": ({"method": "proximal"}, "none"),
}
WEIGHTS = [float(f"{10 ** (k / 2):.2g}") for k in range(-8, 7)]
# regularizers that are compared, beside NT-Xent; each at the weights with which its gradient has these shares
COMPARED = {
    "orthogonality": {}, "sparse_head": {"normalise": True}, "bottleneck": {}, "wasserstein": {}, "koleo": {},
}  # fmt: skip
SHARES = (0.1, 1.0)
PILOT = 1e-3  # the weight at which the share is measured first
# kind of target in nats → its option, objectives, weights that it begins from, whether the backbone is trained
NATS = {
    "nats": ("keep_at", OBJECTIVES, (0.001, 0.1, 1.0), True),
    "nats_bound": ("at_most", OBJECTIVES, (0.001, 10.0), True),
    "nats_head": ("at_most", ("nt_xent",), (0.1, 10.0), False),
}
KINDS = ("targets", "sweep", *NATS, "compare")
NONE = "without"


class Residual(nn.Module):
    """A residual MLP on features, as a backbone that is trained."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h."""
        x = self.norm(x)
        return x + self.down(nn.functional.gelu(self.up(x)))


class Data:
    """Features of the frozen backbone: of augmented views, and of training and test images as they are."""

    def __init__(self):
        model = get_peft_model(hfproj.load_backbone("vit_nano"), hfproj.ProjectionHeadConfig(trainable="head"))
        train, test = (hfproj.load_image_dataset("digits", split=split) for split in ("train", "test"))
        views = hfproj.ImageViews.for_model(model, scale=(0.3, 1.0), flip_probability=0.0)
        plain = hfproj.EvalImages.for_model(model)
        self.views = hfproj.cache_features(model, train, views, passes=SETTINGS["views"] // 2)
        self.bank, self.test = (hfproj.cache_features(model, part, plain) for part in (train, test))


def run(data: Data, objective: str, norm: str, regularizers: dict, seed: int, trained: bool = True) -> dict:
    """Train the head, and the backbone where it is `trained`; return what is measured."""
    set_seed(seed)
    config = hfproj.ProjectionHeadConfig(
        head="mlp", head_options={"hidden_dim": SETTINGS["hidden"], "norm": NORMS[norm]}, out_dim=SETTINGS["out_dim"],
        trainable="full" if trained else "head", **OBJECTIVES[objective],
    )  # fmt: skip
    dim = data.bank.features.shape[-1]
    model = get_peft_model(Residual(dim, SETTINGS["hidden"]) if trained else hfproj.FeatureBackbone(dim), config)
    trainer = hfproj.ProjectionTrainer(
        model,
        hfproj.ProjectionTrainingArguments(
            output_dir=str(RUNS / "trainer"),
            max_steps=SETTINGS["steps"],
            per_device_train_batch_size=SETTINGS["batch"],
            learning_rate=SETTINGS["learning_rate"],
            logging_steps=SETTINGS["steps"] // 20,
            log_representation=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        ),
        objective=objective,
        regularizers=regularizers,
        train_dataset=data.views,
        data_collator=hfproj.FeatureViews(seed=seed),
    )
    trainer.train()
    there, here = (
        hfproj.extract_features(model, part, collator=hfproj.EvalFeatures()) for part in (data.bank, data.test)
    )
    probe = hfproj.KNNProbe(k=20).fit(there.h, there.labels)
    found = {"knn_h": probe.score(here.h, here.labels), "correct": [int(c) for c in probe.correct_]}
    found |= {"rankme_h": rankme(here.h), "rankme_z": rankme(here.z)}
    return found | {"log": [entry for entry in trainer.state.log_history if "loss" in entry]}


def cases(what: str) -> Iterator[tuple[str, str, str, dict, int]]:
    """Yield (name of the run, objective, norm, regularizers, seed)."""
    if what == "targets":
        for seed in SEEDS:
            for objective in OBJECTIVES:
                for norm in NORMS:
                    for target in TARGETS:
                        name = f"{objective}-{norm}-{target}-{seed}"
                        yield name, objective, norm, {"sparse_head": {"sparsity": target}}, seed
    elif what == "sweep":
        for form, (options, norm) in FORMS.items():
            for weight in (0.0, *WEIGHTS):
                yield f"{form}-{weight:g}", "nt_xent", norm, {"sparse_head": {"weight": weight, **options}}, 0
    elif what == "compare":
        for seed in SEEDS:
            yield f"{NONE}-{seed}", "nt_xent", "BatchNorm", {}, seed
            for name, options in COMPARED.items():
                pilot = f"{name}-pilot"
                yield pilot, "nt_xent", "BatchNorm", {name: {"weight": PILOT, **options}}, 0
                for share in SHARES:
                    weight = float(f"{PILOT * share / at_end(kept(what, pilot), f'{name}_grad_share'):.1g}")
                    yield f"{name}-{share}-{seed}", "nt_xent", "BatchNorm", {name: {"weight": weight, **options}}, seed
    else:
        option, objectives, starts, _ = NATS[what]
        for seed in SEEDS:
            for objective in objectives:
                free = f"{objective}-{NONE}-{seed}"
                yield free, objective, "BatchNorm", {"bottleneck": 1e-9}, seed
                half = float(f"{at_end(kept(what, free), 'bottleneck') / 2:.2g}")
                for start in starts:
                    wanted = {"bottleneck": {option: half, "weight": start}}
                    yield f"{objective}-{start:g}-{seed}", objective, "BatchNorm", wanted, seed


def measure(what: str) -> None:
    data = None
    for name, objective, norm, regularizers, seed in cases(what):
        if kept(what, name) is not None:
            continue
        data = data or Data()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does next to nothing.*|.*sparsity 1.*|.*A BatchNorm follows.*")
            found = run(data, objective, norm, regularizers, seed, trained=NATS[what][3] if what in NATS else True)
        row = {"objective": objective, "norm": norm, "regularizers": regularizers, "seed": seed, **found}
        file(what, name).parent.mkdir(parents=True, exist_ok=True)
        write_json(file(what, name), row)
        print(name, {k: round(v, 3) for k, v in row.items() if isinstance(v, float)}, flush=True)


def file(what: str, name: str) -> Path:
    return RUNS / what / f"{name.replace(', ', '-')}.json"


def kept(what: str, name: str) -> dict | None:
    return json.loads(file(what, name).read_text()) if file(what, name).is_file() else None


def at_end(row: dict | None, name: str) -> float:
    """Return the mean of what was logged in the last fifth of a training."""
    values = [entry[name] for entry in (row or {}).get("log", []) if name in entry]
    return statistics.mean(values[-len(values) // 5 :]) if values else float("nan")


def collected() -> dict:
    """Return the runs below runs/, without what the tables don't need; where there are none, those of the JSON file."""
    before = json.loads(OUT.read_text()) if OUT.is_file() else {}
    content: dict = {"settings": SETTINGS, "versions": installed_versions()}
    for what in KINDS:
        rows = []
        for file in sorted((RUNS / what).glob("*.json")):
            row = json.loads(file.read_text())
            last = row.pop("log")
            row["end"] = {k: v for k, v in last[-1].items() if k != "epoch"}
            for name in row["regularizers"] if what in (*NATS, "compare") else ():
                row |= {key: at_end({"log": last}, key) for key in (name, f"{name}_grad_share")}
            correct = row.pop("correct")
            if what in ("targets", "compare"):
                row["correct"] = "".join(map(str, correct))
            rows.append(row)
        content[what] = rows or before.get(what, [])
    return content


def of_targets(rows: list[dict]) -> list[str]:
    lines = ["| objective | norm | target | sparsity | RankMe h | RankMe z | 20-NN h | against 0 (95 % interval) |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|---:|"]

    def of(objective: str, norm: str, target: float) -> list[dict]:
        wanted = (objective, norm, {"sparse_head": {"sparsity": target}})
        return [r for r in rows if (r["objective"], r["norm"], r["regularizers"]) == wanted]

    for objective in OBJECTIVES:
        for norm in NORMS:
            plain = of(objective, norm, 0.0)
            for target in TARGETS:
                found = of(objective, norm, target)
                if not found:
                    continue
                reached = statistics.mean(r["end"]["sparse_head_sparsity"] for r in found)
                cells = [objective, norm, f"{target:g}", f"{reached:.3f}"]
                cells += [mean_std([r[n] for r in found], 1) for n in ("rankme_h", "rankme_z")]
                cells += [mean_std([r["knn_h"] for r in found], 3)]
                cells += [gap(found, plain) if target and plain else ""]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def gap(after: list[dict], before: list[dict]) -> str:
    found = paired_interval(*([[int(c) for c in r["correct"]] for r in rows] for rows in (after, before)))
    return f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def of_compare(rows: list[dict]) -> list[str]:
    lines = ["| regularizer | weight | share of gradient | its value | RankMe h | RankMe z | 20-NN h | against none |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
    plain = [r for r in rows if not r["regularizers"]]
    for name in (NONE, *COMPARED):
        own = plain if name == NONE else [r for r in rows if name in r["regularizers"]]
        weights = sorted({r["regularizers"][name]["weight"] for r in own} - {PILOT}) if name != NONE else [None]
        for weight in weights:
            found = [r for r in own if weight is None or r["regularizers"][name]["weight"] == weight]
            if not found:
                continue
            of_term = [(f"{name}_grad_share", 2), (name, 3)] if weight else []
            cells = [name, f"{weight:g}" if weight else "", *([] if weight else ["", ""])]
            cells += [mean_std([r[n] for r in found], d) for n, d in (*of_term, ("rankme_h", 1), ("rankme_z", 1))]
            cells += [mean_std([r["knn_h"] for r in found], 3), gap(found, plain) if weight and plain else ""]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def of_sweep(rows: list[dict]) -> list[str]:
    """Return the smallest weight of each form that moves RankMe by over 1, kills z, zeroes a column, zeroes all."""
    lines = ["| form | norm | RankMe of h or z moves by over 1 | first zeros | z dead: RankMe below 1.5 | all zero |"]
    lines += ["|---|---|---:|---:|---:|---:|"]
    by_weight: dict[float, list[str]] = {}
    for form, (options, norm) in FORMS.items():
        found = {}
        for row in rows:
            own = dict(row["regularizers"]["sparse_head"])
            weight = own.pop("weight")
            if (own, row["norm"]) == (options, norm):
                found[weight] = row
        if 0.0 not in found:
            continue
        plain = found[0.0]
        effects = (
            lambda row, plain=plain: any(abs(row[n] - plain[n]) > 1 for n in ("rankme_h", "rankme_z")),
            lambda row: row["end"]["sparse_head_sparsity"] > 0,
            lambda row: row["rankme_z"] < 1.5,
            lambda row: row["end"]["sparse_head_sparsity"] == 1,
        )
        firsts = [next((w for w in sorted(found) if w and effect(found[w])), None) for effect in effects]
        cells = [form, norm, *(f"above {max(found):g}" if w is None else f"{w:g}" for w in firsts)]
        lines.append(f"| {' | '.join(cells)} |")
        for weight, row in found.items():
            values = (f"{row['end']['sparse_head_sparsity']:.2f}", f"{row['rankme_h']:.1f}", f"{row['rankme_z']:.1f}")
            by_weight.setdefault(weight, []).append(f"{', '.join(values)}, {row['knn_h']:.3f}")
    lines += ["", "Sparsity, RankMe of h, RankMe of z, 20-NN of h; one seed:", ""]
    lines += ["| weight | " + " | ".join(FORMS) + " |", "|---:" * (1 + len(FORMS)) + "|"]
    return lines + [f"| {w:g} | {' | '.join(cells)} |" for w, cells in sorted(by_weight.items())]


def of_nats(rows: list[dict]) -> list[str]:
    lines = ["| objective | free, nats | target | first weight | reached / target | last weight | 20-NN h, free |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for objective in OBJECTIVES:
        own = [(r, r["regularizers"]["bottleneck"]) for r in rows if r["objective"] == objective]
        free = [r for r, options in own if options == 1e-9]
        targets = [(r, options.copy()) for r, options in own if options != 1e-9]
        for start in sorted({options["weight"] for _, options in targets}):
            found = [r for r, options in targets if options["weight"] == start]
            (wanted,) = zip(*([v for k, v in o.items() if k != "weight"] for _, o in targets if o["weight"] == start))
            cells = [objective, mean_std([r["bottleneck"] for r in free], 3), mean_std(wanted, 3), f"{start:g}"]
            cells += [mean_std([r["bottleneck"] / w for r, w in zip(found, wanted)], 2)]
            cells += [mean_std([r["end"]["bottleneck_weight"] for r in found], 2)]
            cells += [f"{mean_std([r['knn_h'] for r in found], 3)}, {mean_std([r['knn_h'] for r in free], 3)}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def mean_std(values: Sequence[float], digits: int) -> str:
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table() -> None:
    content = collected()
    write_json(OUT, content)
    text = DOCS.read_text(encoding="utf-8")
    shown = {"targets": of_targets, "sweep": of_sweep, **dict.fromkeys(NATS, of_nats), "compare": of_compare}
    for name, lines in shown.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not (start and end):
            raise SystemExit(f"{DOCS} has no place for it: <!-- {name} --> and <!-- /{name} -->, each on a line.")
        made = lines(content[name])
        print("\n".join([*made, ""]))
        text = before + start + "\n".join(made) + "\n" + end + after
    write_atomic(DOCS, text.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*KINDS, "table"))
    what = parser.parse_args().what
    table() if what == "table" else measure(what)


if __name__ == "__main__":
    main()
