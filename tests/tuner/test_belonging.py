"""An adapter is attached to the backbone that it was made on, through every door, or it says so."""

import copy
import dataclasses
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import timm
import torch
from cases import TRAINED, WIDTHS, assert_refused, make_backbone, make_config, make_inputs, perturb, snapshot
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

import hfproj
from hfproj.backbones import FeatureBackbone


def tuned(name, amount=1e-4):
    """The same backbone after some training."""
    backbone = make_backbone(name)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return backbone


def saved_adapter(folder, name, trained="lora", **options):
    model = get_peft_model(make_backbone(name), make_config(name, trained, **options))
    perturb(model)
    model.eval().save_pretrained(folder)
    return model


def loaded_config(folder, **changes):
    config = PeftConfig.from_pretrained(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


DOORS = {
    "hfproj": lambda backbone, folder, **c: hfproj.from_pretrained(folder, backbone=backbone, **c),
    "PeftModel": lambda backbone, folder, **c: PeftModel.from_pretrained(
        backbone, folder, **({"config": loaded_config(folder, **c)} if c else {})
    ),
    "get_peft_model": lambda backbone, folder, **c: get_peft_model(backbone, loaded_config(folder, **c)),
    "load_adapter": lambda backbone, folder, **c: _beside(backbone, folder, c),
}


def _beside(backbone, folder, changes):
    model = get_peft_model(backbone, hfproj.ProjectionHeadConfig(head="linear", out_dim=2))
    if changes:
        model.add_adapter("more", loaded_config(folder, **changes))
    model.load_adapter(folder, "more")
    return model


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", ["dinov2", "timm_cnn", "bert"])
def test_the_same_backbone_is_welcome_and_another_is_not(name, trained, door, tmp_path):
    saved_adapter(tmp_path, name, trained)
    DOORS[door](make_backbone(name), tmp_path)
    other = tuned(name)
    before, modules = snapshot(other), [n for n, _ in other.named_modules()]
    said = ("This backbone has other weights", "a backbone without a name", "backbone_check='warn'")
    said = said if name != "timm_cnn" else (said[0], "timm/test_efficientnet", said[2])
    if door != "load_adapter":
        assert_refused(lambda: DOORS[door](other, tmp_path), *said, error=hfproj.AdapterFileError)
        assert [n for n, _ in other.named_modules()] == modules
        assert all(torch.equal(value, before[n]) for n, value in snapshot(other).items())
    else:
        with pytest.raises(hfproj.AdapterFileError, match="other weights"):
            DOORS[door](other, tmp_path)


@pytest.mark.parametrize("door", DOORS)
def test_other_weights_can_be_meant(door, tmp_path):
    saved_adapter(tmp_path / "first", "dinov2", "lora")
    with pytest.warns(UserWarning, match="This backbone has other weights"):
        model = DOORS[door](tuned("dinov2"), tmp_path / "first", backbone_check="warn")
    name = "more" if door == "load_adapter" else "default"
    config = model.peft_config[name]
    assert config.fingerprint["instead_of"] == "a backbone without a name"
    model.set_adapter(name)
    results = hfproj.Results(config=hfproj.tuner.description.describe_adapter(model))
    for text in (results.table(), hfproj.reporting.render_card(results)):
        assert "was made on a backbone without a name and is used here" in text.replace("\n", " ")
    # Saved again, it belongs to the backbone that it is used on now.
    model.save_pretrained(tmp_path / "again", selected_adapters=[name])
    folder = tmp_path / "again" / ("" if name == "default" else name)
    PeftModel.from_pretrained(tuned("dinov2"), folder)
    file = folder / "adapter_config.json"
    for written in (json.loads(file.read_text())["backbone_check"], "warn"):  # what a file says means nothing
        file.write_text(json.dumps(json.loads(file.read_text()) | {"backbone_check": written}))
        for load in (hfproj.from_pretrained, lambda d, backbone: PeftModel.from_pretrained(backbone, d)):
            with pytest.raises(hfproj.AdapterFileError, match="other weights"):
                load(folder, backbone=make_backbone("dinov2"))


def test_another_structure_is_refused_even_where_other_weights_are_meant(tmp_path):
    saved_adapter(tmp_path, "vit", "head")
    small = {"hidden_size": 16, "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "intermediate_size": 32}
    shallow = ViTModel(ViTConfig(**small, num_hidden_layers=2), add_pooling_layer=False)
    for door in ("hfproj", "PeftModel", "get_peft_model"):
        for changes in ({}, {"backbone_check": "warn"}):
            call = lambda d=door, c=changes: DOORS[d](shallow, tmp_path, **c)  # noqa: E731
            said = ("This is another backbone", "its num_hidden_layers is 2, expected 3", "of 16x16, expected 12")
            assert_refused(call, *said, error=hfproj.AdapterFileError)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_is_a_warning_and_the_fingerprint_stays(dtype, tmp_path):
    first = saved_adapter(tmp_path, "dinov2", "two_blocks")
    with pytest.warns(UserWarning, match="same weights in another precision: its weights are"):
        model = PeftModel.from_pretrained(make_backbone("dinov2").to(dtype), tmp_path)
    assert model.peft_config["default"].fingerprint == first.peft_config["default"].fingerprint
    model.save_pretrained(tmp_path / "again")
    PeftModel.from_pretrained(make_backbone("dinov2"), tmp_path / "again")


def test_a_changed_copy_of_a_new_config_is_new():
    config = dataclasses.replace(make_config("vit"), out_dim=3)  # PEFT has written its version into it by now
    assert get_peft_model(make_backbone("vit"), config).peft_config["default"].fingerprint is not None


def test_old_adapters_load_with_one_warning(tmp_path):
    saved_adapter(tmp_path, "dinov2")
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in values.items() if k not in ("fingerprint", "backbone_check")}))
    for door in ("hfproj", "PeftModel", "get_peft_model"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            DOORS[door](make_backbone("dinov2"), tmp_path)
        said = [str(w.message) for w in caught if "fingerprint" in str(w.message)]
        assert len(said) == 1
        assert "can't be checked" in said[0]


@pytest.mark.parametrize("trained", ["two_blocks", "full"])
def test_the_fingerprint_is_that_of_the_originals(trained, tmp_path):
    model = get_peft_model(make_backbone("vit"), make_config("vit", trained))
    fresh = model.peft_config["default"].fingerprint
    perturb(model)
    model.save_pretrained(tmp_path)
    kept = model.peft_config["default"].fingerprint
    assert {n: kept[n] for n in fresh} == fresh
    model.add_adapter("second", make_config("vit", "head"))
    assert model.peft_config["second"].fingerprint["weights"] == fresh["weights"]
    with pytest.warns(UserWarning, match="keep_original=False"):
        lossy = get_peft_model(make_backbone("vit"), make_config("vit", trained, keep_original=False))
    perturb(lossy)
    lossy.save_pretrained(tmp_path / "lossy")
    assert "sha256" not in lossy.peft_config["default"].fingerprint
    with pytest.warns(UserWarning, match="keep_original=False"):
        PeftModel.from_pretrained(make_backbone("vit"), tmp_path / "lossy")


def test_weights_that_are_loaded_after_the_head_was_attached_are_those_that_are_saved(tmp_path):
    model = get_peft_model(make_backbone("dinov2"), make_config("dinov2"))
    model.get_base_model().load_state_dict(tuned("dinov2").state_dict(), strict=False)
    with pytest.warns(UserWarning, match="has changed since the head was attached"):
        model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(tuned("dinov2"), tmp_path)
    with pytest.raises(hfproj.AdapterFileError, match="other weights"):
        PeftModel.from_pretrained(make_backbone("dinov2"), tmp_path)


def test_random_weights_with_another_seed(tmp_path):
    options = {"library": "timm", "pretrained": False, "img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}

    def random_backbone(seed):
        torch.manual_seed(seed)
        return hfproj.load_backbone("vit_tiny_patch16_224", **options)

    for trained in ("head", "full"):
        model = get_peft_model(random_backbone(1), hfproj.ProjectionHeadConfig(out_dim=4, **TRAINED[trained]))
        model.save_pretrained(tmp_path / trained)
        hfproj.from_pretrained(tmp_path / trained, backbone=random_backbone(1))
        if trained == "head":
            with pytest.raises(hfproj.AdapterFileError, match="other weights"):
                hfproj.from_pretrained(tmp_path / trained)
        else:  # every tensor is in the adapter
            torch.manual_seed(5)
            z = hfproj.from_pretrained(tmp_path / trained)(torch.ones(1, 3, 32, 32)).projection
            torch.testing.assert_close(z, model.eval()(torch.ones(1, 3, 32, 32)).projection)


def test_cached_features_have_the_fingerprint_of_their_backbone(tmp_path):
    real = get_peft_model(make_backbone("vit"), make_config("vit", "head"))
    features = FeatureBackbone.of(real)
    model = get_peft_model(features, hfproj.ProjectionHeadConfig(head="linear", out_dim=3))
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(make_backbone("vit"), tmp_path)
    PeftModel.from_pretrained(FeatureBackbone.of(real), tmp_path)
    PeftModel.from_pretrained(FeatureBackbone(16, pooling="cls"), tmp_path)  # of an unknown backbone
    for other in (tuned("vit"), FeatureBackbone.of(get_peft_model(tuned("vit"), make_config("vit", "head")))):
        with pytest.raises(hfproj.AdapterFileError, match="other weights"):
            PeftModel.from_pretrained(other, tmp_path)


def test_a_damaged_fingerprint_is_refused_in_one_line(tmp_path):
    saved_adapter(tmp_path, "vit", "head")
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"fingerprint": {"version": 1, "shapes": {"16": "x"}}}))
    for door in ("hfproj", "PeftModel"):
        assert_refused(lambda d=door: DOORS[d](make_backbone("vit"), tmp_path), error=hfproj.AdapterFileError)
    with pytest.raises(hfproj.UsageError, match="backbone_check"):
        hfproj.ProjectionHeadConfig(backbone_check="off")


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_config_that_is_given_for_loading_is_kept(name, trainable, tmp_path):
    saved_adapter(tmp_path, name)
    config = loaded_config(tmp_path)
    model = PeftModel.from_pretrained(make_backbone(name), tmp_path, config=config, is_trainable=trainable)
    assert model.peft_config["default"] is config
    assert config.inference_mode is not trainable
    fresh = make_config(name, "lora")
    model = PeftModel.from_pretrained(make_backbone(name), tmp_path, config=fresh)
    assert model.peft_config["default"] is fresh
    assert fresh.in_dim == WIDTHS[name]


