"""Which quantizations a saved adapter may ask for: plain values of bitsandbytes and torchao, no other class."""

import json

import pytest
from cases import assert_refused, make_backbone, make_config
from peft import get_peft_model

import hfproj
from hfproj.errors import AdapterFileError
from hfproj.hub.quantization import is_quantization

ROWS = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
DTYPE = {"_type": "torch.dtype", "_data": "float8_e4m3fn"}


def bits(**options):
    return {"quant_method": "bitsandbytes", **options}


def torchao(kind="Float8WeightOnlyConfig", data=None, **options):
    data = {"weight_dtype": DTYPE, "granularity": ROWS} if data is None else data
    return {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": kind, "_version": 2, "_data": data}},
        **options,
    }


ALLOWED = [
    bits(load_in_4bit=True, _load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"),
    bits(load_in_8bit=True, llm_int8_threshold=6.0, llm_int8_skip_modules=["layers.0", "head"]),
    torchao(),
    torchao("Int8WeightOnlyConfig", {"group_size": None, "set_inductor_config": True}, modules_to_not_convert=None),
    torchao("IntxWeightOnlyConfig", {"mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"}}),
]
REFUSED = [
    None,
    bits(load_in_4bit="__import__('os')"),
    bits(llm_int8_skip_modules=["(a+)+$"]),
    bits(use_exllama=True),
    {"quant_method": "gptq", "bits": 4},
    torchao("FqnToConfig", {"fqn_to_config": {"a": 1}}),
    torchao("IntxWeightOnlyConfig", {"weight_dtype": {"_type": "torch.dtype", "_data": "hub"}}),
    torchao("IntxWeightOnlyConfig", {"weight_dtype": {"_type": "os", "_data": "name"}}),
    torchao(data={"granularity": {"_type": "PerRow", "_data": {"dim": ROWS | {"_data": {"dim": ROWS}}}}}),
    torchao(tokenizer="a"),
    {"quant_method": "torchao", "quant_type": "int8_weight_only"},
    {"quant_method": "torchao", "quant_type": {"default": {"_type": ["a"], "_data": {}}}},
]


@pytest.mark.parametrize("config", ALLOWED, ids=lambda c: str(c)[:60])
def test_plain_configs_are_allowed(config):
    assert is_quantization(config)


@pytest.mark.parametrize("config", REFUSED, ids=lambda c: str(c)[:60])
def test_others_are_refused(config):
    assert not is_quantization(config)


def test_an_adapter_that_asks_for_another_is_refused(tmp_path):
    make_backbone("vit").save_pretrained(tmp_path / "backbone")
    backbone = hfproj.load_backbone(str(tmp_path / "backbone"))
    get_peft_model(backbone, make_config("vit")).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["backbone"]["kwargs"]["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    file.write_text(json.dumps(config))
    call = lambda: hfproj.from_pretrained(tmp_path / "adapter")  # noqa: E731
    assert_refused(call, "quantization_config", "load the backbone yourself", error=AdapterFileError)
