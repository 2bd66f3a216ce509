"""What somebody else's config will take, found without making it: backbone, PEFT layers, queues.

A few words of a config can ask for a model of any size. What files really hold may be made of it, as often as
`hfproj.limits` says; what a name and options alone ask for is bounded.
"""

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import nn

from hfproj import limits
from hfproj.backbones.allowance import allowance, bytes_of
from hfproj.backbones.loading import EMBEDDED, embedded_folder
from hfproj.backbones.small_images import split_options
from hfproj.errors import AdapterFileError, HubError
from hfproj.hub.sources import open_source
from hfproj.hub.untrusted import TensorInfo
from hfproj.objectives import create_objective
from hfproj.strict_json import check_size, read_json, short
from hfproj.tuner.config import ProjectionHeadConfig, entries

_HINT = "load the backbone yourself and pass it as backbone="
_COUNT = re.compile(r"\w*(layers?|depths?|blocks?|stages?|experts)")
SMALL_RANK = 256  # that even a tiny backbone may be given
_INDEX = "model.safetensors.index.json"


def check_backbone_size(source: dict[str, Any], where: str, *, backing: int) -> None:
    """Refuse, by an `AdapterFileError`, a source of `validation.backbone_source` whose backbone is too large.

    `backing` is the size of the adapter's own tensors, which may be those of the backbone.
    """
    options = {name: value for name, value in source.items() if name not in ("name", "library", "revision")}
    what = f"{where}: the backbone that it names, {short(source['name'])},"
    if source["library"] == "timm" or source["name"].startswith(("timm/", "hf-hub:timm/")):
        _check_timm(source["name"], source["revision"], options, what, backing)
    else:
        _check_transformers(source, options, what)


def _check_timm(name: str, revision: str | None, options: dict[str, Any], what: str, backing: int) -> None:
    import timm

    bare = name.removeprefix("hf-hub:").removeprefix("timm/")
    architecture = bare.partition(".")[0]
    if not timm.is_model(architecture):
        return  # loading says so
    largest = limits.UNBACKED_BYTES + limits.COPIES * backing
    if options.get("pretrained", True):  # a published size, to which options may add a little
        make = partial(timm.create_model, architecture, pretrained=False)
        published = bytes_of(make, limits.PUBLISHED_BYTES, what, _HINT)
        largest = limits.UNBACKED_BYTES + published * 5 // 4
        if published > limits.UNBACKED_BYTES:  # timm makes the model before it looks for the weights
            file = hf_hub_download(f"timm/{bare}", "model.safetensors", revision=revision)
            largest = limits.UNBACKED_BYTES + Path(file).stat().st_size * limits.COPIES
    given = {"num_classes": 0, **split_options({**options, "pretrained": False})[1]}
    bytes_of(partial(timm.create_model, architecture, **given), largest, what, _HINT)


def _check_transformers(source: dict[str, Any], options: dict[str, Any], what: str) -> None:
    from transformers import AutoConfig, AutoModel

    name = str(embedded_folder()) if source["name"] == EMBEDDED else source["name"]
    try:
        files = open_source(name, revision=source["revision"], token=None, cache_dir=None)
        size = files.size("config.json")
        if size is None:
            return  # loading says so
    except (AdapterFileError, HubError):
        return
    check_size("config.json", size, what, largest=limits.MODEL_CONFIG_BYTES)
    config = AutoConfig.from_pretrained(name, revision=source["revision"], trust_remote_code=False)
    plain = {n: v for n, v in options.items() if n not in ("attn_implementation", "dtype", "add_pooling_layer")}
    for option, value in entries({**config.to_dict(), **plain}):
        counts = value if isinstance(value, list) else [value]
        if _COUNT.fullmatch(str(option)) and sum(n for n in counts if isinstance(n, int)) > limits.BACKBONE_BLOCKS:
            raise AdapterFileError(
                f"{what} has {option}={short(value)}, more than {limits.BACKBONE_BLOCKS:,}; {_HINT}."
            )
    for option, value in plain.items():
        setattr(config, option, value)
    quantized = getattr(config, "quantization_config", None) is not None
    largest = limits.UNBACKED_BYTES + _weights(files) * limits.COPIES * (2 if quantized else 1)
    if quantized:
        config.quantization_config = None
    bytes_of(partial(AutoModel.from_config, config, trust_remote_code=False), largest, what, _HINT)


def _weights(files: Any) -> int:
    """Return the bytes of a model's safetensors files."""
    size = files.size("model.safetensors")
    if size is None and (length := files.size(_INDEX)) is not None:
        check_size(_INDEX, length, files.where, largest=limits.MODEL_CONFIG_BYTES)
        index = read_json(files.get(_INDEX, length), files.where, largest=limits.MODEL_CONFIG_BYTES)
        parts = {str(part) for _, part in entries(index.get("weight_map"))}
        sizes = [files.size(part) or 0 for part in sorted(parts)[:1000] if re.fullmatch(r"[\w.-]+\.safetensors", part)]
        size = sum(sizes)
    return size or 0


def is_large(options: Any) -> bool:
    """Return whether options hold a number that can decide a size of many megabytes."""
    numbers = (n for _, v in entries(options) for n in (v if isinstance(v, list) else [v]))
    return any(isinstance(n, int) and n > 1 << 14 for n in numbers)


def check_objective(config: ProjectionHeadConfig, where: str, *, backing: int) -> None:
    """Refuse, by an `AdapterFileError`, an objective that would take more than its file of `backing` bytes explains."""
    largest, hint = limits.OBJECTIVE_BYTES + limits.COPIES * backing, "it is not what its file holds"
    options = dict(config.objective or {})
    try:
        with torch.device("meta"), allowance(largest, f"{where}: the queues and memories of its objective", hint):
            create_objective(options.pop("name"), **options)
    except AdapterFileError:
        raise
    except Exception:  # who makes it is told: the trainer
        return


def check_rank(config: ProjectionHeadConfig, backbone: nn.Module, where: str) -> None:
    """Refuse, by an `AdapterFileError`, a rank beyond every width of the backbone before its tensors are made."""
    inner = config.backbone_options
    widths = (sorted(p.shape)[-2] if p.ndim > 1 else 1 for p in backbone.parameters())  # a vocabulary is none
    widest = max(widths, default=0)
    ranks = [inner.get("r"), *(inner.get("rank_pattern") or {}).values()]
    largest = max((r for r in ranks if isinstance(r, int | float)), default=0)
    if largest > max(widest, SMALL_RANK):
        other = (
            f"no layer of {type(backbone).__name__} has a rank beyond {widest}; the adapter belongs to another backbone"
        )
        raise AdapterFileError(f"{where}: its {inner['peft_type']} has rank {largest}, but {other}.")


def plausible_size(expected: dict[str, TensorInfo], config: ProjectionHeadConfig) -> tuple[int, int | None]:
    """Return the fewest and the most bytes of a file with the tensors of `head_tensors`; None where that is open."""
    numbers = sum(math.prod(info.shape) for info in expected.values())
    beside = config.trains_backbone or config.backbone_adapter is not None
    return 2 * numbers, None if beside else 8 * numbers + (1 << 20)
