"""The backbone's part of an adapter as a plain PEFT adapter."""

import json
import os
from pathlib import Path

from peft import PeftConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from hfproj.errors import UsageError
from hfproj.export.attached import Attached, attached, staged
from hfproj.export.loading import load_backbone_lines, readme
from hfproj.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD
from hfproj.tuner.layer import CHILD

_HEAD = f"base_model.model.{CHILD}."


def export_backbone_adapter(model: nn.Module, folder: str | os.PathLike, *, adapter_name: str | None = None) -> Path:
    """Write the PEFT method on the backbone (LoRA or another `backbone_adapter`) as an adapter that PEFT alone loads.

    The folder holds ``adapter_config.json``, ``adapter_model.safetensors`` and a ``README.md`` with the lines that load
    it and compute h. ``PeftModel.from_pretrained(backbone, folder)`` gives the same h to the last bit where this
    package is not even installed; the head stays behind.

    Args:
        model: A model with a projection head.
        folder: Where to; files of these names are replaced.
        adapter_name: Whose; None takes the active one.

    Returns:
        The folder.

    Raises:
        UsageError: the adapter has no PEFT method on the backbone, or `folder` holds an adapter with a head.

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
    _refuse_head(Path(folder))
    tensors = get_peft_model_state_dict(found.model, adapter_name=found.name, save_embedding_layers=False)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_HEAD)}
    kind = type(found.backbone)
    origin = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    with staged(folder) as target:
        # Clones: safetensors refuses tensors that share memory, as tied ones do.
        save_file(
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
            target / ADAPTER_WEIGHTS,
            metadata={"format": "pt"},
        )
        config.save_pretrained(str(target), auto_mapping_dict=origin)
        (target / CARD).write_text(_card(found, config), encoding="utf-8")
    return Path(folder)


def _plain_config(found: Attached) -> PeftConfig:
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
    local = named is not None and Path(named).exists()
    config.base_model_name_or_path = named if found.hub_id or local else None
    config.revision = found.source.get("revision")
    config.inference_mode = True
    return config


def _refuse_head(folder: Path) -> None:
    try:
        kind = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError, AttributeError):
        return
    if kind == "PROJECTION_HEAD":
        raise UsageError(f"{str(folder)!r} holds an adapter with a head, which would be lost; give another folder.")


def _card(found: Attached, config: PeftConfig) -> str:
    kind = config.peft_type.value
    load = [
        "from peft import PeftModel",
        *load_backbone_lines(found),
        'model = PeftModel.from_pretrained(base, "path/to/this/folder").get_base_model().eval()',
    ]
    return readme(
        found,
        title=f"{kind} adapter of {found.hub_id or type(found.backbone).__name__}",
        sentence=f"The backbone's part, a {kind} adapter, of an adapter that was trained by self-supervision behind a "
        "projection head. It needs PEFT only.",
        data={"library_name": "peft", "base_model_relation": "adapter"},
        load=load,
    )
