"""Where a representation leaves its backbone, how it is pooled, and which of the backbone's tensors it depends on.

Without a pooling of the user's, h is what the backbone's author reads (version 2 of these rules):

- timm: the model's own pooled output, ``forward_head(forward_features(x), pre_logits=True)``. Where a model made with
  ``global_pool=''`` has none, the class token or the mean of its output.
- transformers, images: the pooled output, where its parameters are trained ones or it has none; else the class token,
  else the mean, of the last hidden state.
- transformers, texts: the pooling that the folder declares in the format of sentence-transformers; else the masked mean
  of encoders and the last real token of causal models. Padding before a text is moved behind it.
- Plain modules: their output; of tokens or a map the mean.

Version 1 (`hfproj.backbones.reading_v1`) is that of adapters saved by hfproj 0.1.0.
"""

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from torch import Tensor, nn

from hfproj.backbones.checkpoint_files import checkpoint_lacks, declared_pooling
from hfproj.backbones.dry_run import (
    BATCH,
    DryRun,
    dry_run,
    structure,
    with_gradients,
)
from hfproj.backbones.features import FeatureBackbone
from hfproj.backbones.loading import library_of, main_input_of, timm_part_of
from hfproj.backbones.pooling import pool, pooled_of, tokens_of
from hfproj.backbones.reading_v1 import (
    check_pooler,
    feeding_by_names,
    random_pooler,
    resolve_by_names,
    timm_read_module,
    width_of,
)
from hfproj.backbones.refusals import check_input
from hfproj.backbones.reruns import idle_in_training, module_of_features, reads_pre_logits, runs_shortened
from hfproj.backbones.structure import POOLINGS, READING, ReadPoint, bare_tensors, blocks_of, prefix_tokens_of
from hfproj.checking import checked
from hfproj.errors import UsageError, check_choice
from hfproj.typing import Pooling

_FOUND: dict[tuple[str, str], tuple[frozenset[str], frozenset[str]] | None] = {}  # by structure and read point
_MOST_FOUND = 256
_T = TypeVar("_T")


@checked
def resolve_read_point(
    backbone: nn.Module, *, pooling: Pooling | None = None, layer: int = -1, in_dim: int | None = None,
    reading: int = READING,
) -> ReadPoint:  # fmt: skip
    """Return where and how `backbone`'s representation is read.

    Args:
        backbone: The bare backbone.
        pooling: One of `POOLINGS`; None takes what the backbone's author reads, see `hfproj.backbones.reading`.
        layer: -1 reads the final output (after the last norm); any other index reads the raw output of that block.
        in_dim: Width of the representation, for modules from which it can't be found.
        reading: Version of the rules: 1 for adapters saved by hfproj 0.1.0.

    Raises:
        UsageError: If this backbone can't be read in this way.
    """
    if isinstance(backbone, FeatureBackbone):
        backbone.check(pooling, layer)
        return ReadPoint(
            backbone.pooling, None, "output", prefix_tokens=0, text=False, in_dim=backbone.in_dim, reading=reading
        )
    if pooling is not None:
        check_choice("pooling", pooling, POOLINGS)
    if not 1 <= reading <= READING:
        raise UsageError(f"reading={reading}: expected 1 to {READING}; a newer hfproj is needed for this adapter.")
    if reading == 1:
        return resolve_by_names(backbone, pooling=pooling, layer=layer, in_dim=in_dim)
    return _of_run(backbone, lambda dry: _Resolver(backbone, dry).resolve(pooling, layer, in_dim))


def _of_run(backbone: nn.Module, found: Callable[[DryRun | None], _T]) -> _T:
    """Return what `found` makes of a run without values, or of one with them where a gradient can't do without."""
    try:
        return found(dry_run(backbone))
    except NotImplementedError:
        return found(dry_run(backbone, values=True))


