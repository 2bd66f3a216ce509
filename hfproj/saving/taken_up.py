"""What an optimizer took up from a checkpoint: whether it fits, and which settings of this run it took the place of."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hfproj.errors import UsageError

# State of a tensor's own shape; others are factored or quantized.
_LIKE_THE_TENSOR = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum", "prev")
_RATE = "initial_lr"  # what the schedule multiplies, where there is one
# What changes from step to step, is no setting, or is said elsewhere.
_NO_SETTINGS = {"params", "lr", "fused", "foreach", "capturable", "differentiable", "part"}


def settings_of(optimizer: Any) -> list[dict[str, Any]]:
    """Return the settings of each parameter group."""
    names = [group.keys() - _NO_SETTINGS for group in optimizer.param_groups]
    return [{name: group[name] for name in known} for group, known in zip(optimizer.param_groups, names)]


def check_taken_up(optimizer: Any, where: Any) -> None:
    """Refuse a state that is of another optimizer, or of other tensors.

    Raises:
        UsageError: If a group lacks a setting of this optimizer, or a state has not the shape of its tensor.
    """
    hint = (
        "Resume with the optimizer and the adapter that it was written with; "
        f"continue_from={str(where)!r} goes on from its adapter with a new optimizer"
    )
    lacking = sorted({name for group in optimizer.param_groups for name in optimizer.defaults.keys() - group.keys()})
    if lacking:
        raise UsageError(f"optimizer.pt of {where} was written by another optimizer: it has no {lacking[0]!r}. {hint}.")
    for parameter, state in optimizer.state.items():
        for name in _LIKE_THE_TENSOR:
            value = state.get(name) if isinstance(state, Mapping) else None
            if isinstance(value, Tensor) and value.shape != parameter.shape:
                shapes = f"{name} has shape {list(value.shape)}, its tensor {list(parameter.shape)}"
                raise UsageError(f"optimizer.pt of {where} is of another model: {shapes}. {hint}.")


def without_effect(wanted: Sequence[Mapping[str, Any]], optimizer: Any) -> str:
    """Return in words which settings of this run the checkpoint's took the place of; "" if none."""
    found: dict[str, None] = {}
    for own, taken in zip(wanted, settings_of(optimizer)):
        for name in sorted(own.keys() & taken.keys()):
            one, other = own[name], taken[name]
            one, other = (tuple(value) if isinstance(value, list) else value for value in (one, other))
            if not isinstance(one, Tensor) and one != other:
                called = "learning_rate" if name == _RATE else name
                found[f"{called} {other!r} instead of {one!r}"] = None
    return ", ".join(found)
