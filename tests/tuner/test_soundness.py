"""Numbers that can't be computed with are refused, through both doors, before anybody reads NaN from a model."""

import json
import shutil

import pytest
import torch
from cases import assert_refused, make_backbone, make_config, perturb, snapshot
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import hfproj

DOORS = {
    "hfproj": lambda folder, dtype: hfproj.from_pretrained(folder, backbone=make_backbone("vit").to(dtype)),
    "PeftModel": lambda folder, dtype: PeftModel.from_pretrained(make_backbone("vit").to(dtype), folder),
    "load_head": lambda folder, dtype: hfproj.load_head(folder),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for trained in ("lora", "two_blocks"):
        model = get_peft_model(make_backbone("vit"), make_config("vit", trained))
        perturb(model)
        model.eval().save_pretrained(folder / trained)
    return folder


def changed(folder, to, change):
    shutil.copytree(folder, to)
    tensors = load_file(to / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, to / "adapter_model.safetensors")
    return to


def first(tensors, part):
    return next(n for n in tensors if part in n and tensors[n].is_floating_point() and "running" not in n)


def one_number(value, part="hfproj", last=""):
    def change(tensors):
        name = next(n for n in tensors if n.endswith("running_var")) if last else first(tensors, part)
        tensors[name] = tensors[name].double() if abs(value) > 1e38 else tensors[name]
        tensors[name].view(-1)[:1].fill_(value)

    return change


FAULTS = {
    "float64 beyond float32": (one_number(3e300), "infinity"),
    "negative variance": (one_number(-0.5, last="running_var"), "a negative variance"),
    "absurd weight": (one_number(-1e25), "numbers beyond 1e+09"),
    "infinity": (one_number(-torch.inf), "infinity"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("fault", FAULTS)
def test_numbers_of_a_file(saved, fault, door, tmp_path):
    change, said = FAULTS[fault]
    folder = changed(saved / "lora", tmp_path / "a", change)
    assert_refused(lambda: DOORS[door](folder, torch.float32), said, error=hfproj.AdapterFileError)


@pytest.mark.parametrize("door", ["hfproj", "PeftModel"])
def test_what_overflows_in_the_dtype_of_the_backbone(saved, door, tmp_path):
    folder = changed(saved / "two_blocks", tmp_path / "a", one_number(1e6, ".backbone."))
    DOORS[door](folder, torch.float32)
    with pytest.warns(UserWarning, match="another precision"):
        assert_refused(lambda: DOORS[door](folder, torch.float16), "infinity", error=hfproj.AdapterFileError)


@pytest.mark.parametrize("door", DOORS)
def test_a_head_whose_options_give_nan(saved, door, tmp_path):
    shutil.copytree(saved / "lora", tmp_path / "a")
    with torch.no_grad():
        model = get_peft_model(make_backbone("vit"), make_config("vit", "head"))
        head = model.get_base_model().hfproj.projection_head_modules["default"].head
        for parameter in head.parameters():
            parameter.fill_(9e8)
        for name, buffer in head.named_buffers():
            if name.endswith("running_var"):
                buffer.fill_(0.0)
            if name.endswith("running_mean"):
                buffer.fill_(3e38)
    model.save_pretrained(tmp_path / "b")
    assert_refused(lambda: DOORS[door](tmp_path / "b", torch.float32), "NaN or infinity", error=hfproj.AdapterFileError)


@pytest.mark.parametrize("value", [1e29, float("nan"), -1e7, 10**30])
@pytest.mark.parametrize("where", ["lora_alpha", "alpha_pattern"])
def test_absurd_scalings(saved, value, where, tmp_path):
    shutil.copytree(saved / "lora", tmp_path / "a")
    values = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    values["backbone_adapter"][where] = value if where == "lora_alpha" else {"q_proj": value}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(values))
    for door in ("hfproj", "PeftModel"):
        with pytest.raises(hfproj.errors.HfprojError):
            DOORS[door](tmp_path / "a", torch.float32)


@pytest.mark.parametrize("init", ["OLoRA", "oLoRa", "Mica", "MICA", "PiSSA_niter_3", "corda", "EVA", "loftq"])
def test_initialisations_that_rewrite_the_backbone_in_any_capitals(init):
    with pytest.raises(hfproj.UsageError, match="rewrites the backbone's weights"):
        hfproj.ProjectionHeadConfig(backbone_adapter={"peft_type": "LORA", "init_lora_weights": init})


@pytest.mark.parametrize("init", ["olora", "pissa", "pissa_niter_2"])
def test_a_method_that_rewrites_the_backbone_is_noticed(init, monkeypatch):
    monkeypatch.setattr("hfproj.tuner.config._REWRITES_BACKBONE", ("none",))
    backbone = make_backbone("vit")
    before = snapshot(backbone)
    config = hfproj.ProjectionHeadConfig(backbone_adapter=LoraConfig(r=2, init_lora_weights=init))
    said = assert_refused(lambda: get_peft_model(backbone, config), "rewrites", "of the backbone when it is attached")
    restored = all(torch.equal(value, before[n]) for n, value in snapshot(backbone).items())
    assert restored is not ("loaded again" in said)