class _Resolver:
    """One backbone and the run of it without data (None where there can be none)."""

    def __init__(self, backbone: Any, dry: DryRun | None):
        self.backbone, self.dry, self.kind = backbone, dry, type(backbone).__name__
        self.text = library_of(backbone) == "transformers" and main_input_of(backbone) == "input_ids"
        self.prefix, self.has_cls = prefix_tokens_of(backbone)
        part = timm_part_of(backbone)
        self.timm_prefix: str = part[0] if part else ""
        self.timm: Any = part[1] if part else None

    def resolve(self, pooling: Pooling | None, layer: int, in_dim: int | None) -> ReadPoint:
        if self.dry is None and self.timm is None and library_of(self.backbone) == "transformers":
            check_input(self.backbone, in_dim)
        chosen = pooling or self.default(layer)
        module, side = self._place(chosen, layer)
        point = ReadPoint(chosen, module, side, self.prefix, self.text, in_dim or 0, READING)
        if chosen in ("cls", "cls_mean") and not (self._has_cls(layer) or self.text):
            hint = "use pooling='mean' or 'max'"
            raise UsageError(f"pooling={chosen!r} needs a class token and {self.kind} has none; {hint}.")
        if chosen == "last" and not self.text:
            raise UsageError(f"pooling='last' reads the last token of a text, and {self.kind} takes none; use 'mean'.")
        if in_dim is None or library_of(self.backbone) != "torch":  # of a plain module the input is a guess
            width = self._width(point)
            in_dim = width if width is not None else in_dim
        if in_dim is None:
            raise UsageError(f"The width of {self.kind}'s representation can't be found; pass in_dim=… to the config.")
        return dataclasses.replace(point, in_dim=int(in_dim))

    # --- how ---

    def default(self, layer: int) -> Pooling:
        """Return the pooling of `layer` where the user gives none."""
        if self.text:
            return declared_pooling(self.backbone) or ("last" if self._is_causal() else "mean")
        if layer != -1:
            return self._of_tokens(layer)
        if self.timm is None:
            return "pooler" if self.dry is not None and self._has_trained_pooler() else self._of_tokens()
        if self.dry is None:
            return self._of_tokens() if getattr(self.timm, "global_pool", "avg") == "" else "pooler"
        pooled = getattr(self.dry.output, "pooler_output", self.dry.output)
        return "pooler" if isinstance(pooled, Tensor) and pooled.ndim == 2 else self._of_tokens()

    def _has_cls(self, layer: int) -> bool:
        """Whether the first of the tokens is a class token; a ViT made for maps (``Dinov2Backbone``) returns none."""
        output: Any = None if self.dry is None or layer != -1 or self.timm is not None else self.dry.output
        return self.has_cls and not (output is not None and tokens_of(output).ndim == 4)

    def _of_tokens(self, layer: int = -1) -> Pooling:
        if self.timm is not None and str(getattr(self.timm, "global_pool", "")).startswith("avg"):
            return "mean"
        return "cls" if self._has_cls(layer) else "mean"

    def _is_causal(self) -> bool:
        """Whether a token sees those before it only, as its attention layers say; else as the task of its family."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

        config: Any = self.backbone.config
        if getattr(config, "is_encoder_decoder", False) and hasattr(self.backbone, "get_decoder"):
            return hasattr(self.backbone, "decoder")
        said = [m.is_causal for m in self.backbone.modules() if isinstance(getattr(m, "is_causal", None), bool)]
        if said:
            return any(said)
        if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
            return bool(getattr(config, "is_decoder", False))
        return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING

    def _has_trained_pooler(self) -> bool:
        """Whether the backbone returns a pooled vector whose own parameters, if any, come from the checkpoint."""
        output: Any = self.dry.output  # type: ignore[union-attr]
        pooled, last = getattr(output, "pooler_output", None), getattr(output, "last_hidden_state", None)
        if not isinstance(pooled, Tensor) or pooled.ndim < 2 or pooled.shape[2:].numel() != 1:
            return False
        return not isinstance(last, Tensor) or all(self._is_trained(part) for part in self._own_parts(pooled, last))

    def _own_parts(self, pooled: Tensor, last: Tensor) -> list[str]:
        """Return the topmost modules that have parameters that only the pooled vector depends on."""
        assert self.dry is not None
        shared = self.dry.feeding(last, "last_hidden_state")
        own = self.dry.feeding(pooled, "pooler_output") - shared
        parts: list[str] = []
        for name, module in self.dry.copy.named_modules():
            inside = [f"{name}.{n}" for n, _ in module.named_parameters()]
            if name and own & set(inside) and not shared & set(inside) and not any(
                name.startswith(f"{p}.") for p in parts
            ):  # fmt: skip
                parts.append(name)
        return parts

    def _is_trained(self, part: str) -> bool:
        lacks = checkpoint_lacks(self.backbone, part.rpartition(".")[2])
        if lacks is None:  # a dense layer with tanh is made up by many classes, and no pretraining knows it
            kinds = [type(m) for m in self.dry.copy.get_submodule(part).modules()]  # type: ignore[union-attr]
            return not (nn.Tanh in kinds and any(issubclass(kind, nn.Linear) for kind in kinds))
        return not lacks

    def _check_pooler(self) -> None:
        """Refuse a pooled output that is not there or whose weights are random."""
        check_pooler(self.backbone)
        output: Any = None if self.dry is None else self.dry.output
        pooled, last = (getattr(output, name, None) for name in ("pooler_output", "last_hidden_state"))
        if isinstance(pooled, Tensor) and isinstance(last, Tensor) and self.timm is None:
            for part in self._own_parts(pooled, last):
                if checkpoint_lacks(self.backbone, part.rpartition(".")[2]):
                    raise random_pooler(self.backbone)

    # --- where ---

    def _place(self, pooling: str, layer: int) -> tuple[str | None, str]:
        if pooling == "pooler":
            if layer != -1:
                hint = "use pooling='cls' or 'mean', or layer=-1"
                raise UsageError(
                    f"pooling='pooler' is the backbone's own; layer={layer} can't be used with it; {hint}."
                )
            if self.timm is not None and self.timm_prefix == "" and getattr(self.timm, "num_classes", False):
                return self._before_the_classifier(), "input"
            self._check_pooler()
            return None, "output"
        if layer != -1:
            return self._block(layer), "output"
        if self.timm is None:
            return None, "output"
        if self.dry is not None and isinstance(self.dry.output, Tensor) and self.dry.output.ndim > 2:
            return None, "output"  # made without pooling and classifier: it returns its tokens
        found = timm_read_module(self.timm)
        if found is None or (self.dry is not None and self.timm_prefix + found[0] not in self.dry.seen):
            return self._of_forward_features(), "output"
        return self.timm_prefix + found[0], found[1]

    def _before_the_classifier(self) -> str:
        """Return the name of a timm model's classifier: its input is the model's own pooled output."""
        model: Any = self.timm
        classifier, dry = model.get_classifier() if hasattr(model, "get_classifier") else None, self.dry
        name = next((n for n, m in model.named_modules() if m is classifier), None)
        if dry is not None and name in dry.seen and reads_pre_logits(dry, str(name)):
            return str(name)
        raise UsageError(
            f"What {self.kind} gives its classifier can't be read from outside; make it with num_classes=0 "
            "(timm.create_model(…, num_classes=0), or model.reset_classifier(0))."
        )

    def _of_forward_features(self) -> str:
        """Return the name of the module whose output is what a timm model's own pooling takes."""
        found = None if self.dry is None else module_of_features(self.dry, self.timm_prefix)
        if found is None:
            raise UsageError(
                f"{self.kind} shows neither a token norm nor a pooling layer; use pooling='pooler' with a model made "
                "by timm.create_model(…, num_classes=0)."
            )
        return found

    def _block(self, layer: int) -> str:
        blocks = blocks_of(self.backbone)
        if not -len(blocks) <= layer < len(blocks):
            hint = f"expected -1 (its final output) or an index from {-len(blocks)} to {len(blocks) - 1}"
            raise UsageError(f"layer={layer}: {self.kind} has {len(blocks)} blocks; {hint}.")
        return blocks[layer]

    def _width(self, point: ReadPoint) -> int | None:
        h = None if self.dry is None else representation_of(self.dry, point)
        if h is not None:
            return h.shape[-1]
        width = width_of(self.backbone) if point.module is None or self.dry is None else None
        return 2 * width if width is not None and point.pooling == "cls_mean" else width


