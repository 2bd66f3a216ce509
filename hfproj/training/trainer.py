"""`ProjectionTrainer`: ``transformers.Trainer`` with several views, an objective of the global batch, online probes.

Methods of ``transformers.Trainer`` that are private by their names are overridden only where it has no public hook; a
comment above each says why, and tests/test_upstream.py fails when one is moved or changed.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from hfproj.checking import check_types, refused_as
from hfproj.data.indexing import EpochSampler, StreamDataset
from hfproj.data.kinds import check_eval_dataset
from hfproj.data.skipped import SkippedImages
from hfproj.diagnostics.global_batch import detached
from hfproj.errors import UsageError
from hfproj.features.views import FixedViews
from hfproj.objectives.base import Step, check_needs, check_output, check_views
from hfproj.objectives.buffers import START, Position
from hfproj.results.history import HISTORY_FILE, read_history
from hfproj.saving.signals import LeaveSignals
from hfproj.training import checks, gradients, setup
from hfproj.training.arguments import REFUSED, ProjectionTrainingArguments
from hfproj.training.checkpoints import Continued
from hfproj.training.ema import EMA
from hfproj.training.optimizer import AroundSteps, make_optimizer
from hfproj.training.resuming import ResumingTrainer
from hfproj.training.shares import GradientShares
from hfproj.tuner.active import active_modules
from hfproj.tuner.patch_dropout import PatchDropout
from hfproj.tuner.views import forward_views
from hfproj.typing import Data, DataOrStream, Refused


class ProjectionTrainer(ResumingTrainer):
    """Trains a projection head, and what its config trains beside it, under a self-supervised objective.

    Args:
        model: A ``PeftModel`` with a projection head.
        args: `ProjectionTrainingArguments`.
        objective: An objective; or the name of one, or ``{"name": name, **options}``, for which the trainer fills in
            the options that model and data decide (``out_dim``, ``num_images``, ``prototypes``). None: that of the
            adapter's config, with its regularizers unless others are given; else ``"nt_xent"``.
        regularizers: Name → weight; or → a dict of ``weight``, ``schedule``, ``end_weight`` and options; or → a
            regularizer module, with weight 1.
        train_dataset: Images: a map-style data set (wrapped in `IndexedDataset`) or a stream (`StreamDataset`).
        eval_dataset: Held-out images, with a length, for the online k-NN (where they have labels), RankMe, std, loss
            and positive-pair cosine; or a dict of several such data sets.
        bank_dataset: Labelled images that the online k-NN searches; None leaves each eval image out of the rest.
        data_collator: Makes the views, see `hfproj.ImageViews`; None takes ``ImageViews.for_model(model)``.
        eval_collator: Makes eval batches; None takes ``EvalImages`` of the size, mean, std and columns of the views.
        continue_from: A folder or Hub repository whose adapter the active one continues from, or ``{"repo", "adapter",
            "revision", "token"}``: its tensors, the objective's buffers and the EMA teacher if they lie there, and the
            step and epoch that the objective sees. Optimizer, schedules and views start fresh; under another
            objective so does what only that one needs (see docs/training.md).
        callbacks, optimizers, optimizer_cls_and_kwargs, processing_class: As in ``transformers.Trainer``.
        **refused: Its other options, which would have no effect here, are refused.

    Attributes:
        started: Steps and epochs before this run, where it continues another one.
        epoch: Epoch whose views are made now, counted from 0.
        last_batch: What callbacks may read of the last training batch on this process: "h" and "z" ``[views, batch,
            dim]``, or lists of ``[batch, dim]``, without gradients, and "labels" ``[batch]``, None where the collator
            gives none.
        history: What callbacks such as `hfproj.SpectrumCallback` measured: a dict for each step that was measured or
            logged, with "step", "epoch" and numbers by name. Saved beside each adapter as ``history.parquet``.

    Raises:
        UsageError: If the model has no head, several GPUs are used without a launcher, the data set is smaller than a
            batch, options contradict each other or have no effect, a metric won't be measured, views would be equal,
            the adapter to continue from has other parts, or it can't be pushed; while training, if the first backward
            pass gives a trained tensor no gradient.
        AdapterFileError: If the adapter to continue from is missing or damaged.
        NonFiniteLossError: While training, at the first loss or gradient that is not finite; checkpoints stay.
    """

    args: ProjectionTrainingArguments
    optimizer: Optimizer | None

    def __init__(
        self, model: setup.Model, args: setup.Arguments | None = None, *, objective: setup.Objective | None = None,
        regularizers: setup.Regularizers | None = None, train_dataset: DataOrStream | None = None,
        eval_dataset: Data | Mapping[str, Data] | None = None, bank_dataset: Data | None = None,
        data_collator: setup.Collator | None = None, eval_collator: setup.Collator | None = None,
        continue_from: setup.Source | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        optimizers: tuple[Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        processing_class: setup.Processing | None = None, **refused: Refused,
    ):  # fmt: skip
        args = args if args is not None else ProjectionTrainingArguments(output_dir="out")
        setup.check_options(model, args, refused, callbacks, optimizers)
        setup.check_train_dataset(train_dataset, args)
        check_eval_dataset(eval_dataset)
        check_eval_dataset(bank_dataset, "bank_dataset", several=False)
        checks.check_arguments(model, args, optimizers)
        made: Any = None if objective is None else setup.make_objective(objective, model, train_dataset)
        with args.main_process_first(desc="continue_from"):
            self._continued = None if continue_from is None else Continued(model, continue_from, made)
        prepared = setup.prepare_objective(model, made, regularizers, train_dataset, log=self._continued is None)
        self.objective, self.regularizers = prepared
        self.bank_dataset, self.eval_collator = bank_dataset, eval_collator
        train_dataset, data_collator = setup.prepared_data(train_dataset, data_collator, model, args)
        if isinstance(train_dataset, StreamDataset):
            args.accelerator_config.dispatch_batches = False  # every process reads the stream and keeps its part
        with refused_as(REFUSED):
            super().__init__(
                model, args,
                data_collator=data_collator, train_dataset=train_dataset, eval_dataset=eval_dataset,
                callbacks=[*(callbacks or ()), *SkippedImages.of(train_dataset)],
                optimizers=optimizers, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                processing_class=processing_class,
            )  # fmt: skip
        # The loss is a mean over the batch: the Trainer must divide it by the accumulation steps, even though the
        # model's forward takes **kwargs and the batch may hold labels.
        self.model_accepts_loss_kwargs, self.can_return_loss = False, True
        for module in (self.objective, *(regularizer.module for regularizer in self.regularizers.values())):
            module.to(self.args.device)
        self.started = START
        if self._continued is not None:
            self.started = self._continued.restore_objective(self.objective, log=self.is_world_process_zero())
        self.ema: EMA | None = None  # made when training starts
        self.history: list[dict[str, Any]] = []
        self.probe_batches: dict[tuple, FixedViews] = {}  # of the callbacks that watch fixed images
        self.epoch, self.last_batch = 0, {}
        self._terms, self._said = {}, set()
        self.has_own_optimizer, self._first = optimizers[0] is not None, True
        self.shares = GradientShares(self)
        self._train_sampler: EpochSampler | None = None
        rate = self.args.patch_dropout
        self._patch_dropout = PatchDropout.for_model(model, rate=rate, seed=self.args.seed) if rate else None
        self.add_callback(AroundSteps(self))
        self._bind(list(self.callback_handler.callbacks))
        checks.check_trainer(self)

    # --- data ---

    # Private: get_train_dataloader, the public form, would have to repeat how transformers prepares the loader.
    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        shuffle = getattr(self.args, "train_sampling_strategy", "random") != "sequential"
        self._train_sampler = EpochSampler(len(dataset), seed=seed, shuffle=shuffle)
        return self._train_sampler

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the training batches, whose workers leave signals to the main process.

        Of a stream, too, the last incomplete batch is dropped: `transformers` would keep it, and accelerate would fill
        it with images that were there before.
        """
        loader: Any
        if self.train_dataset is None:
            raise UsageError("Expected images to train on, got none; pass train_dataset=… to the trainer.")
        if isinstance(self.train_dataset, StreamDataset):
            loader = self.accelerator.prepare(DataLoader(
                self.train_dataset, batch_size=self.args.train_batch_size, collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers, pin_memory=self.args.dataloader_pin_memory,
                drop_last=self.args.dataloader_drop_last, prefetch_factor=self.args.dataloader_prefetch_factor,
            ))  # fmt: skip
        else:
            with refused_as(REFUSED):
                loader = super().get_train_dataloader()
        bare = getattr(loader, "base_dataloader", loader)
        bare.worker_init_fn = LeaveSignals(bare.worker_init_fn)
        return loader

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the views that are made from now on."""
        self.epoch = epoch
        if self._train_sampler is not None:
            self._train_sampler.set_epoch(epoch)
        if isinstance(self.train_dataset, StreamDataset):
            self.train_dataset.set_epoch(epoch)

    def end_data(self, ended: bool) -> None:
        """Set whether the training is over, so that no more images are given."""
        for source in (self._train_sampler, self.train_dataset):
            if isinstance(source, EpochSampler | StreamDataset):
                source.ended = ended

    def train(self, resume_from_checkpoint: str | PathLike | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train, see ``transformers.Trainer.train`` and docs/checkpoints.md.

        Args:
            resume_from_checkpoint: A checkpoint; True, the newest whole one in ``output_dir``; or "auto", that one or,
                where there is none, the beginning.
            **kwargs: As in ``transformers.Trainer.train``.

        Raises:
            UsageError: If a stream, whose position can't be restored, is resumed, there is no whole checkpoint, images
                would be skipped or seen twice, or another run writes into ``output_dir``.
            AdapterFileError: If a checkpoint is of another adapter or objective.
            SaveError: If a checkpoint can't be written.
            SystemExit: With code 75, if SIGTERM or SIGUSR1 came and a checkpoint was written.
            NonFiniteLossError: If the loss or its gradient is NaN or infinite.
        """
        check_types("train", ProjectionTrainer.train, {"resume_from_checkpoint": resume_from_checkpoint})
        if resume_from_checkpoint == "":
            raise UsageError("Expected resume_from_checkpoint to be a folder, True, 'auto' or None, got an empty name.")
        with ExitStack() as stack:
            checkpoint = stack.enter_context(self.in_folder(resume_from_checkpoint))
            self._terms, self.last_batch, self._first = {}, {}, True
            kept = Path(checkpoint or "") / HISTORY_FILE
            self.history = read_history(kept) if checkpoint and kept.is_file() else []
            self._ema_teacher()
            stack.callback(lambda: setattr(self.objective, "position", self.position()))
            if self._patch_dropout is not None:
                self._patch_dropout.attach()
                stack.callback(self._patch_dropout.remove)
            stack.enter_context(checks.checkpointing_of_timm(self.model, self.args))
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    # --- loss ---

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Return the loss of a micro-batch after its backward pass, of which the first one of a training is checked.

        Raises:
            UsageError: If a trained tensor got no gradient.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.shares.finish()
        if self._first and gradients.check_gradients(self):
            gradients.warn_of_equal_views(self, inputs["views"])
            self._first = False
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the objective's loss of the global batch plus the weighted regularizers.

        Raises:
            UsageError: If the batch lacks what the objective needs.
            NonFiniteLossError: If the loss is NaN or infinite.
        """
        views = inputs.get("views") if isinstance(inputs, Mapping) else None
        if not isinstance(views, list | tuple):
            raise UsageError(
                "The collator returned no 'views'; use hfproj.ImageViews.for_model(model), or return "
                "{'views': [tensor or dict, …], 'index': …}."
            )
        check_views(self.objective, len(views))
        for callback in self.callback_handler.callbacks if model.training else ():
            if hasattr(callback, "check_batch"):
                callback.check_batch(inputs)
        measured = model.training and self.shares.due()
        with ExitStack() as stack:
            if measured:
                stack.enter_context(self.shares.reading())
            if self._patch_dropout is not None and model.training:
                if inputs.get("index") is None:
                    raise UsageError("patch_dropout needs 'index' from the collator; hfproj.ImageViews gives it.")
                stack.enter_context(self._patch_dropout.using(inputs["index"], self.epoch))
            out = forward_views(model, views)
        step = self.step()
        prototypes = active_modules(self.bare_model()).prototypes
        given = {
            "labels": inputs.get("labels"), "index": inputs.get("index"), "prediction": out.prediction,
            "scores": out.scores, "prototypes": None if prototypes is None else prototypes.vectors().detach(),
            "scales": out.scales, "target": self.targets(views), "step": step,
        }  # fmt: skip
        check_needs(self.objective, given)
        loss, terms = check_output(self.objective, self.objective(out.z, **given))
        objective, added = loss, {}
        if self.regularizers:
            terms["objective"] = loss.detach()
        for name, regularizer in self.regularizers.items():
            value = added[name] = regularizer(self.bare_model(), out.h, out.z, step=step)
            terms[name] = value.detach()
            loss = loss + regularizer.at(self.progress()) * value
        if not torch.isfinite(loss):
            raise gradients.non_finite(self, "loss", loss.item())
        if measured:
            self.shares.take(out.h, objective, added)
        if model.training:
            for name, value in terms.items():
                self._terms.setdefault(name, []).append(value.detach())
            self.last_batch = {"h": detached(out.h), "z": detached(out.z), "labels": inputs.get("labels")}
        return (loss, out) if return_outputs else loss

    def step(self) -> Step:
        """Return where training stands, with this step's generator."""
        return Step.at(self.args.seed, *self.position(), self.args.device)

    def position(self) -> Position:
        """Return the steps and epochs that the adapter has been trained for, with those before this run."""
        step, epoch = self.state.global_step, float(self.state.epoch or 0)
        return Position(self.started.step + step, self.started.epoch + epoch)

    def progress(self) -> float:
        """Return the fraction of the training that is done, in [0, 1]."""
        return min(self.state.global_step / max(self.state.max_steps, 1), 1.0)

    def bare_model(self) -> setup.Model:
        """Return the model without the wrappers of distributed training."""
        return self.accelerator.unwrap_model(self.model)

    def _ema_teacher(self) -> EMA | None:
        """Return the EMA teacher, made at the first call; None where the objective does not use one."""
        if "target" not in getattr(self.objective, "needs", ()):
            return None
        if self.ema is None:
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                raise UsageError(
                    f"{type(self.objective).__name__} needs an EMA teacher, which is not available under FSDP and "
                    "DeepSpeed: they split the model's parameters. Train with DDP (accelerate launch)."
                )
            chosen = (self.args.ema_momentum, self.args.ema_momentum_end)
            momentum = [own if c is None else c for c, own in zip(chosen, self.objective.ema_momentum)]
            self.ema = EMA(self.bare_model(), momentum)
            if self._continued is not None:
                self._continued.load_ema(self.ema)
        return self.ema

    def targets(self, views: Sequence[Any]) -> Any:
        """Return the EMA teacher's outputs for `views`, or None where the objective does not use them."""
        ema = self._ema_teacher()  # made here for an evaluation before training
        if ema is None:
            return None
        with self.accelerator.autocast():
            output = getattr(self.objective, "target_of", "projection")
            return ema.targets(views, output, getattr(self.objective, "target_views", None))

    # Private: no callback is given the norm, and computing it again would cost a pass over the gradients, as it does in
    # `AroundSteps` where transformers has no such method yet.
    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.check_gradient(norm)
        return norm

    def check_gradient(self, norm: float | Tensor | None) -> None:
        """Raise NonFiniteLossError for a `norm` that is not finite: the step would put NaN into the next checkpoint."""
        scaled = getattr(self.accelerator, "scaler", None) is not None  # fp16's loss scaler skips such a step by itself
        if norm is not None and not scaled and not math.isfinite(norm):
            raise gradients.non_finite(self, "gradient", float(norm))

    @refused_as(REFUSED)
    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Make the optimizer: head and backbone, each with and without weight decay (biases, norms, scales: none)."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self, model if model is not None else self.model)
        # Without one: an optimizer of transformers that makes its own groups.
        return self.optimizer if self.optimizer is not None else super().create_optimizer(model)

    @refused_as(REFUSED)
    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Make the schedule of the learning rate, see ``transformers.Trainer.create_scheduler``."""
        return super().create_scheduler(*args, **kwargs)

    # --- callbacks ---

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a callback, see ``transformers.Trainer.add_callback``; one that watches gets this trainer."""
        super().add_callback(callback)
        self._bind(self.callback_handler.callbacks[-1:])

    def _bind(self, callbacks: Sequence[TrainerCallback]) -> None:
        for callback in callbacks:
            if hasattr(callback, "bind"):
                callback.bind(self)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: `transformers` estimates this for language models only."""
        return 0
