"""What is read of a model while it runs over data: h, z where there is a head, intermediate layers, tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfproj.backbones import (
    READING,
    FeatureBackbone,
    ReadPoint,
    blocks_of,
    channels_last,
    check_texts,
    fit_image_size,
    mask_of,
    pool,
    pooling_of_tokens,
    resolve_read_point,
    without_left_padding,
    without_masking,
)
from hfproj.backbones.wrong_inputs import check_pixels, run_explained, wrong_tokens
from hfproj.errors import UsageError, unknown
from hfproj.functional.modes import evaluating
from hfproj.heads.layers import ALL, LayerTrace, is_layer_name, layer_name, layer_widths
from hfproj.tuner.layer import CHILD, ProjectionLayer
from hfproj.typing import OneOf, Pooling

FINAL = "final"  # name of the layer -1: the backbone's output after its last norm


class Reader:
    """Runs a model on batches in eval mode, without gradients; a context manager, since it hangs hooks into the model.

    The options are those of `extract_features`; `layers` is the name of each intermediate layer → where it is read.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, *, pooling: Pooling | None = None,
        layers: Sequence[int | str] | OneOf["all", "head"] = (), tokens: bool = False,
        dtype: torch.dtype = torch.float32, autocast: torch.dtype | None = None,
    ):  # fmt: skip
        self.model, self.device, self.dtype, self.autocast, self.tokens = model, device, dtype, autocast, tokens
        get_base: Any = getattr(model, "get_base_model", None)
        self.backbone: nn.Module = model if get_base is None else get_base()
        layer: Any = getattr(self.backbone, CHILD, None)
        self._has_hooks = isinstance(layer, ProjectionLayer)
        points = layer.points if isinstance(layer, ProjectionLayer) else {}
        adapter = next((n for n in layer.active_adapters if n in points), None) if points else None
        if adapter is None:
            self._point = resolve_read_point(self.backbone, pooling=pooling, in_dim=1)
        else:
            self._point = points[adapter]
            if pooling not in (None, self._point.pooling):
                own = f"The model's adapter reads its backbone by pooling={self._point.pooling!r}"
                raise UsageError(f"{own}, got pooling={pooling!r}; leave pooling out, or pass the bare backbone.")
        # A pooler gives one vector and no tokens, and only of the end: what lies before it is pooled by the default.
        by_pooler = self._point.pooling == "pooler"
        self._pooling = None if by_pooler else self._point.pooling
        tokens_by = pooling_of_tokens(self.backbone) if by_pooler and tokens else None
        self._token_point = self._resolve(tokens_by, -1) if tokens_by else self._point
        if isinstance(layers, int) and not isinstance(layers, bool):
            raise UsageError(f"Expected layers='all' or a list, got {layers}; do you mean layers=[{layers}]?")
        if isinstance(layers, str):
            if layers not in ("all", ALL):
                there = layers in dict(self.backbone.named_modules()) or is_layer_name(layers)
                meant = f"do you mean layers=[{layers!r}]" if there else "layers=[-1] is the last one"
                wanted = "Expected layers='all', 'head' or a list"
                raise UsageError(f"{wanted}, got {layers!r}; {meant}{'?' * there or '.'}")
            layers = blocks_of(self.backbone) if layers == "all" else [ALL]
        self._head: Any = None  # where layers of the head are read
        self.layers: dict[str, ReadPoint | int] = dict(found for one in layers for found in self._named(one, layer))
        self._captured: dict[tuple[str, str], Any] = {}
        self._entered = ExitStack()

    def _resolve(self, pooling: Pooling | None, layer: int) -> ReadPoint:
        reading = READING if isinstance(self.backbone, FeatureBackbone) else self._point.reading
        return resolve_read_point(self.backbone, pooling=pooling, layer=layer, in_dim=1, reading=reading)

    def _named(self, layer: int | str, heads: Any) -> list[tuple[str, ReadPoint | int]]:
        """Return names and places: of a layer of the head its number, of all of them where they are asked for."""
        if layer != ALL and not is_layer_name(layer):
            return [self._layer(layer)]
        active = heads.active_name if isinstance(heads, ProjectionLayer) else None
        if active is None:
            if layer in dict(self.backbone.named_modules()):
                return [self._layer(layer)]
            hint = "attach a head, switch its adapter on, or name a layer of the backbone"
            raise UsageError(f"Expected a model with an active head for layers={[layer]}, got none; {hint}.")
        self._head = heads.projection_head_modules[active].head
        numbers = range(len(layer_widths(self._head)))
        names = [layer_name(number) for number in numbers]
        if layer in names or (layer == ALL and names):
            return [(name, number) for name, number in zip(names, numbers) if layer in (ALL, name)]
        have = f"{', '.join(names)} beside h and z" if names else "no linear map: there are only h and z"
        which = f"the active head, a {type(self._head).__name__}"
        raise UsageError(f"Expected layers={[layer]} to be of {which}; it has {have}.")

    def _layer(self, layer: int | str) -> tuple[str, ReadPoint]:
        if isinstance(layer, bool) or not isinstance(layer, int | str):
            raise UsageError(f"Expected a layer as the index of a block or the name of a submodule, got {layer!r}.")
        if isinstance(layer, int):
            point = self._resolve(self._pooling, layer) if layer != -1 else self._point
            return FINAL if layer == -1 else str(point.module), point
        names = [name for name, _ in self.backbone.named_modules() if name and name.split(".")[0] != CHILD]
        if layer not in names:
            raise unknown("layer", layer, [name for name in names if name.count(".") < 3])
        point = self._resolve(self._pooling or pooling_of_tokens(self.backbone), -1)
        return layer, dataclasses.replace(point, module=layer, side="output")

    @property
    def protocol(self) -> dict[str, Any]:
        """What decides, beside the weights, which numbers are read; plain JSON."""
        mixed = self.autocast
        if mixed is None and torch.is_autocast_enabled(self.device.type):  # the caller's
            mixed = torch.get_autocast_dtype(self.device.type)
        return {
            "pooling": self._point.pooling, "module": self._point.module, "side": self._point.side,
            "layers": {name: ["head", p] if isinstance(p, int) else [p.module, p.side, p.pooling]
                       for name, p in self.layers.items()},
            **({"reading": self._point.reading} if self._point.text and self._point.reading > 1 else {}),
            "tokens": self.tokens, "dtype": str(self.dtype).removeprefix("torch."),
            "autocast": None if mixed is None else str(mixed).removeprefix("torch."),
        }  # fmt: skip

    def __enter__(self) -> "Reader":
        own = [point for point in self.layers.values() if isinstance(point, ReadPoint)]
        points = [*own, self._point, *[self._token_point] * self.tokens]
        for name, side in sorted({(p.module, p.side) for p in points if p.module is not None}):
            module, keep = self.backbone.get_submodule(name), partial(self._keep, (name, side))
            before = side == "input"
            hook = module.register_forward_pre_hook(keep) if before else module.register_forward_hook(keep)
            self._entered.callback(hook.remove)
        self._entered.callback(self._captured.clear)
        head: Any = getattr(self.backbone, CHILD, None)
        if isinstance(head, ProjectionLayer) and (own or self.tokens):
            self._entered.callback(setattr, head, "whole", head.whole)
            head.whole = True  # blocks after the one that the head reads are read here
        if self._head is not None:
            self._trace = self._entered.enter_context(LayerTrace(self._head))
        self._entered.enter_context(evaluating(self.model))
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.close()

    def _keep(self, where: tuple[str, str], module: nn.Module, inputs: tuple, output: Any = None) -> None:
        self._captured[where] = inputs[0] if where[1] == "input" else output

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return h, z?, ``layers.<name>`` and tokens? of a batch, on the CPU."""
        mixed = nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)
        self._captured.clear()
        undo: list[Any] = []
        batch, options = self._prepared(batch, undo)
        with torch.inference_mode(), mixed:
            given = batch["inputs"] if "inputs" in batch else {"": batch.get("pixel_values")}
            args = () if "inputs" in batch else (batch.get("pixel_values"),)
            try:
                call = partial(run, self.model, batch, self.device, **options)
                output = run_explained(call, self.backbone, args, given)
            finally:
                for restore in undo:
                    restore()
            inputs = {n: v.to(self.device) for n, v in batch.get("inputs", {}).items() if n.endswith("attention_mask")}
            found: dict[str, Tensor] = {}
            own = getattr(output, "representation", None)
            bare = getattr(output, "backbone_output", None) if own is not None else output
            found["h"] = own if own is not None else self._pooled(self._point, bare, inputs)
            if getattr(output, "projection", None) is not None:
                found["z"] = output.projection
            for name, point in self.layers.items():
                f = self._inside(point) if isinstance(point, int) else self._pooled(point, bare, inputs)
                found[f"layers.{name}"] = f
            if self.tokens:
                found["tokens"] = self._sequence(self._source(self._token_point, bare))
            return {name: self._stored(name, f) for name, f in found.items()}

    def _prepared(self, batch: Mapping[str, Any], undo: list[Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """Return the batch and the options that a bare backbone needs, and that the head's hooks give it otherwise."""
        options: dict[str, Any] = {}
        if self._point.text and "inputs" in batch:
            check_texts(batch["inputs"].get("attention_mask"), batch.get("index"))
            ids = batch["inputs"].get("input_ids")  # on the CPU still: a GPU that met an unknown token is lost
            if isinstance(ids, Tensor) and (why := wrong_tokens(self.backbone, ids)) is not None:
                raise UsageError(f"{why}.")
        if self._point.reading > 1 and self._point.text and "inputs" in batch:
            batch = {**batch, "inputs": without_left_padding(batch["inputs"])}
        images = batch.get("pixel_values", batch.get("inputs", {}).get("pixel_values"))
        if not isinstance(images, Tensor) or images.ndim != 4:
            return batch, options
        if not self._has_hooks:
            check_pixels(self.backbone, images)
        if not self._has_hooks and fit_image_size(self.backbone, (images.shape[-2], images.shape[-1])):
            options["interpolate_pos_encoding"] = True
        if self._point.reading > 1:
            noise = without_masking(self.backbone, images, {}, undo).get("noise")
            options |= {} if noise is None else {"noise": noise.to(self.device)}
        return batch, options

    def _inside(self, number: int) -> Tensor:
        """Return what a layer of the head gave, a row for each row of h."""
        if number >= len(self._trace.outputs):
            raise UsageError(f"{type(self._head).__name__} did not run its layer {layer_name(number)!r}.")
        return self._trace.outputs[number].flatten(0, -2)

    def _source(self, point: ReadPoint, output: Any) -> Any:
        if point.module is None:
            return output
        if (point.module, point.side) not in self._captured:
            raise UsageError(f"{type(self.backbone).__name__} did not run its module {point.module!r}.")
        return self._captured[point.module, point.side]

    def _pooled(self, point: ReadPoint, output: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        source = self._source(point, output)
        if point.pooling == "pooler":
            pooled = source[1] if isinstance(source, tuple) else getattr(source, "pooler_output", source)
            width = pooled.shape[1] if isinstance(pooled, Tensor) else 0
        else:
            f = self._tensor(source)
            width = f.shape[1] if f.ndim == 4 and not channels_last(self.backbone, f) else f.shape[-1]
            width *= 2 if point.pooling == "cls_mean" else 1
        return pool(source, dataclasses.replace(point, in_dim=width), mask_of(point, inputs))

    def _sequence(self, source: Any) -> Tensor:
        f = self._tensor(source)
        if f.ndim == 4:
            f = f.flatten(1, 2) if channels_last(self.backbone, f) else f.flatten(2).mT
        if f.ndim != 3:
            found = f"one vector per item ({tuple(f.shape)}) from {type(self.backbone).__name__}"
            raise UsageError(f"Expected tokens, got {found}; leave tokens out.")
        return f

    def _tensor(self, source: Any) -> Tensor:
        value = getattr(source, "last_hidden_state", source)
        value = value[0] if isinstance(value, tuple | list) and value else value
        if not isinstance(value, Tensor) or not 2 <= value.ndim <= 4:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(
                "Expected [batch, dim], [batch, tokens, dim], [batch, dim, height, width], an output with "
                f"last_hidden_state or a model with an active head; {type(self.backbone).__name__} returned {found}."
            )
        return value

    def _stored(self, name: str, f: Tensor) -> Tensor:
        stored = f.to(self.dtype)
        if self.dtype == torch.float16 and bool((stored.isinf() & f.isfinite()).any()):
            largest = f"{name!r} has values up to {f.abs().max().item():.3g}"
            raise UsageError(f"{largest}, beyond float16; use dtype=torch.bfloat16 or torch.float32.")
        return stored.cpu()


def run(model: nn.Module, batch: Mapping[str, Any], device: torch.device, **options: Any) -> Any:
    """Run the model on the inputs of a batch, `inputs` (a mapping) or `pixel_values`, and return its output."""
    if "inputs" in batch:
        inputs = {key: value.to(device, non_blocking=True) for key, value in batch["inputs"].items()}
        return model(**inputs, **options)
    if "pixel_values" in batch:
        # By position: timm and plain modules call their first argument otherwise than transformers do.
        return model(batch["pixel_values"].to(device, non_blocking=True), **options)
    raise UsageError(f"Expected 'pixel_values' or 'inputs' (a mapping) in the batch, got {sorted(batch)}.")


def run_head(model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> Any:
    """Run a model with an active head on the inputs of a batch, and return its output."""
    output = run(model, batch, device)
    if getattr(output, "representation", None) is None or getattr(output, "projection", None) is None:
        raise UsageError(
            f"The model returned {type(output).__name__} without `representation` and `projection`; expected a model "
            "with an active projection head. Is its adapter disabled, or was the head never attached?"
        )
    return output


def view_batches(batch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return each view of a batch as `run` takes it; a batch without "views" is one view."""
    views = batch.get("views", [batch])
    return [v if v is batch else {"inputs": v} if isinstance(v, Mapping) else {"pixel_values": v} for v in views]