def test_a_new_config_serves_for_several_backbones_though_weights_are_loaded(tmp_path):
    config = make_config("vit", "head", head="linear", head_options={})
    model = get_peft_model(make_backbone("vit_nano"), config)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default")  # as a trainer resumes
    assert config.in_dim is None
    assert get_peft_model(make_backbone("vit"), config).peft_config["default"].in_dim == 16


def test_a_quantized_backbone_is_a_warning(tmp_path):
    saved_adapter(tmp_path, "vit", "head")
    backbone = make_backbone("vit")
    layer = next(m for m in backbone.modules() if isinstance(m, torch.nn.Linear))
    layer.weight = torch.nn.Parameter(torch.zeros(128, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.warns(UserWarning, match="1 of its tensors are quantized"):
        PeftModel.from_pretrained(backbone, tmp_path)


def test_it_says_where_the_adapter_was_made(tmp_path):
    model = get_peft_model(hfproj.load_backbone("vit_nano"), make_config("vit_nano", "head"))
    model.save_pretrained(tmp_path)
    hfproj.from_pretrained(tmp_path)
    assert_refused(
        lambda: hfproj.from_pretrained(tmp_path, backbone=tuned("vit_nano")), "made on vit_nano",
        error=hfproj.AdapterFileError,
    )  # fmt: skip


def test_poolers_that_nobody_reads_may_differ(tmp_path):
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    bert = BertModel(config).eval()
    bert.save_pretrained(tmp_path / "bert")
    get_peft_model(copy.deepcopy(bert), hfproj.ProjectionHeadConfig(out_dim=4, trainable="full")).save_pretrained(
        tmp_path / "adapter"
    )
    bert.pooler.dense.reset_parameters()
    PeftModel.from_pretrained(bert, tmp_path / "adapter")
    shutil.rmtree(tmp_path / "bert")


def test_a_timm_model_in_another_image_size(tmp_path):
    made = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=0)
    get_peft_model(made, hfproj.ProjectionHeadConfig(out_dim=4)).save_pretrained(tmp_path)
    other = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=1, num_classes=0)
    said = ("it has no tensors of 1x17x192, expected 1", "it has 1 tensor of 1x10x192, expected none")
    assert_refused(lambda: PeftModel.from_pretrained(other, tmp_path), *said, error=hfproj.AdapterFileError)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_what_is_pulled_gives_the_z_that_was_saved(name, tmp_path):
    model = saved_adapter(tmp_path, name, "lora")
    inputs = make_inputs(name)
    loaded = PeftModel.from_pretrained(make_backbone(name), tmp_path)
    torch.testing.assert_close(loaded(**inputs).projection, model(**inputs).projection)


def test_training_goes_on_with_the_backbone_of_the_adapter(tmp_path):
    from hfproj.training.checkpoints import Continued

    saved_adapter(tmp_path, "vit", "head")
    config = make_config("vit", "head")
    Continued(get_peft_model(make_backbone("vit"), config), tmp_path)
    other = get_peft_model(tuned("vit"), config)
    with pytest.raises(hfproj.AdapterFileError, match="other weights"):
        Continued(other, tmp_path)
    other.peft_config["default"].backbone_check = "warn"
    with pytest.warns(UserWarning, match="other weights"):
        Continued(other, tmp_path)
    assert "instead_of" in other.peft_config["default"].fingerprint


def test_the_example_of_the_docs(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).resolve().parents[2] / "docs" / "hub.md").read_text(encoding="utf-8")
    part = text.partition("## The backbone an adapter belongs to")[2].partition("## Continue")[0]
    (block,) = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="other weights"):
        exec(block, {})
    said = capsys.readouterr().out
    assert "This backbone has other weights: tensors of 128 differ. The adapter was made on vit_nano; " in said
