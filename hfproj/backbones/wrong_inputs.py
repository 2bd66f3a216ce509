"""Why a backbone failed on its inputs, in one line; and inputs that it takes although they are wrong.

A backbone's own error about a wrong input comes from deep inside a library (``'list' object has no attribute 'ndim'``).
It is explained once it has come, so that a call that works costs nothing more. What brings no error is checked
before: pixels that are whole numbers, and images whose border the patches leave out.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hfproj.backbones.loading import library_of, main_input_of, timm_part_of
from hfproj.backbones.preprocessing import channels_of
from hfproj.errors import HfprojError, UsageError

# Vision transformers of transformers whose patches are a convolution without padding: the border may be lost.
_CUT = ("clip_vision_model", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "ijepa", "siglip_vision_model",
        "vit", "vit_msn")  # fmt: skip
_POSITIONS = ("position_embedding", "position_embeddings", "wpe", "embed_positions")
_IMAGES = "hfproj.EvalImages.for_model(model) makes a batch of images, hfproj.ImageViews views of them"
_TEXTS = "hfproj.EvalText(tokenizer) makes a batch of texts, hfproj.TextViews(tokenizer) views of them"


def check_pixels(backbone: nn.Module, images: Tensor) -> None:
    """Refuse pixels ``[batch, channels, height, width]`` that are whole numbers; warn of a border that is cut.

    Raises:
        UsageError: If there are none; or if they are whole numbers, and the backbone is of `transformers` or timm,
            which take them as they are: from 0 to 255 instead of around 0.
    """
    if not images.is_floating_point() and library_of(backbone) != "torch":
        raise UsageError(
            f"Expected pixels as normalised floats, got {images.dtype} of shape {list(images.shape)}: {_IMAGES}."
        )
    if not len(images):
        raise UsageError(f"Expected a batch of one image or more, got {list(images.shape)}; leave empty batches out.")
    patch, height, width = patch_of(backbone), *images.shape[-2:]
    if patch and (height % patch or width % patch) and min(height, width) >= patch:
        left = f"{height - height % patch} × {width - width % patch}"
        warnings.warn(
            f"{type(backbone).__name__} sees {left} of {height} × {width} pixels: its patches have {patch}, and the "
            "rest at the border is left out; take a multiple as the size.",
            stacklevel=4,
        )


def patch_of(backbone: Any) -> int | None:
    """Return the side of the patches of a vision transformer that leaves out what is over at the border; else None."""
    config = getattr(backbone, "config", None)
    patch = getattr(config, "patch_size", None)
    return patch if isinstance(patch, int) and getattr(config, "model_type", None) in _CUT else None


def vocabulary_of(backbone: Any) -> int | None:
    """Return how many tokens a text backbone knows, or None where it does not say."""
    embedding = backbone.get_input_embeddings() if hasattr(backbone, "get_input_embeddings") else None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def positions_of(backbone: nn.Module) -> int | None:
    """Return how many tokens a text may have, where the backbone learned a vector for each position; else None.

    Example:
        >>> backbone = nn.ModuleDict({"position_embeddings": nn.Embedding(512, 4)})
        >>> positions_of(backbone)
        512
    """
    if getattr(getattr(backbone, "config", None), "model_type", None) == "tapas":  # counts anew in each cell
        return None
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
            before = module.padding_idx + 1 if module.padding_idx is not None else 0  # as in RoBERTa
            return module.num_embeddings - int(getattr(module, "offset", before) or before)
    return None


def run_explained(call: Callable[[], Any], backbone: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what a call of a backbone returns; an error of a library about its inputs is a `UsageError`.

    Raises:
        UsageError: If the call fails and the inputs are wrong; other errors stay as they are.
    """
    try:
        return call()
    except HfprojError:
        raise
    except Exception as error:
        raise_explained(error, backbone, args, kwargs)
        raise


