"""`ProjectionTrainer`: ``transformers.Trainer`` with several views, an objective over the joint batch, and online probes."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import ParallelMode

from hfproj import distributed
from hfproj.data.indexing import EpochSampler, IndexedDataset, StreamDataset
from hfproj.diagnostics import positive_cosine, rankme, representation_std
from hfproj.errors import NonFiniteLossError, UsageError
from hfproj.objectives import create_objective
from hfproj.objectives.base import Step
from hfproj.probes import KNNProbe, extract_features
from hfproj.regularizers import create_regularizer
from hfproj.training.arguments import _PUSHING, ProjectionTrainingArguments
from hfproj.training.patch_dropout import PatchDropout
from hfproj.training.views import ViewOutputs, forward_views
from hfproj.tuner.layer import CHILD

_OBJECTIVE_FILE = "objective.safetensors"
_NO_DECAY_BELOW = 2  # biases, norms and scales have fewer dimensions


class ProjectionTrainer(Trainer):
    """Trains a projection head, and what its config trains beside it, under a self-supervised objective.

    Args:
        model: A ``PeftModel`` with a projection head.
        args: Training arguments.
        objective: An objective, or the name of one.
        regularizers: name → weight, or name → regularizer module with weight 1.
        train_dataset: Images: a map-style data set (wrapped in `IndexedDataset`) or a stream (`StreamDataset`).
        eval_dataset: Held-out images for the online k-NN (where they have labels), RankMe, std, loss and positive-pair
            cosine; or a dict of such.
        bank_dataset: Labelled images that the online k-NN searches; None leaves each eval image out of the rest.
        data_collator: Makes the views, see `hfproj.ImageViews`; None takes ``ImageViews.for_model(model)``.
        eval_collator: Makes eval batches; None takes ``EvalImages.for_model(model)``.
        **kwargs: As in ``transformers.Trainer`` (``callbacks``, ``optimizers`` …).

    Raises:
        UsageError: the model has no head, several GPUs are used without a launcher, the data set is smaller than a batch,
            or options contradict each other.
        NonFiniteLossError: while training, at the first loss that is not finite; checkpoints written before stay.
    """

    def __init__(
        self,
        model: PeftModel,
        args: ProjectionTrainingArguments | None = None,
        *,
        objective: nn.Module | str = "nt_xent",
        regularizers: Mapping[str, float | nn.Module] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        bank_dataset: Any = None,
        data_collator: Any = None,
        eval_collator: Any = None,
        **kwargs: Any,
    ):
        args = args if args is not None else ProjectionTrainingArguments(output_dir="out")
        if not isinstance(args, ProjectionTrainingArguments):
            raise UsageError(f"args is a {type(args).__name__}; expected hfproj.ProjectionTrainingArguments(output_dir=…).")
        _check_model(model)
        _check_devices(args)
        if data_collator is None:
            from hfproj.data.images import ImageViews

            data_collator = ImageViews.for_model(model, seed=args.seed)
        self.objective = create_objective(objective) if isinstance(objective, str) else objective
        self.regularizers = {
            name: (create_regularizer(name), float(value)) if not isinstance(value, nn.Module) else (value, 1.0)
            for name, value in (regularizers or {}).items()
        }
        self.bank_dataset, self.eval_collator = bank_dataset, eval_collator
        train_dataset = _indexed(train_dataset)
        _check_size(train_dataset, args)
        if isinstance(train_dataset, IterableDataset):
            args.accelerator_config.dispatch_batches = False  # every process reads the stream and keeps its share
        super().__init__(
            model, args, data_collator=data_collator, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs
        )
        # The loss is ours, a mean over the batch: the Trainer must divide it by the accumulation steps, even though the
        # model's forward takes **kwargs and the batch may hold labels.
        self.model_accepts_loss_kwargs = False
        self.can_return_loss = True
        self.objective.to(self.args.device)
        self._train_sampler: EpochSampler | None = None
        self._epoch = 0
        self._terms: dict[str, list[Tensor]] = {}
        self._last: ViewOutputs | None = None
        self._patch_dropout = self._make_patch_dropout()

    # --- data ---

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        shuffle = getattr(self.args, "train_sampling_strategy", "random") != "sequential"
        self._train_sampler = EpochSampler(len(dataset), seed=seed, shuffle=shuffle)
        return self._train_sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Before the epoch's iterator is made: accelerate forwards the epoch neither to a sharded sampler nor, after a
        # resume in mid-epoch, to anything.
        self._epoch = kwargs["epoch"]
        if self._train_sampler is not None:
            self._train_sampler.set_epoch(self._epoch)
        if isinstance(self.train_dataset, StreamDataset):
            self.train_dataset.set_epoch(self._epoch)
        super()._run_epoch(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """Train, see ``transformers.Trainer.train``; ``resume_from_checkpoint=True`` takes the last complete checkpoint.

        Raises:
            UsageError: resuming a stream, whose position can't be restored; no checkpoint to resume from.
        """
        if resume_from_checkpoint:
            if isinstance(self.train_dataset, IterableDataset) and not self.args.ignore_data_skip:
                raise UsageError(
                    "A stream can't be resumed exactly: what it gave before is not known. Pass ignore_data_skip=True to go on "
                    "with its beginning, or use a data set with a length."
                )
            if resume_from_checkpoint is True:
                resume_from_checkpoint = _last_complete_checkpoint(self.args.output_dir)
            elif not (Path(resume_from_checkpoint) / "trainer_state.json").is_file():
                raise UsageError(f"{resume_from_checkpoint} is no complete checkpoint: it has no trainer_state.json.")
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

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
        self._check_views(len(views))
        if self._patch_dropout is not None and model.training:
            with self._patch_dropout.using(inputs["index"], self._epoch, len(views)):
                out = forward_views(model, views)
        else:
            out = forward_views(model, views)
        step = Step.at(self.args.seed, self.state.global_step, float(self.state.epoch or 0), self.args.device)
        loss, terms = self.objective(
            out.z,
            labels=inputs.get("labels"),
            prediction=out.prediction,
            scores=out.scores,
            index=inputs.get("index"),
            step=step,
        )
        terms = dict(terms)
        if self.regularizers:
            terms["objective"] = loss.detach()
        for name, (regularizer, weight) in self.regularizers.items():
            value = regularizer(self.accelerator.unwrap_model(model), out.h, out.z)
            terms[name] = value.detach()
            loss = loss + weight * value
        if not torch.isfinite(loss):
            raise NonFiniteLossError(self._non_finite_message(loss))
        if model.training:
            for name, value in terms.items():
                self._terms.setdefault(name, []).append(value.detach())
            self._last = ViewOutputs(*(_detached(t) for t in out))
        return (loss, out) if return_outputs else loss

    def _check_views(self, count: int) -> None:
        fewest, most = getattr(self.objective, "views", (1, None))
        if count < fewest or (most is not None and count > most):
            wanted = f"{fewest}" if most == fewest else f"at least {fewest}" if most is None else f"{fewest} to {most}"
            raise UsageError(
                f"{type(self.objective).__name__} needs {wanted} views of each image and the batch has {count}; set "
                f"num_views={fewest} in the collator (hfproj.ImageViews)."
            )

    def _non_finite_message(self, loss: Tensor) -> str:
        last = _last_complete_checkpoint(self.args.output_dir, required=False)
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been written yet"
        return (
            f"The loss became {loss.item()} at step {self.state.global_step + 1}; training stopped, {kept}. Lower "
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
        """Make the optimizer: head and backbone each with and without weight decay (biases, norms and scales have none)."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        rates = {True: self.args.head_learning_rate, False: None}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in (model or self.model).named_parameters():
            if parameter.requires_grad:
                key = (f".{CHILD}." in f".{name}", parameter.ndim >= _NO_DECAY_BELOW)
                groups.setdefault(key, []).append(parameter)
        if not groups:
            raise UsageError("No parameter is trainable: the adapter was loaded frozen; load it with is_trainable=True.")
        cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if {"params", "model", "optimizer_dict"} & set(kwargs):
            return super().create_optimizer(model)  # optimizers of transformers that make their own groups
        settings = [
            {
                "params": parameters,
                "weight_decay": self.args.weight_decay if decays else 0.0,
                **({"lr": rates[is_head]} if rates[is_head] is not None else {}),
            }
            for (is_head, decays), parameters in groups.items()
        ]
        self.optimizer = cls(settings, **kwargs)
        return self.optimizer

    # --- logging and evaluation ---

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs`, with the objective's terms and the state of the representation while training."""
        if "loss" in logs:
            logs |= {n: torch.stack(v).float().mean().item() for n, v in self._terms.items()}
            if self.args.log_representation and self._last is not None:
                logs |= _representation(self._last)
            self._terms = {}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return ``knn_h``, ``knn_z`` (with labels), ``rankme_*``, ``std_*``, ``loss`` and ``positive_cosine_*``, prefixed.

        The k-NN searches `bank_dataset`, or each image among the others of `eval_dataset`. Loss and cosine are means over
        batches of views that are the same at each evaluation.

        Raises:
            UsageError: there is no eval data set.
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
        start = time.time()
        found = {**self._probe(dataset), **self._evaluate_views(dataset)}
        metrics = {f"{metric_key_prefix}_{n}": v for n, v in found.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.time() - start, 4)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _features(self, dataset: Any) -> Any:
        return extract_features(
            self.model,
            dataset,
            batch_size=self.args.per_device_eval_batch_size,
            collator=self.eval_collator,
            device=self.args.device,
        )

    def _probe(self, dataset: Any) -> dict[str, float]:
        test = self._features(dataset)
        bank = self._features(self.bank_dataset) if self.bank_dataset is not None else None
        metrics: dict[str, float] = {}
        for layer in ("h", "z"):
            f = getattr(test, layer)
            if test.labels is not None:
                probe = KNNProbe(k=self.args.eval_knn_k, temperature=self.args.eval_knn_temperature)
                if bank is None:
                    metrics[f"knn_{layer}"] = probe.fit(f, test.labels).score_leave_one_out()
                else:
                    metrics[f"knn_{layer}"] = probe.fit(getattr(bank, layer), bank.labels).score(f, test.labels)
            metrics[f"rankme_{layer}"] = rankme(f)
            metrics[f"std_{layer}"] = representation_std(f)
        return metrics

    @torch.no_grad()
    def _evaluate_views(self, dataset: Any) -> dict[str, float]:
        if isinstance(dataset, IterableDataset):
            return {}
        size = min(self.args.per_device_eval_batch_size, len(dataset) // distributed.world_size())
        if size < 2:
            return {}
        loader = self.accelerator.prepare(
            torch.utils.data.DataLoader(
                _indexed(dataset),
                batch_size=size,
                sampler=EpochSampler(len(dataset), shuffle=False),
                collate_fn=self.data_collator,
                drop_last=True,
            )
        )
        was_training = self.model.training
        self.model.eval()
        sums: dict[str, list[float]] = {}
        try:
            for batch in loader:
                batch = self._prepare_inputs(batch)
                loss, out = self.compute_loss(self.model, batch, return_outputs=True)
                sums.setdefault("loss", []).append(loss.item())
                for layer in ("h", "z"):
                    rows = getattr(out, layer)
                    if isinstance(rows, Tensor):
                        joint = distributed.gather_rows(rows.transpose(0, 1).contiguous()).transpose(0, 1)
                        sums.setdefault(f"positive_cosine_{layer}", []).append(positive_cosine(joint))
        finally:
            self.model.train(was_training)
            self.accelerator._dataloaders.remove(loader)
        return {n: sum(v) / len(v) for n, v in sums.items()}

    # --- checkpoints ---

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        buffers = {n: b.detach().cpu().contiguous() for n, b in self.objective.state_dict().items()}
        if buffers and self.args.should_save:
            target = Path(output_dir or self.args.output_dir) / _OBJECTIVE_FILE
            save_file(buffers, str(target) + ".part", metadata={"format": "pt"})
            os.replace(str(target) + ".part", target)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.objective.state_dict():
            self.objective.load_state_dict(load_file(Path(resume_from_checkpoint) / _OBJECTIVE_FILE))

    def push_to_hub(self, *args: Any, **kwargs: Any) -> str:
        """Refuse, until pushing with probe results is available.

        Raises:
            UsageError: always.
        """
        raise UsageError(_PUSHING)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: `transformers` estimates this for language models only."""
        return 0


def _indexed(dataset: Any) -> Any:
    if dataset is None or isinstance(dataset, IndexedDataset | StreamDataset):
        return dataset
    streams = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")
    return StreamDataset(dataset) if streams else IndexedDataset(dataset)


def _check_model(model: Any) -> None:
    backbone = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(model, PeftModel) or not hasattr(backbone, CHILD):
        raise UsageError(
            f"The model is a {type(model).__name__} without a projection head; attach one with "
            "peft.get_peft_model(backbone, hfproj.ProjectionHeadConfig(…))."
        )


def _check_devices(args: ProjectionTrainingArguments) -> None:
    if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED and args.n_gpu > 1:
        raise UsageError(
            f"{args.n_gpu} GPUs are visible to one process, which would split each batch and its negatives; start the script "
            "with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one of them."
        )


def _check_size(dataset: Any, args: ProjectionTrainingArguments) -> None:
    joint = args.train_batch_size * args.world_size
    if hasattr(dataset, "__len__") and len(dataset) < joint and args.dataloader_drop_last:
        raise UsageError(
            f"train_dataset has {len(dataset)} images, fewer than one batch of {joint} ({args.train_batch_size} on each of "
            f"{args.world_size} processes); lower per_device_train_batch_size."
        )


def _detached(rows: Any) -> Any:
    if isinstance(rows, list):
        return [r.detach() for r in rows]
    return None if rows is None else rows.detach()


def _representation(out: ViewOutputs) -> dict[str, float]:
    """Return RankMe, std and positive-pair cosine of the joint batch's h and z."""
    logs: dict[str, float] = {}
    for layer in ("h", "z"):
        rows = getattr(out, layer)
        if not isinstance(rows, Tensor):
            continue
        joint = distributed.gather_rows(rows.transpose(0, 1).contiguous()).transpose(0, 1).float()
        logs[f"rankme_{layer}"] = rankme(joint.flatten(0, 1))
        logs[f"std_{layer}"] = representation_std(joint.flatten(0, 1))
        logs[f"positive_cosine_{layer}"] = positive_cosine(joint)
    return logs


def _last_complete_checkpoint(folder: str, required: bool = True) -> str | None:
    """Return the newest checkpoint that was written to its end (its state file comes last)."""
    found = [
        p for p in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if p.name.rpartition("-")[2].isdigit() and (p / "trainer_state.json").is_file()
    ]
    if not found:
        if required:
            raise UsageError(f"{folder} holds no complete checkpoint to resume from; start without resume_from_checkpoint.")
        return None
    return str(max(found, key=lambda p: int(p.name.rpartition("-")[2])))