def pooling_of_tokens(backbone: nn.Module) -> Pooling:
    """Return how tokens of `backbone` are pooled by default where it has no pooled output, as in an inner layer."""
    if isinstance(backbone, FeatureBackbone):
        return backbone.pooling
    return _Resolver(backbone, dry_run(backbone)).default(0)


def representation_of(dry: DryRun, point: ReadPoint) -> Tensor | None:
    """Return h of a run without data, or None where the run shows none.

    Raises:
        UsageError: If what is read is no tensor with one row per sample.
    """
    seen: tuple[Any, Any] = dry.seen.get(point.module or "", (None, None))
    source = dry.output if point.module is None else seen[0 if point.side == "input" else 1]
    if source is None:
        return None
    f = pooled_of(source) if point.pooling == "pooler" else tokens_of(source)
    if f.ndim < 2 or f.shape[0] != BATCH:
        kind = type(dry.copy).__name__
        raise UsageError(f"{kind} gave {tuple(f.shape)} for a batch of {BATCH}, where rows have to come first.")
    width = f.shape[-1]
    if f.ndim == 4 and not channels_last(dry.copy, f):
        width = f.shape[1]
    with with_gradients():
        return pool(source, dataclasses.replace(point, in_dim=width * (2 if point.pooling == "cls_mean" else 1)))


