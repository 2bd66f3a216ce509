"""Loading adapters: damaged, foreign and hostile files are refused in one line."""

import functools
import inspect
import json
import shutil

import pytest
import torch
from cases import BACKBONES, BLOCKS, assert_refused, make_backbone, make_config, make_inputs, perturb
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

import hfproj


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(make_backbone("vit"), make_config("vit", "lora"))
    perturb(model)
    model.eval().save_pretrained(folder)
    return folder, model


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copy")


def edit_config(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def edit_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def doors(folder):
    """Every way to a saved head, with the errors it may raise."""
    yield lambda: hfproj.from_pretrained(folder, backbone=make_backbone("vit"))
    yield lambda: hfproj.load_head(folder)


refused = functools.partial(assert_refused, error=hfproj.AdapterFileError)


def test_backbone_and_adapter_together(tmp_path):
    model = get_peft_model(hfproj.load_backbone("vit_nano"), make_config("vit_nano", "lora"))
    perturb(model)
    model.eval().save_pretrained(tmp_path / "a" / "nested")
    inputs = make_inputs("vit_nano")
    for options in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True, "adapter_name": "mine"}):
        loaded = hfproj.from_pretrained(tmp_path / "a", adapter="nested", **options)
        assert any(p.requires_grad for p in loaded.parameters()) == ("is_trainable" in options)
        assert torch.equal(loaded.eval()(**inputs).projection, model(**inputs).projection)
        assert loaded.active_adapter == options.get("adapter_name", "nested")
    head = hfproj.load_head(tmp_path / "a", adapter="nested")
    assert torch.equal(head(model(**inputs).representation), model(**inputs).projection)


def test_the_name_of_another_adapter_is_not_silently_given(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "a")
    shutil.copytree(saved[0], tmp_path / "a" / "student")
    with pytest.warns(UserWarning, match=r"adapter_name='student': adapter 'default' .* adapter='student' loads that"):
        loaded = hfproj.from_pretrained(tmp_path / "a", backbone=make_backbone("vit"), adapter_name="student")
    assert loaded.active_adapter == "student"


def test_one_word_for_one_thing():
    """`adapter` is a name in a folder or repository, `adapter_name` one in a model, as in PEFT."""
    of_model = {"model", "backbone"}
    for name in hfproj.__all__:
        function = getattr(hfproj, name)
        if inspect.isfunction(function):
            parameters = set(inspect.signature(function).parameters)
            assert "adapter" not in parameters or "repo" in parameters or "repo_id" in parameters, name
            assert "adapter_name" not in parameters or parameters & of_model, name


