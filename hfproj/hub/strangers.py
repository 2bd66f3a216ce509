"""An adapter's configuration as a stranger wrote it: what may be in it, and which tensors it then has.

Each field has one of the values that `ProjectionHeadConfig` can mean, sizes are bounded, nothing names code, and the
config of the backbone's PEFT method holds numbers, switches and names of modules only: the options through which PEFT
imports modules, reads further files or rewrites the backbone have their defaults or are refused.
"""

import dataclasses
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from torch import nn

from hfproj.backbones import EMBEDDED, POOLINGS
from hfproj.errors import AdapterFileError, UsageError
from hfproj.filenames import ADAPTER_CONFIG
from hfproj.hub.remote import is_repo_id
from hfproj.hub.safety import one_line, pattern_cost, read_json, short
from hfproj.tuner.config import WIDEST, ProjectionHeadConfig, entries, plain

LARGEST_RANK = 1 << 16
SMALL_RANK = 256  # that even a tiny backbone may be given
MOST_STEPS = 300_000  # for matching one module's name
_CODE = (
    "auto_map", "trust_remote_code", "code_revision", "remote_code", "custom_modules", "custom_objects",
    "custom_pipelines", "import_allowlist", "allow_all_kernels", "_target_", "__class__", "__reduce__", "py/object",
)  # fmt: skip
_LIBRARIES = ("transformers", "timm")  # whose classes a config may name, and hfproj loads backbones from


def read_config(path: Path, where: str) -> ProjectionHeadConfig:
    """Return the configuration in a stranger's adapter_config.json.

    Raises:
        AdapterFileError: it is damaged, of another PEFT method, names what no adapter needs, or its options can't work.
    """
    values = read_json(path, where)
    kind = values.get("peft_type")
    if kind != PeftType.PROJECTION_HEAD:
        shown = kind if isinstance(kind, str) and kind.isidentifier() and len(kind) < 40 else short(kind)
        raise AdapterFileError(f"{where} holds a {shown} adapter, no projection head; load it with PEFT itself.")
    for name, value in entries(values):
        if name in _CODE and value not in (None, False, [], {}, ""):
            raise AdapterFileError(
                f"{where}: {ADAPTER_CONFIG} names code to run ({name}={short(value)}); an adapter needs none, and "
                "none is run."
            )
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
        raise AdapterFileError(
            f"{where}: {ADAPTER_CONFIG} lacks in_dim; save the adapter with model.save_pretrained(…)."
        )
    _check_backbone_fields(values, where)
    if values.get("backbone_adapter") is not None:
        values["backbone_adapter"] = _checked_inner(values["backbone_adapter"], where)
    try:
        config = ProjectionHeadConfig(**values)
        config.inner_config()
    except Exception as error:  # whatever a value does to PEFT's own checks
        raise AdapterFileError(f"{where}: {ADAPTER_CONFIG} can't be used: {one_line(error, 400)}") from error
    return config


def _misplaced(where: str, name: str, value: Any, expected: str) -> AdapterFileError:
    return AdapterFileError(f"{where}: {ADAPTER_CONFIG} says {name}={short(value)}, expected {expected}.")


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


def _is_head(value: Any) -> bool:
    return _is_name(value) or (isinstance(value, dict) and _is_name(value.get("head")))


def _is_prototypes(value: Any) -> bool:
    if not isinstance(value, dict):
        return _is_whole(value, 2, WIDEST)
    return _is_whole(value.get("count"), 2, WIDEST) and isinstance(value.get("learn_norm", False), bool)


def _are_scales(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= 100
        and all(n.isidentifier() and _is_number(v) for n, v in value.items())
    )


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


_OBJECT = ("a JSON object", lambda value: isinstance(value, dict))
_OBJECT_OR_NONE = ("null or a JSON object", _or_none(_OBJECT[1]))
_NAME_OR_NONE = ("null or a short text", _or_none(lambda value: isinstance(value, str) and len(value) <= 1000))
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "head": ("the name of a head", _is_name),
    "head_options": _OBJECT,
    "out_dim": (f"null or a whole number from 1 to {WIDEST:,}", _or_none(lambda value: _is_whole(value, 1, WIDEST))),
    "in_dim": (f"a whole number from 1 to {WIDEST:,}", _or_none(lambda value: _is_whole(value, 1, WIDEST))),
    "predictor": ("null or a JSON object with a head", _or_none(_is_head)),
    "prototypes": ("null, a whole number, or a JSON object with such a count", _or_none(_is_prototypes)),
    "scales": ("null or a JSON object of numbers", _or_none(_are_scales)),
    "objective": _OBJECT_OR_NONE,
    "regularizers": _OBJECT_OR_NONE,
    "backbone_adapter": _OBJECT_OR_NONE,
    "backbone": _OBJECT_OR_NONE,
    "trainable": ("a text or a number of blocks", lambda value: isinstance(value, str) or _is_whole(value, 1, 10_000)),
    "pooling": (f"null or one of {', '.join(POOLINGS)}", _or_none(lambda value: value in POOLINGS)),
    "layer": ("the index of a block", lambda value: _is_whole(value, -10_000, 10_000)),
    "keep_original": ("true or false", lambda value: isinstance(value, bool)),
    "inference_mode": ("true or false", lambda value: isinstance(value, bool)),
    "task_type": _NAME_OR_NONE,
    "peft_version": _NAME_OR_NONE,
    "base_model_name_or_path": _NAME_OR_NONE,
    "revision": _NAME_OR_NONE,
    "auto_mapping": _OBJECT_OR_NONE,
}


