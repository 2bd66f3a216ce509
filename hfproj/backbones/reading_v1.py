"""Version 1 of the rules by which h is read, that of adapters saved by hfproj 0.1.0: found from names alone.

What h depends on was told by names and by the order of registration, too. Adapters of that version keep both, for what
they saved; and so does a backbone that can't be run without data (`hfproj.backbones.dry_run`).
"""

from typing import Any

from torch import nn

from hfproj.backbones.checkpoint_files import checkpoint_lacks
from hfproj.backbones.loading import library_of, timm_part_of
from hfproj.backbones.structure import ReadPoint, bare_tensors, blocks_of, prefix_tokens_of
from hfproj.errors import UsageError
from hfproj.typing import Pooling


def width_of(backbone: Any) -> int | None:
    """Return the width that a backbone names in its attributes or its config, if it does."""
    if timm_part := timm_part_of(backbone):
        return int(getattr(timm_part[1], "num_features"))  # noqa: B009  torch types it as Tensor | Module
    config: Any = getattr(backbone, "config", None)
    if getattr(config, "hidden_size", None):
        return int(config.hidden_size)
    for attribute in ("hidden_sizes", "depths_width", "embed_dims"):
        if found := getattr(config, attribute, None):
            return int(found[-1])
    names = ("num_features", "embed_dim", "hidden_size", "out_features", "out_dim")
    return next((n for n in (getattr(backbone, name, None) for name in names) if isinstance(n, int)), None)


def timm_read_module(model: nn.Module) -> tuple[str, str] | None:
    """Return (name, side) of the last feature map or token sequence of a timm model, or None when it shows neither."""
    for name, module in model.named_modules():
        if name.split(".")[-1] == "global_pool" and "Pool" in type(module).__name__:
            return name, "input"
    return ("norm", "output") if isinstance(getattr(model, "norm", None), nn.Module) else None


def resolve_by_names(
    backbone: nn.Module, *, pooling: Pooling | None = None, layer: int = -1, in_dim: int | None = None
) -> ReadPoint:
    """Return where and how `backbone` is read by version 1, see `hfproj.backbones.resolve_read_point`."""
    kind, width, side = type(backbone).__name__, width_of(backbone), "output"
    module: str | None = None
    text = getattr(backbone, "main_input_name", None) == "input_ids"
    prefix, has_cls = prefix_tokens_of(backbone)
    has_cls = has_cls or text
    timm_prefix, timm_model = timm_part_of(backbone) or ("", None)
    pooling = pooling or ("cls" if has_cls else "mean")
    if pooling == "pooler":
        if layer != -1:
            hint = "use pooling='cls' or 'mean', or layer=-1"
            raise UsageError(f"pooling='pooler' is the backbone's own; layer={layer} can't be used with it; {hint}.")
        check_pooler(backbone)
        width = int(getattr(timm_model, "head_hidden_size", None) or 0) or width
    elif layer != -1:
        module, width = _block(backbone, layer, prefix, width)
    elif timm_model is not None:
        found = timm_read_module(timm_model)
        if found is None:
            hint = "use pooling='pooler' with a model made by timm.create_model(…, num_classes=0)"
            raise UsageError(f"{kind} shows neither a token norm nor a pooling layer; {hint}.")
        module, side = timm_prefix + found[0], found[1]
    if pooling in ("cls", "cls_mean") and not has_cls:
        raise UsageError(f"pooling={pooling!r} needs a class token and {kind} has none; use pooling='mean' or 'max'.")
    if in_dim is None and width is not None:
        in_dim = 2 * width if pooling == "cls_mean" else width
    if in_dim is None or (pooling == "cls_mean" and width is None):
        raise UsageError(f"The width of {kind}'s representation can't be inferred; pass in_dim=… to the head's config.")
    return ReadPoint(pooling=pooling, module=module, side=side, prefix_tokens=prefix, text=text, in_dim=int(in_dim))


def _block(backbone: nn.Module, layer: int, prefix_tokens: int, width: int | None) -> tuple[str, int | None]:
    """Return the name of block `layer` and the width of its output."""
    blocks = blocks_of(backbone)
    if not -len(blocks) <= layer < len(blocks):
        raise UsageError(
            f"layer={layer}: {type(backbone).__name__} has {len(blocks)} blocks; expected -1 (its final output) or an "
            f"index from {-len(blocks)} to {len(blocks) - 1}."
        )
    sizes = getattr(getattr(backbone, "config", None), "hidden_sizes", None) or []
    if len(sizes) == len(blocks):  # the stages of a CNN differ in width
        width = int(sizes[layer])
    prefix, model = timm_part_of(backbone) or ("", None)
    if model is not None and prefix_tokens == 0 and (timm_read_module(model) or ("", ""))[1] == "input":
        info: Any = getattr(model, "feature_info", None)
        widths = {prefix + i["module"]: i["num_chs"] for i in info} if isinstance(info, list) else {}
        width = widths.get(blocks[layer])
    return blocks[layer], width


def check_pooler(backbone: Any) -> None:
    """Refuse to read a pooled output that is not there, is class scores or has random weights."""
    kind, hint = type(backbone).__name__, "use pooling='cls' or 'mean'"
    if timm_part := timm_part_of(backbone):
        if getattr(timm_part[1], "num_classes", 0):
            raise UsageError(
                f"pooling='pooler' of {kind} would read class scores; make it with num_classes=0, or {hint}."
            )
    elif library_of(backbone) == "transformers":
        if getattr(backbone, "pooler", ...) is None:
            raise UsageError(f"pooling='pooler': this {kind} has no pooler; {hint}.")
        parts = {n: getattr(backbone, n, None) for n in ("pooler", "head")}
        learned = [n for n, m in parts.items() if isinstance(m, nn.Module) and any(True for _ in m.parameters())]
        if learned and checkpoint_lacks(backbone, learned[0]):
            raise random_pooler(backbone)


def random_pooler(backbone: Any) -> UsageError:
    """Return the error that the checkpoint of `backbone` has no pooler."""
    made = f"so {type(backbone).__name__} made one with random weights; use pooling='cls' or 'mean'"
    return UsageError(f"pooling='pooler': the checkpoint {backbone.name_or_path!r} has no pooler, {made}.")


def feeding_by_names(backbone: nn.Module, point: ReadPoint) -> list[str]:
    """Return the names (as in `bare_tensors`) of the tensors that the representation depends on.

    Left out are mask tokens, poolers and classifiers that are not read, and what is registered after the module that is
    read (blocks after `layer`, final norms, classifiers).
    """
    names = list(bare_tensors(backbone))
    drop, kind = {"mask_token"}, type(backbone).__name__
    if point.pooling != "pooler":
        drop |= {"pooler"} | ({"head"} if "Siglip" in kind else set())
        drop |= {"post_layernorm"} if kind.startswith("CLIP") else set()
    elif timm_part := timm_part_of(backbone):
        classifier = (getattr(timm_part[1], "pretrained_cfg", None) or {}).get("classifier")
        drop |= {classifier} if isinstance(classifier, str) else set()
    names = [n for n in names if not drop & set(n.split("."))]
    if point.module is None:
        return names
    modules = [n for n, _ in backbone.named_modules()]
    first_after = modules.index(point.module) + (point.side == "output")
    after = {n for n in modules[first_after:] if point.side == "input" or not n.startswith(point.module + ".")}
    return [n for n in names if n.rpartition(".")[0] not in after]
