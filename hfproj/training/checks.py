"""What `ProjectionTrainer` refuses when it is made: arguments that would act silently or wrongly, metrics that it can't
measure, and views that would be equal.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from hfproj import distributed
from hfproj.backbones import main_input_of
from hfproj.backbones.wrong_inputs import warn_of_tokenizer
from hfproj.data.images import ImageViews
from hfproj.data.indexing import IndexedDataset
from hfproj.data.text import TextViews
from hfproj.errors import HfprojError, UsageError, unknown
from hfproj.functional.modes import evaluating
from hfproj.training.arguments import ProjectionTrainingArguments
from hfproj.training.gradients import CHECKPOINTING, outside_parameters, same_rows
from hfproj.training.setup import ProjectionTrainer
from hfproj.tuner.active import active_modules
from hfproj.tuner.layer import CHILD
from hfproj.tuner.views import forward_views

_EVAL = "evaluation measures features, not the outputs of a classifier"
_LENGTH = "batches are drawn at random or in order, whatever the length of items"
# Arguments of transformers without effect here, with the reason; some are in no or in other versions of it.
_WITHOUT_EFFECT = {
    "label_smoothing_factor": "objectives here take no soft labels",
    "include_num_input_tokens_seen": "batches hold views, whose tokens transformers does not count",
    "group_by_length": _LENGTH, "length_column_name": _LENGTH,
    "bf16_full_eval": "evaluation runs in the precision of training", "fp16_full_eval": "as in training, use fp16=True",
    **dict.fromkeys(
        ("batch_eval_metrics", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object",
         "include_for_metrics", "include_inputs_for_metrics", "label_names", "prediction_loss_only"), _EVAL
    ),
}  # fmt: skip
REFUSED = {*_WITHOUT_EFFECT, "auto_find_batch_size", "enable_jit_checkpoint", "remove_unused_columns"}  # always
_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # the newer name of transformers, and the older
_UNKNOWN = object()


def check_arguments(model: PeftModel, args: ProjectionTrainingArguments, optimizers: Sequence[Any]) -> None:
    """Refuse training arguments that would be ignored, or would change something else than they say."""
    chosen = args.chosen()
    for name, why in _WITHOUT_EFFECT.items():
        if name in chosen:
            raise UsageError(f"{name}={chosen[name]!r} would have no effect: {why}. Leave it out.")
    if chosen.get("train_sampling_strategy") not in (None, "random", "sequential"):
        given = chosen["train_sampling_strategy"]
        raise UsageError(
            f"train_sampling_strategy={given!r} would have no effect: {_LENGTH}; 'random' or 'sequential'."
        )
    if args.auto_find_batch_size:
        raise UsageError(
            "auto_find_batch_size=True would make the batch smaller without a word, and the objective, which is one of "
            "the whole batch, another one. Lower per_device_train_batch_size, or checkpoint activations."
        )
    _check_optimizer(model, args, chosen, own=any(given is not None for given in optimizers[:1]))
    backbone = model.get_base_model()
    of_text = main_input_of(backbone) == "input_ids" and hasattr(backbone, "get_input_embeddings")
    if args.neftune_noise_alpha is not None and not of_text:
        raise UsageError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} adds noise to embeddings of words, and "
            f"{type(backbone).__name__} has patches or features instead; leave it out (views come from augmentation)."
        )
    if getattr(args, "use_liger_kernel", False) and not of_text:
        raise UsageError(f"use_liger_kernel=True would have no effect on {type(backbone).__name__}; leave it out.")
    _check_checkpointing(model, args)
    if chosen.get("enable_jit_checkpoint"):
        raise UsageError(
            "enable_jit_checkpoint=True would save within a step, at other steps on other processes, and end like a "
            "run that is done; leave it out: SIGTERM and SIGUSR1 end in a checkpoint anyway (docs/checkpoints.md)."
        )
    try:
        os.makedirs(args.output_dir, exist_ok=True)  # as transformers does
    except OSError as error:
        raise UsageError(
            f"Expected output_dir to be a folder that can be written to, got {args.output_dir!r} ({error.strerror})."
        ) from error


def _check_optimizer(model: PeftModel, args: ProjectionTrainingArguments, chosen: dict[str, Any], *, own: bool) -> None:
    """Refuse options of an optimizer that is not the one in use."""
    wanted = [n for n in ("lars", "head_learning_rate", "fixed_predictor_rate") if getattr(args, n)]
    if own and wanted:
        raise UsageError(
            f"{', '.join(wanted)} would have no effect on an optimizer that is passed; choose one of both."
        )
    of_optim = [n for n in ("optim", "optim_args", "optim_target_modules") if n in chosen]
    if args.lars and of_optim:
        raise UsageError(
            f"lars=True takes the place of optim: {', '.join(of_optim)} would have no effect; leave it out."
        )
    of_lars = [n for n in ("lars_trust_coefficient", "lars_clip") if getattr(args, n) != _default(n)]
    if of_lars and not args.lars:
        raise UsageError(f"{', '.join(of_lars)} would have no effect without lars=True.")
    if args.fixed_predictor_rate and active_modules(model).predictor is None:
        raise UsageError("fixed_predictor_rate=True would have no effect: the adapter has no predictor; leave it out.")


def _default(name: str) -> Any:
    return ProjectionTrainingArguments.__dataclass_fields__[name].default


def _checkpointing(args: ProjectionTrainingArguments) -> tuple[bool, dict[str, Any]]:
    """Return whether gradient checkpointing is on, and its options, under whichever name they were given."""
    options: list[Any] = [getattr(args, f"{name}_kwargs", None) for name in _CHECKPOINTING]
    return any(getattr(args, n, None) for n in _CHECKPOINTING), next((given for given in options if given), {})


def _by_timm(backbone: nn.Module) -> bool:
    """Whether a backbone has timm's switch for checkpointing instead of that of `transformers`."""
    return hasattr(backbone, "set_grad_checkpointing") and not hasattr(backbone, "gradient_checkpointing_enable")


