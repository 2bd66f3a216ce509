"""The copy of a run without data (`hfproj.backbones.dry_run`) runs again: shortened, in parts, in training mode."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from hfproj.backbones.dry_run import DryRun, first_tensor, noting, quiet, with_gradients


def idle_in_training(found: DryRun) -> frozenset[str]:
    """Return the modules that run in eval mode and not in training mode, though what they are in runs.

    Gemma 3n clips the weight of a layer there and uses it without running the layer. Of lists (experts, layers that
    are dropped at random) one may run by chance alone.
    """
    again = DryRun(found.copy, None, found.inputs)
    device = next((p.device for p in found.copy.parameters()), torch.device("meta"))
    mode = "meta" if device.type == "meta" else "real"
    args, kwargs = [v for k, v in found.inputs.items() if k == 0], {str(k): v for k, v in found.inputs.items() if k}
    found.copy.train()
    with suppress(Exception), torch.no_grad(), noting(again), quiet(device, mode):
        found.copy(*args, **kwargs)
    found.copy.eval()

    def inside(name: str) -> str:
        parent = name.rpartition(".")[0]
        return parent if parent in found.seen or not parent else inside(parent)

    return frozenset(
        name
        for name in found.seen.keys() - again.seen.keys()
        if "" in again.seen  # it ran to its end
        and inside(name) in again.seen
        and not isinstance(found.copy.get_submodule(name.rpartition(".")[0]), nn.ModuleList)
    )


@contextmanager
def shortened(backbone: nn.Module, last: str) -> Iterator[None]:
    """The list of blocks that `last` is in ends with it."""
    undo = shorten(backbone, last)
    try:
        yield
    finally:
        undo()


def shorten(backbone: nn.Module, last: str) -> Callable[[], None]:
    """End the list of blocks that `last` is in with it, and return what undoes this."""
    parent, _, name = last.rpartition(".")
    container = backbone.get_submodule(parent)
    whole = dict(container._modules)
    names = list(whole)
    for after in names[names.index(name) + 1 :]:
        del container._modules[after]
    return partial(container._modules.update, whole)  # in their order: those before are there


def runs_shortened(found: DryRun, last: str) -> bool:
    """Return whether the backbone runs without the blocks after `last`, and gives the same output of it."""
    parent = last.rpartition(".")[0]
    container = found.copy.get_submodule(parent) if parent else None
    before = first_tensor(found.seen.get(last, (None, None))[1])
    if not isinstance(container, nn.ModuleList | nn.Sequential) or before is None:
        return False
    again = DryRun(found.copy, None, found.inputs)
    args, kwargs = [v for k, v in found.inputs.items() if k == 0], {str(k): v for k, v in found.inputs.items() if k}
    with suppress(Exception), with_gradients(), shortened(found.copy, last), noting(again):
        found.copy(*args, **kwargs)
        after = first_tensor(again.seen[last][1])
        return after is not None and after.shape == before.shape and again.feeding(after) == found.feeding(before)
    return False


def module_of_features(found: DryRun, prefix: str) -> str | None:
    """Return the name of the module whose output is what a timm model's ``forward_features`` returns."""
    model: Any = found.copy.get_submodule(prefix.rstrip(".")) if prefix else found.copy
    again = DryRun(model, None, found.inputs)
    with suppress(Exception), with_gradients(), noting(again):
        features = model.forward_features(next(iter(found.inputs.values())))
        return next((prefix + n for n, (_, output) in reversed(again.seen.items()) if output is features and n), None)
    return None


def reads_pre_logits(found: DryRun, classifier: str) -> bool:
    """Return whether a timm model gives its classifier ``forward_head(…, pre_logits=True)``.

    Shapes and the parameters that both depend on tell.
    """
    model: Any = found.copy
    read = found.seen[classifier][0]
    with suppress(Exception), with_gradients():
        own = model.forward_head(model.forward_features(found.inputs[0]), pre_logits=True)
        parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
        same = found.feeding(own) & parameters == found.feeding(read) & parameters
        return own.ndim == 2 and read.flatten(1).shape == own.shape and same
    return False
