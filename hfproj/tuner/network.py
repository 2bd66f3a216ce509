"""A copy of a backbone that computes h and can be trained as a whole, with what its adapter learned merged in."""

import copy
import warnings
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from hfproj.backbones.loading import bare_backbone
from hfproj.backbones.quantized import quantized_names
from hfproj.backbones.structure import READING
from hfproj.errors import UsageError
from hfproj.tuner import ProjectionHeadConfig
from hfproj.tuner.layer import CHILD, ProjectionLayer, remove_hooks
from hfproj.typing import Pooling


def network_of(
    model: nn.Module, *, pooling: Pooling | None = None, layer: int = -1, in_dim: int | None = None
) -> nn.Module:
    """Return a copy of the backbone of `model` with what its adapter learned merged in, every tensor of it trainable.

    Its output's `representation` is h. Tensors that h does not depend on stay frozen. Half precision becomes float32.
    """
    backbone, reading = bare_backbone(model), READING
    head = getattr(backbone, CHILD, None)
    if isinstance(head, ProjectionLayer) and head.active_name is not None:
        if (pooling, layer, in_dim) != (None, -1, None):
            hint = "pass the backbone, or none of them"
            raise UsageError(f"pooling, layer and in_dim are those of the projection head; {hint}.")
        configs: Any = model.peft_config
        config = configs[head.active_name]
        pooling, layer, in_dim, reading = config.pooling, config.layer, config.in_dim, config.reading or READING
    if packed := quantized_names(backbone.named_parameters()):
        hint = "load the backbone without quantization and the adapter onto it"
        raise UsageError(f"{packed[0]} and other weights are quantized, so that they can't be trained; {hint}.")
    bare = copy.deepcopy(backbone)
    for parameter in bare.parameters():
        parameter.grad = None
    like = next((p for p in bare.parameters() if p.is_floating_point()), torch.empty(0))
    bare.to(torch.promote_types(like.dtype, torch.float32))
    _merge_adapters(bare)
    config = ProjectionHeadConfig(
        head="identity", pooling=pooling, layer=layer, in_dim=in_dim, trainable="full", keep_original=False,
        reading=reading,
    )  # fmt: skip
    with warnings.catch_warnings():  # that the originals are given up: this is a copy
        warnings.filterwarnings("ignore", message="keep_original=False")
        return get_peft_model(bare, config)


def _merge_adapters(backbone: nn.Module) -> None:
    """Turn a copied backbone with PEFT layers into a plain one that computes the same."""
    head = getattr(backbone, CHILD, None)
    if isinstance(head, ProjectionLayer):
        remove_hooks(head)
        delattr(backbone, CHILD)
    backbone.__dict__.pop("peft_config", None)
    for name, module in list(backbone.named_modules()):
        parent, _, child = name.rpartition(".")
        try:
            plain = _merged(module)
        except (NotImplementedError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"The adapter of {name} ({type(module).__name__}) can't be merged into the backbone, which fine-tuning "
                f"has to start from: {error}"
            ) from error
        if plain is not module:
            setattr(backbone.get_submodule(parent), child, plain)


def _merged(module: nn.Module) -> nn.Module:
    """Return a PEFT layer's base layer with what is active merged in; any other module unchanged."""
    merge = getattr(module, "unload_and_optionally_merge_module", None)
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and merge is not None:
        return merge(merge=not module.disable_adapters, safe_merge=False, adapter_names=None)
    if isinstance(module, BaseTunerLayer) and hasattr(module, "base_layer"):
        if not module.merged and not module.disable_adapters:
            module.merge(safe_merge=False, adapter_names=None)
        return module.get_base_layer()
    return module
