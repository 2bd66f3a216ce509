"""The backbone with what was learned merged in, as its own library loads it."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from hfproj.backbones import library_of
from hfproj.backbones.loading import files_of
from hfproj.backbones.preprocessing import preprocessor_config
from hfproj.errors import UsageError
from hfproj.export.attached import Attached, attached, merged_backbone, staged
from hfproj.export.loading import auto_class, call_line, pooler_option, readme
from hfproj.filenames import ADAPTER_CONFIG, CARD, PREPROCESSING
from hfproj.tuner.description import known_preprocessing

_WEIGHTS = "model.safetensors"
_IMAGE_FILES = (PREPROCESSING, "processor_config.json")
_TEXT_FILES = (
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


def export_merged(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Write the backbone with what the active adapter learned merged in; its own library loads it, as any other.

    That is ``AutoModel.from_pretrained(folder)`` for a transformers backbone, and for one of timm
    ``timm.create_model("local-dir:<folder>", pretrained=True)``; of any other module the weights alone are written. The
    folder's ``README.md`` has the lines that load it and compute h. Image-processor or tokenizer files come along where
    the backbone's own are known. h is the same to the last bit where the backbone's own weights were trained, or
    nothing but the head; LoRA and the like are merged in float32, and rounded to the backbone's type.

    Args:
        model: A model with a projection head. It is copied, not changed.
        folder: Where to; files of these names are replaced.

    Returns:
        The folder.

    Raises:
        UsageError: no adapter or more than one is in use, it can't be merged, timm can't make the backbone by name, or
            `folder` holds an adapter.

    Example:
        >>> import tempfile, hfproj
        >>> from peft import get_peft_model
        >>> from transformers import AutoModel
        >>> model = get_peft_model(hfproj.load_backbone("vit_nano"), hfproj.ProjectionHeadConfig(trainable="full"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     type(AutoModel.from_pretrained(export_merged(model, folder))).__name__
        'ViTModel'
    """
    found = attached(model)
    folder = Path(folder)
    if (folder / ADAPTER_CONFIG).exists():
        raise UsageError(
            f"{str(folder)!r} holds an adapter, which from_pretrained would load on top of the merged backbone; give "
            "another folder."
        )
    backbone = merged_backbone(found)
    write = {"transformers": _write_transformers, "timm": _write_timm}.get(library_of(backbone), _write_weights)
    with staged(folder) as target:
        load = write(found, backbone, target)
        (target / CARD).write_text(_card(found, load), encoding="utf-8")
    return folder


def _write_transformers(found: Attached, backbone: Any, target: Path) -> list[str]:
    backbone.save_pretrained(target)
    source = files_of(backbone)
    names = _TEXT_FILES if backbone.main_input_name == "input_ids" else _IMAGE_FILES
    for name in names:
        file = _file_of(source, name) if source else None
        if file is not None:
            (target / name).write_bytes(file.read_bytes())
    known = None if any((target / name).exists() for name in names) else known_preprocessing(found.model, found.name)
    if known is not None:  # from the adapter, for a backbone without such files
        (target / PREPROCESSING).write_text(json.dumps(preprocessor_config(known), indent=2) + "\n", encoding="utf-8")
    name = auto_class(backbone)
    option = pooler_option(backbone)
    return [f"from transformers import {name}", call_line(f"{name}.from_pretrained", "path/to/this/folder", option)]


def _file_of(source: str, name: str) -> Path | None:
    from transformers.utils import cached_file

    try:
        found = cached_file(
            source,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):
        return None
    return Path(found) if found else None


def _write_timm(found: Attached, backbone: nn.Module, target: Path) -> list[str]:
    import timm
    from timm.models import save_for_hf

    try:
        save_for_hf(backbone, target, safe_serialization=True)
        loaded = timm.create_model(f"local-dir:{target}", pretrained=True).state_dict()
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"timm can't make this {type(backbone).__name__} again from its name and arguments ({reason}); make the "
            "backbone with timm.create_model(…)."
        ) from error
    if any(not torch.equal(tensor, loaded[name]) for name, tensor in backbone.cpu().state_dict().items()):
        raise UsageError(
            f"timm's own loading changes the weights of this {type(backbone).__name__}, so that h would be another."
        )
    return ["import timm", call_line("timm.create_model", "local-dir:path/to/this/folder", {"pretrained": True})]


def _write_weights(found: Attached, backbone: nn.Module, target: Path) -> list[str]:
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in backbone.state_dict().items()}
    save_file(tensors, target / _WEIGHTS, metadata={"format": "pt"})
    return [
        "from safetensors.torch import load_file",
        f"model = ...  # a {type(backbone).__name__} as it was trained on",
        f'model.load_state_dict(load_file("path/to/this/folder/{_WEIGHTS}"))',
        "model.eval()",
    ]


def _card(found: Attached, load: list[str]) -> str:
    library = library_of(found.backbone)
    return readme(
        found,
        title=f"{found.hub_id or type(found.backbone).__name__}, trained by self-supervision",
        sentence=f"A backbone in one piece. Trained behind a projection head, and merged in: {found.trained}.",
        data={"library_name": library if library != "torch" else None, "base_model_relation": "finetune"},
        load=load,
    )
