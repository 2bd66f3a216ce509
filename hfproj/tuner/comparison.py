"""How two adapters differ: in what they hold and compute, and in what they were trained for."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import nn

from hfproj.backbones import resolve_read_point
from hfproj.heads import HEADS
from hfproj.objectives import OBJECTIVES
from hfproj.tuner.config import ProjectionHeadConfig, plain

_COMPARED = ("head", "in_dim", "out_dim", "scales", "pooling", "layer", "reading", "trainable")
_KINDS = {"head_options": "head", "predictor": "predictor.head", "backbone_adapter": "backbone_adapter.peft_type"}
# Of the backbone's PEFT method, what is about training or about the file.
_FREE = {"inference_mode", "base_model_name_or_path", "revision", "peft_version", "task_type", "auto_mapping"}


def differences(model: PeftModel, saved: ProjectionHeadConfig, own: ProjectionHeadConfig) -> dict[str, list[str]]:
    """Return part → in words, in what of it two adapters differ: their tensors or what they compute would disagree."""
    parts = [_parts(config) for config in (saved, own)]
    found: dict[str, list[str]] = {}
    for name in sorted(parts[0].keys() | parts[1].keys()):
        there, here = (part.get(name) for part in parts)
        part = name.partition(".")[0]
        kind = _KINDS.get(part, "")
        same = parts[0].get(kind) == parts[1].get(kind)  # else the options are others, too, and the kind says it all
        if there != here and (name == kind or same):
            said = f"{part if name == kind else name} is {_short(there)} there and {_short(here)} here"
            found.setdefault(part, []).append(said)
    if "reading" in found and _reads_alike(model.get_base_model(), saved, own):
        del found["reading"]
    return found


def terms(config: ProjectionHeadConfig) -> dict[str, Any]:
    """Return what an adapter was trained for: the objective, its options with their defaults, and regularizers."""
    options = dict(config.objective or {})
    name = options.pop("name", None)
    options = {**_defaults(OBJECTIVES.options(name)), **options} if name in OBJECTIVES.list() else options
    added = {f"regularizer {n}": value for n, value in (config.regularizers or {}).items()}
    return plain({"objective": name, **{f"objective.{n}": value for n, value in options.items()}, **added})


def _reads_alike(backbone: nn.Module, *configs: ProjectionHeadConfig) -> bool:
    """Whether versions of the reading rules come to one thing; of texts they never do, which are padded."""
    points = set()
    for config in configs:
        how: dict[str, Any] = {n: getattr(config, n) for n in ("pooling", "layer", "in_dim", "reading")}
        points.add(dataclasses.replace(resolve_read_point(backbone, **how), reading=1))
    return len(points) == 1 and not points.pop().text


def _parts(config: ProjectionHeadConfig) -> dict[str, Any]:
    parts = {name: getattr(config, name) for name in _COMPARED}
    parts["scales"] = sorted(config.scales or ())
    parts |= _head_options("head_options", config.head, config.head_options)
    if isinstance(config.predictor, dict):
        parts |= _head_options("predictor", config.predictor["head"], config.predictor)
    prototypes = config.prototypes if isinstance(config.prototypes, dict) else {"count": config.prototypes}
    parts |= {f"prototypes.{n}": v for n, v in {"learn_norm": False, **prototypes}.items()}
    for name, value in config.backbone_options.items():
        if name not in _FREE and "dropout" not in name and not name.startswith("init_"):
            parts[f"backbone_adapter.{name}"] = sorted(value) if isinstance(value, list | set) else value
    return {name: plain(value) for name, value in parts.items() if value is not None}


def _head_options(prefix: str, head: str, options: Mapping[str, Any]) -> dict[str, Any]:
    found = {**_defaults(HEADS.options(head)), **options}
    return {f"{prefix}.{name}": value for name, value in found.items() if name not in ("in_dim", "out_dim")}


def _defaults(options: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    return {n: p.default for n, p in options.items() if p.default is not inspect.Parameter.empty}


def _short(value: Any) -> str:
    return f"{len(value)} modules" if isinstance(value, list) and len(value) > 4 else repr(value)
