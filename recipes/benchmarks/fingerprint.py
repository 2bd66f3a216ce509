"""Does an adapter recognise its backbone? False alarms and misses of the fingerprint over pairs of backbones.

    python recipes/benchmarks/fingerprint.py        # a minute of one core
    python recipes/benchmarks/fingerprint.py table  # the table from the numbers that are there

Each pair is a backbone and what became of it. A pair of the same weights (a copy, a cast, other names for modules,
another pooler that h is not read from) that is refused is a false alarm; one of other weights or another structure that
is accepted is a miss. A cast has to be a warning, and a copy silent. Backbones: `vit_nano`, a small pretrained BERT of
the tests where it is there, and random models of timm and transformers. Milliseconds are of a ViT-B on one core.

Writes fingerprint.json and fingerprint.md below recipes/benchmarks/results.
"""

import copy
import json
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a shared CPU spinning threads cost more than they save

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

import hfproj
from hfproj.backbones import bare_tensors, feeds_representation, resolve_read_point
from hfproj.backbones.fingerprint import compare, digest, fingerprint
from hfproj.files import installed_versions, write_atomic, write_json

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "recipes" / "benchmarks" / "results"
BERT = ROOT.parent / "shared" / "bert_nano"
SMALL = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
SAME, WARNED, REFUSED = ("same",), ("cast", "quantized"), ("weights", "statistics", "structure")


def backbones() -> dict[str, Callable[[], nn.Module]]:
    """Return makers of backbones, each the same at every call."""
    found: dict[str, Callable[[], nn.Module]] = {
        "vit_nano": lambda: hfproj.load_backbone("vit_nano"),
        "timm resnet18": lambda: timm.create_model("resnet18", num_classes=0),
        "timm vit": lambda: timm.create_model("vit_tiny_patch16_224", depth=4, num_classes=0),
        "timm convnext": lambda: timm.create_model("convnext_atto", num_classes=0),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**SMALL, image_size=56, patch_size=14)),
        "bert": lambda: BertModel(BertConfig(**SMALL, intermediate_size=96, vocab_size=500)),
    }
    if BERT.is_dir():
        found["bert_nano"] = lambda: hfproj.load_backbone(str(BERT))
    return found


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Return a new model whose random weights depend on `seed` alone."""
    torch.manual_seed(seed)
    return make().eval()


def tensors_of(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """Return what h depends on."""
    tensors = bare_tensors(backbone)
    return {name: tensors[name] for name in feeds_representation(backbone, resolve_read_point(backbone))}


def taken(backbone: nn.Module) -> dict[str, Any]:
    """Return the fingerprint that an adapter on this backbone carries."""
    return fingerprint(backbone, tensors_of(backbone))


def renamed(backbone: nn.Module, *, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Return the fingerprint under the names that another version of a library might have, in another order."""
    tensors, other = reversed(tensors_of(backbone).items()), copy.deepcopy(backbone)
    for module in other.modules():
        module._modules = {_other_name(part): child for part, child in module._modules.items()}
    found = {".".join(map(_other_name, n.split("."))): t for n, t in tensors}
    return fingerprint(other, {n: t.to(dtype) if dtype and t.is_floating_point() else t for n, t in found.items()})


def _other_name(part: str) -> str:
    return part if part.isdigit() or part.startswith("running_") else f"new_{part}"


def stepped(backbone: nn.Module) -> nn.Module:
    """Return the backbone after one step of AdamW at a learning rate of 1e-5."""
    text = getattr(backbone, "main_input_name", "") == "input_ids"
    side = getattr(getattr(backbone, "config", None), "image_size", 64)
    side = 224 if type(backbone).__name__ == "VisionTransformer" else side
    x = torch.randint(5, 400, (4, 12)) if text else torch.randn(4, 3, side, side)
    tuned = copy.deepcopy(backbone).train()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-5)
    output = tuned(x)
    (output if isinstance(output, torch.Tensor) else output[0]).square().mean().backward()
    optimizer.step()
    return tuned.eval()


def swapped(backbone: nn.Module) -> nn.Module | None:
    """Return the backbone with two of its blocks exchanged, or None where it has no list of equal ones."""
    found = copy.deepcopy(backbone)
    lists = [m for m in found.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 2]
    blocks = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=None)
    if blocks is None or len({sum(p.numel() for p in b.parameters()) for b in blocks}) > 1:
        return None
    blocks[0], blocks[2] = blocks[2], blocks[0]
    return found


