"""The key of a feature cache: what the features of a data set depend on, as plain JSON and as its SHA-256.

    key = SHA-256(weights in use, architecture, adapter, data, preprocessing, what is read, version of this library)

A part that is not known makes an error instead of a key; a part that does not matter may make another key, but never
returns features of something else. Weights count by content: every parameter and buffer except those of adapters that
are not active.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.data import Subset

from hfproj.data.indexing import IndexedDataset
from hfproj.data.pixels import upright
from hfproj.errors import UsageError

SAMPLE = 256  # items whose content stands for a data set without a fingerprint
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
# Where a model came from and how it was trained, not what it computes; weights count by their content.
_NO_MATTER = {
    "_name_or_path", "name_or_path", "transformers_version", "base_model_name_or_path", "revision", "inference_mode",
    "backbone", "objective", "regularizers", "keep_original", "peft_version", "auto_mapping", "training",
    "gradient_checkpointing", "active_adapter",  # its config counts
}  # fmt: skip


def digest(value: Any) -> str:
    """Return the first 32 hexadecimal digits of the SHA-256 of plain JSON, whatever the order of its names.

    Example:
        >>> digest({"a": 1, "b": [2.5, None]}) == digest({"b": [2.5, None], "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def tensor_digest(tensor: Tensor) -> str:
    """Return a digest of a tensor's type, shape and bytes, wherever it lies.

    Example:
        >>> a = torch.tensor([1.0, 2.0])
        >>> tensor_digest(a) == tensor_digest(a.clone()), tensor_digest(a) == tensor_digest(a.double())
        (True, False)
    """
    if tensor.is_meta:
        raise UsageError("The model has tensors on the meta device (offloaded weights), so its features have no key.")
    bare = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    data: Any = tensor.detach().cpu().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy()
    bare.update(data)
    return bare.hexdigest()[:32]


def model_identity(model: Any) -> dict[str, Any]:
    """Return what the outputs of a model in eval mode depend on: digests of weights and architecture, the adapter."""
    idle = _idle(model)

    def in_use(name: str) -> bool:
        return not any(name == part or name.startswith(part + ".") for part in idle)

    tensors = {n: tensor_digest(t) for n, t in [*model.named_parameters(), *model.named_buffers()] if in_use(n)}
    architecture = [[n, *_described(m)] for n, m in model.named_modules() if in_use(n)]
    config = getattr(getattr(model, "config", None), "to_dict", None)
    found: dict[str, Any] = {
        "class": _name(model), "weights": digest(tensors),
        "architecture": digest([architecture, _loose(config()) if config else None]),
    }  # fmt: skip
    if hasattr(model, "peft_config"):
        tuners = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        active = set().union(*map(_active, tuners)) & set(model.peft_config)
        configs = {n: model.peft_config[n] for n in sorted(active)}
        found["adapter"] = {n: _loose(c.to_dict() if hasattr(c, "to_dict") else vars(c)) for n, c in configs.items()}
    return found


def _idle(model: nn.Module) -> set[str]:
    """Return the prefixes of the names that belong to adapters not in use."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            for container in (*module.adapter_layer_names, *module.other_param_names):
                held: Any = getattr(module, container, None)
                if isinstance(held, nn.ModuleDict | nn.ParameterDict) or type(held).__name__ == "BufferDict":  # PEFT's
                    found |= {f"{name}.{container}.{adapter}" for adapter in set(held.keys()) - _active(module)}
    return found


def _active(module: BaseTunerLayer) -> set[str]:
    return set() if module.disable_adapters else set(module.active_adapters)


def _described(module: Any) -> list[Any]:
    """Return class and plain settings of one module, without those of its children."""
    if isinstance(module, nn.ParameterDict | nn.ModuleDict):  # they list what adapters are there, active or not
        return [_name(module)]
    if isinstance(module, BaseTunerLayer):
        held = {n: getattr(module, n, None) for n in module.other_param_names}
        used = {n: {a: v[a] for a in _active(module) & set(v)} for n, v in held.items() if type(v) is dict}
        return [_name(module), {n: _loose(v) for n, v in used.items()}]
    settings = {n: v for n, v in vars(module).items() if n[0] != "_" and isinstance(v, bool | int | float | str)}
    return [_name(module), _ADDRESS.sub("", module.extra_repr()), _loose(settings)]


def _loose(value: Any) -> Any:
    """Return settings as JSON that always works: what is no plain value counts by its text without addresses."""
    if isinstance(value, Mapping):
        return {str(k): _loose(v) for k, v in value.items() if str(k) not in _NO_MATTER}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_loose(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else _ADDRESS.sub("", str(value))


def _name(value: Any) -> str:
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


# --- preprocessing ---


def preprocessing_identity(collator: Any, key: str | None = None) -> dict[str, Any]:
    """Return what a collator's batches depend on: its class and public settings, or the user's `key`.

    Example:
        >>> from hfproj.data import EvalImages
        >>> preprocessing_identity(EvalImages(size=8, mean=(0.5,) * 3, std=(0.5,) * 3))["settings"]["resize"]
        8
    """
    if key is not None:
        return {"key": key}
    own = getattr(collator, "cache_key", None)
    if isinstance(own, str):
        return {"class": _name(collator), "key": own}
    hint = "pass preprocessing_key='…', a text that changes with what it does, or give it such an attribute cache_key."
    called = getattr(collator, "__qualname__", None) or type(collator).__qualname__
    if not type(collator).__module__.startswith("hfproj."):
        raise UsageError(f"A cache has to know how the collator {called} prepares items; {hint}")
    try:
        return {"class": _name(collator), "settings": _settings(collator)}
    except TypeError as error:
        raise UsageError(f"The collator {called} has settings without a plain form ({error}); {hint}") from None


def _settings(owner: Any) -> dict[str, Any]:
    return {name: _strict(value) for name, value in sorted(vars(owner).items()) if name[0] != "_"}


def _strict(value: Any) -> Any:
    """Return a setting as JSON, the same as in keys of old caches; TypeError for what has no plain form."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor | np.ndarray):
        tensor = torch.as_tensor(value)
        return tensor.tolist() if tensor.numel() <= 16 else tensor_digest(tensor)
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple | range):
        return [_strict(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted((_strict(v) for v in value), key=str)
    if isinstance(value, PurePath | torch.dtype):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"class": _name(value), **{f.name: _strict(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    backend = getattr(value, "backend_tokenizer", None)
    if backend is not None:
        parts = json.loads(backend.to_str())
        # A call writes its padding and truncation there; the collator's own settings say which.
        return {"class": _name(value), "tokenizer": digest({**parts, "padding": None, "truncation": None})}
    if type(value).__module__.startswith("hfproj."):
        return {"class": _name(value), **_settings(value)}
    raise TypeError(f"{type(value).__name__} {str(value)[:40]!r}")


# --- data ---


def data_identity(dataset: Any, key: str | None = None) -> dict[str, Any]:
    """Return what a data set's items depend on.

    A 🤗 data set is known by its fingerprint. Of another, the length and the content of up to 256 evenly spaced items
    are taken; a change in between is not seen, hence the user's `key`. Of wrappers what they wrap is taken.

    Example:
        >>> rows = [{"x": torch.tensor([1.0]), "label": 0}, {"x": torch.tensor([2.0]), "label": 1}]
        >>> data_identity(rows) == data_identity(list(rows)), data_identity(rows) == data_identity(rows[::-1])
        (True, False)
    """
    if key is not None:
        return {"key": key, "rows": len(dataset)}
    own = getattr(dataset, "cache_key", None)
    if isinstance(own, str):
        return {"class": _name(dataset), "key": own, "rows": len(dataset)}
    if isinstance(dataset, IndexedDataset):
        return {"indexed": data_identity(dataset.dataset)}
    if isinstance(dataset, Subset):
        return {"subset": digest([int(i) for i in dataset.indices]), "of": data_identity(dataset.dataset)}
    fingerprint = getattr(dataset, "_fingerprint", None)
    if isinstance(fingerprint, str):
        return {"fingerprint": fingerprint, "rows": len(dataset)}
    return _sampled(dataset)


def _sampled(dataset: Any) -> dict[str, Any]:
    rows, count = len(dataset), min(len(dataset), SAMPLE)
    content = hashlib.sha256()
    try:
        for i in range(count):
            _update(content, dataset[i * (rows - 1) // max(count - 1, 1)])
        again = [hashlib.sha256(), hashlib.sha256()]
        for check in again:
            _update(check, dataset[0])
    except TypeError as error:
        what = f"The items of the {type(dataset).__name__} hold {error}, which has no plain form"
        raise UsageError(f"{what}; pass data_key='…', a text that changes whenever the data do.") from None
    if again[0].digest() != again[1].digest():
        raise UsageError(
            f"Item 0 of the {type(dataset).__name__} differs between two readings (a random transform?), so its "
            "features cannot be cached. Take the transform away, or pass data_key='…' if any one draw will do."
        )
    below = getattr(getattr(dataset, "dataset", None), "_fingerprint", None)
    plain = {n: v for n, v in getattr(dataset, "__dict__", {}).items() if isinstance(v, bool | int | float | str)}
    found = {"class": _name(dataset), "rows": rows, "sampled": count, "sample": content.hexdigest()[:32]}
    return {**found, "settings": digest(plain), "below": below if isinstance(below, str) else None}


def content_of(dataset: Any, items: int = 16) -> str | None:
    """Return a digest of some evenly spaced items; None where they can't be read twice alike, or have no plain form.

    Example:
        >>> content_of([1, 2, 3]) == content_of([1, 2, 3]), content_of([1, 2, 3]) == content_of([1, 2, 4])
        (True, False)
    """
    while isinstance(dataset, IndexedDataset):  # its items hold the epoch
        dataset = dataset.dataset
    rows, count = len(dataset), min(len(dataset), items)
    found = [hashlib.sha256(), hashlib.sha256()]
    try:
        for content in found:
            for i in range(count):
                _update(content, dataset[i * (rows - 1) // max(count - 1, 1)])
    except Exception:  # the data set's own, such as an image that can't be read: training will say so
        return None
    return found[0].hexdigest()[:32] if found[0].digest() == found[1].digest() else None


def _update(content: Any, value: Any) -> None:
    """Add an item's value to a hash; TypeError for what has no plain form."""
    if value is None or isinstance(value, bool | int | float | str | np.generic):
        content.update(f"{type(value).__name__} {value!r}\n".encode())
    elif isinstance(value, bytes | bytearray):
        content.update(f"bytes {len(value)}\n".encode() + bytes(value))
    elif isinstance(value, Tensor):
        content.update(tensor_digest(value).encode())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        content.update(f"array {value.dtype} {value.shape}\n".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for name in sorted(value, key=str):
            content.update(f"name {name!r}\n".encode())
            _update(content, value[name])
        content.update(b"end\n")
    elif isinstance(value, Sequence):
        content.update(f"sequence {len(value)}\n".encode())
        for part in value:
            _update(content, part)
    elif hasattr(value, "tobytes") and hasattr(value, "mode"):  # a PIL image
        value = upright(value)
        colours = value.convert("RGBA") if value.mode == "P" else value  # the bytes of mode "P" lack its palette
        content.update(f"image {value.mode} {value.size}\n".encode() + colours.tobytes())
    else:
        raise TypeError(f"a {type(value).__name__}")


def library_version() -> str:
    """Return the version of this library, whose collators and pooling the features depend on."""
    return metadata.version("hfproj")
