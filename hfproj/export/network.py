"""What is exported: an adapter, its backbone with everything learned merged in, and plain modules to be traced.

These take x → {h, z} or h → {z}, with batches to trace and check them with and what is said of them in the file.
"""

import copy
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hfproj.checking import checked

from hfproj.backbones import (  # isort: skip
    EMBEDDED, FeatureBackbone, ReadPoint, bare_tensors, fit_image_size, image_preprocessing, library_of, pool,
    without_left_padding, without_masking,
)  # fmt: skip
from hfproj.backbones.preprocessing import channels_of, preprocessor_config
from hfproj.errors import UsageError
from hfproj.files import installed_versions, portable
from hfproj.tuner import ProjectionHeadConfig
from hfproj.tuner.description import known_preprocessing
from hfproj.tuner.layer import CHILD, ProjectionLayer
from hfproj.tuner.network import network_of
from hfproj.typing import OneOf

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
Batch = dict[str, Tensor]


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
        """Where the backbone was loaded from, ``{"library", "id", "kwargs"}``; empty where that is unknown."""
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
    """Return one adapter of `model`: the one of this name, or the active one; without one a `UsageError`."""
    layer, name = _layer(model, adapter_name)
    if not hasattr(model, "peft_config"):
        raise UsageError(f"model is a {type(model).__name__}; expected the PeftModel around it.")
    return Attached(model, model.get_base_model(), name, model.peft_config[name], layer.points[name])


@checked
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


def _layer(model: Any, adapter_name: str | None) -> tuple[Any, str]:
    """Return what carries the heads of `model`, and the name of the one asked for."""
    layer: Any = getattr(model.get_base_model() if hasattr(model, "get_base_model") else model, CHILD, None)
    if not isinstance(layer, ProjectionLayer):
        hint = "attach one with get_peft_model(backbone, ProjectionHeadConfig(…)) or hfproj.from_pretrained(…)"
        raise UsageError(f"{type(model).__name__} has no projection head; {hint}.")
    active: Any = layer.active_adapters
    name = adapter_name or next(iter(active), None)
    if name not in layer.points:
        raise UsageError(f"There is no adapter {name!r}; there are: {', '.join(layer.points)}.")
    return layer, str(name)


def merged_backbone(found: Attached, *, full_precision: bool = False) -> nn.Module:
    """Return a copy of the backbone, in eval mode, with what the active adapter learned merged in.

    It is plain: no layer of PEFT, no hook. Each tensor has the type it had, or float32 with `full_precision`. With no
    adapter or more than one in use, or a stand-in for the backbone, there is a `UsageError`.
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
        self.head = head.cpu().float().eval().requires_grad_(False)

    def forward(self, h: Tensor) -> Batch:
        return {"z": _projected(self.head, h)}


class _Network(nn.Module):
    """x → h, z: a backbone without layers of PEFT and without the hooks of an attached head."""

    def __init__(self, backbone: nn.Module, point: ReadPoint, head: nn.Module):
        super().__init__()
        self.backbone, self.point, self.head = backbone, point, head.cpu().float().eval().requires_grad_(False)

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
        options = self.options
        if self.point.reading > 1:  # this is a copy: it may stay as it is set for reading
            options = without_masking(self.backbone, pixel_values, options, [])
        return self._read(pixel_values, **options)


class _Texts(_Network):
    """input_ids, attention_mask → h, z."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Batch:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        given = without_left_padding(given) if self.point.reading > 1 else given
        return self._read(**given, mask=given["attention_mask"])


class _Plain(_Network):
    """x → h, z, for a module of no known family."""

    def forward(self, x: Tensor) -> Batch:
        return self._read(x)


def traceable(model: nn.Module, part: OneOf["model", "head"], example: Tensor | None) -> Traceable:
    """Return what `export_onnx` and `export_program` trace; a wrong part or example is a `UsageError`."""
    if part not in ("head", "model"):
        raise UsageError(f"Expected part to be 'head' (h → z) or 'model' (x → h, z), got {part!r}.")
    if part == "head" and example is not None:
        raise UsageError("example is a batch for the backbone; the head alone (part='head') takes none.")
    return _of_head(model) if part == "head" else _of_model(attached(model), example)


