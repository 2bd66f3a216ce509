"""What the files beside a backbone's weights say: which tensors they hold, how texts are pooled."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache
from safetensors import safe_open
from torch import nn

from hfproj import limits
from hfproj.backbones.loading import files_of, source_of
from hfproj.errors import HubError, one_line
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

    It is in the file ``config.json`` of the folder of the module ``Pooling`` in ``modules.json``, which lies beside the
    model's files or, where the model has a folder of its own (``0_Transformer``), above it. A combination that hfproj
    has no name for gives None, with a warning; another warning names modules behind the pooling that change h.
    """
    modules, above = _modules(backbone)
    kinds = [str(m.get("type")).rpartition(".")[2] for m in modules]
    if "Pooling" not in kinds:
        return None
    at, name = kinds.index("Pooling"), (source_of(backbone) or {}).get("id")
    folder = _folder(modules[at])
    config = None if folder is None else _small_json(backbone, f"{above}{folder}/config.json")
    if behind := [kind for kind in kinds[at + 1 :] if kind != "Normalize"]:
        warnings.warn(
            f"{name!r} declares {', '.join(behind)} behind its pooling, which hfproj does not run: h is what they "
            "read, not the author's final embedding.",
            stacklevel=2,
        )
    if not isinstance(config, dict):
        return None
    mode = config.get("pooling_mode")
    said = mode.split("+") if isinstance(mode, str) else list(map(str, mode)) if isinstance(mode, list) else [
        n.removeprefix("pooling_mode_") for n, on in config.items() if n.startswith("pooling_mode_") and on is True
    ]  # fmt: skip
    found = {_MODES.get(mode) for mode in said}
    pooling: Pooling | None = "cls_mean" if found == {"cls", "mean"} else next(iter(found)) if len(found) == 1 else None
    if pooling is None and said:
        warnings.warn(
            f"{name!r} declares the pooling {', '.join(said)}, which hfproj does not have; pass pooling= to "
            "ProjectionHeadConfig to choose another than its default.",
            stacklevel=2,
        )
    return pooling


def _modules(backbone: nn.Module) -> tuple[list[dict[str, Any]], str]:
    """Return the entries of ``modules.json``, and how its folder is reached from that of the model's files."""
    folder = Path(files_of(backbone) or "")
    above = folder.is_dir() and not (folder / "modules.json").exists()
    found = _small_json(backbone, "../modules.json" if above else "modules.json")
    modules = [m for m in found if isinstance(m, dict)] if isinstance(found, list) else []
    if above and folder.resolve().name not in map(_folder, modules):  # of another model
        return [], ""
    return modules, "../" if above else ""


def _folder(module: dict[str, Any]) -> str | None:
    """Return the folder of a module, or None for one that leads out of that of ``modules.json``."""
    path = module.get("path")
    folder = path.rstrip("/") if isinstance(path, str) else ""
    return None if "\\" in folder or {"..", ""} & set(folder.split("/")) else folder


def _small_json(backbone: nn.Module, name: str) -> Any:
    """Return the content of a JSON file beside the weights of a transformers model, or None."""
    if (source_of(backbone) or {}).get("library") != "transformers":
        return None
    try:
        path = file_beside(backbone, name)
    except HubError as error:
        warnings.warn(f"{error} The model's own pooling is not known: pass pooling=.", stacklevel=4)
        return None
    try:
        if path is None or path.stat().st_size > _LARGEST:
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def file_beside(backbone: nn.Module, name: str) -> Path | None:
    """Return a file of the folder or repository that a transformers model was loaded from, or None where it has none.

    It is of the commit that the model is of. Without a network the cache is asked, which may know that there is none.

    Raises:
        HubError: If it is not known whether there is one; not with HF_HUB_OFFLINE=1, where it counts as none.
    """
    files = files_of(backbone)
    if not files:
        return None
    if os.path.isdir(files):
        return path if (path := Path(files, name)).is_file() else None
    revision = (source_of(backbone) or {}).get("revision") or getattr(
        getattr(backbone, "config", None), "_commit_hash", None
    )
    try:
        return Path(hf_hub_download(files, name, revision=revision))
    except errors.GatedRepoError as error:
        failure: Exception = error
    except (errors.HFValidationError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        return None
    except (errors.HTTPError, OSError, RuntimeError) as error:
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            return None
        failure = error
    known = try_to_load_from_cache(files, name, revision=revision)
    if known is not None or constants.is_offline_mode():
        return Path(known) if isinstance(known, str) else None
    reason = one_line(failure.__cause__ or failure)
    todo = "try again, or set HF_HUB_OFFLINE=1 to do without it"
    raise HubError(f"Whether {files} has {name} is not known, as the Hub can't be asked ({reason}); {todo}.")
