"""The layer that holds heads beside a backbone, and the hooks through which the backbone's forward reaches it.

The layer is a child of the backbone named ``hfproj``. The hooks are module-level functions that look it up on the
module they are called with: a deep copy of the model (an EMA teacher) therefore uses its own head, not the original's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hfproj.backbones import (
    ReadPoint,
    by_name,
    fit_image_size,
    mask_of,
    pool,
    shorten,
    without_left_padding,
    without_masking,
)
from hfproj.backbones.wrong_inputs import check_pixels
from hfproj.errors import UsageError
from hfproj.functional.rows import without_steep_rows
from hfproj.heads import create_head
from hfproj.tuner.config import ProjectionHeadConfig

_FEATURE = "_hfproj_feature"  # in a submodule's __dict__ while the backbone runs, so that copies have their own
CHILD = "hfproj"  # must not contain the method's prefix: PEFT's delete_adapter skips names that do


@dataclass
class ProjectionOutput(ModelOutput):
    """What a backbone with an active head returns.

    Args:
        representation: h ``[batch, in_dim]``, the pooled backbone output.
        projection: z ``[batch, out_dim]``.
        prediction: p ``[batch, out_dim]``, where the adapter has a predictor.
        scores: Prototype logits ``[batch, prototypes]``, cosines of z with each prototype, where the adapter has any.
        scales: Name → learnable scalar, where the adapter has any.
        backbone_output: What the bare backbone returned; None where `layer` leaves the blocks after it out.
    """

    representation: Tensor | dict[str, Any] | None = None  # a dict of all fields when accelerate makes a copy
    projection: Tensor | None = None
    prediction: Tensor | None = None
    scores: Tensor | None = None
    scales: dict[str, Tensor] | None = None
    backbone_output: Any = None


class Prototypes(nn.Module):
    """Cosines of z ``[..., dim]`` with `count` learnable prototypes, times their lengths if `learn_norm`."""

    def __init__(self, dim: int, count: int, learn_norm: bool = False):
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(count, dim)))
        self.length = nn.Parameter(torch.ones(count)) if learn_norm else None

    def vectors(self) -> Tensor:
        """Return ``[count, dim]``, which unit z are multiplied with: unit rows, times their lengths if learned."""
        rows = nn.functional.normalize(self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)), dim=-1)
        return rows if self.length is None else rows * self.length.to(rows.dtype)[:, None]

    def forward(self, z: Tensor) -> Tensor:
        """Return prototype logits ``[..., count]``, in [-1, 1] with lengths of 1."""
        with torch.autocast(z.device.type, enabled=False):
            vectors = self.vectors()
            dtype = torch.promote_types(z.dtype, vectors.dtype)
            return nn.functional.normalize(without_steep_rows(z).to(dtype), dim=-1) @ vectors.to(dtype).mT


class HeadModules(nn.Module):
    """One adapter's head, with the predictor, prototypes and scales that the config asks for."""

    head: Any
    predictor: Any
    prototypes: Any

    def __init__(self, config: ProjectionHeadConfig, in_dim: int):
        super().__init__()
        out_dim = {} if config.out_dim is None else {"out_dim": config.out_dim}
        self.head = create_head(config.head, in_dim=in_dim, **{**config.head_options, **out_dim})
        self.predictor, self.prototypes = None, None
        if isinstance(config.predictor, dict):
            kwargs = {"out_dim": self.head.out_dim, **config.predictor}
            self.predictor = create_head(kwargs.pop("head"), in_dim=self.head.out_dim, **kwargs)
        if config.prototypes is not None:
            options = config.prototypes if isinstance(config.prototypes, dict) else {"count": config.prototypes}
            self.prototypes = Prototypes(self.head.out_dim, **options)
        scales = {name: nn.Parameter(torch.tensor(float(value))) for name, value in (config.scales or {}).items()}
        self.scales = nn.ParameterDict(scales)

    def forward(self, h: Tensor) -> dict[str, Tensor]:
        """Return z, p and prototype logits as far as there are modules; h is ``[batch, dim]`` or with views first."""
        weight = next((p for p in self.parameters() if p.is_floating_point()), None)
        z = self.head(h if weight is None else h.to(weight.dtype))
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            self._check(z, h)
        out = {"projection": z}
        if self.predictor is not None:
            out["prediction"] = self.predictor(z)
        if self.prototypes is not None:
            out["scores"] = self.prototypes(z)
        return {name: value.reshape(-1, value.shape[-1]) for name, value in out.items()}

    def _check(self, z: Any, h: Tensor) -> None:
        """Refuse what a head of somebody's own returns if it is not one z of `out_dim` numbers for each h."""
        width = getattr(self.head, "out_dim", None)
        if not isinstance(z, Tensor) or z.shape[:-1] != h.shape[:-1] or (width is not None and z.shape[-1] != width):
            got = list(z.shape) if isinstance(z, Tensor) else "None" if z is None else type(z).__name__
            wanted = f"z of shape {[*h.shape[:-1], width or 'out_dim']} for h of shape {list(h.shape)}"
            hint = "let its forward return a row of out_dim numbers for each row of h"
            raise UsageError(f"Expected {type(self.head).__name__} to return {wanted}, got {got}; {hint}.")