def _check_checkpointing(model: PeftModel, args: ProjectionTrainingArguments) -> None:
    on, options = _checkpointing(args)
    backbone: Any = model.get_base_model()
    name = type(backbone).__name__
    if options and not on:
        raise UsageError(f"{CHECKPOINTING}_kwargs={options} would have no effect: set {CHECKPOINTING}=True.")
    if not on:
        return
    trained = any(p.requires_grad and CHILD not in n.split(".") for n, p in backbone.named_parameters())
    if options.get("use_reentrant") and trained:
        raise UsageError(
            f"{CHECKPOINTING}_kwargs={{'use_reentrant': True}} drops the gradients of what is trained behind a "
            "frozen input, as in a backbone; use {'use_reentrant': False}, or leave it out."
        )
    if _by_timm(backbone):
        others = sorted(set(options) - {"use_reentrant"})
        if others:
            raise UsageError(f"timm's checkpointing, that of {name}, has no options, got {', '.join(others)}.")
        try:
            backbone.set_grad_checkpointing(True)
        except (AssertionError, NotImplementedError, TypeError) as error:
            raise UsageError(f"{name} can't checkpoint its activations; set {CHECKPOINTING}=False.") from error
    elif not getattr(backbone, "supports_gradient_checkpointing", hasattr(backbone, "gradient_checkpointing_enable")):
        raise UsageError(
            f"{name} can't checkpoint its activations (it has neither set_grad_checkpointing nor, in transformers, "
            f"layers that do); set {CHECKPOINTING}=False, or lower per_device_train_batch_size."
        )
    elif options:
        options.setdefault("use_reentrant", False)  # else torch's own default, which is the reentrant way


