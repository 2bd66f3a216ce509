"""Folders that others load without this package: the backbone's PEFT adapter alone, or the backbone with all merged in.

Each has a README.md, made of `README.md.jinja`, with the lines of Python that load it and compute h.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from jinja2 import Template
from peft import PeftConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from hfproj.backbones import library_of, main_input_of
from hfproj.backbones.loading import EMBEDDED, files_of
from hfproj.backbones.preprocessing import preprocessor_config
from hfproj.backbones.small_images import OPTIONS
from hfproj.checking import checked
from hfproj.errors import UsageError, one_line
from hfproj.export.network import Attached, attached, merged_backbone, staged
from hfproj.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, PREPROCESSING
from hfproj.tuner.description import known_preprocessing
from hfproj.tuner.layer import CHILD

_HERE = "path/to/this/folder"
_WEIGHTS = "model.safetensors"
_IMAGE_FILES = (PREPROCESSING, "processor_config.json")
_TEXT_FILES = (
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


@checked
def export_backbone_adapter(model: nn.Module, folder: str | os.PathLike, *, adapter_name: str | None = None) -> Path:
    """Write the PEFT method on the backbone (LoRA or another `backbone_adapter`) as an adapter that PEFT alone loads.

    The folder holds ``adapter_config.json``, ``adapter_model.safetensors`` and a ``README.md`` with the lines that load
    it and compute h. ``PeftModel.from_pretrained(backbone, folder)`` gives the same h to the last bit where this
    package is not even installed; the head stays behind. Returns `folder`.

    Args:
        model: A model with a projection head.
        folder: Where to; files of these names are replaced.
        adapter_name: The adapter of the model that is written; None takes the active one.

    Raises:
        UsageError: If the adapter has no PEFT method on the backbone, or `folder` holds an adapter with a head.

    Example:
        >>> import tempfile, hfproj
        >>> from peft import LoraConfig, PeftConfig, get_peft_model
        >>> backbone = hfproj.load_backbone("vit_nano")
        >>> model = get_peft_model(backbone, hfproj.ProjectionHeadConfig(backbone_adapter=LoraConfig(r=4)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     PeftConfig.from_pretrained(export_backbone_adapter(model, folder)).r
        4
    """
    found = attached(model, adapter_name)
    config = _plain_config(found)
    with suppress(OSError):
        if '"PROJECTION_HEAD"' in (Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8", errors="replace"):
            raise UsageError(f"{str(folder)!r} holds an adapter with a head, which would be lost; give another folder.")
    tensors = get_peft_model_state_dict(found.model, adapter_name=found.name, save_embedding_layers=False)
    head, method, cls = f"base_model.model.{CHILD}.", config.peft_type.value, type(found.backbone)
    title = f"{method} adapter of {found.hub_id or cls.__name__}"
    sentence = (
        f"The backbone's part, a {method} adapter, of an adapter that was trained by self-supervision behind a "
        "projection head. It needs PEFT only."
    )
    front = {"library_name": "peft", "base_model_relation": "adapter"}
    make = f'model = PeftModel.from_pretrained(base, "{_HERE}").get_base_model().eval()'
    with staged(folder) as target:
        _save(target / ADAPTER_WEIGHTS, {n: tensor for n, tensor in tensors.items() if not n.startswith(head)})
        origin = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
        config.save_pretrained(str(target), auto_mapping_dict=origin)
        _write_readme(found, target, title, sentence, front, ["from peft import PeftModel", *_load_base(found), make])
    return Path(folder)


@checked
def export_merged(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Write the backbone with what the active adapter learned merged in; its own library loads it; return `folder`.

    That is ``AutoModel.from_pretrained(folder)`` for a transformers backbone, and for one of timm
    ``timm.create_model("local-dir:<folder>", pretrained=True)``; of any other module the weights alone are written. The
    folder's ``README.md`` has the lines that load it and compute h. Image-processor or tokenizer files come along where
    the backbone's own are known. h is the same to the last bit where the backbone's own weights were trained, or
    nothing but the head; LoRA and the like are merged in float32, and rounded to the backbone's type.

    Args:
        model: A model with a projection head. It is copied, not changed.
        folder: Where to; files of these names are replaced.

    Raises:
        UsageError: If no adapter or more than one is in use, it can't be merged, timm can't make the backbone by name,
            or `folder` holds an adapter.

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
        what = "holds an adapter, which from_pretrained would load on top of the merged backbone"
        raise UsageError(f"{str(folder)!r} {what}; give another folder.")
    backbone, library = merged_backbone(found), library_of(found.backbone)
    title = f"{found.hub_id or type(backbone).__name__}, trained by self-supervision"
    sentence = f"A backbone in one piece. Trained behind a projection head, and merged in: {found.trained}."
    front = {"library_name": library if library != "torch" else None, "base_model_relation": "finetune"}
    write = {"transformers": _write_transformers, "timm": _write_timm}.get(library, _write_weights)
    with staged(folder) as target:
        _write_readme(found, target, title, sentence, front, write(found, backbone, target))
    return folder


def _plain_config(found: Attached) -> PeftConfig:
    """Return the config of the backbone's PEFT method, with the backbone that it belongs to."""
    config = found.config.inner_config()
    if found.config.trains_backbone:
        raise UsageError(
            f"The adapter {found.name!r} trained the backbone's own weights (trainable={found.config.trainable!r}), "
            "which no plain PEFT adapter holds; write the whole backbone with hfproj.export_merged(model, folder)."
        )
    if config is None:
        raise UsageError(
            f"The adapter {found.name!r} is a head alone: it has no PEFT method on the backbone, which is unchanged. "
            "Train one with ProjectionHeadConfig(backbone_adapter=LoraConfig(…)), or take the backbone as it is."
        )
    named = found.source.get("id")
    config.base_model_name_or_path = named if found.hub_id or (named and Path(named).exists()) else None
    config.revision = found.source.get("revision")
    config.inference_mode = True
    return config


def _write_transformers(found: Attached, backbone: Any, target: Path) -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING
    from transformers.utils import cached_file

    backbone.save_pretrained(target)
    source, names = files_of(backbone), _TEXT_FILES if main_input_of(backbone) == "input_ids" else _IMAGE_FILES
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    copied = False
    for name in names if source is not None else ():
        try:
            file = cached_file(str(source), name, **quiet)
        except (OSError, ValueError):
            continue
        if file:
            (target / name).write_bytes(Path(file).read_bytes())
            copied = True
    known = None if copied else known_preprocessing(found.model, found.name)
    if known is not None:  # from the adapter, for a backbone without such files
        (target / PREPROCESSING).write_text(json.dumps(preprocessor_config(known), indent=2) + "\n", encoding="utf-8")
    auto = MODEL_MAPPING.get(type(backbone.config), None) is type(backbone)  # else AutoModel makes another class of it
    name = "AutoModel" if auto else type(backbone).__name__
    return [f"from transformers import {name}", f"model = {_call(name, _HERE, _pooler_option(backbone))}.eval()"]


def _write_timm(found: Attached, backbone: nn.Module, target: Path) -> list[str]:
    import timm
    from timm.models import save_for_hf

    try:
        save_for_hf(backbone, target, safe_serialization=True)
        loaded = timm.create_model(f"local-dir:{target}", pretrained=True).state_dict()
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"timm can't make this {type(backbone).__name__} again from its name and arguments ({one_line(error)})"
        hint = "make the backbone with timm.create_model(…), arguments of your own with timm 1.0.31 or newer"
        raise UsageError(f"{what}; {hint}.") from error
    if any(not torch.equal(tensor, loaded[name]) for name, tensor in backbone.cpu().state_dict().items()):
        what = f"timm's own loading changes the weights of this {type(backbone).__name__}"
        raise UsageError(f"{what}, and h with them; write the adapter with model.save_pretrained(…) instead.")
    return ["import timm", f"model = {_call('timm', f'local-dir:{_HERE}', {'pretrained': True})}.eval()"]


def _write_weights(found: Attached, backbone: nn.Module, target: Path) -> list[str]:
    _save(target / _WEIGHTS, backbone.state_dict())
    return [
        "from safetensors.torch import load_file",
        f"model = ...  # a {type(backbone).__name__} as it was trained on",
        f'model.load_state_dict(load_file("{_HERE}/{_WEIGHTS}"))',
        "model.eval()",
    ]


def _save(file: Path, tensors: dict[str, Tensor]) -> None:
    # Clones: safetensors refuses tensors that share memory, as tied ones do.
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(kept, file, metadata={"format": "pt"})


def _write_readme(found: Attached, target: Path, title: str, sentence: str, data: dict, load: list[str]) -> None:
    """Write README.md: front matter from `data`, a sentence, and code that loads ``model`` and computes ``h``."""
    base = {"base_model": found.hub_id} if found.hub_id else {"base_model_relation": None}
    front = ModelCardData(**{**data, **base}, tags=["hfproj", "self-supervised-learning"]).to_yaml()
    source = Path(__file__).with_name("README.md.jinja").read_text(encoding="utf-8")
    template = Template(source, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    words = {"front": front, "title": title, "sentence": sentence, "load": load, "library": library_of(found.backbone)}
    last = getattr(found.backbone, "output_fmt", "") == "NHWC"
    text = template.render(words, point=found.point, config=found.config, channels_last=last)
    (target / CARD).write_text(text, encoding="utf-8")


def _load_base(found: Attached) -> list[str]:
    """Return the lines that load the bare backbone as ``base``."""
    source, name = found.source, found.hub_id
    if name is None:
        origin = f" ({EMBEDDED} of hfproj)" if source.get("id") == EMBEDDED else ""
        return [f"base = ...  # the backbone that this was trained on{origin}, without changes"]
    revision, kwargs = source.get("revision"), dict(source.get("kwargs") or {})
    if library_of(found.backbone) == "timm":
        if {*OPTIONS} & {*kwargs}:
            given = [repr(name), *(f"{option}={value!r}" for option, value in kwargs.items())]
            return ["import hfproj", f"base = hfproj.load_backbone({', '.join(given)})"]
        name = name.removeprefix("timm/")
        name = f"hf-hub:timm/{name}@{revision}" if revision else name
        return ["import timm", f"base = {_call('timm', name, {'pretrained': True, **kwargs})}"]
    options = ({"revision": revision} if revision else {}) | kwargs | _pooler_option(found.backbone)
    cls = type(found.backbone).__name__  # AutoModel would make all of CLIP, of which this is the image tower
    return [f"from transformers import {cls}", f"base = {_call(cls, name, options)}"]


def _pooler_option(backbone: nn.Module) -> dict[str, bool]:
    """Return the option without which transformers adds a pooler with random weights that this backbone has not."""
    return {"add_pooling_layer": False} if getattr(backbone, "pooler", False) is None else {}


def _call(cls: str, argument: str, options: dict[str, Any]) -> str:
    function = "timm.create_model" if cls == "timm" else f"{cls}.from_pretrained"
    given = [f'"{argument}"', *(f"{name}={value!r}" for name, value in options.items())]
    return f"{function}({', '.join(given)})"
