"""Seconds and memory of attaching a head with LoRA, beside PEFT's LoRA alone, each in a process of its own.

    python recipes/benchmarks/attach_costs.py      # then: python recipes/benchmarks/backbones.py table

Models have their published sizes and random weights: nothing is downloaded. Writes "costs" in
recipes/benchmarks/results/backbones.json, in 3 minutes on two cores.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import timm
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import hfproj
from hfproj.files import write_json

OUT = Path(__file__).resolve().parent / "results" / "backbones.json"
BIG = ("vit_base", "vit_large", "convnext_base", "swin_tiny", "bert_base")


def big(name: str) -> nn.Module:
    """Make a backbone of its published size, with random weights."""
    if name == "bert_base":
        return transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)
    whole = {"vit_base": "vit_base_patch16_224", "vit_large": "vit_large_patch16_224",
             "convnext_base": "convnext_base", "swin_tiny": "swin_tiny_patch4_window7_224"}[name]  # fmt: skip
    return timm.create_model(whole, pretrained=False, num_classes=0)


def attach(name: str, how: str) -> None:
    """Attach once, in this process, and print seconds and the growth of its peak memory in MiB."""
    backbone = big(name)
    get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))  # imports are no costs of a model
    targets = [n for n, m in backbone.named_modules() if type(m) is nn.Linear]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, worked = time.perf_counter(), time.process_time()
    config = (
        LoraConfig(r=8, target_modules=targets)
        if how == "peft"
        else hfproj.ProjectionHeadConfig(head="linear", out_dim=4, backbone_adapter=LoraConfig(r=8))
    )
    get_peft_model(backbone, config)
    seconds = time.perf_counter() - began
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    worked = time.process_time() - worked  # does not depend on what else the machine does
    print(json.dumps({"seconds": round(seconds, 3), "cpu": round(worked, 3), "MiB": round(peak, 1)}))


def costs(name: str) -> dict[str, Any]:
    """Measure attaching to one backbone in new processes, the best of three."""
    row: dict[str, Any] = {}
    for how in ("peft", "hfproj"):
        command = [sys.executable, "-W", "ignore", __file__, "attach", name, how]
        runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(3)]
        row[how] = min(runs, key=lambda run: run["cpu"])
    return row


def main() -> None:
    if sys.argv[1:2] == ["attach"]:
        return attach(*sys.argv[2:])
    rows = {}
    for name in BIG:
        rows[name] = costs(name)
        print(f"{name}: {json.dumps(rows[name])}", flush=True)
    write_json(OUT, {**json.loads(OUT.read_text()), "costs": rows})


if __name__ == "__main__":
    main()
