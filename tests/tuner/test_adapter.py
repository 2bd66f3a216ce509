"""PEFT's verbs on heads: outputs, gradients, switching, copies, dtypes, checkpointing, compilation, refusals."""

import copy
import gc
import json
import re
import weakref

import jaxtyping
import peft
import pytest
import torch
from cases import (
    BACKBONES,
    QUERY,
    TEXT,
    TRAINED,
    VALUE,
    WIDTHS,
    assert_same_tensors,
    make_backbone,
    make_config,
    make_inputs,
    perturb,
    snapshot,
    timm_vit,
)
from peft import IA3Config, LNTuningConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, ViTModel

import hfproj
from hfproj.backbones import bare_tensors


def attach(name: str, trained: str = "head", **options: object) -> PeftModel:
    return get_peft_model(make_backbone(name), make_config(name, trained, **options))


@pytest.fixture
def lora_vit():
    model = attach("vit", "lora")
    perturb(model)
    return model.eval()


# --- what comes out ---


def test_output_fields():
    model = attach("vit", predictor={"head": "mlp", "hidden_dim": 4}, prototypes=5).eval()
    inputs = make_inputs("vit")
    out = model(**inputs)
    assert isinstance(out, hfproj.ProjectionOutput)
    shapes = {n: tuple(out[n].shape) for n in ("representation", "projection", "prediction", "scores")}
    assert shapes == {"representation": (4, 16), "projection": (4, 6), "prediction": (4, 6), "scores": (4, 5)}
    assert out.scores.abs().max() <= 1
    bare = make_backbone("vit")(**inputs)
    assert torch.equal(out.backbone_output.last_hidden_state, bare.last_hidden_state)
    assert torch.equal(out.representation, bare.last_hidden_state[:, 0])
    assert torch.equal(model(inputs["pixel_values"]).projection, out.projection)  # positional
    as_tuple = model(**inputs, return_dict=False)
    assert isinstance(as_tuple.backbone_output, tuple)
    assert torch.equal(as_tuple.projection, out.projection)


def test_views_of_one_batch_get_batch_norm_of_their_own():
    model = attach("vit").train()
    one = copy.deepcopy(model)
    a, b = make_inputs("vit", seed=1)["pixel_values"], 3 * make_inputs("vit", seed=2)["pixel_values"]
    together = model(torch.cat([a, b]), num_views=2).projection
    apart = torch.cat([one(a).projection, one(b).projection])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    joint = model(torch.cat([a, b])).projection
    assert (together - joint).abs().max() > 0.1
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer.item() == 3, name
    with model.disable_adapter():
        assert model(a, num_views=2).last_hidden_state.shape[0] == 4


@pytest.mark.parametrize("views", [3, 0, -2])
def test_views_that_do_not_divide_the_batch(views):
    with pytest.raises(hfproj.UsageError, match=f"to be a divisor of the 4 rows of the batch, got {views}"):
        attach("vit")(**make_inputs("vit"), num_views=views)


def test_masked_mean_of_a_text_by_hand():
    model = attach("bert", pooling="mean").eval()
    ids, mask = make_inputs("bert").values()
    hidden = make_backbone("bert")(ids, mask).last_hidden_state
    expected = torch.stack([row[: int(n)].mean(0) for row, n in zip(hidden, mask.sum(1), strict=True)])
    for out in (model(input_ids=ids, attention_mask=mask), model(ids, mask), model(ids, attention_mask=mask)):
        torch.testing.assert_close(out.representation, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(ids).representation, make_backbone("bert")(ids).last_hidden_state.mean(1))
    largest = attach("bert", pooling="max").eval()(ids, mask).representation
    expected = torch.stack([row[: int(n)].amax(0) for row, n in zip(hidden, mask.sum(1), strict=True)])
    torch.testing.assert_close(largest, expected, rtol=0, atol=0)


# --- who gets gradients ---

POOLINGS = [(b, p, layer) for b in BACKBONES for p in ("cls", "mean", "cls_mean", "max", "pooler") for layer in (-1, 1)]


