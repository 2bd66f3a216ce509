"""What `test_reload.py` runs in a new process: loads every saved adapter and writes what it computes."""

import json
from pathlib import Path

import torch
from cases import make_backbone, make_inputs
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file, save_file

import hfproj


def load(job: dict) -> torch.nn.Module:
    options = {"adapter_name": job["adapter_name"], "low_cpu_mem_usage": job["low_cpu_mem_usage"]}
    if job["door"] == "PeftModel":
        return PeftModel.from_pretrained(make_backbone(job["backbone"]), job["folder"], **options)
    if job["door"] == "AutoPeftModel":
        return AutoPeftModel.from_pretrained(job["folder"], **options)
    given = None if job["backbone"] in ("vit_nano", "minilm") else make_backbone(job["backbone"])
    return hfproj.from_pretrained(job["folder"], backbone=given, **options)


@torch.no_grad()
def main(table: str, out: str) -> None:
    computed = {}
    for job in json.loads(Path(table).read_text()):
        torch.manual_seed(job["seed"])  # a tensor that is not loaded must not be right by luck
        if job["door"] == "load_head":
            h = load_file(Path(job["folder"]) / "h.safetensors")["h"].clone()
            computed[job["key"]] = hfproj.load_head(job["folder"])(h)
        else:
            computed[job["key"]] = load(job).eval()(**make_inputs(job["backbone"])).projection
    save_file(computed, out)
