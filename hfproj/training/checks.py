"""What `ProjectionTrainer` refuses before it starts: each check says what to do instead."""

from typing import Any

from peft import PeftModel
from torch.utils.data import IterableDataset
from transformers.training_args import ParallelMode

from hfproj.data.indexing import IndexedDataset, StreamDataset
from hfproj.errors import UsageError
from hfproj.training.arguments import ProjectionTrainingArguments
from hfproj.tuner.layer import CHILD

# Options of transformers.Trainer that would be ignored, or would scale the loss once more.
_REPLACED = {
    "compute_loss_func": "pass objective=… and regularizers=…",
    "compute_metrics": "measure with hfproj.evaluate, or in a TrainerCallback",
    "preprocess_logits_for_metrics": "measure with hfproj.evaluate",
    "model_init": "pass the model itself",
}


def indexed(dataset: Any) -> Any:
    """Return `dataset` with an index and an epoch in every item; None stays None."""
    if dataset is None or isinstance(dataset, IndexedDataset | StreamDataset):
        return dataset
    return StreamDataset(dataset) if is_stream(dataset) else IndexedDataset(dataset)


def is_stream(dataset: Any) -> bool:
    """Whether `dataset` can only be read from its beginning."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")


def check_options(args: Any, options: dict[str, Any]) -> None:
    """Refuse arguments of another class, options that have no effect here, and several GPUs in one process."""
    if not isinstance(args, ProjectionTrainingArguments):
        raise UsageError(f"args is a {type(args).__name__}; expected hfproj.ProjectionTrainingArguments(output_dir=…).")
    for name, cure in _REPLACED.items():
        if options.get(name) is not None:
            raise UsageError(f"ProjectionTrainer takes no {name}: {cure}.")
    if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED and args.n_gpu > 1:
        raise UsageError(
            f"{args.n_gpu} GPUs are visible to one process, which would split each batch and its negatives; start the "
            "script with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one of them."
        )


def check_model(model: Any) -> None:
    """Refuse a model without a projection head."""
    backbone = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(model, PeftModel) or not hasattr(backbone, CHILD):
        raise UsageError(
            f"The model is a {type(model).__name__} without a projection head; attach one with "
            "peft.get_peft_model(backbone, hfproj.ProjectionHeadConfig(…))."
        )


def check_train_dataset(dataset: Any, args: ProjectionTrainingArguments) -> None:
    """Refuse a data set that is smaller than a batch, and a stream that several workers would read."""
    if dataset is None:
        return
    if is_stream(dataset):
        if args.dataloader_num_workers > 1:
            raise UsageError(
                f"train_dataset is a stream, and {args.dataloader_num_workers} workers would each count its images "
                "from 0; set dataloader_num_workers to 0 or 1."
            )
        return
    joint = args.train_batch_size * args.world_size
    if len(dataset) < joint and args.dataloader_drop_last:
        raise UsageError(
            f"train_dataset has {len(dataset)} images, fewer than one batch of {joint} ({args.train_batch_size} on "
            f"each of {args.world_size} processes); lower per_device_train_batch_size."
        )


def check_eval_dataset(dataset: Any) -> None:
    """Refuse a stream: k-NN and RankMe need all rows, in the same order each time."""
    for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
        if part is not None and is_stream(part):
            raise UsageError(
                f"The eval data set is a stream ({type(part).__name__}); evaluation needs a length. Take its first "
                "items with list(itertools.islice(stream, 1000))."
            )