def raise_explained(error: Exception, backbone: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise a `UsageError` from the error of a backbone's forward, if its inputs explain it; else return."""
    try:
        why = what_is_wrong(backbone, args, kwargs)
    except Exception:  # the device that failed can't be read any more, or a class of the user's own
        return
    if why is not None:
        raise UsageError(f"{why}.") from error


def what_is_wrong(backbone: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the inputs of a backbone, and what to do; None where nothing is seen.

    Example:
        >>> what_is_wrong(nn.Conv2d(3, 4, 2), [[torch.zeros(3, 8, 8)]], {})
        'Expected a tensor as input of Conv2d, got list; make a batch of them: torch.stack(images)'
    """
    kind, main = type(backbone).__name__, _main(backbone)
    texts = main == "input_ids"
    value = kwargs.get(main, args[0] if args else None)
    if value is None and texts and kwargs.get("inputs_embeds") is not None:
        return None
    if value is None:
        given = ", ".join(n for n, v in kwargs.items() if v is not None and n != "num_views") or "nothing"
        other = _TEXTS if texts else _IMAGES
        hint = other if {"pixel_values", "input_ids"} & set(kwargs) else f"pass {main}=…"
        reads = "texts" if texts else "images"
        return (
            f"{kind} reads {reads if library_of(backbone) != 'torch' else 'its input'} as {main}, got {given}; {hint}"
        )
    if not isinstance(value, Tensor):
        return f"Expected a tensor as {f'{main} of' if main else 'input of'} {kind}, got {_no_tensor(value, texts)}"
    like = next((p for p in backbone.parameters() if p.is_floating_point()), None)
    if value.is_meta and like is not None and not like.is_meta:
        return f"Expected {main} of {kind} with data, got a tensor of the device 'meta'; make it on {like.device}"
    if like is not None and value.device != like.device:
        return f"{main} is on {value.device} and {kind} on {like.device}; move it: x.to({str(like.device)!r})"
    if texts:
        return _wrong_ids(backbone, value, kwargs)
    if main == "pixel_values" or timm_part_of(backbone) is not None:
        return _wrong_pixels(backbone, value, like)
    return None


def _main(backbone: nn.Module) -> str:
    if library_of(backbone) == "transformers":
        return str(main_input_of(backbone))
    return next(iter(inspect.signature(backbone.forward).parameters), "its input")


def _no_tensor(value: Any, texts: bool) -> str:
    """Return in words what is no tensor, and how to make one of it."""
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"{kind}; unpack the batch: model(**batch)"
    first = value[0] if isinstance(value, list | tuple) and value else value
    if texts and isinstance(first, str):
        return f"{kind}; make tokens of it: model(**tokenizer(texts, padding=True, return_tensors='pt'))"
    if isinstance(first, Tensor):
        return f"{kind}; make a batch of them: torch.stack(images)"
    if isinstance(value, np.ndarray):
        return f"{kind}; make a tensor of it: torch.from_numpy(array)"
    return f"{kind}; {_TEXTS if texts else _IMAGES}"


def _wrong_ids(backbone: nn.Module, ids: Tensor, kwargs: Mapping[str, Any]) -> str | None:
    kind, shape = type(backbone).__name__, list(ids.shape)
    if ids.ndim == 4:
        return f"{kind} reads texts as input_ids, got pixel_values ({ids.dtype} of shape {shape}); {_TEXTS}"
    if ids.is_floating_point():
        return f"Expected input_ids of {kind} as whole numbers, got {ids.dtype}; give what the tokenizer gives"
    if ids.ndim != 2:
        return f"Expected input_ids of {kind} of shape [batch, tokens], got {shape}; of one text: input_ids[None]"
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape != ids.shape:
        return f"Expected attention_mask of shape {shape}, as input_ids have, got {list(mask.shape)}"
    return wrong_tokens(backbone, ids)


def wrong_tokens(backbone: nn.Module, ids: Tensor) -> str | None:
    """Return what is wrong with token numbers ``[batch, tokens]``: too many of them, or unknown ones; else None."""
    kind, most, known = type(backbone).__name__, positions_of(backbone), vocabulary_of(backbone)
    if most is not None and ids.shape[-1] > most:
        hint = f"cut them: max_length={most} of the collator or the tokenizer"
        return f"{kind} has positions for {most} tokens, got texts of {ids.shape[-1]}; {hint}"
    if known is not None and ids.numel() and (largest := int(ids.max())) >= known:
        hint = "the tokenizer is another model's, or grew: backbone.resize_token_embeddings(len(tokenizer))"
        return f"{kind} knows {known} tokens, numbered from 0, got token {largest}; {hint}"
    return None


def warn_of_tokenizer(backbone: nn.Module, tokenizer: Any) -> None:
    """Say when a tokenizer has more tokens than its backbone: the first text with one of them ends the run."""
    known, there = vocabulary_of(backbone), len(tokenizer) if hasattr(tokenizer, "__len__") else 0
    if known is not None and there > known:
        warnings.warn(
            f"The tokenizer has {there} tokens and {type(backbone).__name__} knows {known}: it is another model's, or "
            "grew. Take the model's own, or backbone.resize_token_embeddings(len(tokenizer)) before the head is made.",
            stacklevel=4,
        )


def _wrong_pixels(backbone: nn.Module, x: Tensor, like: Tensor | None) -> str | None:
    config, kind, shape = getattr(backbone, "config", None), type(backbone).__name__, list(x.shape)
    if any(getattr(config, name, None) for name in ("num_frames", "frames_per_clip")):
        return None
    channels = channels_of(backbone)
    wanted = f"Expected images of {kind} of shape [batch, {channels}, height, width], got {shape}"
    if x.ndim == 3 and x.shape[0] == channels:
        return f"{wanted}; make a batch of one image: x[None]"
    if x.ndim != 4:
        return f"{wanted}; {_IMAGES}"
    if x.shape[1] != channels:
        last = x.shape[-1] == channels
        return f"{wanted}; " + ("put the channels first: x.permute(0, 3, 1, 2)" if last else _IMAGES)
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int) and min(x.shape[-2:]) < patch:
        return f"{wanted}, smaller than a patch of {patch} × {patch} pixels; {_IMAGES}"
    if like is not None and x.dtype != like.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"{kind} has {like.dtype} weights, got images of {x.dtype}; convert them: x.to({like.dtype})"
    return None
