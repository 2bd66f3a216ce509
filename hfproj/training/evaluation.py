"""What `ProjectionTrainer` measures and logs: k-NN, RankMe and std of held-out features, loss and cosine of views."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from hfproj import distributed
from hfproj.data.images import EvalImages, ImageViews
from hfproj.data.indexing import IndexedDataset
from hfproj.data.kinds import check_eval_dataset
from hfproj.data.skipped import SkippedImages
from hfproj.diagnostics import rankme, representation_std
from hfproj.diagnostics.global_batch import describe_rows
from hfproj.errors import NotMeasurableError, UsageError
from hfproj.features import extract_features
from hfproj.functional.labels import UNLABELLED, check_classes
from hfproj.functional.modes import evaluating
from hfproj.probes import KNNProbe
from hfproj.regularizers import Weighted
from hfproj.results import Results
from hfproj.saving.signals import LeaveSignals
from hfproj.training import checks
from hfproj.training.shares import GradientShares
from hfproj.typing import Data

LOG = logging.getLogger("hfproj.training")


def probe(trainer: Any, dataset: Any) -> dict[str, float]:
    """Return ``knn_*`` (with labels), ``rankme_*`` and ``std_*`` of h and z; the bank is the trainer's."""
    test, metrics = features(trainer, dataset), {}
    bank = features(trainer, trainer.bank_dataset) if trainer.bank_dataset is not None else None
    sources = {"the eval data set": (test, dataset), "bank_dataset": (bank or test, trainer.bank_dataset or dataset)}
    bare = [(name, part) for name, (found, part) in sources.items() if found.labels is None or (found.labels < 0).all()]
    for name, part in bare[:1]:
        reason = checks.why_unlabelled(trainer, part, name) or f"no row of {name} has a label"
        trainer.say_once(f"k-NN is not measured: {reason}.")
    for layer in ("h", "z"):
        f = getattr(test, layer)
        measures = {"knn": lambda layer=layer: _knn(trainer.args, layer, bank, test)} if not bare else {}
        measures |= {"rankme": lambda f=f: rankme(f), "std": lambda f=f: representation_std(f)}
        for name, measure in measures.items():
            try:
                metrics[f"{name}_{layer}"] = measure()
            except UsageError as error:  # no reason to end a training
                if name != "knn" and not isinstance(error, NotMeasurableError):
                    raise
                trainer.say_once(f"{name}_{layer} is not measured: {str(error).removesuffix('.')}.")
    left = sum(int((part.labels == UNLABELLED).sum()) for part in (test, bank) if part and part.labels is not None)
    if left and not bare:
        trainer.say_once(f"{left} held-out rows have no label and are left out of the k-NN.")
    return metrics


def _knn(args: Any, layer: str, bank: Any, test: Any) -> float:
    """Return the k-NN accuracy on the labelled rows; raise UsageError if it can't be measured."""
    check_classes((bank or test).labels, "bank", test.labels)
    knn = KNNProbe(k=args.eval_knn_k, temperature=args.eval_knn_temperature)
    knn.fit(getattr(bank or test, layer), (bank or test).labels)
    return knn.score_leave_one_out() if bank is None else knn.score(getattr(test, layer), test.labels)


def features(trainer: Any, dataset: Any) -> Any:
    """Return h, z and labels of `dataset`, read as the trainer's arguments say."""
    args = trainer.args
    return extract_features(
        trainer.model, dataset, batch_size=args.per_device_eval_batch_size, collator=eval_collator(trainer),
        device=args.device, num_workers=args.dataloader_num_workers,
    )  # fmt: skip


def eval_collator(trainer: Any) -> Any:
    """Return the trainer's own, or one that prepares images as its `ImageViews` does, but for the augmentations."""
    views = trainer.data_collator
    if trainer.eval_collator is not None or not isinstance(views, ImageViews):
        return trainer.eval_collator
    same = ("size", "flip_channels", "image_column", "label_column")
    pixels = {name: getattr(views, name).flatten().tolist() for name in ("mean", "std")}
    return EvalImages.for_model(trainer.model, **pixels, **{name: getattr(views, name) for name in same})


@torch.no_grad()
def evaluate_views(trainer: Any, dataset: Any) -> dict[str, float]:
    """Return the mean ``loss`` and ``positive_cosine_*`` over batches of views; empty where no batch is whole."""
    sums: dict[str, list[float]] = {}
    modules = [trainer.model, trainer.objective, *(r.module for r in trainer.regularizers.values())]
    modules += [trainer.ema.module] if trainer.ema is not None else []
    with ExitStack() as stack:
        for module in modules:  # objectives update their buffers in training only
            stack.enter_context(evaluating(module))
        for batch in _batches_of_views(trainer, dataset):
            # Private to transformers, without a public form: to the device, and under DeepSpeed to its precision.
            inputs = trainer._prepare_inputs(batch)
            loss, out = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
            described = describe_rows({"h": out.h, "z": out.z}, spread=False)
            for name, value in ({"loss": loss.item()} | described).items():
                sums.setdefault(name, []).append(value)
    return {n: sum(v) / len(v) for n, v in sums.items()}


