"""Every layout: h, z, p, scores of the converted model are those of the official network, before and after saving."""

import re

import pytest
import torch
from official_files import CASES
from official_layers import Builder, below

import hfproj
from hfproj.converters import FAMILIES, conversion, families

# timm has the class token and its position in one tensor, whose float32 sum is rounded once
ROUNDED = {"dinov2: SwiGLU, registers, ibot_head", "dinov2: whole model, chunked SwiGLU"}


def outputs(model, x):
    with torch.no_grad():
        out = model(x)
    found = {"h": out.representation, "z": out.projection, "p": out.prediction, "scores": out.scores}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("name", CASES)
def test_the_official_network_and_the_converted_one(name, tmp_path):
    case = CASES[name]()
    torch.save(case.file, tmp_path / "checkpoint.pth")
    model = hfproj.convert(tmp_path / "checkpoint.pth", case.method, **case.options).double()
    assert not model.training
    x = torch.randn(3, 3, case.image, case.image, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, found = case.network(x), outputs(model, x)
    assert found.keys() == expected.keys()
    for part, value in expected.items():
        assert value.std() > 1e-2, f"{part} is nearly constant: nothing would be compared"
        assert (found[part] - value).abs().max() <= (1e-6 if name in ROUNDED else 1e-10), part


@pytest.mark.parametrize("name", {make().method: name for name, make in reversed(CASES.items())}.values())
def test_it_loads_as_it_was_saved(name, tmp_path):
    case = CASES[name]()
    model = hfproj.convert(case.file, case.method, **case.options)
    x = torch.randn(3, 3, case.image, case.image)
    before = outputs(model, x)
    model.save_pretrained(tmp_path)
    config = model.peft_config["default"]
    assert config.backbone["kwargs"]["pretrained"] is False
    backbone = hfproj.load_backbone(config.backbone["id"], **config.backbone["kwargs"])
    loaded = hfproj.from_pretrained(tmp_path, backbone=backbone)
    for part, value in outputs(loaded, x).items():
        assert torch.equal(value, before[part]), part
    assert torch.equal(hfproj.load_head(tmp_path)(before["h"]), before["z"])
    with torch.no_grad():
        assert torch.allclose(loaded.unload()(x), before["h"], atol=1e-5)


def test_every_family_is_tested_and_named_with_its_sources():
    assert {make().method for make in CASES.values()} == set(FAMILIES) == set(hfproj.converters.list_converters())
    for name, family in FAMILIES.items():
        assert family.name == name
        assert "/" in family.source
        for source in family.source.split(", "):
            assert re.search(rf"{source}\W+[0-9a-f]{{7}}\b|{source}\s+``", families.__doc__), "no commit of its source"


@pytest.mark.parametrize(("name", "options"), [
    ("moco_v3: ViT", {"norm": "batch", "bias": False, "last_bias": False, "last_norm": "batch", "last_affine": False}),
    ("simclr_v2", {"last_affine": "scale", "batch_statistics": "joint", "bias": False}),
    ("simclr_v2: with a shift", {"last_affine": True, "batch_statistics": "joint"}),
    ("simsiam", {"last_bias": True, "bias": False, "last_affine": False}),
    ("byol: yaox12", {"batch_statistics": "joint", "bias": True, "last_bias": True}),
    ("byol: lucidrains", {"norm": "batch"}),
    ("vicreg", {"bias": True, "last_bias": False}),
    ("swav: release", {"batch_statistics": "joint"}),
    ("dino: ViT", {"norm": None, "activation": "gelu", "init": "trunc_normal"}),
    ("dino: ResNet, BatchNorm in the head", {"norm": "batch", "batch_statistics": "joint"}),
    ("directclr", {"d0": 7}),
])  # fmt: skip
def test_options_of_the_head(name, options):
    case = CASES[name]()
    config = hfproj.convert(case.file, case.method, **case.options).peft_config["default"]
    assert options.items() <= config.head_options.items()
    assert ("batch_statistics" in options) == ("batch_statistics" in config.head_options)


def test_lengths_of_prototypes_are_kept_where_they_were_learned():
    found = {}
    for name in ("dino: ViT", "dino: ViT, student with lengths"):
        case = CASES[name]()
        found[name] = hfproj.convert(case.file, case.method, **case.options).peft_config["default"].prototypes
    assert list(found.values()) == [30, {"count": 30, "learn_norm": True}]


def test_what_was_read_and_what_was_left_out():
    case = CASES["moco_v2"]()
    done = conversion(case.file, "moco_v2")
    encoder = len(below(case.file["state_dict"], "module.encoder_q."))
    assert (done.read, done.network) == ({"backbone": encoder - 4, "head": 4}, "query")
    assert (done.source, done.own_backbone) == ("facebookresearch/moco", True)
    assert set(done.ignored) == {"of network='key'", "keys of past batches"}
    assert done.ignored["keys of past batches"] == ["queue", "queue_ptr"]
    case = CASES["dino: ViT"]()
    done = conversion(case.file, "dino", num_heads=3)
    assert done.read["prototypes"] == 1
    assert done.network == "teacher"
    case = CASES["simsiam"]()
    assert conversion(case.file, "simsiam").read["predictor"] == 8


def test_the_networks_of_a_file_differ():
    case = CASES["byol: yaox12"]()
    heads = [
        hfproj.detach(hfproj.convert(case.file, "byol", network=network)).hidden[0].linear.weight
        for network in ("online", "target")
    ]
    assert not torch.equal(*heads)


def test_widths_and_depths_come_from_the_shapes():
    builder = Builder()
    width = builder.resnet("backbone.", channels=(8, 8, 8, 8))
    builder.mlp("projector.", width, 12, 16, 20, 9, norm=True, last_bias=False)
    config = hfproj.convert({"model": builder.tensors}, "vicreg").peft_config["default"]
    assert (config.head_options["depth"], config.head_options["hidden_dim"]) == (4, [12, 16, 20])
    assert (config.in_dim, config.out_dim) == (32, 9)


def test_files_without_a_count_of_batches():
    """Before torch 0.4.1 BatchNorm had none."""
    case = CASES["barlow_twins"]()
    old = {k: v for k, v in case.file["model"].items() if not k.endswith("num_batches_tracked")}
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, found = (hfproj.convert({"model": f}, "barlow_twins")(x) for f in (case.file["model"], old))
    assert torch.equal(found.projection, expected.projection)


def test_safetensors(tmp_path):
    from safetensors.torch import save_file

    case = CASES["swav: release"]()
    save_file(case.file, tmp_path / "swav.safetensors")  # which sorts the names
    model = hfproj.convert(tmp_path / "swav.safetensors", "swav")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x).scores, hfproj.convert(case.file, "swav")(x).scores)


def test_training_goes_on_from_a_converted_adapter(tmp_path):
    case = CASES["simsiam"]()
    model = hfproj.convert(case.file, "simsiam")
    model.save_pretrained(tmp_path)
    backbone = hfproj.load_backbone(**renamed(model.peft_config["default"].backbone))
    loaded = hfproj.from_pretrained(tmp_path, backbone=backbone, is_trainable=True).train()
    out = loaded(torch.randn(4, 3, 32, 32), num_views=2)
    out.prediction.square().mean().backward()
    without = [n for n, p in loaded.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert any(n.endswith("layer1.0.conv1.weight") and p.requires_grad for n, p in loaded.named_parameters())


def renamed(source):
    return {"name": source["id"], **source["kwargs"]}
