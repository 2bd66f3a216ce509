"""What a config means for one backbone: where h is read, which tensors are trained, which layers PEFT reaches."""

import inspect
import re
from contextlib import suppress
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from hfproj.backbones import (
    READING,
    FeatureBackbone,
    ReadPoint,
    acting_modules,
    bare_tensors,
    feeds_representation,
    last_blocks,
    library_of,
    resolve_read_point,
    source_of,
)
from hfproj.backbones.loading import quantization_of
from hfproj.backbones.quantized import METHODS, is_quantized_linear, is_repacked, quantized_names
from hfproj.errors import AdapterFileError, UsageError
from hfproj.heads import check_known
from hfproj.tuner.config import ProjectionHeadConfig
from hfproj.tuner.layer import CHILD, ProjectionLayer

_WITH_CONV1D = ("LORA", "IA3")  # methods of PEFT that know transformers' transposed linear layer


def refuse_foreign(model: nn.Module, name: str, config: ProjectionHeadConfig) -> None:
    """Refuse a name that no module can have, and a backbone whose place for the head is taken, that carries another
    PEFT adapter, or can't be saved.
    """
    if not isinstance(name, str) or not name or "." in name:
        hint = f": {name.replace('.', '_')!r}" if isinstance(name, str) and name else ", such as 'default'"
        raise UsageError(
            f"Expected adapter_name without a dot, since modules have it, got {name!r}; take another{hint}."
        )
    if isinstance(model, PeftModel):
        raise UsageError(
            "This model has an adapter already. model.add_adapter(name, config) puts a second head beside it, "
            "model.load_adapter(folder, name) a saved one, and model.unload() returns the bare backbone."
        )
    if config.in_dim is not None:  # of a file: its head may be one that its author alone has
        predictor = config.predictor if isinstance(config.predictor, dict) else {}
        check_known([config.head, predictor.get("head")], f"Adapter {name!r}")
    taken = hasattr(model, CHILD)
    if taken and not isinstance(getattr(model, CHILD), ProjectionLayer):
        raise UsageError(f"{type(model).__name__} has a submodule named {CHILD!r}, where the head would go; rename it.")
    if not taken and any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise UsageError(
            "This backbone carries another PEFT adapter already. Attach the head to the bare backbone and pass "
            "that method as ProjectionHeadConfig(backbone_adapter=LoraConfig(…)), or merge it first."
        )
    if any(is_repacked(p) for p in model.parameters()):
        raise UsageError(
            "This backbone ran in eval mode on the CPU, where bitsandbytes has repacked its 4-bit weights: no gradient "
            "flows through them, and saving would put them into a wrong order. Load it again, and attach the adapter "
            "before it runs."
        )


def resolve(model: nn.Module, config: ProjectionHeadConfig) -> ReadPoint:
    """Return where h is read, and fill what the backbone decides into `config`."""
    saved_width = config.in_dim
    if isinstance(model, FeatureBackbone):
        config.reading = model.reading
    how: dict[str, Any] = {"pooling": config.pooling, "layer": config.layer, "reading": config.reading or READING}
    if library_of(model) == "torch" and config.reading != 1:
        how["in_dim"] = saved_width  # of a plain module the input is a guess, and so may its width be
    try:
        point = resolve_read_point(model, **how)
    except UsageError:
        if saved_width is None:
            raise
        point = resolve_read_point(model, **{**how, "in_dim": saved_width})
    if saved_width is not None and saved_width != point.in_dim:
        raise AdapterFileError(
            f"This head takes a representation of {saved_width} dimensions, but {type(model).__name__} gives "
            f"{point.in_dim} (pooling={point.pooling!r}, layer={config.layer}); use the backbone it was made for"
            + (f" ({made_on})." if (made_on := (config.backbone or {}).get("id")) else ".")
        )
    config.in_dim, config.pooling = point.in_dim, point.pooling
    if config.backbone is None:
        config.backbone = source_of(model)
        made = "add_pooling_layer" in inspect.signature(type(model).__init__).parameters
        if config.backbone and made and point.pooling == "pooler":  # else load_backbone leaves it out
            config.backbone = {**config.backbone, "kwargs": {**config.backbone["kwargs"], "add_pooling_layer": True}}
    return point


