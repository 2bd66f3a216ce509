"""What the files beside a backbone's weights say: which tensors they hold, how texts are pooled."""

import json
import warnings
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from hfproj import limits
from hfproj.backbones.loading import files_of, source_of
from hfproj.strict_json import read_json
from hfproj.typing import Pooling


def checkpoint_lacks(backbone: nn.Module, part: str) -> bool | None:
    """Whether the checkpoint of a transformers model has no tensor below `part`; None when that is not known."""
    from transformers.utils import cached_file

    source = files_of(backbone)
    if source is None:
        return None
    quiet = {f"_raise_exceptions_for_{e}": False for e in ("missing_entries", "gated_repo", "connection_errors")}
    try:
        index = cached_file(source, "model.safetensors.index.json", local_files_only=True, **quiet)
        if index:
            names = list(read_json(Path(index), source, largest=limits.MODEL_CONFIG_BYTES)["weight_map"])
        else:
            with safe_open(cached_file(source, "model.safetensors", local_files_only=True), framework="pt") as handle:
                names = list(handle.keys())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if not names else not any(f".{part}." in f".{name}" for name in names)


_MODES: dict[str, Pooling] = {  # of sentence-transformers
    "cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean", "max": "max", "max_tokens": "max",
    "lasttoken": "last",
}  # fmt: skip
_LARGEST = 100_000  # bytes of a small JSON file


def declared_pooling(backbone: nn.Module) -> Pooling | None:
    """Return the pooling that the folder or repository of a text model declares for sentence-transformers, or None.

    It is in the file ``config.json`` of the folder of the module ``Pooling`` in ``modules.json``. A combination that
    hfproj has no name for gives None, with a warning.
    """
    modules = _small_json(backbone, "modules.json")
    kinds = [m for m in modules if isinstance(m, dict)] if isinstance(modules, list) else []
    folder = next((m.get("path") for m in kinds if str(m.get("type")).rpartition(".")[2] == "Pooling"), None)
    parts = folder.split("/") if isinstance(folder, str) else [".."]
    if ".." in parts or "" in parts or "\\" in str(folder):
        return None
    config = _small_json(backbone, f"{folder}/config.json")
    if not isinstance(config, dict):
        return None
    said = [config["pooling_mode"]] if isinstance(config.get("pooling_mode"), str) else [
        n.removeprefix("pooling_mode_") for n, on in config.items() if n.startswith("pooling_mode_") and on is True
    ]  # fmt: skip
    found = {_MODES.get(mode) for mode in said}
    pooling: Pooling | None = "cls_mean" if found == {"cls", "mean"} else next(iter(found)) if len(found) == 1 else None
    if pooling is None and said:
        warnings.warn(
            f"{source_of(backbone)['id']!r} declares the pooling {', '.join(said)}, which hfproj does not have; "  # type: ignore[index]
            "pass pooling= to ProjectionHeadConfig to choose another than its default.",
            stacklevel=2,
        )
    return pooling


def _small_json(backbone: nn.Module, name: str) -> Any:
    """Return the content of a JSON file beside the weights of a transformers model, or None."""
    from transformers.utils import cached_file

    source, files = source_of(backbone) or {}, files_of(backbone)
    if source.get("library") != "transformers" or not files:
        return None
    quiet = {f"_raise_exceptions_for_{e}": False for e in ("missing_entries", "gated_repo", "connection_errors")}
    commit = getattr(getattr(backbone, "config", None), "_commit_hash", None)
    try:
        path = cached_file(files, name, revision=source.get("revision") or commit, **quiet)
        if path is None or Path(path).stat().st_size > _LARGEST:
            return None
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
