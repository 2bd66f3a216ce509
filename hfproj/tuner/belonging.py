"""Whether an adapter belongs to the backbone that it is attached to, by `hfproj.backbones.fingerprint`."""

import dataclasses
import warnings
from collections.abc import Collection
from typing import Any

from torch import nn

from hfproj.backbones import FeatureBackbone, ReadPoint, bare_tensors, feeds_representation, source_of
from hfproj.backbones.fingerprint import Comparison, compare, digest, fingerprint, is_fingerprint, origin
from hfproj.errors import AdapterFileError
from hfproj.tuner.backbone_tensors import BackboneTensors
from hfproj.tuner.config import ProjectionHeadConfig
from hfproj.tuner.description import starts_random

MEANT = "backbone_check='warn' in the config (PEFT: from_pretrained(…, config=config)) or in hfproj.from_pretrained"


def current_fingerprint(
    model: nn.Module, config: ProjectionHeadConfig, point: ReadPoint, kept: BackboneTensors, names: Collection[str]
) -> dict[str, Any] | None:
    """Return the fingerprint of the backbone as it was before any adapter was trained; `names` are what is trained."""
    if isinstance(model, FeatureBackbone):
        return model.fingerprint
    tensors = bare_tensors(model) | kept.originals
    read = {name: tensors[name] for name in feeds_representation(model, point)}
    source = config.backbone if config.fingerprint is None else None  # else it is that of the backbone before
    return fingerprint(model, read, source=source, apart=set(names) if starts_random(config.backbone) else ())


def check_backbone(
    config: ProjectionHeadConfig, current: dict[str, Any] | None, model: nn.Module | None = None, *, stacklevel: int = 3
) -> None:  # fmt: skip
    """Compare the backbone with the one that `config` was made on, and write its fingerprint into a new config.

    Raises:
        AdapterFileError: If it is another backbone, unless only its weights are others and ``backbone_check`` is
            ``"warn"``.
    """
    if config.fingerprint is None:
        if config.of_file:
            said = "This adapter has no fingerprint of its backbone (hfproj before 0.2, or cached features without one)"
            warnings.warn(f"{said}: whether it was made on this backbone can't be checked.", stacklevel=stacklevel + 1)
        config.fingerprint = current
        return
    if not is_fingerprint(config.fingerprint):
        raise AdapterFileError("fingerprint: expected what hfproj wrote; the config is damaged.")
    if current is None:
        return  # cached features of a backbone that is not there
    found = compare(config.fingerprint, current)
    if found.kind == "same":
        return
    made_on, said = _named(config.fingerprint), sentence(found)
    if found.kind == "structure":
        raise AdapterFileError(f"{said} The adapter was made on {made_on}; load that backbone.")
    if found.refused and config.backbone_check != "warn":
        hint = f"load that backbone, or, if these weights are meant, set {MEANT}"
        raise AdapterFileError(f"{said} The adapter was made on {made_on}; {hint}.")
    warnings.warn(f"{said} The adapter was made on {made_on}.", stacklevel=stacklevel + 1)
    if found.refused:
        if model is not None:
            config.backbone = source_of(model)
            config.base_model_name_or_path = (config.backbone or {}).get("id")
        config.fingerprint = current | origin(config.backbone) | {"instead_of": made_on}


def check_continued(saved: ProjectionHeadConfig, own: ProjectionHeadConfig) -> None:
    """Check, as `check_backbone` does, that the adapter that goes on was made on the backbone of the active one."""
    before = dataclasses.replace(saved, backbone_check=own.backbone_check)
    check_backbone(before, own.fingerprint, stacklevel=4)
    if before.fingerprint is not None and "instead_of" in before.fingerprint:
        own.fingerprint = before.fingerprint


def refresh(
    model: nn.Module, config: ProjectionHeadConfig, point: ReadPoint, kept: BackboneTensors, names: Collection[str]
) -> None:
    """Bring a config up to date when it is saved: the weights that were loaded since, and their exact digest."""
    if isinstance(model, FeatureBackbone) or config.fingerprint is None:
        return
    tensors = bare_tensors(model) | kept.originals
    read = {name: tensors[name] for name in feeds_representation(model, point)}
    apart = set(names) if starts_random(config.backbone) else set()
    lost = {name for trained in kept.names.values() for name in trained} - kept.originals.keys() - apart
    if lost or any(not tensor.numel() or hasattr(tensor, "placements") for tensor in read.values()):
        return  # trained without a copy of the original, or sharded
    current = fingerprint(model, read, source=config.backbone, apart=apart)
    found = compare(config.fingerprint, current)
    if found.kind == "structure":
        return  # sharded by FSDP 1
    if found.refused:
        said = "The backbone has changed since the head was attached"
        warnings.warn(f"{said} ({found.words}); the adapter is saved as one of what it is now.", stacklevel=4)
        config.fingerprint = current
    config.fingerprint = config.fingerprint | origin(config.backbone)  # it may have been published since
    exact = {name: tensor for name, tensor in read.items() if name not in apart}
    unchanged = found.kind == "same" and "sha256" in config.fingerprint
    if not unchanged and found.kind not in ("cast", "quantized") and exact and (hashed := digest(model, exact)):
        config.fingerprint = config.fingerprint | {"sha256": hashed}


def sentence(found: Comparison) -> str:
    """Return what a comparison found, as a sentence."""
    heads = {
        "structure": "This is another backbone",
        "weights": "This backbone has other weights",
        "statistics": "This backbone has other weights",
        "cast": "This backbone has the same weights in another precision",
        "quantized": "This backbone is quantized otherwise",
        "unknown": "The weights of this backbone can't be compared",
    }
    return f"{heads[found.kind]}: {found.words}."


def _named(saved: dict[str, Any]) -> str:
    revision = str(saved.get("revision") or "")[:12]
    return f"{saved.get('id') or 'a backbone without a name'}{f' at {revision}' if revision else ''}"