def is_possible(name: str, pooling: str, layer: int) -> bool:
    if name == "plain":
        return pooling in ("mean", "max", "pooler") and layer == -1
    if name == "vit_nano" and (pooling, layer) not in (("mean", -1), ("cls", 1)):
        return False  # the same class as "vit", larger
    if pooling == "pooler":
        return layer == -1 and name not in ("vit", "vit_nano")
    return pooling in ("mean", "max") or name not in ("timm_cnn", "siglip")


@pytest.mark.parametrize(("name", "pooling", "layer"), [row for row in POOLINGS if is_possible(*row)])
def test_every_trainable_parameter_gets_a_gradient_and_no_other(name, pooling, layer):
    """DDP with find_unused_parameters=False needs exactly this."""
    for trained in TRAINED:
        if trained in ("head", "two_blocks") and (pooling, layer) != ("mean", -1):
            continue  # the others show as much
        model = attach(name, trained, pooling=pooling, layer=layer, predictor={"head": "linear"}, prototypes=3)
        perturb(model)
        out = model.train()(**make_inputs(name))
        (out.prediction.square().sum() + out.scores.square().sum()).backward()
        wrong = [n for n, p in model.named_parameters() if (p.grad is not None) != p.requires_grad]
        assert not wrong, (trained, wrong[:5])
        asked = {n: p for n, p in model.named_parameters() if p.requires_grad}
        in_backbone = [n for n in asked if ".hfproj." not in n]
        assert bool(in_backbone) == (trained != "head")
        assert all(".lora_" in n for n in in_backbone) == (trained in ("head", "lora"))
        zero = [n for n, p in asked.items() if not p.grad.any()]
        # softmax does not see a key's bias; BatchNorm and ReLU may silence a few
        assert len(zero) <= len(asked) // 4, (trained, zero)


@pytest.mark.parametrize("name", [n for n in BACKBONES if n != "vit_nano"])
def test_impossible_poolings_are_refused(name):
    for row in POOLINGS:
        if row[0] == name and not is_possible(*row):
            with pytest.raises(hfproj.UsageError, match=r"pooling|blocks|layer|dimensions") as caught:
                attach(name, pooling=row[1], layer=row[2])(**make_inputs(name))
            assert "\n" not in str(caught.value)


def trainable_names(model: nn.Module) -> set[str]:
    return {n.replace(".base_layer.", ".") for n, p in model.named_parameters() if p.requires_grad}


def test_head_only_keeps_its_lora_frozen():
    model = attach("vit", "lora", trainable="head")
    names = trainable_names(model)
    assert names
    assert all(".hfproj." in n for n in names)
    with model.disable_adapter():
        assert not trainable_names(model)
    assert trainable_names(model) == names
    model.set_adapter("default")
    assert trainable_names(model) == names
    model.set_requires_grad("default", False)
    assert not trainable_names(model)
    model.set_requires_grad("default", True)
    assert trainable_names(model) == names


@pytest.mark.parametrize("trained", TRAINED)
def test_trainability_survives_disabling(trained, tmp_path):
    model = attach("vit", trained)
    names = trainable_names(model)
    with model.disable_adapter():
        assert not trainable_names(model)
    assert trainable_names(model) == names
    model.save_pretrained(tmp_path)

    frozen = PeftModel.from_pretrained(make_backbone("vit"), tmp_path)
    assert not trainable_names(frozen)
    assert not frozen.training
    with frozen.disable_adapter():
        pass
    assert not trainable_names(frozen)
    resumed = PeftModel.from_pretrained(make_backbone("vit"), tmp_path, is_trainable=True)
    assert trainable_names(resumed) == names


def test_numbers_of_trainable_parameters(capsys):
    model = attach("vit", "full", head="linear", head_options={})
    model.print_trainable_parameters()
    backbone = sum(p.numel() for p in make_backbone("vit").parameters())
    total = backbone + 6 * 16
    assert f"trainable params: {total:,} || all params: {total:,}" in capsys.readouterr().out
    assert attach("vit", head="linear", head_options={}).get_nb_trainable_parameters() == (96, total)


# --- several heads ---