def pairs(make: Callable[[], nn.Module], pretrained: bool) -> Iterator[tuple[str, tuple[str, ...], dict[str, Any]]]:
    """Yield what became of a backbone, which answers are right, and its fingerprint then."""
    backbone = seeded(make)
    yield "copy", SAME, taken(seeded(make))
    yield "renamed modules, other order", SAME, renamed(backbone)
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        yield f"cast to {name}", WARNED, taken(copy.deepcopy(backbone).to(dtype))
        yield f"cast to {name} and back", WARNED, taken(copy.deepcopy(backbone).to(dtype).float())
        yield f"renamed, in {name}", WARNED, renamed(backbone, dtype=dtype)
    if torch.cuda.is_available():
        yield "another device", SAME, taken(copy.deepcopy(backbone).cuda())
    if getattr(backbone, "pooler", None) is not None:
        other = copy.deepcopy(backbone)
        for layer in other.pooler.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        yield "a new pooler", SAME, taken(other)
        other.pooler = None
        yield "no pooler", SAME, taken(other)
    yield "one AdamW step at 1e-5", REFUSED, taken(stepped(backbone))
    yield "one AdamW step at 1e-5, renamed", REFUSED, renamed(stepped(backbone))
    longer = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in longer.parameters():
            parameter.add_(1e-3 * torch.randn(parameter.shape))
    yield "trained on by 1e-3, in bfloat16", REFUSED, taken(longer.bfloat16())
    if not pretrained:
        yield "another seed", REFUSED, taken(seeded(make, 1))
        yield "another seed, in float16", REFUSED, taken(seeded(make, 2).half())
    if (other := swapped(backbone)) is not None:
        yield "two blocks exchanged", REFUSED, taken(other)
        yield "two blocks exchanged, in bfloat16", REFUSED, taken(other.bfloat16())
    moved = copy.deepcopy(backbone)
    statistics_there = [b for n, b in moved.named_buffers() if n.endswith("running_mean")]
    if statistics_there:
        statistics_there[0].add_(0.01)
        yield "other statistics of one BatchNorm", REFUSED, taken(moved)


def measured() -> dict[str, Any]:
    """Return every pair with its answer, the counts, and milliseconds."""
    rows = []
    for name, make in backbones().items():
        saved = taken(seeded(make))
        for what, expected, now in pairs(make, pretrained="nano" in name):
            answer = compare(saved, now).kind
            rows.append({"backbone": name, "what": what, "expected": list(expected), "answer": answer})
            print(f"{name}: {what}: {answer}", flush=True)
    for what, first, second in crossed():
        answer = compare(first, second).kind
        rows.append({"backbone": "timm vit", "what": what, "expected": list(WARNED), "answer": answer})
    false = [r for r in rows if r["answer"] in REFUSED and r["expected"] != list(REFUSED)]
    missed = [r for r in rows if r["answer"] not in REFUSED and r["expected"] == list(REFUSED)]
    other = [r for r in rows if r["answer"] not in r["expected"] and r not in false and r not in missed]
    counts = {"pairs": len(rows), "false_alarms": len(false), "misses": len(missed), "other_mistakes": len(other)}
    return {**counts, "seconds": seconds(), "versions": installed_versions(), "rows": rows}


def crossed() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield two different casts of one model, of several seeds."""
    for seed in range(5):
        model = seeded(backbones()["timm vit"], seed)
        yield f"float16 against bfloat16, seed {seed}", taken(copy.deepcopy(model).half()), taken(model.bfloat16())


def seconds() -> dict[str, float]:
    """Return the time that a ViT-B takes, median of five where it is short."""
    backbone = timm.create_model("vit_base_patch16_224", num_classes=0)
    tensors, times = tensors_of(backbone), []
    for _ in range(6):
        start = time.perf_counter()
        found = fingerprint(backbone, tensors)
        compare(found, found)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    digest(backbone, tensors)
    exact = time.perf_counter() - start
    return {"fingerprint_and_comparison": round(statistics.median(times[1:]), 4), "sha256": round(exact, 3)}


def table(found: dict[str, Any]) -> str:
    """Return the numbers in Markdown."""
    lines = [
        "# Fingerprints of backbones",
        "",
        f"{found['pairs']} pairs: {found['false_alarms']} false alarms, {found['misses']} misses, "
        f"{found['other_mistakes']} other mistakes (a warning instead of silence, or silence instead of a warning).",
        f"ViT-B on one core: {1000 * found['seconds']['fingerprint_and_comparison']:.0f} ms, and "
        f"{found['seconds']['sha256']:.1f} s for the exact digest.", "", "| what became of it | backbones | answer |",
        "| --- | --- | --- |",
    ]  # fmt: skip
    alike: dict[tuple[str, str], list[str]] = {}
    for row in found["rows"]:
        alike.setdefault((row["what"], row["answer"]), []).append(row["backbone"])
    return "\n".join([*lines, *(f"| {w} | {', '.join(b)} | {a} |" for (w, a), b in alike.items())]) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] != ["table"]:
        write_json(OUT / "fingerprint.json", measured())
    text = table(json.loads((OUT / "fingerprint.json").read_text(encoding="utf-8")))
    write_atomic(OUT / "fingerprint.md", text.encode())
    print(text)
