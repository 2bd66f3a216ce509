"""Adapters on quantized backbones: what is reached, refused, recognised and restored, on a stand-in of such layers.

`test_quantized_packages.py` does the same with bitsandbytes and torchao themselves.
"""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from cases import BACKBONES, BLOCKS, assert_refused, make_backbone, make_config, make_inputs, perturb
from fingerprints import taken
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTModel

import hfproj
from hfproj.backbones import acting_modules, feeds_representation, resolve_read_point, source_of
from hfproj.backbones.dry_run import dry_run, structure
from hfproj.backbones.fingerprint import compare
from hfproj.tuner.network import network_of

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}
NAMES = ["vit", "dinov2", "clip", "bert", "timm_vit"]


class Int8(nn.Linear):
    """A linear layer of bitsandbytes: int8 codes, a scale per row, a bias that takes over the dtype of the input."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        scale = layer.weight.detach().abs().amax(1)
        codes = (layer.weight.detach() / scale[:, None] * 127).round().to(torch.int8)
        self.weight, self.bias = nn.Parameter(codes, requires_grad=False), layer.bias
        self.state = SimpleNamespace(SCB=scale)
        self.support_avx512bf16_for_cpu = 1  # an int, as the C function returns
        self.repacked = False

    def forward(self, x):
        self.repacked |= bool(self.support_avx512bf16_for_cpu) and not self.training
        if self.bias is not None and self.bias.dtype != x.dtype:
            self.bias.data = self.bias.data.to(x.dtype)
        weight = self.weight.float() * self.state.SCB[:, None] / 127
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


Int8.__module__ = "bitsandbytes.nn.modules"


def quantized(backbone, skip=()):
    """Return `backbone` with a stand-in in place of every linear layer but those named."""
    for name, module in list(backbone.named_modules()):
        if type(module) is nn.Linear and "pooler" not in name and not name.endswith(tuple(skip)):
            parent, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent), child, Int8(module))
    return backbone.eval()


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, Int8)]


def targets(backbone, **options):
    model = get_peft_model(backbone, make_config("vit", "lora", **options))
    return sorted(model.peft_config["default"].backbone_adapter["target_modules"])


@pytest.mark.parametrize("name", NAMES)
def test_default_targets_are_those_of_full_precision(name):
    assert targets(quantized(make_backbone(name))) == targets(make_backbone(name))
    mixed = quantized(make_backbone(name), skip=("fc1", "intermediate.dense"))
    assert targets(mixed) == targets(make_backbone(name))


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_what_h_depends_on_is_that_of_full_precision(name):
    whole, packed = make_backbone(name), quantized(make_backbone(name))
    point = resolve_read_point(whole)
    assert resolve_read_point(packed) == point
    assert feeds_representation(packed, point) == feeds_representation(whole, point)
    assert acting_modules(packed, point) == acting_modules(whole, point)
    assert all(tensor.is_meta for tensor in dry_run(packed).copy.parameters())  # it did not need values


def test_attaching_leaves_the_structure_that_runs_are_kept_by():
    backbone = quantized(make_backbone("vit"))
    before = structure(backbone)
    assert structure(get_peft_model(backbone, make_config("vit", "lora")).get_base_model()) == before


class AsksForValues(nn.Module):
    """A module that can't be run on tensors without values."""

    def __init__(self):
        super().__init__()
        self.first, self.unread, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.first(x)
        return self.last(x if x.sum().item() < 1e9 else -x)


def test_a_quantized_pooler_of_no_checkpoint_is_not_read():
    backbone = ViTModel(ViTConfig(**TINY))
    backbone.pooler.dense = Int8(backbone.pooler.dense)
    assert resolve_read_point(backbone).pooling == "cls"


def test_a_backbone_that_asks_for_values_is_run_with_its_own():
    packed = quantized(AsksForValues())
    codes, layer = packed.first.weight, packed.first
    assert dry_run(packed).copy.first.weight is codes  # no copy of them
    config = hfproj.ProjectionHeadConfig(head="linear", out_dim=3, in_dim=4, backbone_adapter=LoraConfig(r=2))
    model = get_peft_model(packed, config)
    assert model.peft_config["default"].backbone_adapter["target_modules"] == ["first", "last"]
    assert packed.first.base_layer is layer
    assert layer.weight is codes
    assert not layer.repacked


@pytest.mark.parametrize("trained", [1, 2, "full"])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_quantized_blocks_are_not_trained(name, trained):
    config = hfproj.ProjectionHeadConfig(out_dim=4, trainable=trained)
    backbone = quantized(make_backbone(name))
    assert_refused(lambda: get_peft_model(backbone, config), f"trainable={trained!r}", "quantized", "LoraConfig")
    assert not hasattr(backbone, "hfproj")


def test_blocks_that_are_not_quantized_are_trained():
    backbone = make_backbone("vit")
    for block in backbone.get_submodule(BLOCKS)[:-1]:
        quantized(block)
    model = get_peft_model(backbone, hfproj.ProjectionHeadConfig(out_dim=4, trainable=1))
    model(**make_inputs("vit")).projection.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert_refused(lambda: get_peft_model(copy.deepcopy(model.unload()), make_config("vit", "two_blocks")), "quantized")


def test_a_quantized_backbone_is_not_fine_tuned():
    assert_refused(lambda: network_of(quantized(make_backbone("vit"))), "quantized", "load the backbone")


