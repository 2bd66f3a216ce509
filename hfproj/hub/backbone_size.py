"""What a backbone will take that somebody else's config names, found without making it.

A few words of a config can ask for a model of any size. What files really hold may be made of it, as often as
`hfproj.limits` says; what a name and options alone ask for is bounded.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from hfproj import limits
from hfproj.backbones.allowance import bytes_of
from hfproj.backbones.loading import EMBEDDED, embedded_folder
from hfproj.errors import AdapterFileError, HubError
from hfproj.hub.sources import open_source
from hfproj.strict_json import check_size, read_json, short
from hfproj.tuner.config import entries

_HINT = "load the backbone yourself and pass it as backbone="
_COUNT = re.compile(r"\w*(layers?|depths?|blocks?|stages?|experts)")
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
    given = {"num_classes": 0, **options, "pretrained": False}
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
            raise AdapterFileError(f"{what} has {option}={short(value)}, more than {limits.BACKBONE_BLOCKS:,}; {_HINT}.")
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
