"""The backbone's own tensors: bit-equal when disabled or unloaded, exactly the trained ones when switched back."""

import copy
import warnings

import pytest
import torch
from cases import (
    BACKBONES,
    TRAINED,
    assert_same_tensors,
    make_backbone,
    make_config,
    make_inputs,
    perturb,
    snapshot,
)
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

from hfproj.backbones import bare_tensors, feeds_representation, load_backbone

TABLE = [(b, t) for b in BACKBONES for t in TRAINED]


def attach(name: str, trained: str, **options: object) -> PeftModel:
    return get_peft_model(make_backbone(name), make_config(name, trained, **options))


def first_tensor(output: object) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


def train_steps(model: nn.Module, name: str, steps: int = 2) -> None:
    """Train with momentum, so that all that requires gradients moves, in train mode."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        model(**make_inputs(name, seed=step + 1)).projection.square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(("name", "trained"), TABLE)
def test_disabled_and_unloaded_the_backbone_is_untouched(name, trained):
    backbone, inputs = make_backbone(name), make_inputs(name)
    with torch.no_grad():
        expected = first_tensor(backbone(**inputs))
    untouched = snapshot(backbone)
    model = attach(name, trained)
    perturb(model)
    train_steps(model, name)
    with torch.no_grad():
        model.eval()
        z, after_training = model(**inputs).projection, snapshot(model)

        with model.disable_adapter():
            assert torch.equal(first_tensor(model(**inputs)), expected)
            assert_same_tensors(dict(bare_tensors(model.get_base_model())), dict(bare_tensors(backbone)))
            with model.disable_adapter():
                assert torch.equal(first_tensor(model(**inputs)), expected)
            assert torch.equal(first_tensor(model(**inputs)), expected)
            model.train()
            model(**inputs)  # BatchNorm must not learn from this
            model.eval()
        assert_same_tensors(snapshot(model), after_training)
        assert torch.equal(model(**inputs).projection, z)

        model.train()
        bare = model.unload()
        assert_same_tensors(snapshot(bare), untouched)
        assert [n for n, _ in bare.named_modules()] == [n for n, _ in backbone.named_modules()]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in bare.modules())
        assert all(m.training for m in bare.modules())
        assert torch.equal(first_tensor(bare.eval()(**inputs)), expected)


@pytest.mark.parametrize("name", ["timm_cnn", "plain"])
def test_batch_norm_of_a_frozen_backbone_does_not_move_and_that_of_a_trained_one_does(name):
    for trained in TRAINED:
        model = attach(name, trained)
        before = {n: t.clone() for n, t in bare_tensors(model.get_base_model()).items() if "running_mean" in n}
        train_steps(model, name, 1)
        after = bare_tensors(model.get_base_model())
        moved = {n for n in before if not torch.equal(before[n], after[n])}
        if trained == "full":
            assert moved == set(before)
        elif trained == "two_blocks":
            assert set() < moved
            assert moved < set(before) or name == "plain"
        else:
            assert not moved
        with model.disable_adapter():
            assert not any(m.training for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
        if trained == "full":
            assert all(m.training for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("name", ["vit", "timm_cnn", "bert"])
def test_switching_between_heads_restores_each_exactly(name):
    inputs = make_inputs(name)
    with torch.no_grad():
        expected = first_tensor(make_backbone(name)(**inputs))
    model = get_peft_model(make_backbone(name), make_config(name, "full"), adapter_name="full")
    others = {"head": "head", "lora": "lora", "lora2": "lora", "two": "two_blocks", "mlp": "full"}
    for adapter, trained in others.items():
        model.add_adapter(adapter, make_config(name, trained, pooling="mean"))
    z = {}
    for seed, adapter in enumerate(["full", *others]):
        model.set_adapter(adapter)
        perturb(model, seed)
        train_steps(model, name, 1)
        with torch.no_grad():
            z[adapter] = model.eval()(**inputs).projection
    assert len({tuple(v.flatten().tolist()) for v in z.values()}) == len(z)
    with torch.no_grad():
        for adapter in ["two", "lora", "full", "head", "mlp", "lora2", "two", "full"]:
            model.set_adapter(adapter)
            assert torch.equal(model(**inputs).projection, z[adapter]), adapter
        with model.disable_adapter():
            model.set_adapter("mlp")  # switching while disabled must not bring back what was trained
            assert torch.equal(first_tensor(model(**inputs)), expected)
        assert torch.equal(model(**inputs).projection, z["mlp"])
        assert torch.equal(first_tensor(model.unload()(**inputs)), expected)


def test_every_head_is_saved_as_it_is_whichever_is_active(tmp_path):
    names = {"full": "full", "linear": "lora", "mlp": "two_blocks", "hidden": "head"}  # names of modules, too
    inputs, z = make_inputs("timm_vit"), {}
    model = get_peft_model(make_backbone("timm_vit"), make_config("timm_vit", "full"), adapter_name="full")
    for adapter, trained in list(names.items())[1:]:
        model.add_adapter(adapter, make_config("timm_vit", trained))
    for seed, adapter in enumerate(names):
        model.set_adapter(adapter)
        perturb(model, seed)
        z[adapter] = model.eval()(**inputs).projection
    with model.disable_adapter():
        model.save_pretrained(tmp_path / "disabled")
    model.save_pretrained(tmp_path)
    for adapter in names:
        assert (tmp_path / adapter / "adapter_model.safetensors").read_bytes() == (
            tmp_path / "disabled" / adapter / "adapter_model.safetensors"
        ).read_bytes()
        loaded = PeftModel.from_pretrained(make_backbone("timm_vit"), tmp_path / adapter)
        assert torch.equal(loaded(**inputs).projection, z[adapter]), adapter
    one = PeftModel.from_pretrained(make_backbone("timm_vit"), tmp_path / "full", adapter_name="a")
    for adapter in ("mlp", "linear"):  # onto a model that has a trained backbone in use
        one.load_adapter(tmp_path / adapter, adapter_name=adapter)
    for active, adapter in (("a", "full"), ("mlp", "mlp"), ("linear", "linear"), ("a", "full")):
        one.set_adapter(active)
        assert torch.equal(one(**inputs).projection, z[adapter]), adapter


def test_deleting_the_active_full_adapter_restores_the_backbone():
    inputs = make_inputs("timm_cnn")
    model = attach("timm_cnn", "full")
    model.add_adapter("b", make_config("timm_cnn", "head"))
    perturb(model)
    with pytest.warns(UserWarning, match="b is active now"):
        model.delete_adapter("default")
    expected = bare_tensors(make_backbone("timm_cnn"))
    assert_same_tensors(dict(bare_tensors(model.get_base_model())), dict(expected))
    assert model.active_adapter == "b"
    assert not any("default" in n for n in model.state_dict())
    assert model.base_model.backbone_tensors.originals == {}
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".hfproj." not in n)
    assert model.eval()(**inputs).projection.shape == (4, 6)


def test_without_originals_the_trained_backbone_stays():
    with pytest.warns(UserWarning, match="keep_original=False"):
        model = attach("vit", "full", keep_original=False)
    assert model.base_model.backbone_tensors.originals == {}
    train_steps(model, "vit")
    trained = {n: t.clone() for n, t in bare_tensors(model.get_base_model()).items()}
    with model.disable_adapter():
        assert_same_tensors({n: t.clone() for n, t in bare_tensors(model.get_base_model()).items()}, trained)
    assert_same_tensors(snapshot(model.unload()), trained)


def test_without_originals_an_adapter_never_used_has_the_backbones_values():
    model = attach("vit", "full")
    with pytest.warns(UserWarning, match="keep_original=False"):
        model.add_adapter("second", make_config("vit", "full", keep_original=False))
    tensors = model.base_model.backbone_tensors
    assert_same_tensors(tensors.values(model.get_base_model(), "second"), snapshot(make_backbone("vit")))


def test_nobody_is_warned_of_random_originals():
    backbone = load_backbone(
        "vit_tiny_patch16_224", library="timm", pretrained=False, depth=1, embed_dim=24, num_heads=2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(backbone, make_config("timm_vit", "full", keep_original=False))


def test_state_dict_holds_no_copies_of_the_backbone():
    backbone = make_backbone("vit")
    model = attach("vit", "full")
    names = [n.removeprefix("base_model.model.") for n in model.state_dict()]
    assert [n for n in names if not n.startswith("hfproj.")] == list(backbone.state_dict())
    assert all(n.startswith("hfproj.projection_head_modules.default.") for n in names[len(backbone.state_dict()) :])


def test_copies_keep_their_own_backbone_tensors():
    inputs = make_inputs("vit")
    model = attach("vit", "full")
    perturb(model)
    teacher = copy.deepcopy(model).eval()
    z = teacher(**inputs).projection
    perturb(model, 1)
    assert torch.equal(teacher(**inputs).projection, z)
    expected = make_backbone("vit")(**inputs).last_hidden_state
    with teacher.disable_adapter():
        assert torch.equal(teacher(**inputs).last_hidden_state, expected)
    bare = teacher.unload()
    assert torch.equal(bare(**inputs).last_hidden_state, expected)
    assert isinstance(model(**inputs).projection, torch.Tensor)
    assert not torch.equal(model.eval()(**inputs).backbone_output.last_hidden_state, expected)


def test_originals_survive_a_change_of_dtype():
    model = attach("vit", "full")
    perturb(model)
    model.to(torch.bfloat16)
    bare = model.unload()
    assert_same_tensors(snapshot(bare), snapshot(make_backbone("vit").to(torch.bfloat16)))


@pytest.mark.parametrize("name", ["timm_vit", "vit", "dinov2", "bert", "clip", "timm_cnn"])
def test_parts_behind_the_read_block_are_not_trained(name):
    model = attach(name, "full", layer=0)
    trained = set(feeds_representation(model.get_base_model(), model.base_model.model.hfproj.points["default"]))
    unread = set(bare_tensors(model.get_base_model())) - trained
    assert unread
    assert {
        n for n in bare_tensors(model.get_base_model()) if n in model.base_model.backbone_tensors.names["default"]
    } == trained
    out = model(**make_inputs(name)).projection
    out.square().sum().backward()
    for n, p in bare_tensors(model.get_base_model()).items():
        if isinstance(p, nn.Parameter):
            assert (p.grad is not None) == p.requires_grad == (n in trained), n


def test_norms_of_a_second_ln_tuning_adapter_carry_no_hooks():
    """PEFT copies the norm, which the first adapter reads through a hook."""
    model = get_peft_model(
        make_backbone("timm_vit"), make_config("timm_vit", "lora", backbone_adapter=LNTuningConfig()), adapter_name="a"
    )
    model.add_adapter("b", make_config("timm_vit", "lora", backbone_adapter=LNTuningConfig()))
    norm = model.get_base_model().norm
    assert not any(m._forward_hooks for n, m in norm.named_modules() if n)
    for adapter in ("a", "b"):
        model.set_adapter(adapter)
        perturb(model)
        out = model(**make_inputs("timm_vit"))
        out.projection.sum().backward()
        assert not any("_hfproj_feature" in m.__dict__ for m in model.modules())
    copy.deepcopy(model)


def test_lora_never_lands_in_a_head():
    model = get_peft_model(make_backbone("plain"), make_config("plain", "lora", head="linear", head_options={}))
    model.add_adapter("b", make_config("plain", "lora", head="linear", head_options={}))
    wrapped = {n.partition(".lora_A")[0] for n, _ in model.named_modules() if n.endswith(".lora_A")}
    assert wrapped == {"base_model.model.linear"}
    explicit = make_config("plain", "head", trainable="adapter", head="linear", head_options={},
                           backbone_adapter=LoraConfig(r=2, target_modules=["linear"]))  # fmt: skip
    model.add_adapter("c", explicit)
    assert {n.partition(".lora_A")[0] for n, _ in model.named_modules() if n.endswith(".lora_A")} == wrapped
