"""Pooling of what a backbone returns, or of a captured feature, to one vector per sample."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfproj.backbones.structure import ReadPoint
from hfproj.errors import UsageError


def tokens_of(output: Any) -> Tensor:
    """Return the tokens, the feature map or the vectors in what a backbone or a module returned.

    Raises:
        UsageError: If it returned none of them.
    """
    first = output[0] if isinstance(output, tuple | list) and output else None
    named = [getattr(output, name, None) for name in ("last_hidden_state", "pooler_output")]
    maps = getattr(output, "feature_maps", None)  # of a transformers *Backbone, first stage to last
    named += [maps[-1]] if isinstance(maps, tuple | list) and maps else []
    found = next((value for value in (output, *named, first) if isinstance(value, Tensor)), None)
    if found is None:
        expected = "a tensor, a tuple of tensors or an output with last_hidden_state"
        raise UsageError(f"The backbone returned {type(output).__name__}; expected {expected}.")
    return found


def pooled_of(output: Any) -> Tensor:
    """Return the backbone's own pooled vectors ``[batch, dim]``.

    Raises:
        UsageError: If it returned none.
    """
    named = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    pooled = output[1] if isinstance(output, tuple) and len(output) > 1 else named  # a tuple: return_dict=False
    if not isinstance(pooled, Tensor) or pooled.ndim < 2 or pooled.shape[2:].numel() != 1:
        raise UsageError("pooling='pooler': the backbone returned no pooled vector per sample; use 'cls' or 'mean'.")
    return pooled.flatten(1)


def pool(output: Any, point: ReadPoint, attention_mask: Tensor | None = None) -> Tensor:
    """Return the representation ``h`` ``[batch, in_dim]`` from a backbone's output or a captured feature.

    Args:
        output: What the backbone returned or the captured feature: ``[batch, dim]``, ``[batch, tokens, dim]`` or a map.
        point: Where it was read and how it is pooled.
        attention_mask: What `mask_of` gives: 1 for each token ``[batch, tokens]`` that counts.

    Raises:
        UsageError: If the output has another width than the head was made for, or can't be pooled this way.
    """
    if point.pooling == "pooler":
        h = pooled_of(output)
    else:
        f = tokens_of(output)
        prefix = 0 if f.ndim == 4 else point.prefix_tokens
        if f.ndim == 4:  # feature map; timm's Swin family keeps channels last
            f = f.flatten(1, 2) if f.shape[-1] == point.in_dim and f.shape[1] != point.in_dim else f.flatten(2).mT
        h = f if f.ndim == 2 else _pool_tokens(f, point, prefix, attention_mask)
    if h.shape[-1] != point.in_dim:
        raise UsageError(
            f"The representation has {h.shape[-1]} dimensions and the head was made for {point.in_dim}; give "
            f"the config in_dim={h.shape[-1]}, or use the backbone that the head was trained on."
        )
    return h


def _pool_tokens(f: Tensor, point: ReadPoint, prefix: int, mask: Tensor | None) -> Tensor:
    patches = f if point.text else f[:, prefix:]
    if not point.text and (mask is None or mask.shape != patches.shape[:2]):
        mask = None
    if point.pooling == "last":
        return f[:, -1] if mask is None else _at(f, f.shape[1] - 1 - mask.flip(1).ne(0).int().argmax(1))
    first = f[:, 0]
    if point.pooling == "cls":
        return first
    if mask is not None:
        mask = mask.to(patches.dtype).unsqueeze(-1)
    if point.pooling == "max":
        return (patches if mask is None else patches.masked_fill(mask == 0, -torch.inf)).amax(1)
    mean = patches.mean(1) if mask is None else (patches * mask).sum(1) / mask.sum(1).clamp_min(1)
    return torch.cat([first, mean], dim=-1) if point.pooling == "cls_mean" else mean


def _at(f: Tensor, index: Tensor) -> Tensor:
    """Return token ``index`` ``[batch]`` of each row of ``[batch, tokens, dim]``."""
    return f.gather(1, index[:, None, None].expand(-1, 1, f.shape[-1]))[:, 0]


def check_texts(mask: Any, index: Any = None) -> None:
    """Refuse texts without a token, of which there is nothing to read; a mask `[texts, tokens]` is looked at.

    Args:
        mask: The attention mask of a batch; anything else is let pass.
        index: The rows of the data set that its texts are, where they are known; the same for each of several views.

    Raises:
        UsageError: If a row of the mask is all 0.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2 or (has := mask.bool().any(1)).all():
        return
    rows = sorted({int(index[i % len(index)]) if index is not None else i for i in (~has).nonzero().flatten().tolist()})
    shown = ", ".join(map(str, rows[:10])) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
    where = "" if index is not None else " of a batch"
    raise UsageError(f"Expected texts of at least one token, got none in row {shown}{where}; leave empty texts out.")


def mask_of(point: ReadPoint, given: Mapping[str, Any]) -> Tensor | None:
    """Return, from the inputs of a backbone by name, which tokens count: words, or patches of images of any size."""
    name = "attention_mask" if point.text else "pixel_attention_mask"
    mask = given.get(name) if point.text or point.reading > 1 else None
    return mask if isinstance(mask, Tensor) else None


def by_name(backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of a call of `backbone` by their names."""
    if not args:
        return kwargs
    return {**inspect.signature(backbone.forward).bind_partial(*args).arguments, **kwargs}


def without_left_padding(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs of a text backbone with the padding before each text moved behind it.

    Most models count positions from the first column, padding or not: h of a text would depend on its batch.
    """
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return dict(given)
    length = mask.shape[1]
    start = mask.ne(0).int().argmax(1, keepdim=True)  # 0 where nothing precedes the text
    order = torch.arange(length, device=mask.device) + start
    order = torch.where(order < length, order, order - length)

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != mask.shape:
            return value
        return value.gather(1, order.reshape(*order.shape, *[1] * (value.ndim - 2)).expand(value.shape))

    return {name: moved(value) for name, value in given.items()}
