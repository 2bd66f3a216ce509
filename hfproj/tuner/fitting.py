"""What a config means for one backbone: where h is read, which tensors are trained, which layers PEFT reaches."""

import re
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hfproj.backbones import ReadPoint, feeds_representation, last_blocks, resolve_read_point, source_of
from hfproj.errors import AdapterFileError, UsageError
from hfproj.tuner.config import ProjectionHeadConfig
from hfproj.tuner.layer import CHILD, ProjectionLayer


def refuse_foreign(model: nn.Module) -> None:
    """Refuse a backbone whose place for the head is taken, or that carries another PEFT adapter."""
    taken = hasattr(model, CHILD)
    if taken and not isinstance(getattr(model, CHILD), ProjectionLayer):
        raise UsageError(f"{type(model).__name__} has a submodule named {CHILD!r}, where the head would go; rename it.")
    if not taken and any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise UsageError(
            "This backbone carries another PEFT adapter already. Attach the head to the bare backbone and pass "
            "that method as ProjectionHeadConfig(backbone_adapter=LoraConfig(…)), or merge it first."
        )


def resolve(model: nn.Module, config: ProjectionHeadConfig) -> ReadPoint:
    """Return where h is read, and fill what the backbone decides into `config`."""
    saved_width = config.in_dim
    try:
        point = resolve_read_point(model, pooling=config.pooling, layer=config.layer)
    except UsageError:
        if saved_width is None:
            raise
        point = resolve_read_point(model, pooling=config.pooling, layer=config.layer, in_dim=saved_width)
    if saved_width is not None and saved_width != point.in_dim:
        raise AdapterFileError(
            f"This head takes a representation of {saved_width} dimensions, but {type(model).__name__} gives "
            f"{point.in_dim} (pooling={point.pooling!r}, layer={config.layer}); use the backbone it was made for"
            + (f" ({made_on})." if (made_on := (config.backbone or {}).get("id")) else ".")
        )
    config.in_dim, config.pooling = point.in_dim, point.pooling
    if config.backbone is None:
        config.backbone = source_of(model)
    return point


def trained_names(model: nn.Module, config: ProjectionHeadConfig, point: ReadPoint) -> list[str]:
    """Return the names of the backbone's own tensors that `config` trains."""
    if isinstance(config.trainable, int):
        return last_blocks(model, point, config.trainable)
    return feeds_representation(model, point) if config.trainable == "full" else []


def resolved_inner(model: nn.Module, config: ProjectionHeadConfig, point: ReadPoint) -> PeftConfig | None:
    """Return the backbone's PEFT config with its targets resolved from the model itself, or None."""
    inner: Any = config.inner_config()
    if inner is None:
        return None
    if getattr(inner, "target_modules", None) in (None, "all-linear"):
        reached = {n.rpartition(".")[0] for n in feeds_representation(model, point)}
        layers = [(n, m) for n, m in model.named_modules() if not isinstance(m, BaseTunerLayer)]
        bare = {n.replace(".base_layer", ""): m for n, m in layers}
        modules = {n: m for n, m in bare.items() if n in reached}
        # Exact types: a subclass has a forward of its own (padding, weight norm), which PEFT does not imitate.
        if inner.peft_type == "LN_TUNING":
            targets = [n for n, m in modules.items() if "Norm" in type(m).__name__]
        else:
            targets = [n for n, m in modules.items() if type(m) is nn.Linear]
            targets = targets or [n for n, m in modules.items() if type(m) is nn.Conv2d and m.groups == 1]
        if not targets:
            kind, method = type(model).__name__, inner.peft_type.value
            raise UsageError(f"{kind} has no layer that {method} can adapt; give the backbone_adapter target_modules.")
        targets.sort()
        # PEFT takes a name for a suffix: 'norm' would match 'blocks.0.attn.norm', too. A pattern matches in full.
        ambiguous = any(n.endswith(f".{t}") for t in targets for n in bare if n not in targets)
        chosen = "|".join(re.escape(t) for t in targets) if ambiguous else targets
        inner.target_modules = config.backbone_options["target_modules"] = chosen
        if inner.peft_type == "IA3" and inner.feedforward_modules is None:
            inner.feedforward_modules = []
    inner.inference_mode, inner.base_model_name_or_path = config.inference_mode, None
    return inner
