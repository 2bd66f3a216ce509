r"""An official self-supervised checkpoint as an adapter repository: the head that its authors throw away, kept.

    python recipes/convert.py vit-s-300ep.pth.tar --method moco_v3 --output_dir out/moco_v3_vit_s
    python recipes/convert.py dino_deitsmall16_pretrain_full_checkpoint.pth --method dino \
        --backbone timm/vit_small_patch16_224.dino --license apache-2.0 --output_dir out/dino_vit_s16
    python recipes/convert.py --list

Reads tensors alone, whatever else the file holds. The output folder holds the adapter, a results.json that says where
it comes from, how images are prepared, and a card. It is loaded again and compared before the recipe says that it is
done. Then: `recipes/geometry.py head --adapter out/…` for what the head does, `recipes/probe.py --model out/…` for h
and z, and `hfproj.push_to_hub`. A ResNet-50 takes some seconds on a CPU. docs/convert.md lists what is mapped.
"""

from hfproj import cli

cli.start(__file__)  # answers --help before anything large is imported

import argparse
import hashlib
import warnings
from pathlib import Path

import torch
from peft import PeftModel

import hfproj
from hfproj.backbones.preprocessing import preprocessor_config
from hfproj.converters import Conversion, conversion, list_converters
from hfproj.files import command_line, portable, write_json
from hfproj.reporting import check_license, write_card
from hfproj.tuner.description import known_preprocessing


def convert(options: argparse.Namespace) -> Path:
    """Convert, save, load again, compare; return the folder."""
    check_license(options.license)
    chosen = {name: getattr(options, name) for name in ("d0", "head") if getattr(options, name) is not None}
    done = conversion(
        options.checkpoint,
        options.method,
        backbone=options.backbone,
        network=options.network,
        num_heads=options.num_heads,
        **chosen,
    )
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    done.model.save_pretrained(folder)
    prepared = known_preprocessing(done.model, "default")
    if prepared is not None:
        write_json(folder / "preprocessor_config.json", preprocessor_config(prepared))
    describe(done, options, folder)
    cli.write_arguments(folder)
    size = prepared.size if prepared else 224
    difference = compare(done.model, folder, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
    print(f"{done.method} ({done.network} network) of {done.source}")
    print("read: " + ", ".join(f"{part} {count}" for part, count in done.read.items()) + " tensors")
    for why, keys in done.ignored.items():
        print(f"left out, {why}: {len(keys)} tensors ({keys[0]} …)")
    print(f"loaded again, largest difference of h and z: {difference}")
    print(f"Saved to {folder}.")
    return folder


def compare(model: PeftModel, folder: Path, x: torch.Tensor) -> float:
    """Return the largest difference of h and z between a model and what is loaded from its folder.

    Raises:
        AdapterFileError: there is one.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="keep_original=False")
        loaded = hfproj.from_pretrained(folder)
    with torch.no_grad():
        ours, theirs = model(x), loaded.eval()(x)
    parts = ((ours.representation, theirs.representation), (ours.projection, theirs.projection))
    difference = max(float((a - b).abs().max()) for a, b in parts)
    if difference != 0:
        raise hfproj.AdapterFileError(f"{folder} loads with a difference of {difference}: it was not written as it is.")
    return difference


def describe(done: Conversion, options: argparse.Namespace, folder: Path) -> None:
    """Write results.json, which says where the adapter comes from, and the card."""
    config = done.model.peft_config["default"]
    source = config.backbone or {}
    name = str(source.get("id", "a backbone")).removeprefix("timm/").split(".")[0]
    digest = sha256(options.checkpoint)
    where = f", from {options.source}" if options.source else ""
    notes = [
        f"Converted from a {done.method} checkpoint of {done.source}{where}: {Path(options.checkpoint).name}, SHA-256 "
        f"{digest}.",
        f"Its {done.network} network was read: "
        + ", ".join(f"{part} {count}" for part, count in done.read.items() if count)
        + " tensors.",
        *(f"Left out, {why}: {len(keys)} tensors." for why, keys in done.ignored.items()),
        "Nothing was trained: weights and BatchNorm statistics are those of the checkpoint, and so is its licence.",
    ]
    # an architecture without its own weights is no base model
    base = f"{name} with the weights of the checkpoint" if done.own_backbone else source.get("id")
    results = hfproj.Results(
        config={
            "base_model": base,
            "adapter": portable({key: value for key, value in config.to_dict().items() if value is not None}),
            "conversion": {
                "method": done.method,
                "network": done.network,
                "source": done.source,
                "file": Path(options.checkpoint).name,
                "sha256": digest,
                "read": done.read,
                "left_out": {why: len(keys) for why, keys in done.ignored.items()},
            },
        },
        command=command_line(),
        notes=notes,
    )
    write_card(results, folder, license=options.license)


def sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="A .pth or .safetensors file.")
    parser.add_argument("--method", help="See --list.")
    parser.add_argument("--output_dir", help="Folder of the adapter.")
    parser.add_argument("--backbone", help="A backbone that may have the same weights: timm/… or a Hub id.")
    parser.add_argument("--network", help="teacher, student, query, key, base, momentum, online, target.")
    parser.add_argument("--num_heads", type=int, help="Attention heads of a ViT of unusual width.")
    parser.add_argument("--d0", type=int, help="Of directclr: the --dim of its training.")
    parser.add_argument("--head", help="Of dinov2: dino_head or ibot_head.")
    parser.add_argument("--license", help="Of the checkpoint, as the Hub writes it: apache-2.0, mit, cc-by-nc-4.0 …")
    parser.add_argument("--source", help="Where the file was downloaded from, for the card.")
    parser.add_argument("--list", action="store_true", help="List the methods.")
    options = cli.arguments(parser)
    if options.list:
        for name, line in list_converters().items():
            print(f"{name:13} {line}")
    else:
        needed = {"CHECKPOINT": "checkpoint", "--method": "method", "--output_dir": "output_dir"}
        missing = [flag for flag, name in needed.items() if not getattr(options, name)]
        if missing:
            *first, last = missing
            named = f"{', '.join(first)} and {last}" if first else last
            parser.error(f"expected {named}, got none; --list shows the methods")
        convert(options)


if __name__ == "__main__":
    cli.run(main)