def trained_names(model: nn.Module, config: ProjectionHeadConfig, point: ReadPoint) -> list[str]:
    """Return the names of the backbone's own tensors that `config` trains."""
    if isinstance(config.trainable, int):
        names = last_blocks(model, point, config.trainable)
    else:
        names = feeds_representation(model, point) if config.trainable == "full" else []
    tensors = bare_tensors(model) if names else {}
    if packed := quantized_names((name, tensors[name]) for name in names):
        more = f" and {len(packed) - 2} more" if len(packed) > 2 else ""
        hint = "use backbone_adapter=LoraConfig(…), or load the backbone without quantization"
        raise UsageError(
            f"trainable={config.trainable!r} would train {', '.join(packed[:2])}{more}, which are quantized; {hint}."
        )
    return names


def resolved_inner(model: nn.Module, config: ProjectionHeadConfig, point: ReadPoint) -> PeftConfig | None:
    """Return the backbone's PEFT config with its targets resolved from the model itself, or None."""
    inner: Any = config.inner_config()
    if inner is None:
        return None
    named = getattr(inner, "target_modules", None) not in (None, "all-linear")
    acting = acting_modules(model, point)
    if not named:
        targets = [n for n in _default_targets(model, inner.peft_type, acting) if _takes(model, inner, n)]
        if not targets:
            kind, method = type(model).__name__, inner.peft_type.value
            raise UsageError(
                f"{kind} has no layer that {method} can adapt; give the backbone_adapter target_modules, or use "
                "trainable='full' or 'head'."
            )
        targets = _of_asked_blocks(targets, inner)
        # PEFT takes a name for a suffix: 'norm' would match 'blocks.0.attn.norm', too. A pattern matches in full.
        ambiguous = any(n.endswith(f".{t}") for t in targets for n, _ in _bare(model) if n not in targets)
        chosen = "|".join(re.escape(t) for t in targets) if ambiguous else targets
        inner.target_modules = config.backbone_options["target_modules"] = chosen
        kinds = {type(m) for n, m in _bare(model) if n in targets}
        if kinds == {Conv1D} and hasattr(inner, "fan_in_fan_out"):
            inner.fan_in_fan_out = True
        if inner.peft_type == "IA3" and inner.feedforward_modules is None:
            inner.feedforward_modules = []
    inner.inference_mode, inner.base_model_name_or_path = config.inference_mode, None
    return inner


def _of_asked_blocks(targets: list[str], inner: Any) -> list[str]:
    """Return the targets in the blocks that `inner` asks for, and take its request back, which they answer.

    PEFT looks at blocks only where it completes the names of targets, and these are complete. As in PEFT, a block's
    index is the first number in a name, or the one behind `layers_pattern`.
    """
    asked, patterns = getattr(inner, "layers_to_transform", None), getattr(inner, "layers_pattern", None)
    if asked is None or asked == []:
        return targets
    before = "|".join([patterns] if isinstance(patterns, str) else patterns or []) or r"[^.]+"
    found = {n: re.search(rf"(?:^|\.)(?:{before})\.(\d+)\.", n) for n in targets}
    blocks = {n: int(match[1]) for n, match in found.items() if match}
    kept = [n for n, block in blocks.items() if block in ({asked} if isinstance(asked, int) else set(asked))]
    if not kept:
        there = f"the indices {sorted(set(blocks.values()))}" if blocks else "no index in their names"
        behind = f" behind layers_pattern={patterns!r}" if patterns else ""
        raise UsageError(
            f"backbone_adapter: layers_to_transform={asked!r} names no block with a layer to adapt: they have "
            f"{there}{behind}; name some of these, or leave layers_to_transform out."
        )
    inner.layers_to_transform = inner.layers_pattern = None
    return kept


def _bare(model: nn.Module) -> list[tuple[str, nn.Module]]:
    layers = [(n, m) for n, m in model.named_modules() if not isinstance(m, BaseTunerLayer)]
    return [(n.replace(".base_layer", ""), m) for n, m in layers]