@contextmanager
def checkpointing_of_timm(model: PeftModel, args: ProjectionTrainingArguments) -> Iterator[None]:
    """Switch checkpointing on in a timm backbone, and hide it from `transformers`, which does not know how."""
    backbone: Any = model.get_base_model()
    if not _by_timm(backbone) or not _checkpointing(args)[0]:
        yield
        return
    backbone.set_grad_checkpointing(True)
    kept = {name: getattr(args, name) for name in _CHECKPOINTING if hasattr(args, name)}
    for name in kept:
        setattr(args, name, False)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(args, name, value)


def check_trainer(trainer: ProjectionTrainer) -> None:
    """Refuse a trainer with trainable parameters outside the adapter, metrics it won't measure, or equal views."""
    momenta = [n for n in ("ema_momentum", "ema_momentum_end") if getattr(trainer.args, n) is not None]
    if momenta and "target" not in getattr(trainer.objective, "needs", ()):
        of = type(trainer.objective).__name__
        trainer.say_once(f"{' and '.join(momenta)} without effect: {of} has no EMA teacher.")
    _check_parameters(trainer)
    _check_metrics(trainer, trainer.callback_handler.callbacks)
    _check_text_views(trainer)


def _check_parameters(trainer: ProjectionTrainer) -> None:
    """Refuse parameters of objective or regularizers, unless an optimizer that is passed has them."""
    outside = outside_parameters(trainer.objective, trainer.regularizers)
    optimizer: Any = trainer.optimizer
    groups = optimizer.param_groups if trainer.has_own_optimizer else []
    known = {id(p) for group in groups for p in group["params"]}
    left = [name for name, p in outside.items() if id(p) not in known]
    if left:
        raise UsageError(
            f"{', '.join(left)}: trainable parameters outside the adapter, which no optimizer, no checkpoint and no "
            "other process would see. Keep them in the adapter (predictor, prototypes and scales of the config), make "
            "them buffers, or freeze them (requires_grad_(False))."
        )


# --- metrics ---


def _check_metrics(trainer: ProjectionTrainer, callbacks: Sequence[TrainerCallback]) -> None:
    """Refuse a metric in the arguments that evaluation will not give, and early stopping without one."""
    args, metric = trainer.args, trainer.args.metric_for_best_model
    stopping = any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks)
    example = "metric_for_best_model='rankme_h' (or 'knn_h', 'loss', …)"
    if stopping and metric is None:
        raise UsageError(f"EarlyStoppingCallback needs a metric: set {example}.")
    if metric is None and not stopping:
        return
    if args.eval_strategy == IntervalStrategy.NO or trainer.eval_dataset is None:
        need = "eval_strategy='epoch' or 'steps', and pass eval_dataset"
        raise UsageError(f"The metric {metric!r} would never be measured: set {need}.")
    theirs = [c for c in callbacks if not type(c).__module__.startswith(("transformers.", "hfproj."))]
    adds = any(type(c).on_evaluate is not TrainerCallback.on_evaluate for c in theirs)
    if adds or not type(trainer).evaluate.__module__.startswith("hfproj."):
        return  # what they add to the metrics is not known
    parts: Any = trainer.eval_dataset
    parts = {f"{name}_": part for name, part in parts.items()} if isinstance(parts, dict) else {"": parts}
    wanted, names = metric.removeprefix("eval_"), []
    for prefix, part in parts.items():
        found, why = measurable(trainer, part)
        names += [prefix + name for name in found]
        if why is not None and wanted in (f"{prefix}knn_h", f"{prefix}knn_z"):
            raise UsageError(f"metric_for_best_model={metric!r} can't be measured: {why}.")
    if wanted not in names:
        raise unknown("metric_for_best_model", metric, names)