def test_a_backbone_in_a_folder_of_the_user(tmp_path):
    bare = ViTModel(make_backbone("vit").config)
    bare.save_pretrained(tmp_path / "backbone")
    model = get_peft_model(ViTModel.from_pretrained(tmp_path / "backbone"), make_config("vit", "two_blocks"))
    perturb(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    inputs = make_inputs("vit")
    for load in (AutoPeftModel.from_pretrained, hfproj.from_pretrained):
        assert torch.equal(load(str(tmp_path / "adapter")).eval()(**inputs).projection, model(**inputs).projection)


def test_names_with_dots(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "v1.0")
    loaded = hfproj.from_pretrained(tmp_path, adapter="v1.0", backbone=make_backbone("vit"))
    assert loaded.active_adapter == "v1_0"
    assert list(hfproj.list_adapters(tmp_path)) == ["v1.0"]


def test_detach(saved):
    _, model = saved
    head, h = hfproj.detach(model), torch.randn(3, 16)
    own = model.get_base_model().hfproj.projection_head_modules["default"].head
    assert torch.equal(head(h), own(h))
    assert not {p.data_ptr() for p in head.parameters()} & {p.data_ptr() for p in model.parameters()}
    with pytest.raises(hfproj.UsageError, match="no adapter 'b'; there are: default"):
        hfproj.detach(model, "b")
    with pytest.raises(hfproj.UsageError, match="has no projection head; attach one"):
        hfproj.detach(make_backbone("vit"))


def test_a_folder_without_config(copied):
    (copied / "adapter_config.json").unlink()
    for door in doors(copied):
        refused(door, "has no adapter_config.json", "save_pretrained")


def test_a_folder_without_tensors(copied):
    (copied / "adapter_model.safetensors").unlink()
    for door in doors(copied):
        refused(door, "has no adapter_model.safetensors")


def test_neither_folder_nor_repository(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for name in ("no/such/folder", "", "../x", "/no/such", "a b", "user\\name", tmp_path / "missing", "x\n" * 300):
        refused(lambda name=name: hfproj.load_head(name), "neither a folder nor a Hub repository")
    refused(lambda: hfproj.load_head("no-such-user/no-such-adapter"), "HF_HUB_OFFLINE is set",
                   error=hfproj.HfprojError)  # fmt: skip


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00\x01", '{"peft_type": ', "3"])
def test_a_config_that_is_not_json(copied, text):
    (copied / "adapter_config.json").write_text(text)
    for door in doors(copied):
        refused(door, "adapter_config.json")


@pytest.mark.parametrize(("values", "said"), [
    ({"peft_type": "LORA"}, "holds a LORA adapter, no projection head"),
    ({"peft_type": None}, "no projection head"),
    ({"in_dim": None}, "lacks in_dim"),
    ({"backbone": "vit"}, "backbone"),
    ({"backbone": {"id": "vit_nano", "kwargs": "all"}}, "backbone.kwargs='all', expected a JSON object"),
    ({"head_options": [1]}, "head_options"),
    ({"trainable": "heads"}, "trainable"),
    ({"backbone_adapter": {"peft_type": "VERA"}}, "can't live beside a head"),
])  # fmt: skip
def test_configs_that_mean_something_else(copied, values, said):
    edit_config(copied, **values)
    refused(lambda: hfproj.load_head(copied), said, error=hfproj.HfprojError)
    refused(lambda: hfproj.from_pretrained(copied), said, error=hfproj.HfprojError)


def test_a_config_of_a_later_version(copied, saved):
    edit_config(copied, invented_later=3)
    with pytest.warns(UserWarning, match="invented_later"):
        head = hfproj.load_head(copied)
    h = torch.randn(2, 16)
    assert torch.equal(head(h), hfproj.load_head(saved[0])(h))


@pytest.mark.parametrize("kwargs", [
    {"checkpoint_path": "/etc/passwd"}, {"img_size": {"a": 1}}, {"attn_implementation": "someone/kernels"},
    {"pretrained_cfg": {"file": "x.bin"}}, {"pretrained_cfg_overlay": {"hf_hub_id": "someone/x"}}, {"dtype": "eval"},
    {"img_size": [1, 2, 3]}, {"img_size": 10**6}, {"global_pool": "a b"}, {"weights_only": False}, {"config": "x"},
])  # fmt: skip
def test_backbone_options_that_are_not_allowed(copied, kwargs):
    edit_config(copied, backbone={"library": "transformers", "id": "vit_nano", "kwargs": kwargs})
    refused(lambda: hfproj.from_pretrained(copied), next(iter(kwargs)), "not allowed", "pass it as backbone=")


def test_an_unknown_backbone(copied):
    edit_config(copied, backbone=None)
    refused(lambda: hfproj.from_pretrained(copied), "pass it as from_pretrained", error=hfproj.UsageError)
    edit_config(copied, backbone={"library": "transformers", "id": "no-such-user/x", "kwargs": {}})
    refused(lambda: hfproj.from_pretrained(copied), "No backbone could be loaded", error=hfproj.UsageError)


@pytest.mark.parametrize("size", [0, 4, 100, -1, -100])
def test_truncated_files(copied, size):
    file = copied / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    for door in doors(copied):
        refused(door, "damaged or cut short", "download or save it again")


def test_a_corrupted_header(copied):
    file = copied / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"\xff" * 32
    file.write_bytes(data)
    for door in doors(copied):
        refused(door, "damaged or cut short")


HEAD = "base_model.model.hfproj.projection_head_modules.head.last.linear.weight"


@pytest.mark.parametrize("change", [
    lambda t: t.pop(HEAD),
    lambda t: t.update({HEAD: torch.zeros(6, 9)}),
    lambda t: t.update({HEAD.replace("last", "later"): torch.zeros(6, 8)}),
    lambda t: t.clear(),
])  # fmt: skip
def test_tensors_of_another_head(copied, change):
    edit_tensors(copied, change)
    for door in doors(copied):
        refused(door, "download or save it again")
    refused(lambda: PeftModel.from_pretrained(make_backbone("vit"), copied), "do not fit this adapter")


def test_missing_lora_and_missing_backbone_tensors(copied, tmp_path):
    edit_tensors(copied, lambda t: [t.pop(k) for k in list(t) if f"{BLOCKS}.1" in k and "lora" in k])
    refused(lambda: PeftModel.from_pretrained(make_backbone("vit"), copied), f"missing {BLOCKS}.1", "more")
    get_peft_model(make_backbone("vit"), make_config("vit", "full")).save_pretrained(tmp_path / "full")
    edit_tensors(tmp_path / "full", lambda t: t.pop("base_model.model.hfproj.backbone.layernorm.weight"))
    refused(lambda: PeftModel.from_pretrained(make_backbone("vit"), tmp_path / "full"),
                   "missing hfproj.backbone.layernorm.weight")  # fmt: skip


def test_a_head_for_another_width(saved):
    wide = ViTModel(ViTConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8,
                              image_size=32, patch_size=8))  # fmt: skip
    for door in (hfproj.from_pretrained, PeftModel.from_pretrained):
        call = (
            (lambda: door(saved[0], backbone=wide))
            if door is hfproj.from_pretrained
            else (lambda: door(wide, saved[0]))
        )
        refused(call, "16", "24", "ViTModel")
    assert not hasattr(wide, "hfproj")
    model = get_peft_model(wide, make_config("vit"))
    refused(lambda: model.load_adapter(saved[0], "b"), "16", "24")
    assert list(model.peft_config) == ["default"]


def test_the_other_backbones_of_this_width_are_not_its_own(saved):
    """Same width, other layers: the LoRA finds no place."""
    for name in ("bert", "timm_vit"):
        assert name in BACKBONES
        refused(lambda name=name: PeftModel.from_pretrained(make_backbone(name), saved[0]),
                       error=hfproj.HfprojError)  # fmt: skip


def test_the_pooler_of_a_backbone_does_not_disturb(tmp_path, saved):
    """Trained without a pooler, loaded onto a backbone that has one: PEFT's shortened targets would reach it too."""
    backbone = make_backbone("bert")
    without = type(backbone)(backbone.config, add_pooling_layer=False)
    without.load_state_dict(backbone.state_dict(), strict=False)
    model = get_peft_model(without.eval(), make_config("bert", "lora", backbone_adapter=LoraConfig(r=2)))
    perturb(model)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(backbone, tmp_path)
    inputs = make_inputs("bert")
    assert torch.equal(loaded(**inputs).projection, model(**inputs).projection)


@pytest.mark.parametrize("load", [hfproj.from_pretrained, hfproj.load_head])
@pytest.mark.parametrize("what", [None, 5, ["a"]], ids=str)
def test_what_is_no_name(load, what):
    with pytest.raises(hfproj.UsageError, match=f"^Expected .*, got .*{type(what).__name__}"):
        load(what)
