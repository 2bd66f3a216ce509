"""What is traced: a plain module x → {h, z} or h → {z}, batches to trace and check it with, and what is said of it."""

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfproj.backbones import ReadPoint, fit_image_size, image_preprocessing, library_of, pool
from hfproj.errors import UsageError
from hfproj.export.attached import Attached, attached, detach, merged_backbone
from hfproj.files import installed_versions, portable
from hfproj.tuner.description import known_preprocessing
from hfproj.tuner.layer import CHILD

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Traceable:
    """A module in float32 and eval mode with what an exporter has to know."""

    module: nn.Module  # takes the inputs by name, returns a dict of tensors
    batch: Callable[[int], Batch]  # makes a batch of so many rows
    axes: dict[str, tuple[str, ...]]  # input → names of its leading axes, whose sizes stay free
    outputs: tuple[str, ...]  # names of what it returns
    metadata: dict[str, str]  # what it is, for the file


def _projected(head: nn.Module, h: Tensor) -> Tensor:
    """Return z, which is never h itself: exporters lose one of two names of one value."""
    z = head(h)
    return z.clone() if z is h else z


class _Head(nn.Module):
    """h → z."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, h: Tensor) -> Batch:
        return {"z": _projected(self.head, h)}


class _Network(nn.Module):
    """x → h, z: a backbone without layers of PEFT and without the hooks of an attached head."""

    def __init__(self, backbone: nn.Module, point: ReadPoint, head: nn.Module):
        super().__init__()
        self.backbone, self.point, self.head = backbone, point, head

    def _read(self, *args: Any, mask: Tensor | None = None, **kwargs: Any) -> Batch:
        kept: list[Any] = []
        if self.point.module is None:
            kept.append(self.backbone(*args, **kwargs))
        else:
            module = self.backbone.get_submodule(self.point.module)
            if self.point.side == "input":
                handle = module.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
            else:
                handle = module.register_forward_hook(lambda module, args, output: kept.append(output))
            try:
                self.backbone(*args, **kwargs)
            finally:
                handle.remove()
        h = pool(kept[0], self.point, mask)
        return {"h": h, "z": _projected(self.head, h)}


class _Images(_Network):
    """pixel_values → h, z."""

    def __init__(self, backbone: nn.Module, point: ReadPoint, head: nn.Module, size: tuple[int, int]):
        super().__init__(backbone, point, head)
        self.options: dict[str, Any] = {"interpolate_pos_encoding": True} if fit_image_size(backbone, size) else {}

    def forward(self, pixel_values: Tensor) -> Batch:
        return self._read(pixel_values, **self.options)


class _Texts(_Network):
    """input_ids, attention_mask → h, z."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Batch:
        return self._read(input_ids=input_ids, attention_mask=attention_mask, mask=attention_mask)


class _Plain(_Network):
    """x → h, z, for a module of no known family."""

    def forward(self, x: Tensor) -> Batch:
        return self._read(x)


def traceable(model: nn.Module, part: str, example: Tensor | None) -> Traceable:
    """Return what `export_onnx` and `export_program` trace.

    Raises:
        UsageError: If there is no such part, or the example does not belong to it.
    """
    if part not in ("head", "model"):
        raise UsageError(f"part={part!r}: expected 'head' (h → z) or 'model' (x → h, z).")
    if part == "head":
        if example is not None:
            raise UsageError("example is a batch for the backbone; the head alone (part='head') takes none.")
        return _of_head(model)
    return _of_model(attached(model), example)


def _of_head(model: Any) -> Traceable:
    backbone = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(backbone, CHILD) and isinstance(getattr(model, "in_dim", None), int) and hasattr(model, "out_dim"):
        head, about = _ready(copy.deepcopy(model)), {}  # a head from load_head or detach
    else:
        found = attached(model)
        head, about = _ready(detach(model, found.name)), _about(found)

    def batch(rows: int) -> Batch:
        return {"h": torch.randn(rows, head.in_dim, generator=torch.Generator().manual_seed(rows))}

    return Traceable(_Head(head), batch, {"h": ("batch",)}, ("z",), {**_about_head(head), **about})