@pytest.mark.parametrize("active", TRAINED)
@pytest.mark.parametrize("added", TRAINED)
def test_adding_a_head_leaves_the_active_one_alone(active, added, tmp_path):
    inputs = make_inputs("vit")
    attach("vit", added).save_pretrained(tmp_path)
    model = attach("vit", active)
    perturb(model)
    z, names, before = model.eval()(**inputs).projection, trainable_names(model), snapshot(model)
    model.add_adapter("b", make_config("vit", added))
    model.load_adapter(tmp_path, adapter_name="c")
    assert model.active_adapter == "default"
    assert trainable_names(model) == names
    assert torch.equal(model(**inputs).projection, z)
    now = {n.replace(".base_layer.", "."): t for n, t in snapshot(model).items()}
    assert_same_tensors({n.replace(".base_layer.", "."): t for n, t in before.items()},
                        {n: now[n] for n in (m.replace(".base_layer.", ".") for m in before)})  # fmt: skip
    with model.disable_adapter():
        pass
    assert trainable_names(model) == names
    assert not any(m.training for m in model.modules())


def test_adding_while_disabled_stays_disabled():
    inputs, model = make_inputs("vit"), attach("vit")
    expected = make_backbone("vit")(**inputs).last_hidden_state
    with model.disable_adapter():
        model.add_adapter("b", make_config("vit", "lora", backbone_adapter=LoraConfig(r=2, init_lora_weights=False)))
        model.set_adapter("b")
        assert torch.equal(model(**inputs).last_hidden_state, expected)
    assert not torch.equal(model(**inputs).backbone_output.last_hidden_state, expected)


def test_deleting_an_adapter():
    inputs = make_inputs("vit")
    model = attach("vit", "lora")
    for name, trained in (("z_head", "head"), ("b_lora", "lora")):
        model.add_adapter(name, make_config("vit", trained))
        model.set_adapter(name)
        perturb(model)
    z = model.eval()(**inputs).projection
    model.delete_adapter("z_head")  # not the active one
    assert torch.equal(model(**inputs).projection, z)
    with pytest.warns(UserWarning, match="default is active now"):
        model.delete_adapter("b_lora")
    assert not any("b_lora" in n or "z_head" in n for n in model.state_dict())
    assert model.active_adapters == ["default"]
    assert {
        tuple(m.active_adapters) for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)
    } == {("default",)}
    assert model(**inputs).projection.shape == (4, 6)
    assert list(model.get_base_model().hfproj.points) == ["default"]
    with pytest.raises(ValueError, match="b_lora"):
        model.delete_adapter("b_lora")
    model.delete_adapter("default")
    assert torch.equal(model.base_model(**inputs).last_hidden_state, make_backbone("vit")(**inputs).last_hidden_state)


def test_two_active_heads_are_refused():
    model = attach("vit")
    model.add_adapter("b", make_config("vit"))
    with pytest.raises(hfproj.UsageError, match="Only one head can be active at a time"):
        model.base_model.set_adapter(["default", "b"])
    assert model.base_model.active_adapters == ["default"]


def test_kinds_that_would_wrap_each_other_are_refused():
    model, inputs = attach("vit", "lora"), make_inputs("vit")
    perturb(model)
    z = model.eval()(**inputs).projection
    with pytest.raises(hfproj.UsageError, match="another head's LORA wraps already"):
        model.add_adapter("b", make_config("vit", "lora", backbone_adapter=IA3Config()))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(**inputs).projection, z)


def test_peft_reports_its_status():
    model = attach("vit", "lora")
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.num_adapter_layers) == (True, ["default"], 3 * 6 + 1)
    assert len(model.get_layer_status()) == 3 * 6 + 1


# --- the backbone's PEFT method ---


NEW_NAMES = QUERY == "q_proj"
VIT_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"} if NEW_NAMES else {"query", "key", "value", "dense"}


