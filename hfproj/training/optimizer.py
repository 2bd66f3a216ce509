"""Groups of parameters: head and backbone, each with and without weight decay."""

from typing import Any

from torch import nn

from hfproj.errors import UsageError
from hfproj.tuner.layer import CHILD

_MATRIX = 2  # biases, norms and scales have fewer dimensions …
# … except for these: DoRA's magnitude and IA3's scales may be kept as matrices, tokens and positions are no maps.
_NO_DECAY = ("lora_magnitude_vector", "ia3_l", "cls_token", "mask_token", "reg_token", "register_tokens", "pos_embed",
             "position_embeddings")  # fmt: skip


def parameter_groups(
    model: nn.Module, *, weight_decay: float, head_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Return the trainable parameters of `model` in up to four groups.

    Args:
        model: A model with a projection head.
        weight_decay: Of matrices; biases, norms, scales and tokens have none.
        head_learning_rate: Of the head's groups; None leaves it to the optimizer.

    Raises:
        UsageError: nothing is trainable.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_head = CHILD in name.split(".")
        decays = parameter.ndim >= _MATRIX and not any(part in name for part in _NO_DECAY)
        if (in_head, decays) not in groups:
            group: dict[str, Any] = {"params": [], "weight_decay": weight_decay if decays else 0.0}
            if in_head and head_learning_rate is not None:
                group["lr"] = head_learning_rate
            groups[in_head, decays] = group
        groups[in_head, decays]["params"].append(parameter)
    if not groups:
        raise UsageError("No parameter is trainable: the adapter was loaded frozen; load it with is_trainable=True.")
    return list(groups.values())
