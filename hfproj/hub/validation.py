"""Validation of an adapter's configuration that a third party wrote, and of the tensors that it has to have.

Each field has one of the values that `ProjectionHeadConfig` can mean, sizes are bounded, nothing names code, and the
config of the backbone's PEFT method holds numbers, switches and names of modules only: the options through which PEFT
imports modules, reads further files or rewrites the backbone have their defaults or are refused.

The tensors are found without allocating one: the head is made on torch's meta device, where a tensor is a shape. So a
configuration that asks for billions of numbers costs nothing before the file is seen not to hold them.
"""

import dataclasses
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType

from hfproj import limits
from hfproj.backbones import EMBEDDED, POOLINGS
from hfproj.backbones.fingerprint import is_fingerprint
from hfproj.backbones.small_images import STEMS
from hfproj.errors import AdapterFileError, UsageError, one_line
from hfproj.filenames import ADAPTER_CONFIG
from hfproj.heads import HEADS, check_known
from hfproj.hub.quantization import is_quantization
from hfproj.hub.sources import is_repo_id
from hfproj.hub.untrusted import FLOATS, TensorInfo, pattern_cost
from hfproj.strict_json import read_json, short
from hfproj.tuner.config import ProjectionHeadConfig, entries, plain
from hfproj.tuner.layer import CHILD, HeadModules

HEAD_KEYS = f"base_model.model.{CHILD}.projection_head_modules."
BACKBONE_KEYS = f"base_model.model.{CHILD}.backbone."
_CODE = (
    "auto_map", "trust_remote_code", "code_revision", "remote_code", "custom_modules", "custom_objects",
    "custom_pipelines", "import_allowlist", "allow_all_kernels", "_target_", "__class__", "__reduce__", "py/object",
)  # fmt: skip
_LIBRARIES = ("transformers", "timm")  # whose classes a config may name, and hfproj loads backbones from


Check = Callable[[Any], bool]


def read_config(path: Path, where: str) -> ProjectionHeadConfig:
    """Return the configuration in an adapter_config.json that a third party wrote.

    One that is damaged, of another PEFT method, names what no adapter needs, or has options that can't be used, is an
    `AdapterFileError`.
    """
    values = read_json(path, where)
    kind = values.get("peft_type")
    if kind != PeftType.PROJECTION_HEAD:
        shown = kind if isinstance(kind, str) and kind.isidentifier() and len(kind) < 40 else short(kind)
        raise AdapterFileError(f"{where} holds a {shown} adapter, no projection head; load it with PEFT itself.")
    for name, value in entries(values):
        if name in _CODE and value not in (None, False, [], {}, ""):
            raise AdapterFileError(f"{where}: {ADAPTER_CONFIG} names code to run ({name}={short(value)}); none is run.")
    fields = {f.name for f in dataclasses.fields(ProjectionHeadConfig)}
    if later := sorted(set(values) - fields - set(_CODE)):
        warnings.warn(
            f"{where}: {ADAPTER_CONFIG} has entries that this version of hfproj does not know and ignores: "
            f"{short(', '.join(later), 200)[1:]}",
            stacklevel=4,
        )
    values = {name: value for name, value in values.items() if name in fields}
    for name, (expected, holds) in _FIELDS.items():
        if name in values and not holds(values[name]):
            raise _misplaced(where, name, values[name], expected)
    if values.get("in_dim") is None:
        raise AdapterFileError(f"{where}: {ADAPTER_CONFIG} lacks in_dim; save it with model.save_pretrained(…).")
    _check_backbone_fields(values, where)
    if values.get("backbone_adapter") is not None:
        values["backbone_adapter"] = _checked_inner(values["backbone_adapter"], where)
    try:
        config = ProjectionHeadConfig(**values)
        config.inner_config()
    except Exception as error:  # whatever a value does to PEFT's own checks
        raise AdapterFileError(f"{where}: {ADAPTER_CONFIG} can't be used: {one_line(error, 400)}.") from error
    return config


def _misplaced(where: str, name: str, value: Any, expected: str) -> AdapterFileError:
    return AdapterFileError(f"{where}: {ADAPTER_CONFIG} says {name}={short(value)}, expected {expected}.")


def _whole(low: int, high: int) -> Check:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= limits.NUMBER


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


def _kind(of: type) -> Check:
    return lambda value: isinstance(value, of)


def _is_predictor(value: Any) -> bool:
    return _is_name(value) or (isinstance(value, dict) and _is_name(value.get("head")))


def _is_prototypes(value: Any) -> bool:
    if not isinstance(value, dict):
        return _is_count(value)
    return _is_count(value.get("count")) and isinstance(value.get("learn_norm", False), bool)


