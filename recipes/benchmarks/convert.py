"""Converted checkpoints of official size beside the official networks: how far h, z, predictions and scores differ.

    python recipes/benchmarks/convert.py                    # all layouts; three minutes of one core
    python recipes/benchmarks/convert.py --only dino vicreg

Official files are not at hand: these have their names and shapes, with random weights and BatchNorm statistics, as made
by tests/converters/official_files.py, whose networks are written with torch's functions alone. Both run in float64 on
two images; the adapter is saved and loaded in float32, where the difference has to be 0. Writes convert.json and
convert.md below recipes/benchmarks/results. What is there is not measured again, unless `--only` names it.
"""

import argparse
import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a shared CPU spinning threads cost more than they save

import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import hfproj
from hfproj import cli
from hfproj.converters import conversion
from hfproj.files import installed_versions, rounded, write_atomic, write_json

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "recipes" / "benchmarks" / "results"
PARTS = {"h": "representation", "z": "projection", "p": "prediction", "scores": "scores"}


def cases() -> dict[str, Any]:
    """Return the makers of checkpoints that the tests use, too."""
    sys.path.insert(0, str(ROOT / "tests" / "converters"))
    import official_files

    return official_files.CASES


def measured(make: Any) -> dict[str, Any]:
    """Return sizes and differences of one layout at its official size."""
    case = make(full=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        torch.save(case.file, folder / "checkpoint.pth")
        start = time.process_time()
        done = conversion(folder / "checkpoint.pth", case.method, **case.options)
        seconds = time.process_time() - start
        model, config = done.model, done.model.peft_config["default"]
        x = torch.randn(2, 3, case.image, case.image, generator=torch.Generator().manual_seed(0))
        model.save_pretrained(folder / "adapter")
        megabytes = (folder / "adapter" / "adapter_model.safetensors").stat().st_size / 1e6
        backbone = hfproj.load_backbone(config.backbone["id"], **config.backbone["kwargs"])
        loaded = hfproj.from_pretrained(folder / "adapter", backbone=backbone)
        reloaded = largest(outputs(loaded, x), outputs(model, x))
    found, expected = outputs(model.double(), x.double()), case.network(x.double())
    assert found.keys() == expected.keys()
    head = hfproj.detach(model)
    return {
        "method": case.method,
        "backbone": config.backbone["id"].removeprefix("timm/"),
        "options": {k: v for k, v in config.backbone["kwargs"].items() if k != "pretrained"},
        "widths": [config.in_dim, config.out_dim],
        "head_parameters": sum(p.numel() for p in head.parameters()),
        "tensors": done.read,
        "difference": {part: float((found[part] - value).abs().max()) for part, value in expected.items()},
        "spread": {part: float(value.std()) for part, value in expected.items()},
        "reloaded": reloaded,
        "megabytes": megabytes,
        "seconds": seconds,
    }


def outputs(model: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        out = model(x)
    return {part: getattr(out, name) for part, name in PARTS.items() if getattr(out, name) is not None}


def largest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((found[part] - value).abs().max()) for part, value in expected.items())


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    columns = ["layout", "timm backbone", "h → z", "head, M parameters", *(f"max \\|Δ{part}\\|" for part in PARTS)]
    columns += ["loaded again", "adapter, MB", "seconds"]
    lines = [
        "# Converted checkpoints beside the official networks, at official size",
        "",
        "Random weights and BatchNorm statistics under the official names; float64, two images. max |Δ|: between the",
        "official network and the converted one. Loaded again: max |Δ| of all outputs after saving, in float32.",
        "Seconds: of one core, for reading and converting the file.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for name, row in rows.items():
        options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        differences = [row["difference"].get(part) for part in PARTS]
        cells = [
            name,
            row["backbone"] + (f" ({options})" if options else ""),
            " → ".join(map(str, row["widths"])),
            f"{row['head_parameters'] / 1e6:.2f}",
            *("–" if value is None else f"{value:.1e}" for value in differences),
            f"{row['reloaded']:g}",
            f"{row['megabytes']:.0f}",
            f"{row['seconds']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="Methods or layouts.")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="keep_original=False")
    file = OUT / "convert.json"
    kept = json.loads(file.read_text())["layouts"] if file.is_file() else {}
    makers = cases()
    for name, make in makers.items():
        if {name, name.split(":")[0]} & set(options.only) if options.only else name not in kept:
            kept[name] = rounded(measured(make))
            print(name, kept[name]["difference"], flush=True)
            rows = {of: kept[of] for of in makers if of in kept}
            write_json(file, {"versions": installed_versions(), "layouts": rows})
            write_atomic(OUT / "convert.md", ("\n".join(table(rows)) + "\n").encode())


if __name__ == "__main__":
    cli.run(main)