def _check_backbone_fields(values: dict[str, Any], where: str) -> None:
    """Check the form of what the config says of its backbone; whether to load it is `backbone_source`'s matter."""
    source = values.get("backbone") or {}
    parts = {"library": _is_name, "id": _is_name, "revision": _is_name, "kwargs": _OBJECT[1]}
    for name, value in source.items():
        if name not in parts:
            raise _misplaced(where, f"backbone.{name}", value, f"no entries but {', '.join(parts)}")
        if value is not None and not parts[name](value):
            raise _misplaced(where, f"backbone.{name}", value, "a JSON object" if name == "kwargs" else "a short text")
    mapping = values.get("auto_mapping") or {}
    for name, value in mapping.items():
        if value is not None and not (isinstance(value, str) and re.fullmatch(r"\w[\w.]{0,200}", value)):
            raise _misplaced(where, f"auto_mapping.{name}", value, "the name of a class or module")
    library = str(mapping.get("parent_library") or "").split(".")[0]
    foreign = library not in ("", "hfproj", *_LIBRARIES) if source.get("id") else library in sys.stdlib_module_names
    if foreign:
        raise AdapterFileError(
            f"{where}: {ADAPTER_CONFIG} names code to import (auto_mapping={short(mapping)}), which is no backbone of "
            f"{' or '.join(_LIBRARIES)}."
        )


# --- the backbone's PEFT method ---

_MODULE_NAMES = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern")
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
        raise AdapterFileError(f"{where}: {one_line(error, 400)}") from error
    fields = {f.name for f in dataclasses.fields(cls)}
    defaults = plain(cls().to_dict())
    kept = {"peft_type": kind}
    for name, value in inner.items():
        if name in _IGNORED or name not in fields:
            continue
        if value != defaults.get(name) or isinstance(value, bool) is not isinstance(defaults.get(name), bool):
            expected = _inner_problem(name, value, defaults.get(name))
            if expected:
                raise _misplaced(where, f"backbone_adapter.{name}", value, expected)
        kept[name] = value
    return kept


def _inner_problem(name: str, value: Any, default: Any) -> str | None:
    """Return what was expected instead of `value`, or None where it may stand."""
    if name in _MODULE_NAMES:
        return None if _are_module_names(value) else "null, names of modules, or a simple pattern that matches them"
    if name == "layers_to_transform":
        layers = value if isinstance(value, list) else [value]
        return None if value is None or _all_whole(layers, 10_000) else "null or indices of layers"
    if name.endswith("_pattern"):
        return None if _is_pattern_table(value) else "null or a JSON object: name of a module → number"
    if isinstance(value, bool):
        return None if isinstance(default, bool | str | None) and not name.endswith("_config") else f"{short(default)}"
    if isinstance(value, str) and _CHOICES.fullmatch(name):
        return None if re.fullmatch(r"\w{0,40}", value) else "the name of a choice"
    if _is_number(value) and (_is_number(default) or default is None):
        bounded = _ANY_NUMBER.fullmatch(name) or isinstance(value, float) or abs(value) <= LARGEST_RANK
        return None if bounded else f"a number of at most {LARGEST_RANK:,}"
    if value is None and (default is None or name in ("r", "alpha")):
        return None
    return f"{short(default)}, its default: nothing else is taken from a file"


def _all_whole(values: list[Any], most: int) -> bool:
    return len(values) <= most and all(_is_whole(v, 0, most) for v in values)


def _are_module_names(value: Any) -> bool:
    if value is None:
        return True
    if isinstance(value, str):
        return pattern_cost(value) <= MOST_STEPS
    names = isinstance(value, list) and len(value) <= 20_000 and all(map(_is_name, value))
    return names and sum(pattern_cost(n) for n in value) <= MOST_STEPS


