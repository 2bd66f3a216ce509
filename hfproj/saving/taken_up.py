"""What an optimizer took up from a checkpoint: whether it is of this run's optimizer, model and settings."""

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


def check_taken_up(optimizer: Any, where: Any, wanted: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a state that is of another optimizer, of other tensors, or of other settings than those `wanted`.

    Raises:
        UsageError: If a group lacks a setting of this optimizer, a state has not the shape of its tensor, or a setting
            of this run would have no effect, since a resumed optimizer goes on with its own.
    """
    on = f"continue_from={str(where)!r} goes on from its adapter with a new optimizer"
    hint = f"Resume with the optimizer and the adapter that it was written with; {on}"
    lacking = sorted({name for group in optimizer.param_groups for name in optimizer.defaults.keys() - group.keys()})
    if lacking:
        raise UsageError(f"optimizer.pt of {where} was written by another optimizer: it has no {lacking[0]!r}. {hint}.")
    for parameter, state in optimizer.state.items():
        for name in _LIKE_THE_TENSOR:
            value = state.get(name) if isinstance(state, Mapping) else None
            if isinstance(value, Tensor) and value.shape != parameter.shape:
                shapes = f"{name} has shape {list(value.shape)}, its tensor {list(parameter.shape)}"
                raise UsageError(f"optimizer.pt of {where} is of another model: {shapes}. {hint}.")
    if instead := _other_settings(wanted, optimizer):
        raise UsageError(f"The optimizer of {where} goes on as it was, with {instead}. Resume with these; {on}.")


def _other_settings(wanted: Sequence[Mapping[str, Any]], optimizer: Any) -> str:
    """Return in words which settings differ, and how; "" if none."""
    found: dict[str, None] = {}
    for own, taken in zip(wanted, settings_of(optimizer)):
        for name in sorted(own.keys() & taken.keys()):
            one, other = own[name], taken[name]
            one, other = (tuple(value) if isinstance(value, list) else value for value in (one, other))
            if not isinstance(one, Tensor) and one != other:
                called = "learning_rate" if name == _RATE else name
                found[f"{called} {other!r} instead of {one!r}"] = None
    return ", ".join(found)
