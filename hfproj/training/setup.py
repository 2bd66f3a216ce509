"""What `ProjectionTrainer` checks and prepares before it starts: options, data sets, model, objective, regularizers."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback
from transformers.training_args import ParallelMode

from hfproj import distributed
from hfproj.data.images import ImageViews
from hfproj.data.kinds import check_collator, check_data_set, indexed, is_stream
from hfproj.data.skipped import skipping
from hfproj.errors import UsageError, unknown
from hfproj.heads import create_head
from hfproj.objectives import OBJECTIVES, create_objective
from hfproj.objectives.base import check_callable, check_needs
from hfproj.regularizers import Weighted, weighted
from hfproj.training.arguments import ProjectionTrainingArguments
from hfproj.tuner import ProjectionHeadConfig
from hfproj.tuner.active import active_config, active_modules
from hfproj.tuner.layer import CHILD, Prototypes

if TYPE_CHECKING:
    import transformers as hf

    from hfproj.training.trainer import ProjectionTrainer as ProjectionTrainer

    Model: TypeAlias = PeftModel
    Args: TypeAlias = hf.TrainingArguments
    State: TypeAlias = hf.TrainerState
    Control: TypeAlias = hf.TrainerControl
    Processing: TypeAlias = hf.PreTrainedTokenizerBase | hf.BaseImageProcessor | hf.ProcessorMixin
    Arguments: TypeAlias = ProjectionTrainingArguments
    Collator: TypeAlias = Callable[[list[Any]], Mapping[str, Any]]
    Objective: TypeAlias = nn.Module | str | Mapping[str, Any]
    Regularizers: TypeAlias = Mapping[str, float | nn.Module | Mapping[str, Any] | Weighted]
    Source: TypeAlias = str | os.PathLike[str] | Mapping[str, Any]
    Limits: TypeAlias = Mapping[str, float | Sequence[float | None] | None]
else:  # no circular import; and run-time type checkers let wrong values pass, for which there are better messages
    ProjectionTrainer = Model = Args = State = Control = Processing = Arguments = Collator = Any
    Objective = Regularizers = Source = Limits = Any

LOG = logging.getLogger("hfproj.training")
# Options of transformers.Trainer that would be ignored, or would scale the loss once more.
_REPLACED = {
    "compute_loss_func": "pass objective=… and regularizers=…",
    "compute_metrics": "measure with hfproj.evaluate, or in a TrainerCallback",
    "preprocess_logits_for_metrics": "measure with hfproj.evaluate",
    "model_init": "pass the model itself",
}
_OPTIONS = (
    "model", "args", "objective", "regularizers", "train_dataset", "eval_dataset", "bank_dataset", "data_collator",
    "eval_collator", "continue_from", "callbacks", "optimizers", "optimizer_cls_and_kwargs", "processing_class",
)  # fmt: skip
# Parts of an adapter that only some objectives use, with the keyword by which they ask for it.
PARTS = {"predictor": "prediction", "prototypes": "scores", "scales": "scales"}


def prepared_data(dataset: Any, collator: Any, model: PeftModel, args: ProjectionTrainingArguments) -> tuple[Any, Any]:
    """Return `dataset`, `indexed` and skipping bad images if `args` say so, and the collator or that of the model."""
    check_collator("data_collator", collator)
    collator = collator if collator is not None else ImageViews.for_model(model, seed=args.seed)
    return skipping(indexed(dataset), args.on_bad_image, collator), collator


def check_options(model: Any, args: Any, others: Mapping[str, Any], callbacks: Any, optimizers: Any) -> None:
    """Refuse a model without a head, other arguments, options without effect, and several GPUs in one process."""
    kinds = (TrainerCallback, type(TrainerCallback))
    callbacks = () if callbacks is None else callbacks
    listed = isinstance(callbacks, list | tuple) and all(isinstance(c, kinds) for c in callbacks)
    if not listed or any(isinstance(c, type) and not issubclass(c, TrainerCallback) for c in callbacks):
        example = "callbacks=[hfproj.SpectrumCallback()]"
        raise UsageError(f"Expected callbacks as a list of TrainerCallback, got {callbacks!r:.80}; {example}.")
    pair = isinstance(optimizers, list | tuple) and len(optimizers) == 2
    if not pair or not isinstance(optimizers[0], torch.optim.Optimizer | None):
        hint = "make both, or give args their options (learning_rate, optim, lars)"
        raise UsageError(f"Expected optimizers as (optimizer, its schedule or None), got {optimizers!r:.80}; {hint}.")
    if not isinstance(args, ProjectionTrainingArguments):
        raise UsageError(
            f"Expected args as hfproj.ProjectionTrainingArguments(output_dir=…), got {type(args).__name__}; write "
            "ProjectionTrainer(model, args)."
        )
    for name, value in others.items():
        if name not in _REPLACED:
            if name in OBJECTIVES.options("nt_xent"):
                raise UsageError(
                    f"ProjectionTrainer has no {name}: objective={{'name': 'nt_xent', {name!r}: {value!r}}}."
                )
            if name in ProjectionTrainingArguments.__dataclass_fields__:
                raise UsageError(
                    f"ProjectionTrainer has no {name}: args=ProjectionTrainingArguments({name}={value!r}, …)."
                )
            raise unknown("option of ProjectionTrainer:", name, [*_OPTIONS, *_REPLACED])
        if value is not None:
            raise UsageError(f"ProjectionTrainer takes no {name}: {_REPLACED[name]}.")
    if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED and args.n_gpu > 1:
        raise UsageError(
            f"{args.n_gpu} GPUs are visible to one process, which would split each batch and its negatives; start the "
            "script with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one of them."
        )
    if not isinstance(model, PeftModel) or not hasattr(model.get_base_model(), CHILD):
        raise UsageError(
            f"The model is a {type(model).__name__} without a projection head; attach one with "
            "peft.get_peft_model(backbone, hfproj.ProjectionHeadConfig(…))."
        )


def check_train_dataset(dataset: Any, args: ProjectionTrainingArguments) -> None:
    """Refuse what is no data set or smaller than a batch, and a stream that several workers would read."""
    check_data_set("train_dataset", dataset)
    batch, stream = args.train_batch_size * args.world_size, dataset is not None and is_stream(dataset)
    if stream and args.dataloader_num_workers > 1:
        raise UsageError(
            f"train_dataset is a stream, and {args.dataloader_num_workers} workers would each count its images from 0; "
            "set dataloader_num_workers to 0 or 1."
        )
    if stream and args.dataloader_persistent_workers:
        why = "workers that stay would never hear of a new epoch, and make the views of the first one again"
        raise UsageError(f"train_dataset is a stream: {why}; leave dataloader_persistent_workers out.")
    if dataset is not None and not stream and len(dataset) < batch and args.dataloader_drop_last:
        raise UsageError(
            f"train_dataset has {len(dataset)} images, fewer than one batch of {batch} ({args.train_batch_size} on "
            f"each of {args.world_size} processes); lower per_device_train_batch_size."
        )


def make_objective(given: Objective, model: PeftModel, dataset: Any) -> nn.Module:
    """Return the objective that `given` describes, with the options that the model and the data set decide."""
    if isinstance(given, nn.Module):
        check_callable(given)
        return given
    if not isinstance(given, str | Mapping) or (isinstance(given, Mapping) and "name" not in given):
        raise UsageError(
            "Expected objective to be an objective (hfproj.create_objective), a name such as 'nt_xent', or a dict "
            f"{{'name': 'nt_xent', 'temperature': 0.2}}, got {given!r}."
        )
    options: dict[str, Any] = {"name": given} if isinstance(given, str) else dict(given)
    name, modules = options.pop("name"), active_modules(model)
    known: dict[str, Any] = {"out_dim": modules.head.out_dim}
    if modules.prototypes is not None:
        known["prototypes"] = len(modules.prototypes.weight)
    if dataset is not None and not is_stream(dataset):
        known["num_images"] = len(dataset)
    wanted = OBJECTIVES.options(name)
    objective: Any = create_objective(name, **{n: v for n, v in known.items() if n in wanted} | options)
    # The config notes what was asked for: what is filled in may differ where the adapter is trained further.
    objective.created = {"name": name, **options}
    return objective


def prepare_objective(
    model: PeftModel, objective: Objective | None, regularizers: Regularizers | None, dataset: Any, *, log: bool = True
) -> tuple[nn.Module, dict[str, Weighted]]:
    """Return the objective and the regularizers that are asked for, with the model made ready for them.

    An adapter that was trained under another objective gets the parts that it lacks, which is logged if `log`.
    """
    config = active_config(model)
    if objective is None:
        objective = config.objective or "nt_xent"
        regularizers = config.regularizers if regularizers is None else regularizers
    if not isinstance(regularizers, Mapping | None):
        expected = "a dict, name → weight or options, such as {'werank': 0.1} or {'werank': {'weight': 0.1}}"
        raise UsageError(f"Expected regularizers to be {expected}, got {regularizers!r}.")
    made = make_objective(objective, model, dataset)
    added = {name: weighted(name, value) for name, value in (regularizers or {}).items()}
    if config.objective is not None:
        _add_parts(model, made, log=log)
    _prepare_model(model, made)
    config.objective = getattr(made, "created", None)
    config.regularizers = {name: regularizer.describe() for name, regularizer in added.items()} or None
    return made, added


def _add_parts(model: PeftModel, objective: Any, *, log: bool) -> None:
    """Make the predictor, prototypes and scales that the objective needs and the adapter, trained under another, lacks.

    They are those of ``ProjectionHeadConfig.for_objective``.
    """
    modules, config = active_modules(model), active_config(model)
    like = next(modules.parameters(), next(model.parameters()))
    wanted: Any
    wanted, dim = ProjectionHeadConfig.for_objective(objective, head=config.head), modules.head.out_dim
    made: dict[str, Any] = {}
    if wanted.predictor is not None and modules.predictor is None:
        options = made["predictor"] = dict(wanted.predictor)
        modules.predictor = create_head(**{"in_dim": dim, "out_dim": dim, "name": options["head"], **_rest(options)})
    if wanted.prototypes is not None and modules.prototypes is None:
        made["prototypes"] = getattr(objective, "created", {}).get("prototypes", wanted.prototypes)
        modules.prototypes = Prototypes(dim, made["prototypes"])
    scales = {n: v for n, v in (wanted.scales or {}).items() if n not in modules.scales}
    if scales:
        made["scales"] = {**(config.scales or {}), **scales}
        modules.scales.update({n: nn.Parameter(torch.tensor(float(v))) for n, v in scales.items()})
    for part, value in made.items():
        setattr(config, part, value)
        getattr(modules, part).to(like.device, like.dtype)
    if made and log and distributed.rank() == 0:
        name = (config.objective or {}).get("name")
        LOG.warning(
            f"Kept: head and backbone as trained on {name}. New for {type(objective).__name__}: "
            f"{', '.join(f'{part}={value!r}' for part, value in made.items())}."
        )


def _rest(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "head"}


def _prepare_model(model: PeftModel, objective: Any) -> None:
    """Check that the adapter has what the objective needs, and freeze what it does not use."""
    modules = active_modules(model)
    needs: frozenset[str] = getattr(objective, "needs", frozenset())
    for part, keyword in (("predictor", "prediction"), ("prototypes", "scores")):
        if getattr(modules, part) is None:
            check_needs(objective, {name: name for name in needs if name != keyword})
    missing = {n: v for n, v in getattr(objective, "scales", {}).items() if n not in modules.scales}
    if "scales" in needs and missing:
        raise UsageError(f"{type(objective).__name__} needs scales: pass ProjectionHeadConfig(scales={missing}).")
    trainable = any(parameter.requires_grad for parameter in model.parameters())  # else it was loaded frozen
    for part, keyword in PARTS.items():  # a part without a gradient must be frozen: DDP would wait for one
        if getattr(modules, part) is not None:
            getattr(modules, part).requires_grad_(trainable and keyword in needs)
