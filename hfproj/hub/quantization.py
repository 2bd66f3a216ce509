"""Which quantizations of a backbone are made because a saved adapter says so: those of plain values.

transformers and torchao look up a class for each name in such a config; the names that may stand there are listed here.
"""

import re
from typing import Any

_CLASSES = {  # of torchao: the configs of weights in fewer bits, and what they are made of
    "Int8WeightOnlyConfig", "Int4WeightOnlyConfig", "IntxWeightOnlyConfig", "Float8WeightOnlyConfig",
    "Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig",
    "Float8DynamicActivationFloat8WeightConfig", "Float8DynamicActivationInt4WeightConfig",
    "PerRow", "PerTensor", "PerAxis", "PerGroup", "PerToken",
}  # fmt: skip
_CHOICES = {
    "MappingType", "IntxPackingFormat", "IntxChooseQParamsAlgorithm", "Int4PackingFormat",
    "Int4ChooseQParamsAlgorithm", "ZeroPointDomain", "KernelPreference", "Float8PackingFormat",
}  # fmt: skip
_OPTIONS = {"modules_to_not_convert", "include_input_output_embeddings", "untie_embedding_weights"}
_DTYPE = re.compile(r"(u?int|b?float)[0-9]{1,2}(_e\d{1,2}m\d{1,2}\w{0,5})?")
_NAME = re.compile(r"[\w.]{1,200}")


def is_quantization(value: Any) -> bool:
    """Return whether a config of quantization is one of bitsandbytes or torchao whose values are plain."""
    if not isinstance(value, dict):
        return False
    if value.get("quant_method") == "bitsandbytes":
        names = all(re.fullmatch(r"_?(load_in|llm_int8|bnb_4bit)_\w{1,40}|quant_method", n) for n in value)
        return names and all(map(_is_simple, value.values()))
    if value.get("quant_method") != "torchao" or not isinstance(value.get("quant_type"), dict):
        return False
    kinds, others = value["quant_type"], {n: v for n, v in value.items() if n not in ("quant_method", "quant_type")}
    if not others.keys() <= _OPTIONS or not all(map(_is_simple, others.values())):
        return False
    return kinds.keys() == {"default"} and _is_object(kinds["default"])


def _is_object(value: Any, depth: int = 3) -> bool:
    """Return whether `value` stands for a config of torchao, in the form that its ``config_to_dict`` writes."""
    if not isinstance(value, dict) or not value.keys() <= {"_type", "_version", "_data"} or not depth:
        return False
    kind, data = value.get("_type"), value.get("_data")
    if not isinstance(kind, str):
        return False
    if kind == "torch.dtype":
        return isinstance(data, str) and _DTYPE.fullmatch(data) is not None
    if kind in _CHOICES:
        return isinstance(data, str) and re.fullmatch(r"\w{1,40}", data) is not None
    if kind not in _CLASSES or not isinstance(data, dict) or not isinstance(value.get("_version", 1), int):
        return False
    return all(re.fullmatch(r"[a-z]\w{0,40}", n) for n in data) and all(
        _is_object(v, depth - 1) if isinstance(v, dict) else _is_simple(v) for v in data.values()
    )


def _is_simple(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 1000 and all(isinstance(v, str) and _NAME.fullmatch(v) for v in value)
    if isinstance(value, str):
        return re.fullmatch(r"\w{0,20}", value) is not None
    return value is None or isinstance(value, bool | int) or (isinstance(value, float) and abs(value) < 1e6)