class ProjectionLayer(nn.Module, BaseTunerLayer):
    """All heads of one backbone, by adapter name; PEFT switches, disables and deletes them."""

    adapter_layer_names = ("projection_head_modules",)
    other_param_names = ()

    def __init__(self) -> None:
        super().__init__()
        self.projection_head_modules = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.points: dict[str, ReadPoint] = {}
        self.num_views = 1
        self.handles: list[Any] = []
        self.undo: list[Callable[[], Any]] = []  # while the backbone runs: what restores it as it was
        self.avoids_fused_layers = False
        self.skips: set[str] = set()  # adapters that leave the blocks after the one they read out of the computation
        self.whole = False  # whether all blocks are run all the same, for somebody who reads those too
        self.shortened = False

    def forward(self, x: Any) -> Any:
        """Return `x`: a backbone that is a Sequential runs this child in turn; the hooks run the heads."""
        return x

    @property
    def weight(self) -> Tensor:
        """PEFT asks every tuner layer for weight and bias of the layer that it wraps; a head wraps none."""
        raise AttributeError("a projection head wraps no layer, so it has neither its weight nor its bias")

    bias = weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise UsageError: a head has no weights to be merged into."""
        raise UsageError("A projection head can't be merged into a backbone, which it follows; use model.unload().")

    def unmerge(self) -> None:
        """Do nothing: nothing is ever merged."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return False: a head is no low-rank change of a weight."""
        return False

    # Private to PEFT, without a public form: called after loading with low_cpu_mem_usage, with the device of the base
    # layer. A head has none; its device and dtype are the backbone's at injection.
    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self.projection_head_modules:
            self.projection_head_modules[adapter_name].to(device or self.device, self.dtype)

    def add(self, name: str, config: ProjectionHeadConfig, point: ReadPoint, like: Tensor) -> None:
        """Make the head of adapter `name`, on the device of the backbone's tensor `like` and in float32 or better."""
        self.device, self.dtype = like.device, torch.promote_types(like.dtype, torch.float32)
        try:
            modules = HeadModules(config, point.in_dim)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            raise UsageError(f"Memory does not suffice for head {config.head!r} of adapter {name!r}.") from error
        if not any(p.is_meta for p in modules.parameters()):
            modules.to(self.device, self.dtype)
        if self.projection_head_modules:
            modules.train(self.training)  # a head that joins others takes over their mode
        self.projection_head_modules[name] = modules
        self.points[name] = point
        self.skips.discard(name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget adapter `adapter_name`."""
        super().delete_adapter(adapter_name)
        self.points.pop(adapter_name, None)

    @property
    def active_name(self) -> str | None:
        """Name of the head in use, or None while disabled."""
        if self.disable_adapters:
            return None
        names: Any = self.active_adapters
        return next((n for n in names if n in self.projection_head_modules), None)

    def project(self, backbone: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Return a `ProjectionOutput` around the backbone's `output`, or that output itself while disabled."""
        name = self.active_name
        read = {point.module for point in self.points.values() if point.module is not None}
        captured = {m: backbone.get_submodule(m).__dict__.pop(_FEATURE, None) for m in read}
        if name is None:
            return output
        point = self.points[name]
        source = output if point.module is None else captured[point.module]
        if source is None and point.module is not None:
            kind, hint = type(backbone).__name__, "set another `layer` in its config"
            raise UsageError(f"{kind} did not run its module {point.module!r}, which the head reads; {hint}.")
        h = rows = pool(source, point, mask_of(point, by_name(backbone, args, kwargs) if point.text else kwargs))
        if self.num_views != 1:
            if self.num_views < 1 or h.shape[0] % self.num_views:
                rows_there = f"the {h.shape[0]} rows of the batch"
                raise UsageError(f"Expected num_views to be a divisor of {rows_there}, got {self.num_views}.")
            rows = h.reshape(self.num_views, -1, h.shape[-1])
        modules: Any = self.projection_head_modules[name]
        scales = dict(modules.scales) or None
        whole = None if self.shortened else output
        return ProjectionOutput(representation=h, **modules(rows), scales=scales, backbone_output=whole)


def before_backbone(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Take ``num_views`` out of the call, prepare the captures, and ask for interpolated positions where needed."""
    layer: ProjectionLayer = getattr(module, CHILD)
    layer.num_views = kwargs.pop("num_views", 1)
    layer.shortened = False
    for point in layer.points.values():
        if point.module is not None:
            module.get_submodule(point.module).__dict__[_FEATURE] = None
    images = kwargs.get("pixel_values", args[0] if args else None)
    if isinstance(images, Tensor) and images.ndim == 4:
        if not torch.compiler.is_compiling():
            check_pixels(module, images)
        if fit_image_size(module, (images.shape[-2], images.shape[-1])):
            kwargs.setdefault("interpolate_pos_encoding", True)
    active = layer.points.get(layer.active_name or "")
    if active is None:
        return args, kwargs
    if active.text and active.reading > 1:
        args, kwargs = (), without_left_padding(by_name(module, args, kwargs))
    if active.reading > 1:
        kwargs = without_masking(module, images, kwargs, layer.undo)
    layer.shortened = layer.active_name in layer.skips and not layer.whole and not torch.compiler.is_compiling()
    if layer.shortened:
        layer.undo.append(shorten(module, str(active.module)))
    if layer.avoids_fused_layers and torch.backends.mha.get_fastpath_enabled():
        torch.backends.mha.set_fastpath_enabled(False)
        layer.undo.append(partial(torch.backends.mha.set_fastpath_enabled, True))
    return args, kwargs


def restore(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    """Undo what `before_backbone` switched off for this call, also when the backbone raised an error."""
    layer: ProjectionLayer = getattr(module, CHILD)
    while layer.undo:
        layer.undo.pop()()


def after_backbone(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """Run the active head on the backbone's output."""
    return getattr(module, CHILD).project(module, args, kwargs, output)


def capture_output(module: nn.Module, args: tuple, output: Any) -> None:
    """Keep a submodule's output until the backbone has returned."""
    if _FEATURE in module.__dict__:  # not when checkpointing runs it again in the backward pass
        module.__dict__[_FEATURE] = output


def capture_input(module: nn.Module, args: tuple) -> None:
    """Keep a submodule's first input until the backbone has returned."""
    if _FEATURE in module.__dict__:
        module.__dict__[_FEATURE] = args[0]


def install_hooks(backbone: nn.Module, layer: ProjectionLayer) -> None:
    """Connect `layer` with `backbone`, anew after each injection, since PEFT replaces modules."""
    remove_hooks(layer)
    layer.handles = [
        backbone.register_forward_pre_hook(before_backbone, with_kwargs=True),
        backbone.register_forward_hook(after_backbone, with_kwargs=True),
        backbone.register_forward_hook(restore, with_kwargs=True, always_call=True),
    ]
    # torch's fused kernels read the weights of the layers inside, past what PEFT has put in their place.
    layer.avoids_fused_layers = any(
        isinstance(module, BaseTunerLayer)
        for fused in backbone.modules()
        if isinstance(fused, nn.TransformerEncoderLayer | nn.MultiheadAttention)
        for module in fused.modules()
    )
    for name, side in sorted({(p.module, p.side) for p in layer.points.values() if p.module is not None}):
        module = backbone.get_submodule(name)
        if side == "input":
            layer.handles.append(module.register_forward_pre_hook(capture_input))
        else:
            layer.handles.append(module.register_forward_hook(capture_output))


def remove_hooks(layer: ProjectionLayer) -> None:
    """Disconnect `layer` from its backbone."""
    for handle in layer.handles:
        handle.remove()
    layer.handles = []