def _is_pattern_table(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or len(value) > 2000 or sum(map(pattern_cost, value)) > MOST_STEPS / 60:
        return False
    return all(isinstance(n, float) or _is_whole(n, 0, LARGEST_RANK) for n in value.values())


def check_rank(config: ProjectionHeadConfig, backbone: nn.Module, where: str) -> None:
    """Refuse a backbone_adapter whose rank exceeds every width of the backbone, before its tensors are made.

    Raises:
        AdapterFileError: it does.
    """
    inner = config.backbone_options
    widest = max((n for p in backbone.parameters() for n in p.shape), default=0)
    ranks = [inner.get("r"), *(inner.get("rank_pattern") or {}).values()]
    largest = max((r for r in ranks if isinstance(r, int | float)), default=0)
    if largest > max(widest, SMALL_RANK):
        raise AdapterFileError(
            f"{where}: its {inner['peft_type']} has rank {largest}, but no layer of {type(backbone).__name__} is wider "
            f"than {widest}; the adapter belongs to another backbone."
        )


# --- the backbone ---

_DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")  # others load kernels


def _is_size(value: Any) -> bool:
    return _is_whole(value, 1, 10_000)


def _is_image_size(value: Any) -> bool:
    return len(value) == 2 and all(map(_is_size, value)) if isinstance(value, list) else _is_size(value)


_KWARGS: dict[str, Callable[[Any], bool]] = {
    "add_pooling_layer": lambda value: isinstance(value, bool),
    "dynamic_img_size": lambda value: isinstance(value, bool),
    "pretrained": lambda value: isinstance(value, bool),
    "num_classes": lambda value: _is_whole(value, 0, WIDEST),
    "embed_dim": lambda value: _is_whole(value, 1, 2048),
    "depth": lambda value: _is_whole(value, 1, 64),
    "num_heads": lambda value: _is_whole(value, 1, 256),
    "mlp_ratio": lambda value: _is_number(value) and 0 < value <= 8,
    "reg_tokens": lambda value: _is_whole(value, 0, 256),
    "class_token": lambda value: isinstance(value, bool),
    "no_embed_class": lambda value: isinstance(value, bool),
    "in_chans": _is_size,
    "img_size": _is_image_size,
    "patch_size": _is_image_size,
    "global_pool": lambda value: isinstance(value, str) and re.fullmatch(r"\w{0,20}", value) is not None,
    "attn_implementation": lambda value: value in _ATTENTION,
    "dtype": lambda value: value in _DTYPES,
}


def backbone_source(config: ProjectionHeadConfig, where: str, *, local: bool) -> dict[str, Any]:
    """Return how to load the backbone that a config names: ``name``, ``library``, ``revision`` and options.

    Args:
        config: A configuration that `read_config` returned.
        where: The adapter, for messages.
        local: Whether the adapter lies in a folder of the user's, whose backbone may be a folder too.

    Raises:
        UsageError: it names none.
        AdapterFileError: it names one that must not be loaded because a file says so.
    """
    source = config.backbone or {}
    name, library, revision = source.get("id"), source.get("library"), source.get("revision")
    if not name:
        raise UsageError(
            f"{where} does not say which backbone it was trained on; load that backbone and pass it as "
            "from_pretrained(…, backbone=backbone)."
        )
    cure = "load the backbone yourself and pass it as backbone="
    for option, value in (source.get("kwargs") or {}).items():
        if option not in _KWARGS or not (value is None or _KWARGS[option](value)):
            raise AdapterFileError(
                f"{where}: {ADAPTER_CONFIG} asks to load its backbone with {short(option)[1:-1]}={short(value)}, "
                f"which is not allowed; {cure}."
            )
    if library not in (None, *_LIBRARIES):
        raise AdapterFileError(f"{where}: its backbone is one of library {short(library)}; {cure}.")
    timm = library == "timm" or name.startswith(("timm/", "hf-hub:timm/"))
    known = re.fullmatch(r"((hf-hub:)?timm/)?\w[\w.-]*", name) if timm else is_repo_id(name) or name == EMBEDDED
    if not known and not (local and not timm and os.path.isdir(name)):
        raise AdapterFileError(
            f"{where}: {ADAPTER_CONFIG} names {short(name)} as its backbone, which is no id of a model on the Hub; "
            f"{cure}."
        )
    if revision is not None and (not re.fullmatch(r"\w[\w./-]*", revision) or ".." in revision):
        raise AdapterFileError(f"{where}: its backbone has revision {short(revision)}; {cure}.")
    return {"name": name, "library": library, "revision": revision, **(source.get("kwargs") or {})}