def _takes(model: nn.Module, inner: Any, target: str) -> bool:
    """Return whether PEFT adapts this layer: of Mamba it refuses those that a fused kernel reads."""
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[inner.peft_type]
    try:  # private to PEFT, which has no public list of them; the method reads nothing of a tuner
        tuner._check_target_module_compatiblity(tuner, inner, model, target.rpartition(".")[2])
    except ValueError:
        return False
    return True


def _default_targets(model: nn.Module, method: str, acting: set[str]) -> list[str]:
    """Return the names of the layers that `method` adapts: those of its kinds that run and feed h."""
    quantized_by = (quantization_of(model) or {}).get("quant_method", METHODS[0])
    if quantized_by not in METHODS:
        known = f"only layers of {' and '.join(METHODS)} are found"
        raise UsageError(
            f"{type(model).__name__} is quantized by {quantized_by}: {known}; give the backbone_adapter target_modules."
        )
    modules = [(n, m) for n, m in _bare(model) if n in acting]
    if method == "LN_TUNING":
        return sorted(n for n, m in modules if "Norm" in type(m).__name__)
    # Exact types: a subclass has a forward of its own (padding, weight norm), which PEFT does not imitate.
    linear = [n for n, m in modules if _is_linear(m) or (type(m) is Conv1D and method in _WITH_CONV1D)]
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return sorted(linear or [n for n, m in modules if type(m) in kinds and m.groups == 1 and not _dilated(m)])


def _is_linear(module: nn.Module) -> bool:
    """Whether a layer is torch's linear one, quantized, or a subclass that computes the same (Falcon's)."""
    if is_quantized_linear(module):
        return True
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point() or module.weight.is_meta:
        return type(module) is nn.Linear
    if type(module) is nn.Linear or is_parametrized(module):  # merging into a weight that is computed would be lost
        return type(module) is nn.Linear
    x = torch.linspace(-1, 1, 2 * module.in_features).reshape(2, -1).to(module.weight)
    with torch.no_grad(), suppress(Exception):  # whatever a forward of its own raises
        return torch.allclose(module(x), nn.functional.linear(x, module.weight, module.bias), rtol=1e-2, atol=1e-3)
    return False


def _dilated(module: Any) -> bool:
    """Whether a convolution skips pixels, which the convolutions of PEFT's layers do not imitate."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and any(step != 1 for step in module.dilation)


def check_inner(model: nn.Module, adapter: str, config: ProjectionHeadConfig, point: ReadPoint) -> None:
    """Refuse PEFT layers in place of layers that the config names but that never run; lend the others attributes.

    The backbone's code may read an attribute (the stride of a convolution) that PEFT's layer does not have.

    Raises:
        UsageError: If the backbone uses the weight of such a layer without running it.
    """
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and isinstance(getattr(module, "base_layer", None), nn.Module):
            base = vars(module.base_layer)
            lent = {
                n: v for n, v in base.items() if isinstance(v, int | float | str | tuple) and not hasattr(module, n)
            }
            vars(module).update(lent)
    adapted = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        and not isinstance(module, ProjectionLayer)
        and adapter in module._all_available_adapter_names()  # private to PEFT: there is no public list
    ]
    if dilated := [name for name, module in adapted if _dilated(getattr(module, "base_layer", None))]:
        raise UsageError(f"PEFT can't adapt the dilated convolution {dilated[0]}; leave it out of target_modules.")
    if config.reading == 1 or not adapted:
        return  # an adapter of hfproj 0.1.0 goes on as it was; what could not learn stays frozen
    acting, used = acting_modules(model, point), {n.rpartition(".")[0] for n in feeds_representation(model, point)}
    idle = [
        name
        for name, _ in adapted
        if ".base_layer." not in f"{name}."  # the inside of another PEFT layer, which runs it in its own way
        and name in used - acting
    ]
    if idle:
        raise UsageError(
            f"{type(model).__name__} uses the weight of {', '.join(idle[:3])}"
            + (f" and {len(idle) - 3} more" if len(idle) > 3 else "")
            + " without running the layer, so that a PEFT layer in its place would never act; leave it out of "
            "target_modules, or leave target_modules out."
        )