def _are_scales(value: Any) -> bool:
    known = isinstance(value, dict) and len(value) <= 100
    return known and all(n.isidentifier() and _is_number(v) for n, v in value.items())


def _or_none(expected: str, holds: Check) -> tuple[str, Check]:
    return f"null or {expected}", lambda value: value is None or holds(value)


_is_bool, _is_object, _is_count = _kind(bool), _kind(dict), _whole(2, limits.WIDTH)
_WIDTH = _or_none(f"a whole number from 1 to {limits.WIDTH:,}", _whole(1, limits.WIDTH))
_BOOL = ("true or false", _is_bool)
_OBJECT_OR_NONE = _or_none("a JSON object", _is_object)
_TEXT_OR_NONE = _or_none("a short text", lambda value: isinstance(value, str) and len(value) <= 1000)
_FIELDS: dict[str, tuple[str, Check]] = {
    "head": ("the name of a head", _is_name), "head_options": ("a JSON object", _is_object), "out_dim": _WIDTH,
    "in_dim": _WIDTH, "predictor": _or_none("a JSON object with a head", _is_predictor),
    "prototypes": _or_none("a whole number, or a JSON object with that as its count", _is_prototypes),
    "scales": _or_none("a JSON object of numbers", _are_scales),
    "trainable": ("a text or a number of blocks", lambda value: isinstance(value, str) or _whole(1, 10_000)(value)),
    "pooling": _or_none(f"one of {', '.join(POOLINGS)}", lambda value: value in POOLINGS),
    "layer": ("the index of a block", _whole(-10_000, 10_000)),
    "fingerprint": _or_none("what hfproj wrote", is_fingerprint),
    "backbone_check": ("error or warn", lambda value: value in ("error", "warn")),
    "reading": _or_none("a whole number from 1 to 1,000", _whole(1, 1000)),
    **dict.fromkeys(("keep_original", "inference_mode"), _BOOL),
    **dict.fromkeys(("objective", "regularizers", "backbone_adapter", "backbone", "auto_mapping"), _OBJECT_OR_NONE),
    **dict.fromkeys(("task_type", "peft_version", "base_model_name_or_path", "revision"), _TEXT_OR_NONE),
}  # fmt: skip


def _check_backbone_fields(values: dict[str, Any], where: str) -> None:
    """Check the form of what the config says of its backbone; `backbone_source` decides whether to load it."""
    source = values.get("backbone") or {}
    parts: dict[str, Check] = {"library": _is_name, "id": _is_name, "revision": _is_name, "kwargs": _is_object}
    for name, value in source.items():
        if name not in parts or not (value is None or parts[name](value)):
            expected = {"kwargs": "a JSON object"}.get(name, "a short text, in one of " + ", ".join(parts))
            raise _misplaced(where, f"backbone.{name}", value, expected)
    mapping = values.get("auto_mapping") or {}
    for name, value in mapping.items():
        if value is not None and not (isinstance(value, str) and re.fullmatch(r"\w[\w.]{0,200}", value)):
            raise _misplaced(where, f"auto_mapping.{name}", value, "the name of a class or module")
    library = str(mapping.get("parent_library") or "").split(".")[0]
    foreign = library not in ("", "hfproj", *_LIBRARIES) if source.get("id") else library in sys.stdlib_module_names
    if foreign:
        what = f"{ADAPTER_CONFIG} names code to import (auto_mapping={short(mapping)})"
        raise AdapterFileError(f"{where}: {what}, which is no backbone of {' or '.join(_LIBRARIES)}.")


_MODULE_NAMES = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern")
_SEED = re.compile(r".*(seed|key)")
_ANY_NUMBER = re.compile(r".*(alpha|lambda|seed|key|warmup|interval)")  # they set no size
_CHOICES = re.compile(
    r"init_\w+|mask_type|variant|decomposition_method|wavelet_family|config_\w+|ab_svd_init|psoft_svd|bias"
)
_IGNORED = ("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode")