def _batches_of_views(trainer: Any, dataset: Any) -> Any:
    """Return a loader of this process's part of global batches, the same at each call; empty for a single image."""
    args, world, rank = trainer.args, distributed.world_size(), distributed.rank()
    size = min(args.per_device_eval_batch_size, len(dataset) // world)
    if size * world < 2:
        return ()
    starts = range(rank * size, len(dataset) - (world - rank) * size + 1, world * size)
    # With a generator of its own: the loader would advance the global one, and measuring would change the run.
    return DataLoader(
        IndexedDataset(dataset), batch_sampler=[list(range(start, start + size)) for start in starts],
        collate_fn=trainer.data_collator, num_workers=args.dataloader_num_workers, generator=torch.Generator(),
        worker_init_fn=LeaveSignals(),
    )  # fmt: skip


class MeasuringTrainer(Trainer):
    """The part of `ProjectionTrainer` that measures and logs."""

    control: Any
    history: list[dict[str, Any]]
    last_batch: dict[str, Any]
    regularizers: dict[str, Weighted]
    bare_model: Callable[[], Any]
    shares: GradientShares
    statistics: Any = None  # before the step, see hfproj.training.gradients
    _said: set[str]
    _terms: dict[str, list[Tensor]]

    def say_once(self, text: str) -> None:
        """Log `text` as a warning, from one process and only the first time."""
        if self.is_world_process_zero() and text not in self._said:
            LOG.warning(text)
        self._said.add(text)

    def note_skipped(self, results: Results) -> None:
        """Write into `results` which training images could not be read, if any (``on_bad_image="skip"``)."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SkippedImages):
                callback.note(results)

    def record(self, values: Mapping[str, float]) -> None:
        """Write what was measured into `history`, where numbers that are not finite are None; log ``probe_<name>``."""
        self._history_row().update({n: float(v) if math.isfinite(v) else None for n, v in values.items()})
        should_log = self.control.should_log  # of the step's own line, which logging takes for written
        self.log({f"probe_{n}": float(v) for n, v in values.items() if math.isfinite(v)})
        self.control.should_log = should_log

    def _history_row(self) -> dict[str, Any]:
        step = self.state.global_step
        if not self.history or self.history[-1]["step"] != step:
            self.history.append({"step": step, "epoch": float(self.state.epoch or 0)})
        return self.history[-1]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs`, with the objective's terms and the state of the representation while training."""
        if "loss" in logs:
            logs |= {n: torch.stack(v).float().mean().item() for n, v in self._terms.items()} | self.shares.values
            if any(hasattr(callback, "bind") for callback in self.callback_handler.callbacks):
                self._history_row().update({n: v for n, v in logs.items() if n != "epoch" and math.isfinite(v)})
            if self.args.log_representation:
                found = describe_rows({n: self.last_batch[n] for n in ("h", "z") if n in self.last_batch})
                logs |= {f"batch_{n}": v for n, v in found.items()}
            for name, regularizer in self.regularizers.items():
                own = regularizer.report(self.bare_model())
                logs |= {f"{name}_{key}": float(value) for key, value in own.items()}
            self._terms, self.shares.values = {}, {}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Data | Mapping[str, Data] | str | None = None,
        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval",
    ) -> dict[str, float]:  # fmt: skip
        """Return ``knn_*`` (with labels), ``rankme_*``, ``std_*``, ``loss`` and ``positive_cosine_*`` of h and z.

        What can't be measured (no label, one class) is left out, and a warning says why. RankMe and std are those of
        all rows of the data set, as `hfproj.evaluate` has them.

        Names begin with `metric_key_prefix`. The k-NN searches `bank_dataset`, or each image among the others of
        `eval_dataset`. Loss and cosine are means over batches of views that are the same at each evaluation.

        Raises:
            UsageError: If there is no eval data set, or it has no length.
        """
        dataset: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if dataset is None:
            raise UsageError("There is no eval_dataset; pass one to ProjectionTrainer or to evaluate().")
        check_eval_dataset(dataset)
        start, found = time.time(), {**probe(self, dataset), **evaluate_views(self, dataset)}
        metrics = {f"{metric_key_prefix}_{n}": v for n, v in found.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.time() - start, 4)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: a head predicts no labels.

        Raises:
            UsageError: If it is called; features come from `hfproj.extract_features`.
        """
        raise UsageError("A head predicts no labels; hfproj.extract_features(model, dataset) returns h and z.")
