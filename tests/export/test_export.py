"""Exported adapters and merged backbones: loaded without hfproj they give the same h, and the model stays as it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import (
    ATTENTION,
    BLOCKS,
    QUERY,
    assert_refused,
    assert_same_tensors,
    make_backbone,
    make_config,
    make_inputs,
    perturb,
    snapshot,
)
from huggingface_hub import ModelCard
from peft import IA3Config, LNTuningConfig, LoHaConfig, LoraConfig, OFTConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

import hfproj
from hfproj.backbones import bare_tensors
from hfproj.backbones.preprocessing import OF_ADAPTER

MERGING = 1e-5  # of the largest value: float32 rounds a product of weights once more
KINDS = {
    "dora": LoraConfig(r=2, use_dora=True, use_rslora=True),
    "ia3": IA3Config(),
    "ln": LNTuningConfig(),
    "loha": LoHaConfig(r=2),
    "oft": OFTConfig(r=0, oft_block_size=4),
}
# (backbone, what is trained, options of the head's config, how far h may be off)
ADAPTERS = [
    ("timm_vit", "lora", {}, 0),
    ("timm_vit", "lora", {"pooling": "cls_mean"}, 0),
    ("timm_cnn", "lora", {}, 0),
    ("vit", "lora", {"pooling": "mean", "layer": 1}, 0),
    ("dinov2_registers", "lora", {"pooling": "mean"}, 0),
    ("bert", "lora", {"pooling": "mean"}, 0),
    ("bert", "lora", {"pooling": "max", "layer": 0}, 0),
    ("bert", "lora", {"pooling": "pooler"}, 0),
    *(("vit", "lora", {"backbone_adapter": kind}, 0) for kind in KINDS.values()),
]
MERGED = [
    ("timm_vit", "lora", {}, MERGING),
    ("timm_vit", "full", {"pooling": "max"}, 0),
    ("timm_vit", "two_blocks", {"pooling": "mean", "layer": 1}, 0),
    ("timm_cnn", "lora", {}, MERGING),
    ("timm_cnn", "full", {}, 0),
    ("vit", "head", {}, 0),
    ("vit", "lora", {}, MERGING),
    ("vit", "two_blocks", {"pooling": "max"}, 0),
    ("vit", "full", {"layer": 1}, 0),
    ("dinov2", "lora", {"pooling": "cls_mean"}, MERGING),
    ("dinov2", "two_blocks", {}, 0),
    ("siglip", "full", {}, 0),
    ("clip", "lora", {}, MERGING),
    ("bert", "lora", {"pooling": "cls_mean"}, MERGING),
    ("bert", "full", {"pooling": "pooler"}, 0),
    *(("vit", "lora", {"backbone_adapter": kind}, MERGING) for kind in KINDS.values()),
]

TIMM_REMEMBERS = hasattr(make_backbone("timm_vit"), "_model_args")
timm_remembers = pytest.mark.skipif(not TIMM_REMEMBERS, reason="timm before 1.0.31 forgets what a model was made with")
FIRST_QUERY = f"{BLOCKS}.0.{ATTENTION}.{QUERY}"


def attach(name, trained, **options):
    model = get_peft_model(make_backbone(name), make_config(name, trained, **options))
    perturb(model)
    return model.eval()


def save_batch(file, name, model):
    inputs = make_inputs(name)
    with torch.no_grad():
        save_file({**inputs, "h": model(**inputs).representation.clone()}, file)


def bare_folder(name, folder):
    """Write a backbone without anything learned, as its library loads it, and return the line that does so."""
    if not folder.exists():
        hfproj.export_merged(get_peft_model(make_backbone(name), make_config(name)), folder)
    if name.startswith("timm"):
        return f"import timm; base = timm.create_model('local-dir:{folder}', pretrained=True)"
    pooler = ", add_pooling_layer=False" if name == "vit" else ""
    return f"from transformers import AutoModel; base = AutoModel.from_pretrained('{folder}'{pooler})"


def by_auto_class(model, folder):
    """Return the job that loads an adapter together with the folder its backbone came from."""
    written = hfproj.export_backbone_adapter(model, folder / "auto")
    save_batch(folder / "auto.safetensors", "vit", model)
    code = [
        "from peft import AutoPeftModel",
        "model = AutoPeftModel.from_pretrained('path/to/this/folder').eval()",
        "h = model(pixel_values=images).last_hidden_state[:, 0].detach()",
    ]
    return {"folder": str(written), "tensors": str(folder / "auto.safetensors"), "code": "\n".join(code)}


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.long)])
def test_every_readme_gives_the_same_h_without_this_package(tmp_path, every):
    """One process for all: it does what the READMEs say."""
    jobs, allowed = [], []
    cases = [case for case in [*ADAPTERS, *MERGED] if TIMM_REMEMBERS or case[0] != "timm_vit"][::every]
    for number, case in enumerate(cases):
        name, trained, options, tolerance = case
        model = attach(name, trained, **options)
        before, adapter = snapshot(model), case in ADAPTERS
        export = hfproj.export_backbone_adapter if adapter else hfproj.export_merged
        folder = export(model, tmp_path / str(number))
        assert_same_tensors(before, snapshot(model))
        job = {"folder": str(folder), "tensors": str(tmp_path / f"{number}.safetensors")}
        save_batch(job["tensors"], name, model)
        jobs.append(job | ({"base": bare_folder(name, tmp_path / name)} if adapter else {}))
        allowed.append(tolerance)
    model = get_peft_model(hfproj.load_backbone(str(tmp_path / "vit")), make_config("vit", "lora"))
    perturb(model)
    jobs.append(by_auto_class(model.eval(), tmp_path))
    allowed.append(0)
    file = tmp_path / "jobs.json"
    file.write_text(json.dumps(jobs))
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("export_reader.py"), file],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    off = json.loads(run.stdout.splitlines()[-1])
    assert len(off) == len(allowed)
    wrong = {str(case): o for case, o, a in zip([*cases, "AutoPeftModel"], off, allowed) if not o <= a}
    assert not wrong


@pytest.mark.parametrize("export", [hfproj.export_backbone_adapter, hfproj.export_merged])
def test_a_model_in_training_stays_as_it_is(export, tmp_path):
    model = attach("timm_cnn", "lora").train()
    before, flags = snapshot(model), [(p.requires_grad, p.grad) for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    hooks = len(model.get_base_model()._forward_hooks)
    export(model, tmp_path / "out")
    assert_same_tensors(before, snapshot(model))
    assert flags == [(p.requires_grad, p.grad) for p in model.parameters()]
    assert modes == [m.training for m in model.modules()]
    assert len(model.get_base_model()._forward_hooks) == hooks


def test_a_merged_model_in_training_is_one_in_evaluation(tmp_path):
    model = attach("vit", "full").train()
    hfproj.export_merged(model, tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert_same_tensors(bare_tensors(loaded), bare_tensors(model.get_base_model()))


def test_half_precision_stays_half_precision(tmp_path):
    model = get_peft_model(make_backbone("vit").bfloat16(), make_config("vit", "two_blocks")).eval()
    perturb(model)
    loaded = AutoModel.from_pretrained(hfproj.export_merged(model, tmp_path), add_pooling_layer=False)
    assert loaded.dtype == torch.bfloat16
    assert_same_tensors(bare_tensors(loaded), bare_tensors(model.get_base_model()))


def test_of_several_adapters_the_active_one(tmp_path):
    model = attach("vit", "lora")
    model.add_adapter("mine", make_config("vit", "lora", backbone_adapter=LoraConfig(r=3)))
    model.add_adapter("blocks", make_config("vit", "two_blocks"))
    for name in ("mine", "blocks"):
        model.set_adapter(name)
        perturb(model.eval(), seed=len(name))
        hfproj.export_merged(model, tmp_path / name)
        loaded = AutoModel.from_pretrained(tmp_path / name, add_pooling_layer=False).eval()
        inputs = make_inputs("vit")
        with torch.no_grad():
            expected, h = model(**inputs).representation, loaded(**inputs).last_hidden_state[:, 0]
        torch.testing.assert_close(h, expected, rtol=0, atol=1e-6 if name == "mine" else 0)
    hfproj.export_backbone_adapter(model, tmp_path / "a", adapter_name="mine")
    hfproj.export_backbone_adapter(model, tmp_path / "b", adapter_name="default")
    assert [PeftConfig.from_pretrained(tmp_path / n).r for n in "ab"] == [3, 2]
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert all("lora_" in name and "hfproj" not in name and "mine" not in name for name in saved)
    own = model.get_base_model().get_submodule(FIRST_QUERY).lora_A["mine"].weight
    assert torch.equal(saved[f"base_model.model.{FIRST_QUERY}.lora_A.weight"], own)


def test_which_base_the_adapter_names(tmp_path):
    """A Hub id or a folder that the user gave; nothing where nothing can be loaded by that name."""
    folder = tmp_path / "my vit"
    make_backbone("vit").save_pretrained(folder)
    hub = {
        "library": "transformers",
        "id": "someone/some-vit",
        "revision": "v2",
        "kwargs": {"add_pooling_layer": False},
    }
    cases = {
        "hub": (make_backbone("vit"), hub, "someone/some-vit"),
        "folder": (hfproj.load_backbone(str(folder)), None, str(folder)),
        "embedded": (hfproj.load_backbone("vit_nano"), None, None),
        "unknown": (make_backbone("vit"), None, None),
    }
    for name, (backbone, source, expected) in cases.items():
        config = hfproj.ProjectionHeadConfig(backbone_adapter=LoraConfig(r=2), backbone=source)
        target = hfproj.export_backbone_adapter(get_peft_model(backbone, config), tmp_path / name)
        written = json.loads((target / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == expected
        assert written["revision"] == (source or {}).get("revision")
        assert written["auto_mapping"] == {
            "base_model_class": "ViTModel", "parent_library": "transformers.models.vit.modeling_vit"
        }  # fmt: skip
        card = (target / "README.md").read_text()
        assert str(tmp_path) not in card
        if name == "hub":
            data = ModelCard.load(target / "README.md").data.to_dict()
            assert (data["base_model"], data["base_model_relation"]) == ("someone/some-vit", "adapter")
            assert "ViTModel.from_pretrained(\"someone/some-vit\", revision='v2', add_pooling_layer=False)" in card
        else:
            assert "base_model:" not in card
            assert "base = ..." in card
    assert {f.name for f in target.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_a_merged_folder_names_no_path_of_this_machine(tmp_path):
    folder = tmp_path / "base"
    make_backbone("bert").save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (folder / "vocab.txt").write_text("[UNK]\nword\n")
    model = get_peft_model(hfproj.load_backbone(str(folder)), make_config("bert", "full"))
    written = hfproj.export_merged(model, tmp_path / "merged")
    for file in written.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
    assert (written / "vocab.txt").read_bytes() == (folder / "vocab.txt").read_bytes()
    assert {f.name for f in written.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt"
    }  # fmt: skip


def test_the_image_processor_comes_along(tmp_path):
    model = get_peft_model(hfproj.load_backbone("vit_nano"), make_config("vit_nano"))
    written = hfproj.export_merged(model, tmp_path / "merged")
    own = hfproj.backbones.embedded_folder() / "preprocessor_config.json"
    assert (written / "preprocessor_config.json").read_bytes() == own.read_bytes()
    again = hfproj.load_backbone(str(written))
    assert hfproj.backbones.image_preprocessing(again) == hfproj.backbones.image_preprocessing(model)


def test_the_preprocessing_of_a_pulled_adapter_comes_along(tmp_path):
    """Its backbone was made from a config and has none of its own."""
    model = get_peft_model(make_backbone("vit"), make_config("vit"))
    found = {"size": {"height": 32, "width": 32}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    model.get_base_model().__dict__[OF_ADAPTER] = found
    written = json.loads((hfproj.export_merged(model, tmp_path) / "preprocessor_config.json").read_text())
    assert (written["image_mean"], written["image_std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert written["image_processor_type"] == "ViTImageProcessor"


def test_weights_alone_of_a_module_of_no_known_family(tmp_path):
    model = attach("plain", "full")
    written = hfproj.export_merged(model, tmp_path)
    backbone = make_backbone("plain")
    backbone.load_state_dict(load_file(written / "model.safetensors"))
    inputs = make_inputs("plain")
    assert torch.equal(backbone(**inputs), model(**inputs).representation)
    assert "a PlainNet as it was trained on" in (written / "README.md").read_text()


def test_what_has_no_adapter_of_its_own(tmp_path):
    export = hfproj.export_backbone_adapter
    assert_refused(lambda: export(attach("vit", "head"), tmp_path / "a"), "a head alone", "backbone_adapter=LoraConfig")
    assert_refused(lambda: export(attach("vit", "full"), tmp_path / "a"), "trainable='full'", "export_merged")
    assert_refused(lambda: export(attach("vit", "two_blocks"), tmp_path / "a"), "trainable=2", "export_merged")
    assert_refused(lambda: export(make_backbone("vit"), tmp_path / "a"), "ViTModel has no projection head")
    assert_refused(
        lambda: export(get_peft_model(make_backbone("vit"), LoraConfig(target_modules=[QUERY])), tmp_path / "a"),
        "PeftModel has no projection head",
    )
    assert_refused(lambda: export(attach("vit", "lora"), tmp_path / "a", adapter_name="b"), "no adapter 'b'", "default")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_merged(tmp_path):
    model = attach("vit", "lora")
    with model.disable_adapter():
        assert_refused(lambda: hfproj.export_merged(model, tmp_path / "a"), "is disabled")
    model.add_adapter("b", make_config("vit", "lora"))
    layer = model.get_base_model().get_submodule(FIRST_QUERY)
    layer.set_adapter(["default", "b"])
    assert_refused(
        lambda: hfproj.export_merged(model, tmp_path / "a"), f"{QUERY} also runs with b", "set_adapter('default')"
    )
    layer.set_adapter("default")
    layer.merge(adapter_names=["b"])
    assert_refused(lambda: hfproj.export_merged(model, tmp_path / "a"), "also runs with b", "unmerge")
    features = hfproj.FeatureBackbone(4)
    assert_refused(
        lambda: hfproj.export_merged(get_peft_model(features, hfproj.ProjectionHeadConfig()), tmp_path / "a"),
        "cached features",
        "from_pretrained",
    )
    assert list(tmp_path.iterdir()) == []


def test_folders_that_hold_something_else(tmp_path):
    model = attach("vit", "lora")
    model.save_pretrained(tmp_path / "mine")
    kept = {f.name: f.read_bytes() for f in (tmp_path / "mine").iterdir()}
    assert_refused(
        lambda: hfproj.export_backbone_adapter(model, tmp_path / "mine"), "an adapter with a head", "another folder"
    )
    assert_refused(lambda: hfproj.export_merged(model, tmp_path / "mine"), "holds an adapter", "another folder")
    assert kept == {f.name: f.read_bytes() for f in (tmp_path / "mine").iterdir()}
    (tmp_path / "file").write_text("")
    for export in (hfproj.export_backbone_adapter, hfproj.export_merged):
        assert_refused(lambda export=export: export(model, tmp_path / "file"), "is a file")
        export(model, tmp_path / export.__name__)
        export(model, tmp_path / export.__name__)  # again, over what is there


@timm_remembers
def test_nothing_is_left_of_a_failed_export(tmp_path, monkeypatch):
    model = attach("timm_vit", "lora")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"old")

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", fail)  # the README, the last file
    for export in (hfproj.export_backbone_adapter, hfproj.export_merged):
        with pytest.raises(OSError, match="no space"):
            export(model, tmp_path / "out")
    assert [f.name for f in tmp_path.rglob("*")] == ["out", "model.safetensors"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"old"


def test_a_timm_module_that_timm_cannot_name(tmp_path):
    import timm

    backbone = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0
    )
    model = get_peft_model(backbone, hfproj.ProjectionHeadConfig(trainable="full"))
    assert_refused(
        lambda: hfproj.export_merged(model, tmp_path / "a"), "timm can't make this VisionTransformer", "create_model"
    )
    backbone = make_backbone("timm_vit")
    backbone.blocks[0].mlp.fc1 = nn.Linear(16, 24)
    backbone.blocks[0].mlp.fc2 = nn.Linear(24, 16)
    model = get_peft_model(backbone, hfproj.ProjectionHeadConfig(trainable="full"))
    assert_refused(lambda: hfproj.export_merged(model, tmp_path / "a"), "timm can't make this VisionTransformer")
    assert list(tmp_path.iterdir()) == []