def test_a_layer_that_the_files_lack_is_named_as_the_cause():
    class Lacking(nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.weight.CB  # as bitsandbytes does, whose weights have it once loaded

    backbone = quantized(make_backbone("bert"))
    backbone.config.quantization_config = {"quant_method": "bitsandbytes"}
    backbone.pooler.dense = Lacking(16, 16)
    call = lambda: get_peft_model(backbone, make_config("bert"))  # noqa: E731
    assert_refused(call, "attribute 'CB'", "files lack can't be quantized", "add_pooling_layer=False")


def test_layers_of_other_packages_have_to_be_named():
    backbone = make_backbone("vit")
    backbone.config.quantization_config = {"quant_method": "gptq"}
    call = lambda: get_peft_model(backbone, make_config("vit", "lora"))  # noqa: E731
    assert_refused(call, "gptq", "target_modules")


@pytest.mark.parametrize("trained", ["lora", "head"])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_every_trained_tensor_learns_and_comes_back(name, trained, tmp_path):
    model = get_peft_model(quantized(make_backbone(name)), make_config(name, trained))
    perturb(model)
    inputs = make_inputs(name)
    model.train()(**inputs).projection.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    z = model.eval()(**inputs).projection
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="This (backbone|adapter)")
        again = PeftModel.from_pretrained(quantized(make_backbone(name)), tmp_path)
    assert torch.equal(again(**inputs).projection, z)
    with pytest.warns(UserWarning, match="quantized otherwise: 0 of its tensors are quantized"):
        PeftModel.from_pretrained(make_backbone(name), tmp_path)


def test_an_adapter_of_full_precision_goes_onto_a_quantized_backbone(tmp_path):
    get_peft_model(make_backbone("vit"), make_config("vit", "lora")).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="quantized otherwise: .* 0 were; up to rounding"):
        PeftModel.from_pretrained(quantized(make_backbone("vit")), tmp_path)


def changed(backbone, amount):
    """Return `backbone` with other linear layers and nothing else: as after LoRA was merged into it."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, nn.Linear):
                noise = torch.randn(module.weight.shape, generator=generator)
                module.weight.add_(amount * module.weight.std() * noise)
    return backbone


@pytest.mark.parametrize("name", [n for n in BACKBONES if n in (*NAMES, "vit_nano", "siglip")])
def test_the_fingerprint_compares_what_codes_stand_for(name):
    whole, packed = taken(make_backbone(name)), taken(quantized(make_backbone(name)))
    assert compare(packed, taken(quantized(make_backbone(name)))).kind == "same"
    assert [compare(whole, packed).kind, compare(packed, whole).kind] == ["quantized"] * 2
    mixed = taken(quantized(make_backbone(name), skip=("fc1", "intermediate.dense")))
    assert [compare(whole, mixed).kind, compare(packed, mixed).kind] == ["quantized"] * 2
    assert compare(packed, taken(quantized(changed(make_backbone(name), 0.05)))).kind == "weights"
    assert compare(whole, taken(quantized(changed(make_backbone(name), 3.0)))).kind == "weights"


def test_values_are_told_from_codes_and_scales():
    whole, packed = make_backbone("vit"), quantized(make_backbone("vit"))
    one, other = taken(whole), taken(packed)
    assert {shape: sketch[0] for shape, sketch in one["weights"].items()} == {
        shape: sketch[0] for shape, sketch in other["weights"].items()
    }
    shape = next(iter(other["quantized"]))
    assert 0.001 < other["rounding"][shape] < 0.02  # a step of 1/127 of a row's largest, over √12
    assert abs(one["weights"][shape][3] / other["weights"][shape][3] - 1) < 0.01  # the root of the sum of squares


def test_a_backbone_that_was_quantized_by_hand_has_no_name():
    assert source_of(hfproj.load_backbone("vit_nano"))["id"] == "vit_nano"
    assert source_of(quantized(hfproj.load_backbone("vit_nano")))["id"] is None


def test_layers_do_not_change_the_backbone_while_there_is_a_head():
    backbone = quantized(make_backbone("vit"))
    before = {id(layer): layer.bias.detach().clone() for layer in layers_of(backbone)}
    model = get_peft_model(backbone, make_config("vit", "lora"))
    copied = copy.deepcopy(model)
    for attached in (model, copied):
        with torch.autocast("cpu", torch.bfloat16):
            attached.eval()(**make_inputs("vit"))
    layers = layers_of(model)
    assert not any(layer.repacked for layer in [*layers, *layers_of(copied)])
    assert all(layer.bias.dtype == torch.float32 for layer in layers_of(copied))
    assert all(torch.equal(layer.bias, before[id(layer)]) for layer in layers)
    bare = model.unload()
    assert all(layer.support_avx512bf16_for_cpu and not layer._forward_hooks for layer in layers_of(bare))


def test_a_repacked_backbone_is_refused():
    backbone = quantized(make_backbone("vit"))
    layers_of(backbone)[0].weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    call = lambda: get_peft_model(backbone, make_config("vit", "head"))  # noqa: E731
    assert_refused(call, "repacked", "Load it again")


def test_layers_of_the_head_are_read():
    config = hfproj.ProjectionHeadConfig(head_options={"hidden_dim": 9, "norm": None}, out_dim=4)
    model = get_peft_model(quantized(make_backbone("vit")), config).eval()
    items = [*torch.randn(5, 3, 32, 32)]
    found = hfproj.extract_features(
        model, items, layers=[1, "head.0", "head.1"], collator=lambda batch: {"pixel_values": torch.stack(batch)}
    )
    head = model.get_base_model().hfproj.projection_head_modules["default"].head
    with torch.no_grad():
        expected = head.hidden[0](found.h)
        assert torch.allclose(found.layers["head.0"], expected, atol=1e-6)
        assert torch.allclose(found.layers["head.1"], head.last(expected), atol=1e-6)