@pytest.mark.parametrize(
    ("name", "inner", "expected"),
    [
        ("vit", LoraConfig(r=2), VIT_LINEAR),
        ("dinov2", LoraConfig(r=2), VIT_LINEAR | {"fc1", "fc2"}),
        ("timm_vit", LoraConfig(r=2), {"qkv", "proj", "fc1", "fc2"}),
        ("timm_vit", LoHaConfig(r=2), {"qkv", "proj", "fc1", "fc2"}),
        ("bert", IA3Config(), {"query", "key", "value", "dense"}),
        ("timm_vit", LNTuningConfig(), {"norm1", "norm2", "norm"}),
        ("timm_cnn", LoraConfig(r=2, target_modules="all-linear"), set()),
    ],
)  # fmt: skip
def test_targets_come_from_the_model(name, inner, expected):
    model = attach(name, "head", trainable="adapter", backbone_adapter=inner)
    prefix = {"LORA": ".lora_A", "LOHA": ".hada_w1_a", "IA3": ".ia3_l", "LN_TUNING": ".ln_tuning_layers"}[
        inner.peft_type
    ]
    names = {n for n, _ in model.named_modules()} | {n for n, _ in model.named_parameters()}
    reached = {n.partition(prefix)[0].rpartition(".")[2] for n in names if prefix in n}
    if name == "timm_cnn":  # its ungrouped convolutions
        convolutions = {n: m for n, m in make_backbone(name).named_modules() if isinstance(m, nn.Conv2d)}
        expected = {n.rpartition(".")[2] for n, m in convolutions.items() if m.groups == 1}
        assert len(expected) > 3
    assert reached == expected
    stored = model.peft_config["default"].backbone_adapter["target_modules"]
    assert stored == sorted(stored) if isinstance(stored, list) else "|" in stored
    json.dumps(model.peft_config["default"].to_dict())


def test_convolutions_with_a_forward_of_their_own_are_left_out():
    """LoRA's own convolution would not imitate the dynamic padding of a TensorFlow port."""
    import timm

    backbone = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    model = get_peft_model(backbone, make_config("timm_cnn", "lora"))
    assert not hasattr(backbone.conv_stem, "lora_A")
    assert hasattr(backbone.conv_head, "lora_A")
    assert model.eval()(torch.randn(1, 3, 48, 48)).projection.shape == (1, 6)


def test_targets_behind_the_read_block_are_frozen():
    inner = LoraConfig(r=2, target_modules=[QUERY, VALUE])
    model = attach("vit", "head", trainable="adapter", backbone_adapter=inner, layer=0)
    perturb(model)
    model(**make_inputs("vit")).projection.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert any(
        re.search(r"layers?\.2\.", n) and not p.requires_grad for n, p in model.named_parameters() if ".lora_" in n
    )


@pytest.mark.parametrize("inner", [
    LoraConfig(r=2, target_modules=["no_such_layer"]),
    LoraConfig(r=2, target_modules=[QUERY, "layernorm_before"]),
    LoraConfig(r=2, target_modules=[QUERY, "dropout"]),
])  # fmt: skip
def test_targets_that_do_not_fit_leave_the_backbone_as_it_was(inner):
    backbone = make_backbone("vit")
    names = [n for n, _ in backbone.named_modules()]
    with pytest.raises(hfproj.UsageError, match="backbone_adapter does not fit ViTModel") as caught:
        get_peft_model(backbone, make_config("vit", trainable="adapter", backbone_adapter=inner))
    assert "name other target_modules" in str(caught.value)
    assert [n for n, _ in backbone.named_modules()] == names
    assert all(p.requires_grad for p in backbone.parameters())
    model = get_peft_model(backbone, make_config("vit", "lora"))
    z = model.eval()(**make_inputs("vit")).projection
    with pytest.raises(hfproj.UsageError):
        model.add_adapter("b", make_config("vit", trainable="adapter", backbone_adapter=inner))
    assert torch.equal(model(**make_inputs("vit")).projection, z)
    assert list(model.peft_config) == ["default"]


def test_one_config_serves_for_several_backbones():
    config = hfproj.ProjectionHeadConfig(head="linear", out_dim=4, backbone_adapter=LoraConfig(r=2))
    before = config.to_dict()
    for name in ("vit", "vit_nano", "timm_cnn"):
        model = get_peft_model(make_backbone(name), config)
        assert model.peft_config["default"].in_dim == WIDTHS[name]
    after = config.to_dict()
    assert {k for k in before if before[k] != after[k]} <= {"base_model_name_or_path", "auto_mapping"}


# --- copies, memory, dtypes, checkpointing, compilation ---


@pytest.mark.parametrize(("name", "layer"), [("vit", -1), ("vit", 1), ("timm_vit", -1), ("timm_cnn", 1)])
def test_a_deep_copy_uses_its_own_head(name, layer):
    model, inputs = attach(name, "lora", layer=layer), make_inputs(name)
    perturb(model)
    model.train()(**inputs).projection.sum().backward()  # a step, as before an EMA copy
    teacher = copy.deepcopy(model).eval()
    z = teacher(**inputs).projection
    perturb(model, 1)
    assert torch.equal(teacher(**inputs).projection, z)
    perturb(teacher, 2)
    z = model.eval()(**inputs).projection
    bare = teacher.unload()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bare.modules())
    assert torch.equal(model(**inputs).projection, z)


