"""A head on a backbone: what comes out, who gets gradients, where its PEFT method goes."""

import copy
import json
import re

import pytest
import torch
from cases import (
    BACKBONES,
    QUERY,
    TRAINED,
    VALUE,
    WIDTHS,
    make_backbone,
    make_config,
    make_inputs,
    perturb,
    trainable_names,
)
from peft import IA3Config, LNTuningConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

import hfproj


def attach(name: str, trained: str = "head", **options: object) -> PeftModel:
    return get_peft_model(make_backbone(name), make_config(name, trained, **options))


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


@pytest.mark.parametrize(("name", "block", "options"), [
    ("timm_vit", "blocks.1", {"layers_to_transform": [1]}),
    ("bert", "encoder.layer.1", {"layers_to_transform": 1}),
    ("bert", "encoder.layer.1", {"layers_to_transform": [1], "layers_pattern": "layer"}),
])  # fmt: skip
def test_blocks_are_chosen_among_the_default_targets(name, block, options, tmp_path):
    model = attach(name, "head", trainable="adapter", backbone_adapter=LoraConfig(r=2, **options))
    stored = model.peft_config["default"].backbone_adapter
    every = attach(name, "head", trainable="adapter", backbone_adapter=LoraConfig(r=2)).peft_config["default"]
    layers = [n for n, _ in make_backbone(name).named_modules()]
    expected = [n for n in layers if n.startswith(f"{block}.") and re.fullmatch(_pattern(every), n)]
    assert len(expected) > 3
    assert [n for n in layers if re.fullmatch(_pattern(stored), n)] == expected
    reached = {n.partition(".lora_A")[0].removeprefix("base_model.model.") for n, _ in model.named_modules()
               if ".lora_A" in n}  # fmt: skip
    assert reached == set(expected)
    assert stored["layers_to_transform"] is stored["layers_pattern"] is None
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_backbone(name), tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()


def _pattern(config):
    targets = getattr(config, "backbone_adapter", config)["target_modules"]
    return targets if isinstance(targets, str) else "|".join(map(re.escape, targets))


@pytest.mark.parametrize("options", [{"layers_to_transform": [7]},
                                     {"layers_to_transform": [1], "layers_pattern": "stages"}])  # fmt: skip
def test_blocks_that_are_not_there_are_refused(options):
    with pytest.raises(hfproj.UsageError, match="layers_to_transform") as caught:
        attach("timm_vit", "head", trainable="adapter", backbone_adapter=LoraConfig(r=2, **options))
    assert ("[0, 1" in str(caught.value)) == ("layers_pattern" not in options)


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


def test_what_peft_can_not_do_for_a_model_is_said(monkeypatch):
    """It asks every model for its embeddings, for example, and some models of transformers can't tell them."""

    def inject(*args, **kwargs):
        raise NotImplementedError("`get_input_embeddings` not auto-handled")

    monkeypatch.setattr("hfproj.tuner.model.inject_adapter_in_model", inject)
    with pytest.raises(hfproj.UsageError, match="does not fit ViTModel: `get_input_embeddings` not auto-handled"):
        get_peft_model(make_backbone("vit"), make_config("vit", "lora"))


def test_one_config_serves_for_several_backbones():
    config = hfproj.ProjectionHeadConfig(head="linear", out_dim=4, backbone_adapter=LoraConfig(r=2))
    before = config.to_dict()
    for name in ("vit", "vit_nano", "timm_cnn"):
        model = get_peft_model(make_backbone(name), config)
        assert model.peft_config["default"].in_dim == WIDTHS[name]
    after = config.to_dict()
    assert {k for k in before if before[k] != after[k]} <= {"base_model_name_or_path", "auto_mapping"}