def _ready(head: nn.Module) -> Any:
    return head.cpu().float().eval().requires_grad_(False)


def _of_model(found: Attached, example: Tensor | None) -> Traceable:
    backbone: Any = merged_backbone(found, full_precision=True).cpu()
    if hasattr(backbone, "set_grad_checkpointing"):  # timm checkpoints in eval mode too
        backbone.set_grad_checkpointing(False)
    if getattr(getattr(backbone, "config", None), "_attn_implementation", None) not in (None, "eager", "sdpa"):
        backbone.set_attn_implementation("sdpa")  # flash and flex attention are kernels that no graph format has
    head = _ready(detach(found.model, found.name))
    parts, about = (backbone, found.point, head), {**_about_head(head), **_about(found)}
    if found.point.text:
        if example is not None:
            raise UsageError("example is for images; a text backbone is traced with token ids of its own.")
        axes: dict[str, tuple[str, ...]] = dict.fromkeys(("input_ids", "attention_mask"), ("batch", "tokens"))
        texts = partial(_padded_texts, backbone.config.vocab_size)
        return Traceable(_Texts(*parts), texts, axes, ("h", "z"), about)
    if library_of(backbone) == "torch":
        if example is None:
            raise UsageError(
                f"What {type(backbone).__name__} takes is unknown; pass a batch of it as example=…, a tensor with the "
                "batch as its first axis."
            )
        return Traceable(_Plain(*parts), _rows_of(example, "x"), {"x": ("batch",)}, ("h", "z"), about)
    example = _images(found) if example is None else example
    if example.ndim != 4:
        raise UsageError(
            f"example: expected images [batch, channels, height, width], got a tensor of shape {list(example.shape)}."
        )
    size = (example.shape[-2], example.shape[-1])
    about["image_size"] = json.dumps(size)
    known = known_preprocessing(found.model, found.name)
    if known is not None:
        about |= {"image_mean": json.dumps(known.mean), "image_std": json.dumps(known.std)}
    batches = _rows_of(example, "pixel_values")
    return Traceable(_Images(*parts, size), batches, {"pixel_values": ("batch",)}, ("h", "z"), about)


def _images(found: Attached) -> Tensor:
    """Return images of the size that the backbone wants."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that mean and std are unknown
            size = image_preprocessing(found.model).size
    except UsageError as error:
        raise UsageError(
            f"The image size of {type(found.backbone).__name__} is unknown; pass images of the size that the graph is "
            "to take as example=…, a tensor [batch, channels, height, width]."
        ) from error
    channels = getattr(getattr(found.backbone, "config", None), "num_channels", None)
    if channels is None:
        channels = next((m.in_channels for m in found.backbone.modules() if isinstance(m, nn.Conv2d)), 3)
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(0))


def _rows_of(example: Tensor, name: str) -> Callable[[int], Batch]:
    """Return a maker of batches from the rows of `example`, again and again."""
    if example.ndim < 1 or not len(example):
        raise UsageError(f"example: expected a batch of at least one row, got a tensor of shape {list(example.shape)}.")
    example = example.detach().cpu()
    example = example.float() if example.is_floating_point() else example
    return lambda rows: {name: example[torch.arange(rows) % len(example)].contiguous()}


def _padded_texts(vocabulary: int, rows: int) -> Batch:
    tokens = 5 + rows % 3
    ids = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(rows))
    lengths = tokens - torch.arange(rows) % 3
    return {"input_ids": ids, "attention_mask": (torch.arange(tokens) < lengths[:, None]).long()}


def _about_head(head: Any) -> dict[str, str]:
    created = getattr(head, "created", {})
    options = {name: value for name, value in created.items() if name not in ("name", "in_dim", "out_dim")}
    return {
        "hfproj_version": installed_versions().get("hfproj", "unknown"),
        "head": created.get("name", type(head).__name__),
        "head_options": json.dumps(portable(options)),
        "in_dim": str(head.in_dim),
        "out_dim": str(head.out_dim),
    }


def _about(found: Attached) -> dict[str, str]:
    said = {"pooling": found.point.pooling, "layer": str(found.config.layer)}
    return {**said, "base_model": found.hub_id} if found.hub_id else said
