"""`ProjectionTrainer`: ``transformers.Trainer`` with several views, an objective of the joint batch, online probes."""

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hfproj.data.indexing import EpochSampler, StreamDataset
from hfproj.errors import AdapterFileError, NonFiniteLossError, UsageError
from hfproj.features.views import FixedViews
from hfproj.hub.staging import folder_of
from hfproj.objectives.base import Step, check_needs, check_views
from hfproj.objectives.buffers import BEFORE, START, Position, load_buffers, read_position, save_buffers
from hfproj.results.history import HISTORY_FILE, read_history, write_history
from hfproj.training import checks, evaluation, methods
from hfproj.training.arguments import ProjectionTrainingArguments
from hfproj.training.checkpoints import checkpoint_to_resume, last_complete_checkpoint, replacing
from hfproj.training.continuing import Continued
from hfproj.training.ema import EMA
from hfproj.training.hub import PushesToHub
from hfproj.training.loaders import stream_loader
from hfproj.training.optimizer import lars, parameter_groups
from hfproj.training.patch_dropout import PatchDropout
from hfproj.training.representation import describe
from hfproj.training.steps import AroundSteps
from hfproj.training.views import forward_views
from hfproj.tuner.layer import CHILD


class ProjectionTrainer(PushesToHub, Trainer):
    """Trains a projection head, and what its config trains beside it, under a self-supervised objective.

    Args:
        model: A ``PeftModel`` with a projection head.
        args: `ProjectionTrainingArguments`.
        objective: An objective; or the name of one, or ``{"name": name, **options}``, which gets the options that model
            and data decide (``out_dim``, ``num_images``, ``prototypes``) by itself. None: what the adapter was trained
            on, if its config says so, with its regularizers unless others are given; else ``"nt_xent"``.
        regularizers: name → weight; or → a dict of ``weight``, ``schedule``, ``end_weight`` and options; or → a
            regularizer module, with weight 1.
        train_dataset: Images: a map-style data set (wrapped in `IndexedDataset`) or a stream (`StreamDataset`).
        eval_dataset: Held-out images, with a length, for the online k-NN (where they have labels), RankMe, std, loss
            and positive-pair cosine; or a dict of such.
        bank_dataset: Labelled images that the online k-NN searches; None leaves each eval image out of the rest.
        data_collator: Makes the views, see `hfproj.ImageViews`; None takes ``ImageViews.for_model(model)``.
        eval_collator: Makes eval batches; None takes ``EvalImages.for_model(model)``.
        continue_from: A folder or Hub repository whose adapter the active one goes on from, or ``{"repo", "adapter",
            "revision", "token"}``: its tensors, the objective's buffers and the moving average if they lie there, and
            the step and epoch that the objective sees. Optimizer, schedules and views start fresh.
        **kwargs: As in ``transformers.Trainer`` (``callbacks``, ``optimizers`` …).

    Attributes:
        started: Steps and epochs before this run, where it continues another one.
        last_batch: "h" and "z" of the last training batch on this process, ``[views, batch, dim]``, or lists.
        history: What callbacks such as `hfproj.SpectrumCallback` measured: a dict for each step that was measured or
            logged, with "step", "epoch" and numbers by name. Saved beside each adapter as ``history.parquet``.

    Raises:
        UsageError: the model has no head, several GPUs are used without a launcher, the data set is smaller than a
            batch, or options contradict each other; the adapter to continue from is another one; pushing can't work.
        AdapterFileError: what to continue from is missing or damaged.
        NonFiniteLossError: while training, at the first loss or gradient that is not finite; checkpoints stay.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        objective: Any = None,
        regularizers: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        bank_dataset: Any = None,
        data_collator: Any = None,
        eval_collator: Any = None,
        continue_from: Any = None,
        **kwargs: Any,
    ):
        args = args if args is not None else ProjectionTrainingArguments(output_dir="out")
        checks.check_options(args, kwargs)
        checks.check_model(model)
        checks.check_train_dataset(train_dataset, args)
        checks.check_eval_dataset(eval_dataset)
        checks.check_eval_dataset(bank_dataset)
        if data_collator is None:
            from hfproj.data.images import ImageViews

            data_collator = ImageViews.for_model(model, seed=args.seed)
        self._continued: Continued | None = None
        if continue_from is not None:
            with args.main_process_first(desc="continue_from"):
                self._continued = Continued.load(model, continue_from)
        self.objective, self.regularizers = methods.prepare(model, objective, regularizers, train_dataset)
        self.bank_dataset, self.eval_collator = bank_dataset, eval_collator
        train_dataset = checks.indexed(train_dataset)
        if isinstance(train_dataset, StreamDataset):
            args.accelerator_config.dispatch_batches = False  # every process reads the stream and keeps its share
        super().__init__(
            model, args, data_collator=data_collator, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs
        )
        # The loss is ours, a mean over the batch: the Trainer must divide it by the accumulation steps, even though the
        # model's forward takes **kwargs and the batch may hold labels.
        self.model_accepts_loss_kwargs = False
        self.can_return_loss = True
        for module in (self.objective, *(regularizer.module for regularizer in self.regularizers.values())):
            module.to(self.args.device)
        self.started = START
        if self._continued is not None:
            self.started = self._continued.go_on(self.objective, tell=self.is_world_process_zero())
        self.ema: EMA | None = None  # made when training starts
        self.history: list[dict[str, Any]] = []
        self.probe_batches: dict[tuple, FixedViews] = {}  # of the callbacks that watch fixed images
        self.add_callback(AroundSteps(self))
        for callback in list(self.callback_handler.callbacks):
            self._bind(callback)
        self._train_sampler: EpochSampler | None = None
        self._epoch = 0
        self._terms: dict[str, list[Tensor]] = {}
        self.last_batch: dict[str, Any] = {}
        self._patch_dropout = self._make_patch_dropout()

    _watched = False  # whether a callback records what it measures

    # --- data ---

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        shuffle = getattr(self.args, "train_sampling_strategy", "random") != "sequential"
        self._train_sampler = EpochSampler(len(dataset), seed=seed, shuffle=shuffle)
        return self._train_sampler

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the training batches; of a stream, too, the last incomplete one is dropped."""
        if not isinstance(self.train_dataset, StreamDataset):
            return super().get_train_dataloader()
        return self.accelerator.prepare(stream_loader(self.train_dataset, self.data_collator, self.args))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Before the epoch's iterator is made: accelerate forwards the epoch neither to a sharded sampler nor, after a
        # resume in mid-epoch, to anything.
        self._epoch = kwargs["epoch"]
        if self._train_sampler is not None:
            self._train_sampler.set_epoch(self._epoch)
        if isinstance(self.train_dataset, StreamDataset):
            self.train_dataset.set_epoch(self._epoch)
            kwargs["model"].zero_grad()  # batches at the end of the stream that were too few for a step
        if hasattr(self.objective, "on_epoch_start"):
            self.objective.on_epoch_start(self.step())
        super()._run_epoch(*args, **kwargs)
        if self.state.global_step == 0:
            raise UsageError(
                "train_dataset is a stream with too few images for one step; lower per_device_train_batch_size or "
                "gradient_accumulation_steps."
            )

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> Any:
        """Train, see ``transformers.Trainer.train``; ``resume_from_checkpoint=True`` takes the last complete one.

        Raises:
            UsageError: resuming a stream, whose position can't be restored; no complete checkpoint to resume from.
            AdapterFileError: a checkpoint that is damaged, or of another adapter or objective.
            NonFiniteLossError: the loss or its gradient is NaN or infinite.
        """
        if resume_from_checkpoint:
            if isinstance(self.train_dataset, StreamDataset) and not self.args.ignore_data_skip:
                raise UsageError(
                    "A stream can't be resumed exactly: what it gave before is not known. Pass ignore_data_skip=True "
                    "to go on with its beginning, or use a data set with a length."
                )
            resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        self._terms, self.last_batch = {}, {}
        kept = Path(resume_from_checkpoint or "") / HISTORY_FILE
        self.history = read_history(kept) if resume_from_checkpoint and kept.is_file() else []
        self._make_ema()
        if self._patch_dropout is not None:
            self._patch_dropout.attach()
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        finally:
            self.objective.position = self.position()
            if self._patch_dropout is not None:
                self._patch_dropout.remove()

    # --- loss ---

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the objective's loss of the joint batch plus the weighted regularizers.

        Raises:
            UsageError: the batch is not what the objective needs.
            NonFiniteLossError: the loss is NaN or infinite.
        """
        views = inputs.get("views")
        if not isinstance(views, list | tuple):
            raise UsageError(
                "The collator returned no 'views'; use hfproj.ImageViews.for_model(model), or return "
                "{'views': [tensor or dict, …], 'index': …}."
            )
        check_views(self.objective, len(views))
        with ExitStack() as stack:
            if self._patch_dropout is not None and model.training:
                if inputs.get("index") is None:
                    raise UsageError("patch_dropout needs 'index' from the collator; hfproj.ImageViews gives it.")
                stack.enter_context(self._patch_dropout.using(inputs["index"], self._epoch))
            out = forward_views(model, views)
        step = self.step()
        given = {
            "labels": inputs.get("labels"),
            "index": inputs.get("index"),
            "prediction": out.prediction,
            "scores": out.scores,
            "prototypes": methods.prototype_vectors(self.bare_model()),
            "scales": out.scales,
            "target": self.targets(views),
            "step": step,
        }
        check_needs(self.objective, given)
        loss, terms = self.objective(out.z, **given)
        terms = dict(terms)
        if self.regularizers:
            terms["objective"] = loss.detach()
        for name, regularizer in self.regularizers.items():
            value = regularizer.module(self.bare_model(), out.h, out.z, step=step)
            terms[name] = value.detach()
            loss = loss + regularizer.at(self.progress()) * value
        if not torch.isfinite(loss):
            raise self._non_finite("loss", loss.item())
        if model.training:
            for name, value in terms.items():
                self._terms.setdefault(name, []).append(value.detach())
            self.last_batch = {"h": _detached(out.h), "z": _detached(out.z)}
        return (loss, out) if return_outputs else loss

    def step(self) -> Step:
        """Return where training stands, with this step's generator."""
        return Step.at(self.args.seed, *self.position(), self.args.device)

    def position(self) -> Position:
        """Return the steps and epochs that the adapter has been trained for, with those before this run."""
        step, epoch = self.state.global_step, float(self.state.epoch or 0)
        return Position(self.started.step + step, self.started.epoch + epoch)

    def progress(self) -> float:
        """Return the share of the training that is done, in [0, 1]."""
        return min(self.state.global_step / max(self.state.max_steps, 1), 1.0)

    def bare_model(self) -> nn.Module:
        """Return the model without the wrappers of distributed training."""
        return self.accelerator.unwrap_model(self.model)

    def _make_ema(self) -> None:
        if "target" not in getattr(self.objective, "needs", ()) or self.ema is not None:
            return
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise UsageError(
                f"{type(self.objective).__name__} needs a moving-average copy of the model, which is not available "
                "under FSDP and DeepSpeed: they split its parameters. Train with DDP (accelerate launch)."
            )
        chosen = (self.args.ema_momentum, self.args.ema_momentum_end)
        momentum = [c if c is not None else own for c, own in zip(chosen, self.objective.ema_momentum)]
        self.ema = EMA(self.bare_model(), momentum)
        if self._continued is not None:
            self._continued.load_ema(self.ema)

    def targets(self, views: Any) -> Any:
        """Return what the moving-average copy says of `views`, or None where the objective has no use for it."""
        objective = self.objective
        if "target" not in getattr(objective, "needs", ()):
            return None
        self._make_ema()  # for an evaluation before training
        with self.accelerator.autocast():
            output = getattr(objective, "target_of", "projection")
            return self.ema.targets(views, output, getattr(objective, "target_views", None))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Before the optimizer step: a finite loss may have an infinite gradient; the next checkpoint would hold NaN.
        norm = super()._get_grad_norm(model, grad_norm)
        scaled = getattr(self.accelerator, "scaler", None) is not None  # fp16's loss scaler skips such a step by itself
        if norm is not None and not scaled and not math.isfinite(norm):
            raise self._non_finite("gradient", float(norm))
        return norm

    def _non_finite(self, what: str, value: float) -> NonFiniteLossError:
        last = last_complete_checkpoint(self.args.output_dir)
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been written yet"
        return NonFiniteLossError(
            f"The {what} became {value} at step {self.state.global_step + 1}; training stopped, {kept}. Lower "
            "learning_rate, raise warmup_steps or the temperature, or set max_grad_norm."
        )

    def _make_patch_dropout(self) -> PatchDropout | None:
        if not self.args.patch_dropout:
            return None
        backbone = self.model.get_base_model()
        layer = getattr(backbone, CHILD)
        prefix = layer.points[layer.active_name].prefix_tokens
        return PatchDropout(backbone, rate=self.args.patch_dropout, prefix_tokens=prefix, seed=self.args.seed)

    # --- optimizer ---

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer: head and backbone, each with and without weight decay (biases, norms, scales: none)."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        groups = parameter_groups(
            model if model is not None else self.model,
            weight_decay=self.args.weight_decay,
            head_learning_rate=self.args.head_learning_rate,
            fixed_predictor_rate=self.args.fixed_predictor_rate,
        )
        if self.args.lars:
            self.optimizer = lars(
                groups, self.args.learning_rate, self.args.lars_trust_coefficient, clip=self.args.lars_clip
            )
            return self.optimizer
        cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
        is_class = isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
        if not is_class or {"params", "model", "optimizer_dict"} & set(kwargs):
            return super().create_optimizer(model)  # optimizers of transformers that make their own groups
        self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    # --- logging and evaluation ---

    def add_callback(self, callback: Any) -> None:
        """Add a callback, see ``transformers.Trainer.add_callback``; one that watches gets this trainer."""
        super().add_callback(callback)
        self._bind(self.callback_handler.callbacks[-1])

    def _bind(self, callback: Any) -> None:
        if hasattr(callback, "bind"):
            callback.bind(self)
            self._watched = True

    def record(self, values: Mapping[str, float]) -> None:
        """Write what was measured of the model as it is now into `history`, and log it as ``probe_<name>``.

        Numbers that are not finite become None.
        """
        self._history_row().update({n: float(v) if math.isfinite(v) else None for n, v in values.items()})
        should_log = self.control.should_log  # of the step's own line, which logging takes for written
        self.log({f"probe_{n}": float(v) for n, v in values.items()})
        self.control.should_log = should_log

    def _history_row(self) -> dict[str, Any]:
        step = self.state.global_step
        if not self.history or self.history[-1]["step"] != step:
            self.history.append({"step": step, "epoch": float(self.state.epoch or 0)})
        return self.history[-1]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs`, with the objective's terms and the state of the representation while training."""
        if "loss" in logs:
            logs |= {n: torch.stack(v).float().mean().item() for n, v in self._terms.items()}
            if self._watched:
                self._history_row().update({n: v for n, v in logs.items() if n != "epoch" and math.isfinite(v)})
            if self.args.log_representation:
                logs |= describe(self.last_batch)
            for name, regularizer in self.regularizers.items():
                if hasattr(regularizer.module, "report"):
                    found = regularizer.module.report(self.bare_model())
                    logs |= {f"{name}_{key}": float(value) for key, value in found.items()}
            self._terms = {}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return ``knn_*`` (with labels), ``rankme_*``, ``std_*``, ``loss`` and ``positive_cosine_*`` of h and z.

        Names begin with `metric_key_prefix`. The k-NN searches `bank_dataset`, or each image among the others of
        `eval_dataset`. Loss and cosine are means over batches of views that are the same at each evaluation.

        Raises:
            UsageError: there is no eval data set, or it has no length.
        """
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if dataset is None:
            raise UsageError("There is no eval_dataset; pass one to ProjectionTrainer or to evaluate().")
        checks.check_eval_dataset(dataset)
        start = time.time()
        found = {**evaluation.probe(self, dataset), **evaluation.evaluate_views(self, dataset)}
        metrics = {f"{metric_key_prefix}_{n}": v for n, v in found.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.time() - start, 4)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: there is nothing to predict; features come from `hfproj.extract_features`.

        Raises:
            UsageError: always.
        """
        raise UsageError("A head predicts no labels; hfproj.extract_features(model, dataset) returns h and z.")

    # --- checkpoints ---

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:  # only takes part in collectives
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        with replacing(folder) as part:
            super()._save(str(part), state_dict)
            self.objective.position = self.position()
            beside = folder_of(part, methods.active_name(self.bare_model()))
            save_buffers(self.objective, beside, before=self.started)
            if self.history:
                write_history(self.history, part / HISTORY_FILE)
            if self.ema is not None and Path(folder).name.startswith(PREFIX_CHECKPOINT_DIR):
                self.ema.save(beside)
            (part / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, and folders are shared
            if (folder / "README.md").exists():
                (part / "README.md").unlink(missing_ok=True)  # PEFT's empty card is no replacement for a written one

    def load_checkpoint(self, checkpoint: str) -> None:
        """Give the model, the objective and the moving average the values of a checkpoint.

        Raises:
            AdapterFileError: it is damaged, or of another adapter or objective.
        """
        self._load_from_checkpoint(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except SafetensorError as error:
            raise AdapterFileError(
                f"{resume_from_checkpoint} holds a damaged adapter ({error}); resume from another checkpoint."
            ) from error
        folder = folder_of(Path(resume_from_checkpoint), methods.active_name(self.bare_model()))
        cure = "resume with the adapter and the objective that it was written with, or without resume_from_checkpoint"
        load_buffers(self.objective, folder, hint=cure)
        self.started = read_position(folder, BEFORE)
        if self.ema is not None:
            self.ema.load(folder, cure=cure)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:  # transformers' own finds no adapter under a name other than "default", and no objective
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: `transformers` estimates this for language models only."""
        return 0


def _detached(rows: Any) -> Any:
    return [r.detach() for r in rows] if isinstance(rows, list) else rows.detach()
