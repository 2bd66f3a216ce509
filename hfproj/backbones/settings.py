"""Settings that change what a backbone computes and that no shape of its tensors shows."""

import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

# Of transformers' configs: what changes no number that a backbone gives in eval mode, or is about its files and heads.
_NO_EFFECT = re.compile(
    r"_.*|architectures|(torch_)?dtype|transformers_version|model_type|name_or_path|use_cache|output_\w+|(use_)?return_dict"
    r"|\w*drop(out|_rate|_path|_prob)?\w*|\w*layerdrop|initializ\w+|\w*init\w*_(std|range|factor|scale)|\w*label\w*"
    r"|problem_type|\w*token_id|\w*loss\w*|\w*chunk\w*|tie_\w+|torchscript|\w*checkpointing|finetuning_task|prefix"
    r"|task_specific_params|tokenizer_class|pruned_heads|\w*attn_implementation|quantization_config|auto_map|mask_\w+"
    r"|apply_spec_augment|\w*jitter\w*|classifier_\w+|semantic_\w+|auxiliary_\w+|vocab_size|max_length|use_bfloat16"
    r"|dtype|cross_attention_hidden_size|add_cross_attention|num_beams|is_composition|\w*reduction"
)
_OFFSETS = "create_position_ids_from_input_ids"  # of models whose positions count from the padding's id (RoBERTa)
# Of modules: what belongs to training, to the size of an image at a time or to this machine, and what shapes show.
_OF_NO_USE = {
    "training", "inplace", "momentum", "track_running_stats", "in_features", "out_features", "in_channels",
    "out_channels",
    "num_features", "embed_dim", "num_classes", "img_size", "grid_size", "num_patches", "feat_size", "seq_len",
    "input_resolution", "fused_attn", "device", "dtype", "p", "name", "normalized_shape", "num_parameters",
    "layer_idx", "block_idx", "flatten", "output_fmt", "strict_img_size", "always_partition", "window_size",
    "shift_size", "window_area", "target_input_size",
}  # fmt: skip
_LONGEST = 200  # list that is kept
_SHOWN = 24  # values of a name that are kept; more are kept as a digest


def plain_values(value: Any) -> Any:
    """Return a config's values as JSON can hold them; what it can't is given as text."""
    if isinstance(value, Mapping):
        return {str(k): plain_values(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain_values(v) for v in value]
    value = getattr(value, "value", value)  # of an enum
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def settings_of(model: Any) -> dict[str, Any]:
    """Return the settings of a transformers model, or of a config, that change what it computes, by dotted names."""
    found = dict(_flat("", plain_values(getattr(model, "config", model).to_dict())))
    modules = model.modules() if isinstance(model, nn.Module) else ()
    if any(hasattr(module, _OFFSETS) for module in modules):
        found["pad_token_id"] = model.config.pad_token_id
    return found


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if _NO_EFFECT.fullmatch(name):
            continue
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value if is_setting(value) else f"another value ({_crc(value)})"


def is_setting(value: Any) -> bool:
    """Return whether a value, which a third party may have written, is plain and short, or a list of such."""
    if isinstance(value, list):
        return len(value) <= _LONGEST and all(is_setting(v) and not isinstance(v, list) for v in value)
    if isinstance(value, str):
        return len(value) <= 200 and value.isprintable()
    return value is None or isinstance(value, bool | int | float)


def module_settings(backbone: nn.Module, holders: Collection[str], *, whole: bool) -> dict[str, list[str]]:
    """Return what modules are and how they are set: "modules" → names of classes, and "Class.setting" → its values.

    Args:
        backbone: The backbone, bare or with adapters.
        holders: Names of the modules whose tensors count; others count if they have none.
        whole: Whether settings of the classes of others than torch count.
    """
    found: dict[str, set[str]] = {}
    for name, module in _bare_modules(backbone):
        counts = name in holders or not any(True for _ in module.parameters())
        if not counts or isinstance(module, nn.Identity | _DropoutNd) or "Drop" in type(module).__name__:
            continue
        kind = type(module).__name__
        if isinstance(module, nn.Linear):
            kind = "Linear"  # or a quantized one
        elif isinstance(module, _BatchNorm) and type(module).__module__.startswith("torch."):
            kind = "BatchNorm"  # SyncBatchNorm, too
        of_torch = type(module).__module__.startswith("torch.nn.")
        if of_torch or whole:
            found.setdefault("modules", set()).add(kind)
        if kind == "Linear":
            continue
        for setting, value in vars(module).items():
            known = of_torch or whole or setting in ("num_heads", "eps")
            if known and (text := _text(setting, value)) is not None:
                found.setdefault(f"{kind}.{setting}" if of_torch else setting, set()).add(text)
    return {name: _few(sorted(values)) for name, values in sorted(found.items())}


def _bare_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the backbone's own modules by their names, those that PEFT has wrapped in place of the wrappers."""
    yield name, module
    for part, child in module._modules.items():
        while child is not None and (inner := {"base_layer", "original_module"} & child._modules.keys()):
            child = child._modules[inner.pop()]
        if child is not None and part != "hfproj":
            yield from _bare_modules(child, f"{name}.{part}" if name else part)


def _text(setting: str, value: Any) -> str | None:
    """Return the value of a setting as text, None where it says nothing."""
    if (
        setting.startswith(("_", "hfproj", "dynamic_", "grad_", "forward"))
        or re.search("drop|init|resolution", setting)
        or setting in _OF_NO_USE
    ):
        return None
    if callable(value) and hasattr(value, "__name__"):  # an activation
        return str(value.__name__)
    if isinstance(value, tuple | list) and len(value) <= 4 and all(type(v) in (int, float) for v in value):
        return str(tuple(value))
    return str(value) if type(value) in (bool, int, float, str) and len(str(value)) <= 40 else None


def _few(values: list[str]) -> list[str]:
    if len(values) <= _SHOWN:
        return values
    return [*values[: _SHOWN - 1], f"{len(values) - _SHOWN + 1} more ({_crc(values)})"]


def _crc(value: Any) -> str:
    return f"{zlib.crc32(repr(value).encode()):08x}"
