"""Groups of parameters: head and backbone, each with and without weight decay; LARS on them."""

from typing import Any

import torch
from torch import nn

from hfproj.errors import UsageError
from hfproj.training.steps import FIXED_RATE, PART
from hfproj.tuner.layer import CHILD

_MATRIX = 2  # biases, norms and scales have fewer dimensions …
# … except for these: DoRA's magnitude and IA3's scales may be kept as matrices, tokens and positions are no maps.
_NO_DECAY = ("lora_magnitude_vector", "ia3_l", "cls_token", "mask_token", "reg_token", "register_tokens", "pos_embed",
             "position_embeddings")  # fmt: skip


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    head_learning_rate: float | None = None,
    fixed_predictor_rate: bool = False,
) -> list[dict[str, Any]]:
    """Return the trainable parameters of `model` in up to six groups: backbone, head and predictor, with and without.

    Args:
        model: A model with a projection head.
        weight_decay: Of matrices; biases, norms, scales and tokens have none.
        head_learning_rate: Of the head's groups; None leaves it to the optimizer.
        fixed_predictor_rate: Whether the schedule leaves the predictor's learning rate alone.

    Raises:
        UsageError: nothing is trainable.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        path = name.split(".")
        place = "head" if CHILD in path else "backbone"
        if fixed_predictor_rate and place == "head" and "predictor" in path:
            place = "predictor"
        decays = parameter.ndim >= _MATRIX and not any(part in name for part in _NO_DECAY)
        if (place, decays) not in groups:
            group: dict[str, Any] = {"params": [], "weight_decay": weight_decay if decays else 0.0, PART: place}
            if place != "backbone" and head_learning_rate is not None:
                group["lr"] = head_learning_rate
            if place == "predictor":
                group[FIXED_RATE] = True
            groups[place, decays] = group
        groups[place, decays]["params"].append(parameter)
    if not groups:
        raise UsageError(
            "No parameter is trainable. Either the adapter was loaded frozen: load it with is_trainable=True. Or its "
            "head has no parameters and the backbone is frozen: give the config a backbone_adapter or trainable='full'."
        )
    return list(groups.values())


def lars(
    groups: list[dict[str, Any]], learning_rate: float, trust_coefficient: float, *, clip: bool
) -> torch.optim.Optimizer:
    """Return timm's LARS with momentum 0.9; only matrices are adapted (and decay), as in SimCLR and solo-learn.

    References:
        You, Gitman, Ginsburg 2017, arXiv 1708.03888; `clip`, at most the learning rate itself: NVIDIA's LARC.
    """
    from timm.optim import Lars

    for group in groups:
        group["always_adapt"] = any(p.ndim >= _MATRIX for p in group["params"])
    return Lars(groups, lr=learning_rate, momentum=0.9, trust_coeff=trust_coefficient, trust_clip=clip)
