"""What `ProjectionTrainer.evaluate` measures: k-NN, RankMe and std of held-out features, loss and cosine of views."""

from contextlib import ExitStack
from typing import Any

import torch

from hfproj.diagnostics import rankme, representation_std
from hfproj.features import extract_features
from hfproj.functional.modes import evaluating
from hfproj.probes import KNNProbe
from hfproj.training.loaders import eval_views_loader
from hfproj.training.representation import positive_cosines


def probe(trainer: Any, dataset: Any) -> dict[str, float]:
    """Return ``knn_*`` (with labels), ``rankme_*`` and ``std_*`` of h and z; the bank is the trainer's."""
    args = trainer.args
    test = _features(trainer, dataset)
    bank = _features(trainer, trainer.bank_dataset) if trainer.bank_dataset is not None else None
    metrics: dict[str, float] = {}
    for layer in ("h", "z"):
        f = getattr(test, layer)
        if test.labels is not None:
            knn = KNNProbe(k=args.eval_knn_k, temperature=args.eval_knn_temperature)
            if bank is None:
                metrics[f"knn_{layer}"] = knn.fit(f, test.labels).score_leave_one_out()
            else:
                metrics[f"knn_{layer}"] = knn.fit(getattr(bank, layer), bank.labels).score(f, test.labels)
        metrics[f"rankme_{layer}"] = rankme(f)
        metrics[f"std_{layer}"] = representation_std(f)
    return metrics


def _features(trainer: Any, dataset: Any) -> Any:
    return extract_features(
        trainer.model,
        dataset,
        batch_size=trainer.args.per_device_eval_batch_size,
        collator=trainer.eval_collator,
        device=trainer.args.device,
        num_workers=trainer.args.dataloader_num_workers,
    )


@torch.no_grad()
def evaluate_views(trainer: Any, dataset: Any) -> dict[str, float]:
    """Return the mean ``loss`` and ``positive_cosine_*`` over batches of views; empty where no batch is whole."""
    loader = eval_views_loader(dataset, trainer.data_collator, trainer.args)
    if loader is None:
        return {}
    sums: dict[str, list[float]] = {}
    modules = [trainer.model, trainer.objective, *(r.module for r in trainer.regularizers.values())]
    modules += [trainer.ema.module] if trainer.ema is not None else []
    with ExitStack() as stack:
        for module in modules:  # objectives update their buffers in training only
            stack.enter_context(evaluating(module))
        for batch in loader:
            loss, out = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), return_outputs=True)
            found = {"loss": loss.item(), **positive_cosines({"h": out.h, "z": out.z})}
            for name, value in found.items():
                sums.setdefault(name, []).append(value)
    return {n: sum(v) / len(v) for n, v in sums.items()}