def test_features_are_not_kept():
    model = attach("timm_vit", "lora", layer=1)
    model.get_base_model().set_grad_checkpointing(True)  # runs blocks, with their hooks, again in the backward
    out = model.train()(**make_inputs("timm_vit"))
    feature = weakref.ref(out.representation)
    out.projection.sum().backward()
    assert not any("_hfproj_feature" in m.__dict__ for m in model.modules())
    del out
    gc.collect()
    assert feature() is None
    copy.deepcopy(model)


@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize("trained", ["lora", "full"])
def test_gradient_checkpointing_gives_the_same_gradients(trained, layer):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = attach("vit", trained, layer=layer).train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable()
        model(**make_inputs("vit")).projection.square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("name", ["vit", "timm_vit", "timm_cnn"])
@pytest.mark.parametrize(("trained", "low_cpu_mem_usage"), [("lora", False), ("head", True), ("full", True)])
def test_bfloat16_backbone_keeps_a_float32_head(name, trained, low_cpu_mem_usage, tmp_path):
    """LoRA with low_cpu_mem_usage is missing: PEFT rounds it to the backbone's dtype then."""
    backbone = make_backbone(name).to(torch.bfloat16)
    model = get_peft_model(backbone, make_config(name, trained))
    perturb(model)
    inputs = {n: x.to(torch.bfloat16) for n, x in make_inputs(name).items()}
    out = model.eval()(**inputs)
    assert (out.representation.dtype, out.projection.dtype) == (torch.bfloat16, torch.float32)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if ".hfproj." in n or ".lora_" in n)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        make_backbone(name).to(torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(loaded(**inputs).projection, out.projection)


def test_autocast():
    model, inputs = attach("vit", "lora").train(), make_inputs("vit")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).projection.float().square().mean()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_float64_backbone_gets_a_float64_head(tmp_path):
    model = get_peft_model(make_backbone("vit").double(), make_config("vit", "lora"))
    perturb(model)
    inputs = {n: x.double() for n, x in make_inputs("vit").items()}
    out = model.eval()(**inputs)
    assert out.projection.dtype == torch.float64
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_backbone("vit").double(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(loaded(**inputs).projection, out.projection)
    model.float()
    assert model(**make_inputs("vit")).projection.dtype == torch.float32


class Blocks(nn.Module):
    """Two blocks of which the first may be read."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        for block in self.blocks:
            x = torch.relu(block(x))
        return x


@pytest.fixture
def _unchecked_shapes():
    jaxtyping.config.update("jaxtyping_disable", True)  # compiling the checks takes most of the time
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("_unchecked_shapes")
def test_compiled():
    options = {"head": "linear", "in_dim": 8, "backbone_adapter": LoraConfig(r=2)}
    model, x = get_peft_model(Blocks(), hfproj.ProjectionHeadConfig(**options, layer=0)), torch.randn(4, 8)
    perturb(model)
    with torch.no_grad():
        z = model(x).projection
    compiled = torch.compile(model, backend="eager")
    out = compiled(x)
    torch.testing.assert_close(out.projection.detach(), z)
    out.projection.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    with model.disable_adapter():
        assert isinstance(compiled(x), torch.Tensor)
    torch.testing.assert_close(compiled(x).projection.detach(), z)

    model.add_adapter("b", hfproj.ProjectionHeadConfig(**options))
    model.set_adapter("b")
    torch.compiler.reset()  # needed: compiled code does not notice new hooks
    torch.testing.assert_close(compiled(x).projection, model(x).projection)
    torch.compiler.reset()


# --- doors that refuse ---


def test_transformers_own_doors_refuse(lora_vit, tmp_path):
    # Because of what we declare, or, in a transformers that wants a later PEFT than there is, because of that.
    refusal = "shared state|version of PEFT you are using is not compatible"
    with pytest.raises(ValueError, match=refusal):
        make_backbone("vit").add_adapter(make_config("vit"))
    make_backbone("vit").save_pretrained(tmp_path / "checkpoint")
    model = get_peft_model(
        ViTModel.from_pretrained(tmp_path / "checkpoint", add_pooling_layer=False), make_config("vit", "lora")
    )
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=refusal):
        ViTModel.from_pretrained(tmp_path / "checkpoint").load_adapter(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match=refusal):
        AutoModel.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=refusal):
        peft.inject_adapter_in_model(make_config("vit"), make_backbone("vit"))


def test_merging_is_refused_before_anything_is_merged(lora_vit):
    before = snapshot(lora_vit)
    for verb in (lora_vit.merge_and_unload, lora_vit.merge_adapter):
        with pytest.raises(hfproj.UsageError, match=r"can't be merged into a backbone.*model\.unload\(\)"):
            verb()
    assert_same_tensors(snapshot(lora_vit), before)


def test_another_adapter_is_there_already():
    with (
        pytest.warns(UserWarning, match="modify a model with PEFT for a second time|Already found a `peft_config`"),
        pytest.raises(hfproj.UsageError, match="backbone_adapter=LoraConfig"),
    ):
        get_peft_model(get_peft_model(make_backbone("vit"), LoraConfig(target_modules=[QUERY])).base_model.model,
                       make_config("vit"))  # fmt: skip
    taken = make_backbone("plain")
    taken.hfproj = nn.Linear(2, 2)
    with pytest.raises(hfproj.UsageError, match="submodule named 'hfproj'"):
        get_peft_model(taken, make_config("plain"))
    with pytest.raises(ValueError, match="different peft types"):
        attach("vit").add_adapter("b", LoraConfig(target_modules=[QUERY]))


def test_timm_images_of_another_size():
    model = attach("timm_vit")
    with pytest.raises(
        hfproj.UsageError, match=r"made for images of 32 × 32 pixels, got 64 × 32.*dynamic_img_size=True"
    ):
        model(torch.randn(2, 3, 64, 32))
    flexible = get_peft_model(timm_vit(dynamic_img_size=True), make_config("timm_vit"))
    assert flexible(torch.randn(2, 3, 64, 32)).projection.shape == (2, 6)
    assert attach("timm_cnn")(torch.randn(2, 3, 64, 48)).projection.shape == (2, 6)


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov2_registers", "clip", "siglip", "vit_nano"])
def test_transformers_images_of_another_size(name):
    model = attach(name, pooling="mean").eval()
    images = torch.randn(2, 3, 64, 32)
    h = model(images).representation
    kwargs = {} if "dinov2" in name else {"interpolate_pos_encoding": True}
    bare = make_backbone(name)(images, **kwargs).last_hidden_state
    prefix = {"dinov2_registers": 4, "siglip": 0}.get(name, 1)
    torch.testing.assert_close(h, bare[:, prefix:].mean(1))


def test_a_head_that_is_not_run_says_so():
    class Skips(Blocks):
        def forward(self, x):
            return self.blocks[0](x)

    backbone = Skips()
    config = hfproj.ProjectionHeadConfig(head="linear", layer=1, in_dim=8, pooling="mean")
    with pytest.raises(hfproj.UsageError, match=r"did not run its module 'blocks\.1'"):
        get_peft_model(backbone, config)(torch.randn(2, 8))


def test_tensors_of_the_backbone_are_named_as_without_adapters():
    assert list(bare_tensors(attach("vit", "lora").get_base_model())) == list(make_backbone("vit").state_dict())
    assert set(TEXT) & set(BACKBONES)


def test_a_sequential_backbone_does_not_run_the_head_as_one_of_its_layers(tmp_path):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU())
    x = torch.randn(3, 3, 2, 2)
    h = backbone(x)
    model = get_peft_model(backbone, hfproj.ProjectionHeadConfig(head="mlp", out_dim=4, in_dim=8)).eval()
    out = model(x)
    torch.testing.assert_close(out.representation, h, rtol=0, atol=0)
    torch.testing.assert_close(out.projection, hfproj.detach(model).eval()(h), rtol=0, atol=0)
    with model.disable_adapter():
        assert torch.equal(model(x), h)
    model.save_pretrained(tmp_path)
    bare = model.unload()
    assert len(bare) == 3
    assert torch.equal(bare(x), h)