def _checked_inner(inner: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the config of the backbone's PEFT method without entries that PEFT would ignore."""
    kind = inner.get("peft_type")
    cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise _misplaced(where, "backbone_adapter.peft_type", kind, "the name of a PEFT method")
    try:
        ProjectionHeadConfig(backbone_adapter={"peft_type": kind})
    except UsageError as error:  # a method that can't live beside a head
        raise AdapterFileError(f"{where}: {one_line(error, 400)}.") from error
    fields = {f.name for f in dataclasses.fields(cls)} - set(_IGNORED)
    defaults = plain(cls().to_dict())
    kept = {name: value for name, value in inner.items() if name in fields}
    for name, value in kept.items():
        default = defaults.get(name)
        changed = value != default or isinstance(value, bool) is not isinstance(default, bool)
        if changed and (expected := _inner_problem(name, value, default)):
            raise _misplaced(where, f"backbone_adapter.{name}", value, expected)
    return {"peft_type": kind, **kept}


def _inner_problem(name: str, value: Any, default: Any) -> str | None:
    """Return what was expected instead of `value`, or None where it may stand."""
    if name in _MODULE_NAMES:
        return None if _are_module_names(value) else "null, names of modules, or a simple pattern that matches them"
    if name == "layers_to_transform":
        layers = value if isinstance(value, list) else [value]
        sound = value is None or (len(layers) <= 10_000 and all(map(_whole(0, 10_000), layers)))
        return None if sound else "null or indices of layers"
    if name.endswith("_pattern"):
        return None if _is_pattern_table(value) else "null or a JSON object: name of a module → number"
    if isinstance(value, bool):
        return None if isinstance(default, bool | str | None) and not name.endswith("_config") else f"{short(default)}"
    if isinstance(value, str) and _CHOICES.fullmatch(name):
        return None if re.fullmatch(r"\w{0,40}", value) else "the name of a choice"
    seed = isinstance(value, int) and _SEED.fullmatch(name)
    if seed or (_is_number(value) and (_is_number(default) or default is None)):
        bounded = _ANY_NUMBER.fullmatch(name) or isinstance(value, float) or abs(value) <= limits.RANK
        return None if bounded else f"a number of at most {limits.RANK:,}"
    if value is None and (default is None or name in ("r", "alpha")):
        return None
    return f"{short(default)}, its default: nothing else is taken from a file"


def _are_module_names(value: Any) -> bool:
    if value is None or isinstance(value, str):
        return value is None or pattern_cost(value) <= limits.PATTERN_STEPS
    names = isinstance(value, list) and len(value) <= 20_000 and all(map(_is_name, value))
    return names and sum(map(pattern_cost, value)) <= limits.PATTERN_STEPS


def _is_pattern_table(value: Any) -> bool:
    if value is None:
        return True
    if (
        not isinstance(value, dict)
        or len(value) > limits.PATTERNS
        or sum(map(pattern_cost, value)) > limits.PATTERN_STEPS / 60
    ):
        return False
    return all(_is_number(n) if isinstance(n, float) else _whole(0, limits.RANK)(n) for n in value.values())


_DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")  # others load kernels
_is_size = _whole(1, 10_000)


def _is_image_size(value: Any) -> bool:
    return len(value) == 2 and all(map(_is_size, value)) if isinstance(value, list) else _is_size(value)


_KWARGS: dict[str, Check] = {
    **dict.fromkeys(("add_pooling_layer", "dynamic_img_size", "pretrained", "class_token", "no_embed_class"), _is_bool),
    "img_size": _is_image_size,
    "stem": lambda value: value in STEMS,
    "width": lambda value: _is_number(value) and 1 / 64 <= value <= 16,
    "patch_size": lambda value: _is_image_size(value) and max(value if isinstance(value, list) else [value]) <= 512,
    "num_classes": _whole(0, limits.WIDTH),
    "embed_dim": _whole(1, 2048),
    "depth": _whole(1, 64),
    "num_heads": _whole(1, 256),
    "mlp_ratio": lambda value: _is_number(value) and 0 < value <= 8,
    "reg_tokens": _whole(0, 256),
    "in_chans": _whole(1, 1024),
    "global_pool": lambda value: isinstance(value, str) and re.fullmatch(r"\w{0,20}", value) is not None,
    "num_hidden_layers": _whole(0, 1000),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), _whole(1, 1024)),
    "hidden_act": lambda value: isinstance(value, str) and re.fullmatch(r"\w{0,40}", value) is not None,
    **dict.fromkeys(("layer_norm_eps", "rms_norm_eps"), lambda value: _is_number(value) and 0 <= value < 1),
    "image_size": _is_image_size,
    "quantization_config": is_quantization,
    "attn_implementation": lambda value: value in _ATTENTION,
    "dtype": lambda value: value in _DTYPES,
}