def measurable(trainer: ProjectionTrainer, dataset: Any) -> tuple[list[str], str | None]:
    """Return the names of what evaluation measures on `dataset`, and why k-NN is not among them, or None."""
    sources = {"eval_dataset": dataset, "bank_dataset": trainer.bank_dataset}
    reasons = [why_unlabelled(trainer, part, name) for name, part in sources.items() if part is not None]
    why = next((reason for reason in reasons if reason is not None), None)
    world = distributed.world_size()
    viewed = min(trainer.args.per_device_eval_batch_size, len(dataset) // world) * world > 1
    layered = ["rankme", "std", *["knn"] * (why is None), *["positive_cosine"] * viewed]
    return [f"{name}_{layer}" for name in layered for layer in ("h", "z")] + ["loss"] * viewed + ["runtime"], why


def why_unlabelled(trainer: ProjectionTrainer, dataset: Any, name: str) -> str | None:
    """Return why the rows of `dataset`, called `name`, have no labels for k-NN; None if they have, or can't be read."""
    views: Any = trainer.data_collator
    collator: Any = trainer.eval_collator or (views if isinstance(views, ImageViews) else None)
    column = "label" if collator is None else getattr(collator, "label_column", _UNKNOWN)
    try:
        item: Any = IndexedDataset(dataset)[0]
        given = column in item if column is not _UNKNOWN else collator([item]).get("labels") is not None
    except (HfprojError, LookupError, TypeError, ValueError, OSError):
        return None  # evaluation says what is wrong with the rows
    if column is None:
        return "the collator has label_column=None"
    if not given and column is _UNKNOWN:
        return f"eval_collator gives no 'labels' for {name}"
    if not given:
        others = ", ".join(repr(key) for key in item if key not in ("index", "epoch"))
        cure = "eval_collator=hfproj.EvalImages.for_model(model, label_column=…)"
        return f"the items of {name} have no {column!r}, only {others}; name the column of the labels: {cure}"
    read = column is not _UNKNOWN and hasattr(dataset, "column_names")
    if read and not any(label is not None and label >= 0 for label in dataset[column]):
        return f"no row of {name} has a label: column {column!r} is negative or None throughout"
    return None


# --- equal views ---

_SENTENCE = "Two views of one sentence differ by dropout."


def _check_text_views(trainer: ProjectionTrainer) -> None:
    """Refuse `TextViews` that read one sentence twice where no dropout makes the two differ."""
    collator, args, model = trainer.data_collator, trainer.args, trainer.bare_model()
    if isinstance(collator, TextViews):
        warn_of_tokenizer(model.get_base_model(), collator.tokenizer)
    if not isinstance(collator, TextViews) or args.neftune_noise_alpha is not None:
        return
    columns = collator.columns
    pairs = [(i, j) for j in range(len(columns)) for i in range(j) if columns[i] == columns[j]]
    split = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # a first forward pass comes after they are set up
    peft = [layer for m in model.modules() if isinstance(m, BaseTunerLayer) for layer in m.modules()]
    acts_later = any(isinstance(m, nn.Dropout) and m.p > 0 for m in peft)  # in a LoRA, which changes nothing at first
    if not pairs or split or acts_later or any(p.is_meta for p in model.parameters()):
        return
    device: Any = args.device
    sentences = {column: f"{_SENTENCE} {i}" for i, column in enumerate(columns)}
    views = [{n: t.to(device) for n, t in view.items()} for view in collator([sentences])["views"]]
    cuda = [device] if device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices=cuda), torch.no_grad(), trainer.accelerator.autocast():
        model.train()
        getattr(model.get_base_model(), CHILD).eval()
        h = forward_views(model, views).h
    if any(same_rows(h[i], h[j]) for i, j in pairs):
        raise UsageError(
            f"TextViews reads {columns[0]!r} more than once, and nothing tells the views apart: no dropout acts in "
            f"{type(model.get_base_model()).__name__}. Load it with dropout (ModernBERT: attention_dropout=0.1, "
            "mlp_dropout=0.1; BERT: hidden_dropout_prob=0.1), give the LoraConfig a lora_dropout, or train on pairs "
            "(columns=['sentence', 'paraphrase'])."
        )
