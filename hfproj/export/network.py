"""What is traced: a plain module x → {h, z} or h → {z}, batches to trace and check it with, and what is said of it."""

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hfproj.backbones import ReadPoint, fit_image_size, image_preprocessing, library_of, pool
from hfproj.errors import UsageError
from hfproj.export.attached import Attached, attached, merged_backbone
from hfproj.files import installed_versions, portable
from hfproj.hub.pull import detach
from hfproj.tuner.description import known_preprocessing
from hfproj.tuner.layer import CHILD

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Traceable:
    """A module in float32 and eval mode with what an exporter has to know.

    Args:
        module: Takes the inputs by name, returns a dict of tensors.
        batch: Makes a batch of so many rows.
        axes: input → names of its leading axes, whose sizes stay free.
        outputs: Names of what it returns.
        metadata: What it is, for the file.
    """

    module: nn.Module
    batch: Callable[[int], Batch]
    axes: dict[str, tuple[str, ...]]
    outputs: tuple[str, ...]
    metadata: dict[str, str] = field(default_factory=dict)


def _projected(head: nn.Module, h: Tensor) -> Tensor:
    """Return z, which is never h itself: exporters lose one of two names of one value."""
    z = head(h)
    return z.clone() if z is h else z


class HeadNetwork(nn.Module):
    """h → z."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, h: Tensor) -> Batch:
        """Return z."""
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


class ImageNetwork(_Network):
    """pixel_values → h, z."""

    def __init__(self, backbone: nn.Module, point: ReadPoint, head: nn.Module, size: tuple[int, int]):
        super().__init__(backbone, point, head)
        self.options: dict[str, Any] = {"interpolate_pos_encoding": True} if fit_image_size(backbone, size) else {}

    def forward(self, pixel_values: Tensor) -> Batch:
        """Return h and z of images."""
        return self._read(pixel_values, **self.options)


class TextNetwork(_Network):
    """input_ids, attention_mask → h, z."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Batch:
        """Return h and z of padded texts."""
        return self._read(input_ids=input_ids, attention_mask=attention_mask, mask=attention_mask)


class PlainNetwork(_Network):
    """x → h, z, for a module of no known family."""

    def forward(self, x: Tensor) -> Batch:
        """Return h and z."""
        return self._read(x)


def traceable(model: nn.Module, part: str, example: Tensor | None) -> Traceable:
    """Return what `export_onnx` and `export_program` trace.

    Raises:
        UsageError: there is no such part, or the example does not belong to it.
    """
    if part not in ("head", "model"):
        raise UsageError(f"part={part!r}: expected 'head' (h → z) or 'model' (x → h, z).")
    if part == "head":
        if example is not None:
            raise UsageError("example is a batch for the backbone; the head alone (part='head') takes none.")
        return _head(model)
    return _model(attached(model), example)


def _head(model: Any) -> Traceable:
    backbone = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(backbone, CHILD) and isinstance(getattr(model, "in_dim", None), int) and hasattr(model, "out_dim"):
        head, about = copy.deepcopy(model), {}  # a head from load_head or detach
    else:
        found = attached(model)
        head, about = detach(model, found.name), _about(found)
    head = head.cpu().float().eval().requires_grad_(False)
    width = head.in_dim

    def batch(rows: int) -> Batch:
        return {"h": torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))}

    return Traceable(HeadNetwork(head), batch, {"h": ("batch",)}, ("z",), {**_about_head(head), **about})


def _model(found: Attached, example: Tensor | None) -> Traceable:
    backbone: Any = merged_backbone(found, full_precision=True).cpu()
    head = detach(found.model, found.name).cpu().float().eval().requires_grad_(False)
    if hasattr(backbone, "set_grad_checkpointing"):  # timm checkpoints in eval mode too
        backbone.set_grad_checkpointing(False)
    if getattr(getattr(backbone, "config", None), "_attn_implementation", None) not in (None, "eager", "sdpa"):
        backbone.set_attn_implementation("sdpa")  # flash and flex attention are kernels that no graph format has
    about = {**_about_head(head), **_about(found)}
    axes: dict[str, tuple[str, ...]]
    if found.point.text:
        if example is not None:
            raise UsageError("example is for images; a text backbone is traced with token ids of its own.")
        axes = {"input_ids": ("batch", "tokens"), "attention_mask": ("batch", "tokens")}
        text = TextNetwork(backbone, found.point, head)
        return Traceable(text, _texts(backbone.config.vocab_size), axes, ("h", "z"), about)
    if library_of(backbone) == "torch":
        if example is None:
            raise UsageError(
                f"What {type(backbone).__name__} takes can't be told; pass a batch of it as example=…, a tensor with "
                "the batch as its first axis."
            )
        plain = PlainNetwork(backbone, found.point, head)
        return Traceable(plain, _rows_of(example, "x"), {"x": ("batch",)}, ("h", "z"), about)
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
    network = ImageNetwork(backbone, found.point, head, size)
    return Traceable(network, _rows_of(example, "pixel_values"), {"pixel_values": ("batch",)}, ("h", "z"), about)


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

    def batch(rows: int) -> Batch:
        return {name: example[torch.arange(rows) % len(example)].contiguous()}

    return batch


def _texts(vocabulary: int) -> Callable[[int], Batch]:
    """Return a maker of batches of padded texts."""

    def batch(rows: int) -> Batch:
        tokens = 5 + rows % 3
        ids = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(rows))
        lengths = tokens - torch.arange(rows) % 3
        return {"input_ids": ids, "attention_mask": (torch.arange(tokens) < lengths[:, None]).long()}

    return batch


def _about_head(head: Any) -> dict[str, str]:
    options = {k: v for k, v in getattr(head, "created", {}).items() if k not in ("name", "in_dim", "out_dim")}
    return {
        "hfproj_version": installed_versions().get("hfproj", "unknown"),
        "head": getattr(head, "created", {}).get("name", type(head).__name__),
        "head_options": json.dumps(portable(options)),
        "in_dim": str(head.in_dim),
        "out_dim": str(head.out_dim),
    }


def _about(found: Attached) -> dict[str, str]:
    said = {"pooling": found.point.pooling, "layer": str(found.config.layer)}
    return {**said, "base_model": found.hub_id} if found.hub_id else said