def backbone_source(config: ProjectionHeadConfig, where: str, *, local: bool) -> dict[str, Any]:
    """Return how to load the backbone that a config names: ``name``, ``library``, ``revision`` and options.

    An adapter that is `local`, in a folder of the user's, may name a folder. One that names no backbone is a
    `UsageError`, a name that must not be loaded because a file says so an `AdapterFileError`.
    """
    source = config.backbone or {}
    name, library, revision = source.get("id"), source.get("library"), source.get("revision")
    if not name:
        todo = "load that backbone and pass it as from_pretrained(…, backbone=backbone)"
        raise UsageError(f"{where} does not say which backbone it was trained on; {todo}.")

    def refusal(what: str) -> AdapterFileError:
        return AdapterFileError(f"{where}: {what}; load the backbone yourself and pass it as backbone=.")

    options = source.get("kwargs") or {}
    for option, value in options.items():
        if option not in _KWARGS or not (value is None or _KWARGS[option](value)):
            asked = f"{short(option)[1:-1]}={short(value)}"
            raise refusal(f"{ADAPTER_CONFIG} asks to load its backbone with {asked}, which is not allowed")
    if library not in (None, *_LIBRARIES):
        raise refusal(f"its backbone is one of library {short(library)}, not of {' or '.join(_LIBRARIES)}")
    timm = library == "timm" or name.startswith(("timm/", "hf-hub:timm/"))
    known = re.fullmatch(r"((hf-hub:)?timm/)?\w[\w.-]*", name) if timm else is_repo_id(name) or name == EMBEDDED
    if not known and not (local and not timm and os.path.isdir(name)):
        raise refusal(f"{ADAPTER_CONFIG} names {short(name)} as its backbone, which is no id of a model on the Hub")
    if revision is not None and (not re.fullmatch(r"\w[\w./-]*", revision) or ".." in revision):
        raise refusal(f"its backbone has revision {short(revision)}, which can't be one")
    return {"name": name, "library": library, "revision": revision, **options}


def head_tensors(config: ProjectionHeadConfig, where: str) -> dict[str, TensorInfo]:
    """Return the tensors of a config's head, predictor and prototypes, under their names in a saved file.

    The dtype is "F32" for any floating-point type. A head that can't be made so is an `AdapterFileError`.
    """
    try:
        check_known([config.head, (cast(dict[str, Any], config.predictor or {})).get("head")], where)
    except UsageError as error:
        raise AdapterFileError(str(error)) from error
    try:
        modules = _modules(config)
    except Exception as error:  # the head's own, or whatever a value does to torch
        what = f"no head {short(config.head)} can be made of its options"
        raise AdapterFileError(f"{where}: {what}: {one_line(error, 400)}.") from error
    kinds = {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
    return {
        HEAD_KEYS + name: TensorInfo(kinds.get(tensor.dtype, "F32"), tuple(tensor.shape))
        for name, tensor in modules.state_dict().items()
    }


def _modules(config: ProjectionHeadConfig) -> HeadModules:
    in_dim, predictor = cast(int, config.in_dim), cast(dict[str, Any], config.predictor or {})
    try:
        with torch.device("meta"):
            return HeadModules(config, in_dim)
    except (RuntimeError, NotImplementedError):
        names = [name for name in (config.head, predictor.get("head")) if name]
        if all(HEADS.get(name).__module__.startswith("hfproj.") for name in names):
            raise
        return HeadModules(config, in_dim)  # a class of the user's own need not know the meta device


def check_tensors(
    found: dict[str, TensorInfo], expected: dict[str, TensorInfo], config: ProjectionHeadConfig, where: str
) -> None:
    """Refuse, by an `AdapterFileError`, a file that lists other tensors (`found`) than `head_tensors` (`expected`).

    Those of the backbone's PEFT method, and the trained ones of the backbone itself, may be there where the config has
    them; they are compared when the backbone is there too.
    """
    problems = [f"missing {n}" for n in expected if n not in found]
    for name, info in found.items():
        wanted = expected.get(name)
        if wanted is None:
            if name.startswith(HEAD_KEYS) or not _may_have(config, name):
                problems.append(f"unexpected {short(name, 120)[1:-1]}")
        elif info.shape != wanted.shape:
            problems.append(f"{name} has shape {short(info.shape)}, expected {short(wanted.shape)}")
        elif info.dtype != wanted.dtype and not {info.dtype, wanted.dtype} <= set(FLOATS):
            problems.append(f"{name} has dtype {info.dtype}, expected {wanted.dtype}")
    if problems:
        listed = "; ".join(p.replace(HEAD_KEYS, "").replace("base_model.model.", "") for p in problems[:5])
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AdapterFileError(
            f"{where}: its tensors are not those of head {short(config.head)} ({config.in_dim} → {config.out_dim}): "
            f"{listed}{more}. The file belongs to another config or is damaged; download or save it again."
        )


def _may_have(config: ProjectionHeadConfig, name: str) -> bool:
    if name.startswith(BACKBONE_KEYS):
        return config.trains_backbone
    return config.backbone_adapter is not None and name.startswith("base_model.model.")
