"""Probes of any backbone or adapter on one or several data sets: what did the head do to the representation?

    python recipes/probe.py --model out/simclr_vit                       # an adapter, beside its bare backbone
    python recipes/probe.py --model vit_nano --probes knn,linear,kmeans --datasets digits,uoft-cs/cifar10
    python recipes/probe.py --model facebook/dinov2-small --layers all --probe_options knn.k=10,linear.l2=0.001
    python recipes/probe.py --model out/simclr_vit --labels false        # what can be said without labels

Of an adapter, "before" is its backbone with the adapter disabled, which has no z; intervals of the differences come
with the report. Features are computed once for all probes and kept below --cache_dir, if there is one. The output
folder gets results.json, its table as results.md, and report.html.
"""

from hfproj import cli

cli.start(__file__)  # answers --help before anything large is imported

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset

import hfproj
from hfproj.checking import check_device
from hfproj.data import split_off
from hfproj.files import command_line, write_atomic
from hfproj.probes import create_probe


@dataclass
class Recipe:
    """Flags of this recipe."""

    model: str = field(metadata={"help": "An adapter (folder or Hub id), or a backbone: vit_nano, a Hub id, timm/…"})
    datasets: str = field(default="digits", metadata={"help": "Names, with commas: digits, Hub ids, parquet folders …"})
    probes: str = field(default="knn,linear", metadata={"help": "Names, with commas, see hfproj.list_probes()."})
    probe_options: str | None = field(default=None, metadata={"help": "knn.k=10,linear.l2=0.001 … or JSON."})
    layers: str | None = field(default=None, metadata={"help": "Intermediate layers too: all, 0,5,11, or head."})
    labels: bool = field(default=True, metadata={"help": "Whether to use them; without, say what needs none."})
    train_limit: int | None = field(default=None, metadata={"help": "Take this many random training images."})
    test_limit: int | None = field(default=None, metadata={"help": "Take this many random test images."})
    batch_size: int = field(default=256, metadata={"help": "Images a forward pass."})
    num_workers: int = field(default=0, metadata={"help": "Processes that load images."})
    device: str | None = field(default=None, metadata={"help": "cuda, cpu …; a GPU if there is one."})
    cache_dir: str | None = field(default=None, metadata={"help": "Keep features here."})
    seed: int = field(default=0, metadata={"help": "Of the run that made the adapter; tells runs apart."})
    output_dir: str = field(
        default="out/probe", metadata={"help": "Folder for results.json, results.md and report.html."}
    )


def load_images(dataset: str, recipe: Recipe) -> tuple[Dataset, Dataset]:
    """Return images to fit probes on and to measure on: of a folder without a test split, four fifths and a fifth."""
    try:
        test = hfproj.load_image_dataset(dataset, split="test", limit=recipe.test_limit)
    except hfproj.UsageError:
        train = hfproj.load_image_dataset(dataset, split="train", limit=recipe.train_limit)
        if not Path(dataset).expanduser().is_dir() or len(train) < 2:
            raise
        train, test = split_off(train, -(-len(train) // 5), seed=0)
        print(f"{dataset} has no test split: {len(test)} of its images are measured on, the others train the probes.")
        return train, test
    return hfproj.load_image_dataset(dataset, split="train", limit=recipe.train_limit), test


def main() -> None:
    (recipe,) = cli.parse(Recipe)
    chosen = cli.options(recipe.probe_options)
    names = [name for name in recipe.probes.split(",") if name]
    for name in chosen.keys() - set(names):
        raise hfproj.UsageError(f"--probe_options has options of {name!r}, which is not among --probes {names}.")
    probes = [create_probe(name, **chosen.get(name, {})) for name in names] if recipe.labels else []
    layers = recipe.layers or ()
    if layers and layers not in ("all", "head"):
        layers = [int(layer) if layer.lstrip("-").isdigit() else layer for layer in layers.split(",")]
    adapted = cli.is_adapter(recipe.model)
    model = hfproj.from_pretrained(recipe.model) if adapted else hfproj.load_backbone(recipe.model)
    model.to(check_device("--device", recipe.device or ("cuda" if torch.cuda.is_available() else "cpu")))

    results: list[hfproj.Results] = []
    for dataset in recipe.datasets.split(","):
        train, test = load_images(dataset, recipe)
        for when in ("before", "after") if adapted else ("after",):
            with model.disable_adapter() if when == "before" else nullcontext():
                results.append(
                    hfproj.evaluate(
                        model,
                        probes=probes,
                        train=train if probes else None,
                        test=test,
                        labels="auto" if recipe.labels else None,
                        layers=layers,
                        when=when,
                        dataset=dataset,
                        seed=recipe.seed,
                        batch_size=recipe.batch_size,
                        num_workers=recipe.num_workers,
                        cache_dir=recipe.cache_dir,
                        progress=True,
                    )
                )
    merged = results[0].merge(*results[1:])
    merged.command = command_line()
    merged.config["recipe"] = vars(recipe)
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    merged.save(folder)
    cli.write_arguments(folder)
    write_atomic(folder / "results.md", f"{merged.to_markdown()}\n".encode())
    print(merged.table())
    print(f"\nSaved to {hfproj.report(folder)}, and results.json beside it.")


if __name__ == "__main__":
    cli.run(main)
