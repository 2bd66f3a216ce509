"""Fits an objective and regularizers to a model: options that model and data decide, parts that must be there."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfproj.data.indexing import StreamDataset
from hfproj.errors import UsageError
from hfproj.objectives import OBJECTIVES, create_objective
from hfproj.objectives.base import check_needs
from hfproj.regularizers import Weighted, weighted
from hfproj.training.checks import is_stream
from hfproj.tuner import ProjectionHeadConfig
from hfproj.tuner.layer import CHILD, HeadModules

# Parts of an adapter that only some objectives use, with the keyword that says so.
_PARTS = {"predictor": "prediction", "prototypes": "scores", "scales": "scales"}


def active_name(model: nn.Module) -> str:
    """Return the name of the active adapter."""
    return getattr(model.get_base_model(), CHILD).active_name


def active_modules(model: nn.Module) -> HeadModules:
    """Return the active adapter's head with its predictor, prototypes and scales."""
    layer = getattr(model.get_base_model(), CHILD)
    return layer.projection_head_modules[layer.active_name]


def active_config(model: nn.Module) -> ProjectionHeadConfig:
    """Return the active adapter's config."""
    return model.peft_config[active_name(model)]


@torch.no_grad()
def prototype_vectors(model: nn.Module) -> Tensor | None:
    """Return what unit z are multiplied with to give scores, ``[K, dim]``; None without prototypes."""
    prototypes = active_modules(model).prototypes
    return None if prototypes is None else prototypes.vectors()


def make_objective(given: Any, model: nn.Module, dataset: Any) -> nn.Module:
    """Return the objective that `given` describes, with the options that the model and the data set decide.

    Raises:
        UsageError: it is no description of an objective, no objective has this name, or it has no such option.
    """
    if isinstance(given, nn.Module):
        return given
    if not isinstance(given, str | Mapping) or (isinstance(given, Mapping) and "name" not in given):
        raise UsageError(
            f"objective={given!r}: expected an objective (hfproj.create_objective), a name such as 'nt_xent', or a "
            "dict {'name': 'nt_xent', 'temperature': 0.2}."
        )
    options = {"name": given} if isinstance(given, str) else dict(given)
    name = options.pop("name")
    modules = active_modules(model)
    known: dict[str, Any] = {"out_dim": modules.head.out_dim}
    if modules.prototypes is not None:
        known["prototypes"] = len(modules.prototypes.weight)
    if dataset is not None and not is_stream(dataset) and not isinstance(dataset, StreamDataset):
        known["num_images"] = len(dataset)
    wanted = OBJECTIVES.options(name)
    objective = create_objective(name, **{n: v for n, v in known.items() if n in wanted} | options)
    # What was asked for, to be noted in the config: what is filled in may differ where the adapter is trained further.
    objective.created = {"name": name, **options}
    return objective


def prepare(model: nn.Module, objective: Any, regularizers: Any, dataset: Any) -> tuple[nn.Module, dict[str, Weighted]]:
    """Return the objective and the regularizers that are asked for, with the model made ready for them.

    Args:
        model: A ``PeftModel`` with an active head.
        objective: As `ProjectionTrainer` takes it; None: what the adapter's config says, else NT-Xent.
        regularizers: As `ProjectionTrainer` takes them; None, where `objective` is None: what the config says.
        dataset: What is trained on, for the number of its images.

    Raises:
        UsageError: a name or an option is unknown, or the adapter lacks what the objective needs.
    """
    if objective is None:
        config = active_config(model)
        objective = config.objective or "nt_xent"
        regularizers = config.regularizers if regularizers is None else regularizers
    if not isinstance(regularizers, Mapping | None):
        raise UsageError(
            f"regularizers={regularizers!r}: expected a dict, name → weight or → {{'weight': 0.1, **options}}."
        )
    made = make_objective(objective, model, dataset)
    added = {name: weighted(name, value) for name, value in (regularizers or {}).items()}
    prepare_model(model, made, added)
    return made, added


def prepare_model(model: nn.Module, objective: nn.Module, regularizers: Mapping[str, Weighted]) -> None:
    """Check that the adapter has what the objective needs, freeze what it does not use, and note both in the config.

    Raises:
        UsageError: the adapter lacks a predictor, prototypes or scales.
    """
    modules, needs = active_modules(model), getattr(objective, "needs", frozenset())
    kind = type(objective).__name__
    for part, keyword in (("predictor", "prediction"), ("prototypes", "scores")):
        if getattr(modules, part) is None:
            check_needs(objective, {name: name for name in needs if name != keyword})
    missing = {n: v for n, v in getattr(objective, "scales", {}).items() if n not in modules.scales}
    if "scales" in needs and missing:
        raise UsageError(f"{kind} needs learnable scales: ProjectionHeadConfig(scales={missing}).")
    trainable = any(parameter.requires_grad for parameter in model.parameters())  # else it was loaded frozen
    for part, keyword in _PARTS.items():  # a part without a gradient must be frozen: DDP would wait for one
        if getattr(modules, part) is not None:
            getattr(modules, part).requires_grad_(trainable and keyword in needs)
    config = active_config(model)
    config.objective = getattr(objective, "created", None)
    config.regularizers = {name: regularizer.describe() for name, regularizer in regularizers.items()} or None
