"""The README of an exported folder: what it is, and the lines of Python that load it and compute h."""

from typing import Any

from torch import nn

from hfproj.backbones import ReadPoint, library_of
from hfproj.export.attached import Attached

_WORDS = {
    "cls": "its class token",
    "mean": "its mean over tokens or positions",
    "cls_mean": "its class token beside its mean over tokens",
    "max": "its maximum over tokens or positions",
    "pooler": "the backbone's own pooled output",
}


def readme(found: Attached, *, title: str, sentence: str, data: dict[str, Any], load: list[str]) -> str:
    """Return a README.md: front matter from `data`, a sentence, and code that ends with ``h``."""
    from huggingface_hub import ModelCardData

    if found.hub_id:
        data = {**data, "base_model": found.hub_id}
    else:
        data = {k: v for k, v in data.items() if k != "base_model_relation"}
    front = ModelCardData(**data, tags=["hfproj", "self-supervised-learning"]).to_yaml()
    call = "**inputs" if found.point.text else "images"
    given = (
        "`inputs` come from the tokenizer, with `attention_mask`"
        if found.point.text
        else "`images` is a batch `[batch, channels, height, width]`, prepared as the backbone wants it"
    )
    where = "the final output" if found.config.layer == -1 else f"the output of `{found.point.module}`"
    code = "\n".join(
        ["import torch", *load, "with torch.no_grad():", *(f"    {line}" for line in _reading(found, call))]
    )
    return (
        f"---\n{front}\n---\n\n# {title}\n\n{sentence}\n\n```python\n{code}\n```\n\n{given}. The representation h "
        f"`[batch, {found.config.in_dim}]` is read from {where} of the backbone: {_WORDS[found.point.pooling]}.\n"
    )


def load_backbone_lines(found: Attached) -> list[str]:
    """Return the lines that load the bare backbone as ``base``."""
    library, source = library_of(found.backbone), found.source
    if found.hub_id is None:
        origin = f" ({source['id']} of hfproj)" if source.get("id") == "vit_nano" else ""
        return [f"base = ...  # the backbone that this was trained on{origin}, without changes"]
    kwargs = dict(source.get("kwargs") or {})
    if library == "timm":
        name = found.hub_id.removeprefix("timm/")
        if source.get("revision"):
            name = f"hf-hub:timm/{name}@{source['revision']}"
        return ["import timm", f"base = timm.create_model({_call(name, {'pretrained': True, **kwargs})})"]
    revision = {"revision": source["revision"]} if source.get("revision") else {}
    name = type(found.backbone).__name__  # AutoModel would make all of CLIP, of which this is the image tower
    options = {**revision, **kwargs, **pooler_option(found.backbone)}
    return [f"from transformers import {name}", f"base = {name}.from_pretrained({_call(found.hub_id, options)})"]


def auto_class(backbone: nn.Module) -> str:
    """Return ``"AutoModel"`` where that makes a model of this class from its config, else the name of the class."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    known = MODEL_MAPPING.get(type(backbone.config), None)
    return "AutoModel" if known is type(backbone) else type(backbone).__name__


def pooler_option(backbone: nn.Module) -> dict[str, bool]:
    """Return the option without which transformers adds a pooler with random weights that this backbone has not."""
    return {"add_pooling_layer": False} if getattr(backbone, "pooler", False) is None else {}


def call_line(function: str, argument: str, options: dict[str, Any]) -> str:
    """Return a line that makes ``model``."""
    return f"model = {function}({_call(argument, options)}).eval()"


def _call(argument: str, options: dict[str, Any]) -> str:
    return ", ".join([f'"{argument}"', *(f"{name}={value!r}" for name, value in options.items())])


def _reading(found: Attached, call: str) -> list[str]:
    """Return the lines that compute h with ``model``, as `hfproj.backbones.pool` does."""
    point, library = found.point, library_of(found.backbone)
    if point.pooling == "pooler":
        tail = ".pooler_output" if library == "transformers" else ""
        return [f"h = model({call}){tail}.flatten(1)"]
    if found.config.layer != -1:
        lines = [
            "kept = []",
            f'layer = model.get_submodule("{point.module}")',
            "handle = layer.register_forward_hook(lambda module, args, output: kept.append(output))",
            f"model({call})",
            "handle.remove()",
            "tokens = kept[0][0] if isinstance(kept[0], tuple) else kept[0]",
        ]
    elif library == "timm":
        lines = [f"tokens = model.forward_features({call})"]
    else:
        lines = [f"tokens = model({call})" + (".last_hidden_state" if library == "transformers" else "")]
    return [*lines, *_pooling(point, last=getattr(found.backbone, "output_fmt", "") == "NHWC")]


def _pooling(point: ReadPoint, *, last: bool) -> list[str]:
    if point.pooling == "cls":
        return ["h = tokens[:, 0]"]
    if point.text:
        mask = 'mask = inputs["attention_mask"].unsqueeze(-1)'
        if point.pooling == "max":
            return [mask, "h = tokens.masked_fill(mask == 0, -torch.inf).amax(1)"]
        lines = [mask, "h = (tokens * mask).sum(1) / mask.sum(1)"]
    else:
        reduce = "amax" if point.pooling == "max" else "mean"
        if point.prefix_tokens:
            lines = [f"h = tokens[:, {point.prefix_tokens}:].{reduce}(1)"]
        else:  # tokens without a class token, a feature map, or one vector for an image
            flat = "tokens.flatten(1, 2)" if last else "tokens.flatten(2).mT"
            lines = [
                f"tokens = {flat} if tokens.ndim == 4 else tokens",
                f"h = tokens.{reduce}(1) if tokens.ndim == 3 else tokens",
            ]
    if point.pooling == "cls_mean":
        lines += ["h = torch.cat([tokens[:, 0], h], dim=-1)"]
    return lines
