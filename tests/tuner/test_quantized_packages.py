"""Adapters on backbones that bitsandbytes and torchao quantize: saved, loaded with their quantization, and compared."""

import importlib.util
import warnings

import pytest
import torch
from cases import assert_refused, make_backbone, make_config, make_inputs, perturb
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModel

import hfproj
from hfproj.backbones import loading
from hfproj.tuner.network import network_of

BITS4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
BITS8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
CONFIGS = {
    "fp4": BITS4,
    "nf4": BITS4 | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4_bfloat16": BITS4 | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
    "int8": BITS8,
    "int8_mixed": BITS8 | {"llm_int8_skip_modules": ["fc1"]},
    "torchao_int8": "Int8WeightOnlyConfig",
    "torchao_float8": "Float8WeightOnlyConfig",
    "torchao_dynamic": "Int8DynamicActivationInt8WeightConfig",
}
# Their own: of an enum of torch, and of a layer that casts its input.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore:.*cast")]


def quantized(folder, kind):
    """Load a backbone with transformers alone."""
    config = CONFIGS[kind]
    if isinstance(config, str):
        pytest.importorskip("torchao")
        from torchao import quantization
        from transformers import TorchAoConfig

        config = TorchAoConfig(getattr(quantization, config)())
    else:
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig.from_dict(config)
    return AutoModel.from_pretrained(folder, quantization_config=config, add_pooling_layer=False)


@pytest.fixture(scope="module", params=["vit", "bert"])
def saved(request, tmp_path_factory):
    """The name of a backbone and the folder it lies in."""
    folder = tmp_path_factory.mktemp(request.param)
    make_backbone(request.param).save_pretrained(folder)
    return request.param, folder


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("trained", ["lora", "head"])
def test_an_adapter_comes_back_with_its_quantization(saved, kind, trained, tmp_path):
    name, folder = saved
    inputs, model = make_inputs(name), get_peft_model(quantized(folder, kind), make_config(name, trained))
    if trained == "lora":
        whole = get_peft_model(AutoModel.from_pretrained(folder, add_pooling_layer=False), make_config(name, "lora"))
        reached = [m.peft_config["default"].backbone_adapter["target_modules"] for m in (whole, model)]
        assert sorted(reached[0]) == sorted(reached[1])
    perturb(model)
    with torch.no_grad():
        model.eval()(**inputs)  # an evaluation before the training
    model.train()(**inputs).projection.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        out = model.eval()(**inputs)
        model.save_pretrained(tmp_path)
        assert torch.equal(model(**inputs).projection, out.projection)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="This (backbone|adapter)")
            loaded = [hfproj.from_pretrained(tmp_path), PeftModel.from_pretrained(quantized(folder, kind), tmp_path)]
        for again in loaded:
            found = again(**inputs)
            assert torch.equal(found.representation, out.representation)
            assert torch.equal(found.projection, out.projection)
    with pytest.warns(UserWarning, match="quantized otherwise"):
        PeftModel.from_pretrained(AutoModel.from_pretrained(folder, add_pooling_layer=False), tmp_path)
    for blocks in (1, "full"):
        config = hfproj.ProjectionHeadConfig(out_dim=4, trainable=blocks)
        if kind != "int8_mixed" or name == "bert":
            assert_refused(lambda config=config: get_peft_model(quantized(folder, kind), config), "quantized")


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao_int8"])
def test_a_backbone_prepared_by_peft_trains(saved, kind):
    name, folder = saved
    backbone = prepare_model_for_kbit_training(
        quantized(folder, kind), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = get_peft_model(backbone, make_config(name, "lora"))
    perturb(model)
    model.train()(**make_inputs(name)).projection.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao_int8"])
def test_it_is_not_fine_tuned(saved, kind):
    assert_refused(lambda: network_of(quantized(saved[1], kind)), "quantized", "load the backbone")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_load_backbone_records_the_quantization(saved, kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    name, folder = saved
    backbone = hfproj.load_backbone(str(folder), quantization_config=CONFIGS[kind])
    model = get_peft_model(backbone, make_config(name, "head")).eval()
    model.save_pretrained(tmp_path)
    again = hfproj.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**make_inputs(name)).projection, model(**make_inputs(name)).projection)


def test_a_repacked_backbone_is_refused(saved):
    name, folder = saved
    backbone = quantized(folder, "fp4").eval()
    if not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in backbone.modules()):
        pytest.skip("bitsandbytes repacks 4-bit weights on CPUs with AVX512-BF16 only")
    wide = [m for m in backbone.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    wide[0].weight.quant_state.packing_format_for_cpu = True
    assert_refused(lambda: get_peft_model(backbone, make_config(name, "head")), "repacked")


@pytest.mark.parametrize("method", loading.METHODS)
def test_a_missing_package_is_named(method, tmp_path, monkeypatch):
    make_backbone("vit").save_pretrained(tmp_path)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == method else real(name, *a))
    call = lambda: hfproj.load_backbone(str(tmp_path), quantization_config={"quant_method": method})  # noqa: E731
    assert_refused(call, f"pip install {method}")
