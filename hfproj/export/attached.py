"""What is exported: the adapter asked for, its backbone, and a copy of that with everything learned merged in."""

import copy
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hfproj.backbones import EMBEDDED, FeatureBackbone, ReadPoint, bare_tensors
from hfproj.errors import UsageError
from hfproj.tuner import ProjectionHeadConfig
from hfproj.tuner.layer import CHILD, ProjectionLayer
from hfproj.tuner.network import network_of

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Attached:
    """One adapter of a model: `backbone` carries it under `name`, and its head reads at `point`."""

    model: Any
    backbone: Any
    name: str
    config: ProjectionHeadConfig
    point: ReadPoint

    @property
    def source(self) -> dict[str, Any]:
        """Where the backbone came from, ``{"library", "id", "kwargs"}``; empty where that is unknown."""
        return self.config.backbone or {}

    @property
    def hub_id(self) -> str | None:
        """The backbone's id on the Hub; None for a folder, for the backbone in this package, and where unknown."""
        name = str(self.source.get("id") or "").removeprefix("hf-hub:")
        return name if _HUB_ID.fullmatch(name) and name != EMBEDDED and not Path(name).exists() else None

    @property
    def trained(self) -> str:
        """What of the backbone was trained, in words."""
        if self.config.trains_backbone:
            blocks = self.config.trainable
            return "all of its weights" if blocks == "full" else f"its last {blocks} block{'s' if blocks != 1 else ''}"
        return f"a {self.config.backbone_options['peft_type']} adapter" if self.config.backbone_adapter else "nothing"


def attached(model: Any, adapter_name: str | None = None) -> Attached:
    """Return one adapter of `model`: the one of this name, or the active one.

    Raises:
        UsageError: If there is none.
    """
    if not hasattr(model, "peft_config"):
        raise UsageError(f"model is a {type(model).__name__}; expected the PeftModel with its projection head.")
    layer, name = _layer(model, adapter_name)
    return Attached(model, model.get_base_model(), name, model.peft_config[name], layer.points[name])


def detach(model: nn.Module, adapter_name: str | None = None) -> nn.Module:
    """Return a copy of a head of `model`, free of the backbone: ``z = head(h)``.

    Args:
        model: A model with a projection head.
        adapter_name: The adapter of the model whose head it is; None takes the active one.

    Raises:
        UsageError: If there is no such head.

    Example:
        >>> import hfproj
        >>> from peft import get_peft_model
        >>> config = hfproj.ProjectionHeadConfig(head="linear", out_dim=16)
        >>> detach(get_peft_model(hfproj.load_backbone("vit_nano"), config)).out_dim
        16
    """
    layer, name = _layer(model, adapter_name)
    return copy.deepcopy(layer.projection_head_modules[name].head)


def _layer(model: Any, adapter_name: str | None) -> tuple[ProjectionLayer, str]:
    """Return what carries the heads of `model`, and the name of the one asked for."""
    layer: Any = getattr(model.get_base_model() if hasattr(model, "get_base_model") else model, CHILD, None)
    if not isinstance(layer, ProjectionLayer):
        raise UsageError(
            f"{type(model).__name__} has no projection head; attach one with get_peft_model(backbone, "
            "ProjectionHeadConfig(…)), or load one with hfproj.from_pretrained(…)."
        )
    name = adapter_name or next(iter(layer.active_adapters), None)
    if name not in layer.points:
        raise UsageError(f"There is no head {name!r}; there are: {', '.join(layer.points)}.")
    return layer, str(name)


def merged_backbone(found: Attached, *, full_precision: bool = False) -> nn.Module:
    """Return a copy of the backbone, in eval mode, with what the active adapter learned merged in.

    It is plain: no layer of PEFT, no hook. Each tensor has the type it had, or float32 with `full_precision`.

    Raises:
        UsageError: If no adapter or more than one is in use, it can't be merged, or the backbone is a stand-in.
    """
    if isinstance(found.backbone, FeatureBackbone):
        raise UsageError(
            "This head was trained on cached features, so the model has no backbone. Save it, then load it onto its "
            "backbone with hfproj.from_pretrained(folder), or export the head alone (part='head')."
        )
    layer: ProjectionLayer = getattr(found.backbone, CHILD)
    if layer.active_name is None:
        raise UsageError("The adapter is disabled; export outside of `with model.disable_adapter()`.")
    for name, module in found.backbone.named_modules():
        if isinstance(module, BaseTunerLayer):
            others = {*module.active_adapters, *getattr(module, "merged_adapters", ())} - {found.name}
            if others:
                raise UsageError(
                    f"{name} also runs with {', '.join(sorted(others))}, beside the active adapter {found.name!r}. "
                    f"Stacked adapters are not exported: call model.set_adapter({found.name!r}), and unmerge others."
                )
    dtypes = {name: tensor.dtype for name, tensor in bare_tensors(found.backbone).items()}
    network: Any = network_of(found.model)
    merged = network.unload().eval().requires_grad_(False)  # in float32 or better
    if full_precision:
        return merged.float()
    for name, tensor in bare_tensors(merged).items():
        tensor.data = tensor.data.to(dtypes[name]).contiguous()
    return merged


@contextmanager
def staged(folder: str | os.PathLike) -> Iterator[Path]:
    """Give a folder to write into; what is there at the end moves to `folder`, after an error nothing does."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{str(folder)!r} is a file; give the name of a folder.")
    beside = folder if folder.is_dir() else folder.parent  # on the same disk, and in no folder but the user's
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".export.") as temporary:
        yield Path(temporary)
        folder.mkdir(exist_ok=True)
        mask = os.umask(0)
        os.umask(mask)
        # Weights before what names them: a reader never finds a graph or a config without its weights.
        for file in sorted(Path(temporary).iterdir(), key=lambda f: (f.suffix in (".json", ".onnx"), f.name)):
            os.chmod(file, 0o666 & ~mask)  # safetensors' files are private, an export is to be read by others
            os.replace(file, folder / file.name)