def _of_head(model: Any) -> Traceable:
    backbone = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(backbone, CHILD) and isinstance(getattr(model, "in_dim", None), int) and hasattr(model, "out_dim"):
        head, about = copy.deepcopy(model), {}  # a head from load_head or detach
    else:
        found = attached(model)
        head, about = detach(model, found.name), _about(found)

    def batch(rows: int) -> Batch:
        return {"h": torch.randn(rows, head.in_dim, generator=torch.Generator().manual_seed(rows))}

    return Traceable(_Head(head), batch, {"h": ("batch",)}, ("z",), {**_about_head(head), **about})


def _of_model(found: Attached, example: Tensor | None) -> Traceable:
    backbone: Any = merged_backbone(found, full_precision=True).cpu()
    if hasattr(backbone, "set_grad_checkpointing"):  # timm checkpoints in eval mode too
        backbone.set_grad_checkpointing(False)
    if getattr(getattr(backbone, "config", None), "_attn_implementation", None) not in (None, "eager", "sdpa"):
        backbone.set_attn_implementation("sdpa")  # flash and flex attention are kernels that no graph format has
    head = detach(found.model, found.name)
    parts, about = (backbone, found.point, head), {**_about_head(head), **_about(found)}
    if found.point.text:
        if example is not None:
            raise UsageError("example is for images; a text backbone is traced with token ids of its own.")
        axes: dict[str, tuple[str, ...]] = dict.fromkeys(("input_ids", "attention_mask"), ("batch", "tokens"))
        texts = partial(_padded_texts, backbone.config.vocab_size)
        return Traceable(_Texts(*parts), texts, axes, ("h", "z"), about)
    if library_of(backbone) == "torch":
        if example is None:
            hint = "pass a batch of it as example=…, a tensor with the batch as its first axis"
            raise UsageError(f"What {type(backbone).__name__} takes is unknown; {hint}.")
        return Traceable(_Plain(*parts), _rows_of(example, "x"), {"x": ("batch",)}, ("h", "z"), about)
    example = _images(found) if example is None else example
    if example.ndim != 4:
        shape = list(example.shape)
        raise UsageError(f"Expected example as images [batch, channels, height, width], got a tensor of shape {shape}.")
    size = (example.shape[-2], example.shape[-1])
    about["image_size"] = json.dumps(size)
    known = known_preprocessing(found.model, found.name)
    if known is not None:
        about |= {"image_mean": json.dumps(known.mean), "image_std": json.dumps(known.std)}
        about["image_processor"] = json.dumps(preprocessor_config(known.at(size[1])))
    batches = _rows_of(example, "pixel_values")
    return Traceable(_Images(*parts, size), batches, {"pixel_values": ("batch",)}, ("h", "z"), about)


def _images(found: Attached) -> Tensor:
    """Return images of the size that the backbone wants."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that mean and std are unknown
            size = image_preprocessing(found.model).size
    except UsageError as error:
        hint = "pass images of the size that the graph is to take as example=…"
        raise UsageError(f"The image size of {type(found.backbone).__name__} is unknown; {hint}.") from error
    return torch.randn(3, channels_of(found.backbone), size, size, generator=torch.Generator().manual_seed(0))


def _rows_of(example: Tensor, name: str) -> Callable[[int], Batch]:
    """Return a maker of batches from the rows of `example`, again and again."""
    if example.ndim < 1 or not len(example):
        wanted = "example as a batch of at least one row"
        raise UsageError(f"Expected {wanted}, got a tensor of shape {list(example.shape)}.")
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
    said = {"head": created.get("name", type(head).__name__), "head_options": json.dumps(portable(options))}
    version = installed_versions().get("hfproj", "unknown")
    return {"hfproj_version": version, **said, "in_dim": str(head.in_dim), "out_dim": str(head.out_dim)}


def _about(found: Attached) -> dict[str, str]:
    said = {"pooling": found.point.pooling, "layer": str(found.config.layer)}
    return {**said, "base_model": found.hub_id} if found.hub_id else said
