"""What was saved is what is loaded: in a new process, under any name, through every door, to the last bit."""

import json
from pathlib import Path

import forked
import pytest
import reload_adapters
import torch
from cases import RELOADED, TRAINED, make_backbone, make_config, make_inputs, perturb
from peft import IA3Config, LNTuningConfig, LoHaConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from thinned import thinned
from transformers import ViTModel

import hfproj

KINDS = {
    "dora": LoraConfig(r=2, use_dora=True),
    "ia3": IA3Config(),
    "ln_tuning": LNTuningConfig(),
    "loha": LoHaConfig(r=2),
    "oft": OFTConfig(oft_block_size=4),
}
TABLE = [(b, t, None) for b in RELOADED for t in TRAINED] + [
    *((b, "head", k) for b in ("vit", "timm_vit") for k in KINDS),
    ("timm_cnn", "head", "dora"),
    ("timm_cnn", "head", "ln_tuning"),
]
IDS = [f"{b}-{k or t}" for b, t, k in TABLE]


def make_trained(backbone: str, trained: str, kind: str | None) -> PeftModel:
    extra = {} if kind is None else {"trainable": "adapter", "backbone_adapter": KINDS[kind]}
    config = make_config(backbone, trained, predictor={"head": "linear"}, prototypes=3, **extra)
    model = get_peft_model(make_backbone(backbone), config)
    perturb(model)
    return model.eval()


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """Save every case, load all of them in one new process; return (z before, z after) by key."""
    root = tmp_path_factory.mktemp("adapters")
    before, jobs = {}, []

    def add(case: str, backbone: str, folder: Path, z: torch.Tensor, door: str, **options: object) -> None:
        key = f"{case}/{door}" + "".join(f"/{v}" for v in options.values())
        job = {"adapter_name": "default", "low_cpu_mem_usage": False, **options}
        jobs.append({"key": key, "backbone": backbone, "folder": str(folder), "door": door, "seed": len(jobs), **job})
        before[key] = z

    for case, row in zip(IDS, TABLE, strict=True):
        model, folder = make_trained(*row), root / case
        model.save_pretrained(folder)
        with torch.no_grad():
            out = model(**make_inputs(row[0]))
        h = out.representation.clone()  # the same layout in memory, on which the last bit of a product depends
        save_file({"h": h}, folder / "h.safetensors")
        add(case, row[0], folder, out.projection, "PeftModel", adapter_name="other")
        add(case, row[0], folder, hfproj.detach(model)(h), "load_head")
        if row[0] in ("vit", "timm_cnn"):
            add(case, row[0], folder, out.projection, "PeftModel", low_cpu_mem_usage=True)
        if row[0] in ("vit", "vit_nano"):
            add(case, row[0], folder, out.projection, "hfproj")
    make_backbone("vit").save_pretrained(root / "vit_checkpoint")
    for trained in TRAINED:
        model = get_peft_model(
            ViTModel.from_pretrained(root / "vit_checkpoint", add_pooling_layer=False), make_config("vit", trained)
        )
        perturb(model)
        model.eval().save_pretrained(root / f"auto-{trained}")
        with torch.no_grad():
            z = model(**make_inputs("vit")).projection
        add(f"auto-{trained}", "vit", root / f"auto-{trained}", z, "AutoPeftModel")

    (root / "table.json").write_text(json.dumps(jobs))
    forked.returned(reload_adapters.main, root / "table.json", root / "z.safetensors")
    return root, before, load_file(root / "z.safetensors")


def test_new_process_gives_the_same_z(reloaded):
    _, before, after = reloaded
    assert before.keys() == after.keys()
    assert len(before) >= 4 * len(RELOADED)
    difference = {key: (before[key] - after[key]).abs().max().item() for key in before}
    assert max(difference.values()) == 0.0, {k: d for k, d in difference.items() if d}


@pytest.mark.parametrize("case", thinned([case for case in IDS if not case.startswith(("minilm-two", "minilm-full"))]))
def test_saving_what_was_loaded_gives_the_same_bytes(reloaded, case):
    folder = reloaded[0] / case
    backbone = make_backbone(TABLE[IDS.index(case)][0])
    model = PeftModel.from_pretrained(backbone, folder)
    model.save_pretrained(folder / "again")
    model.save_pretrained(folder / "and_again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / file).read_bytes() == (folder / "again" / file).read_bytes()
        assert (folder / file).read_bytes() == (folder / "and_again" / file).read_bytes()


@pytest.mark.parametrize("trained", TRAINED)
def test_the_file_holds_the_adapter_and_nothing_else(reloaded, trained):
    with safe_open(reloaded[0] / f"vit-{trained}" / "adapter_model.safetensors", framework="pt") as file:
        names = [n.removeprefix("base_model.model.") for n in file.keys()]  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    head = [n for n in names if n.startswith("hfproj.projection_head_modules.")]
    backbone = [n for n in names if n.startswith("hfproj.backbone.")]
    lora = [n for n in names if ".lora_" in n]
    assert not any("default" in n for n in names)
    assert sorted(head + backbone + lora) == sorted(names)
    assert bool(lora) == (trained == "lora")
    expected = {"head": 0, "lora": 0, "two_blocks": 2 * 16 + 2, "full": 3 * 16 + 2 + 4}[trained]
    assert len(backbone) == expected


def test_the_same_seed_and_training_give_the_same_bytes_in_two_saves(tmp_path):
    for folder in ("a", "b"):
        torch.manual_seed(3)
        make_trained("vit", "lora", None).save_pretrained(tmp_path / folder)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
