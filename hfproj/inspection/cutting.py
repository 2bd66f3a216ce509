"""Keep the first layers of a head: a new adapter beside the old one whose z is what a layer of the old head gives.

    z' = head.i,    i < depth − 1,

of a head of class `hfproj.heads.mlp.MLPHead` (the MLPs of all papers). What the adapter does to the backbone is copied.
Predictor, prototypes and scales belong to the whole z and are left behind, and so is the normalisation of its rows.
"""

import copy
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from hfproj.checking import checked
from hfproj.errors import UsageError
from hfproj.heads.layers import layer_name
from hfproj.heads.mlp import MLPHead
from hfproj.heads.presets import PRESETS
from hfproj.inspection import subject
from hfproj.tuner.active import active_config, active_modules, active_name
from hfproj.tuner.config import ProjectionHeadConfig

_HEADS = "hfproj.projection_head_modules."  # in names of tensors, of all that the tuner adds


@checked
def cut_head(model: PeftModel, layer: str, *, adapter_name: str = "cut") -> PeftModel:
    """Put a copy of the active adapter beside it whose head ends after one of its layers, make it active, and return
    `model`.

    ``model(x).projection`` then is what ``extract_features(model, data, layers=[layer])`` gave before, and
    ``model.save_pretrained(folder, selected_adapters=[adapter_name])`` saves it as any other.

    Args:
        model: A PEFT model whose active adapter has an MLP head.
        layer: The layer to end with, "head.0", "head.1", …, but for the last.
        adapter_name: Of the new adapter.

    Raises:
        UsageError: If there is no active MLP head, it has no such layer or it is its last, or the name is taken.

    Example:
        >>> import hfproj
        >>> from peft import get_peft_model
        >>> config = hfproj.ProjectionHeadConfig(head_options={"hidden_dim": 48, "depth": 3}, out_dim=16)
        >>> model = get_peft_model(hfproj.load_backbone("vit_nano"), config)
        >>> cut_head(model, "head.1").peft_config["cut"].out_dim
        48
    """
    model = subject.opened(model)
    modules: Any = active_modules(model)
    if type(modules.head) is not MLPHead:
        hint = "read the layer instead: hfproj.extract_features(model, data, layers=[…])"
        raise UsageError(f"Expected an MLP head to cut, got a {type(modules.head).__name__}; {hint}.")
    inner = [layer_name(number) for number in range(len(modules.head.hidden))]
    if layer not in inner:
        have = f"one of {', '.join(inner)}" if inner else "one of none, since this head has a single layer"
        raise UsageError(f"Expected the layer to end with as {have} (the last layer gives z itself), got {layer!r}.")
    if adapter_name in model.peft_config:
        taken = f"got {adapter_name!r}, which the model has: {', '.join(model.peft_config)}"
        raise UsageError(f"Expected adapter_name as a new name, {taken}; choose another.")
    old, number = active_name(model), inner.index(layer)
    trained = any(p.requires_grad for p in modules.parameters())
    state = get_peft_model_state_dict(model, adapter_name=old, save_embedding_layers=False)
    model.add_adapter(adapter_name, _config(active_config(model), modules.head, number))
    set_peft_model_state_dict(model, _state(state, number), adapter_name=adapter_name)
    model.set_adapter(adapter_name)
    active_modules(model).train(modules.training).requires_grad_(trained)
    return model


def _config(config: ProjectionHeadConfig, head: MLPHead, number: int) -> ProjectionHeadConfig:
    """Return the config of the first `number` + 1 layers."""
    options = _written_out(config)
    linear: list[Any] = [block.linear for block in head.hidden]  # type: ignore[union-attr]
    widths, bias = [layer.out_features for layer in linear[: number + 1]], linear[0].bias is not None
    options |= {
        "hidden_dim": widths[:-1], "depth": number + 1, "bias": bias, "last_bias": bias, "last_affine": True,
        "last_norm": options.get("norm", "batch"), "last_activation": options.get("activation", "relu"),
        "l2_normalise": False,
    }  # fmt: skip
    options.pop("out_dim", None)
    cut = copy.deepcopy(config)
    cut.head, cut.head_options, cut.out_dim = "mlp", options, int(widths[-1])
    cut.predictor = cut.prototypes = cut.scales = None
    cut.objective = cut.regularizers = None
    return cut


def _written_out(config: ProjectionHeadConfig) -> dict[str, Any]:
    """Return the options of the class that a name such as "byol" stands for, with those given."""
    preset = PRESETS.get(config.head)
    return {**(preset[2] if preset else {}), **config.head_options}


def _state(state: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """Return the tensors of the first layers: hidden layer `number` becomes the last."""
    kept = {}
    for name, tensor in state.items():
        where, found, own = name.partition(_HEADS)
        if not found:  # of the backbone
            kept[name] = tensor
        elif own.startswith("head.hidden."):
            layer, _, leaf = own.removeprefix("head.hidden.").partition(".")
            if int(layer) < number:
                kept[name] = tensor
            elif int(layer) == number:
                kept[f"{where}{_HEADS}head.last.{leaf}"] = tensor
    return kept