def channels_last(backbone: nn.Module, f: Tensor) -> bool:
    """Return whether a feature map has its channels last, as those of timm's Swin family have."""
    named = any(getattr(m, "output_fmt", "") == "NHWC" for m in (backbone, *backbone.children()))
    return named or f.shape[1] == f.shape[2] != f.shape[3]


def _feeding(backbone: nn.Module, point: ReadPoint) -> tuple[frozenset[str], frozenset[str]] | None:
    """Return what h depends on and which modules act on it, by a run without data; None where that shows no h."""
    key = structure(backbone), repr(point)

    def found(dry: DryRun | None) -> tuple[frozenset[str], frozenset[str]] | None:
        h = None if dry is None else representation_of(dry, point)
        if dry is None or h is None:
            return None
        names = dry.feeding(h)
        return names, dry.acting(names) - idle_in_training(dry)

    if key not in _FOUND:
        _FOUND[key] = None
        with suppress(RuntimeError, AssertionError):  # a backward of the backbone's own
            _FOUND[key] = _of_run(backbone, found)
        while len(_FOUND) > _MOST_FOUND:
            del _FOUND[next(iter(_FOUND))]
    return _FOUND[key]


def feeds_representation(backbone: nn.Module, point: ReadPoint) -> list[str]:
    """Return the names (as in `bare_tensors`) of the tensors that the representation depends on.

    They are found by a run without data (`hfproj.backbones.dry_run`); where there can be none, and for adapters saved
    by hfproj 0.1.0, they are told by names and the order of registration.
    """
    found = None if point.reading == 1 else _feeding(backbone, point)
    if found is None:
        return feeding_by_names(backbone, point)
    return [name for name in bare_tensors(backbone) if name in found[0]]


def acting_modules(backbone: nn.Module, point: ReadPoint) -> set[str]:
    """Return the names of the modules that run with a tensor of their own that h depends on.

    A module whose weight is used without running it (timm's BEiT, torch's MultiheadAttention; Gemma 3n in training
    mode) is none: a PEFT layer in its place could not act.

    Raises:
        UsageError: If the backbone's own backward hides them (Reformer's reversible layers).
    """
    found = _feeding(backbone, point)
    dry = dry_run(backbone) if found is None else None
    if dry is not None and representation_of(dry, point) is not None:
        raise UsageError(
            f"{type(backbone).__name__} takes its gradients in a way of its own, so that a backbone_adapter between "
            "frozen layers might never learn; use trainable='full' or 'head'."
        )
    if found is None:
        return {n.rpartition(".")[0] for n in feeding_by_names(backbone, point)}
    return set(found[1])


def skips_after(backbone: nn.Module, point: ReadPoint) -> bool:
    """Return whether the blocks after the one that is read at `point` can be left out while it is read."""
    if point.reading == 1 or point.module is None or point.side == "input" or point.module not in _blocks(backbone):
        return False
    dry = dry_run(backbone) if point.module != _blocks(backbone)[-1] else None
    return dry is not None and runs_shortened(dry, point.module)


def _blocks(backbone: nn.Module) -> list[str]:
    with suppress(UsageError):
        return blocks_of(backbone)
    return []


def last_blocks(backbone: nn.Module, point: ReadPoint, count: int) -> list[str]:
    """Return the names, among `feeds_representation`, of the last `count` blocks that feed it and of what follows them.

    Raises:
        UsageError: If `count` is not between 1 and the number of blocks that feed the representation.
    """
    names = feeds_representation(backbone, point)
    blocks = [b for b in blocks_of(backbone) if any(n.startswith(b + ".") for n in names)]
    if not 1 <= count <= len(blocks):
        blocks_there = f"1 to {len(blocks)} blocks of {type(backbone).__name__}"
        wanted = f"trainable to be {blocks_there}"
        raise UsageError(f"Expected {wanted}, got {count}; to train all of it use trainable='full'.")
    first = next(i for i, n in enumerate(names) if n.startswith(blocks[-count] + "."))
    return names[first:]
