"""What `test_processes` runs: as a script under ``accelerate launch`` on two processes, and as a function on one."""

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from small import Seen, adapter, head_model, images, plain, trainer, views

import hfproj
from hfproj import distributed
from hfproj.data import StreamDataset


class Double:
    """A collator whose images are in float64."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, items):
        batch = self.collator(items)
        if "views" in batch:
            batch["views"] = [view.double() for view in batch["views"]]
        else:
            batch["pixel_values"] = batch["pixel_values"].double()
        return batch


def train(folder, *, dataset=None, resume=None, objective=None, config=None, collator=None, extra=None, **options):
    """Train in float64 on global batches of 8, two of them a step, 2 steps an epoch; return all that can differ."""
    world = distributed.world_size()
    run = trainer(
        folder,
        head_model(**(config or {})).double(),
        dataset if dataset is not None else images(35),
        Double(collator or views()),
        extra={
            # Its buffers in float64 too: the rounding of a centre may differ between numbers of processes.
            "objective": objective and hfproj.create_objective(**objective).double(),
            "eval_dataset": images(11, seed=1),
            "bank_dataset": images(9, seed=2),
            "eval_collator": Double(plain()),
            **(extra or {}),
        },
        cls=Seen,
        **{
            "per_device_train_batch_size": 8 // world,
            "per_device_eval_batch_size": 8 // world,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 2,
            "optim": "sgd",
            "learning_rate": 0.1,
            "patch_dropout": 0.5,
            "log_representation": True,
            "eval_strategy": "steps",
            "eval_steps": 2,
            **options,
        },
    )
    start = adapter(run.model)
    run.train(resume_from_checkpoint=resume)
    times = ("runtime", "second")
    log = [{n: v for n, v in e.items() if not any(t in n for t in times)} for e in run.state.log_history]
    weights = adapter(run.model)
    if run.ema is not None:
        weights |= {f"ema.{n}": t for n, t in adapter(run.ema.module).items()}
        weights |= {f"objective.{n}": t for n, t in run.objective.state_dict().items()}
    results = hfproj.Results()
    run.note_skipped(results)
    return {
        "weights": weights, "seen": run.seen, "log": log, "start": start, "history": run.history,
        "skipped": results.config.get("skipped_images"),
    }  # fmt: skip


def broken(count):
    """Images of which four can't be read, each in its own way."""
    items = images(count)
    items[3]["image"] = items[8]["image"] = {"bytes": b"no image", "path": None}
    items[17]["image"] = np.full((16, 16, 3), np.nan)
    items[29]["image"] = {"bytes": None, "path": "/nowhere/29.png"}
    return hfproj.IndexedDataset(items, on_bad_image="skip")


def cases(folder):
    """Return name → result of every run."""
    results = {"global batch": train(folder / "whole", save_strategy="steps", save_steps=3)}
    distributed.barrier()
    # Step 3 of 4 is the first of epoch 2.
    results["resumed"] = train(folder / "resumed", resume=folder / "whole/checkpoint-3")
    results["workers"] = train(folder / "workers", dataloader_num_workers=2, eval_strategy="no")
    results["skipped"] = train(
        folder / "skipped", dataset=broken(35), save_strategy="steps", save_steps=3, dataloader_num_workers=1
    )
    distributed.barrier()
    results["skipped resumed"] = train(
        folder / "skipped again", dataset=broken(35), resume=folder / "skipped/checkpoint-3"
    )
    targets = {"sparse_head": {"sparsity": 0.5}, "bottleneck": {"at_most": 0.5}, "wasserstein": {"keep_at": 0.3}}
    targets = {"extra": {"regularizers": targets}, "eval_strategy": "no"}
    results["targets"] = train(folder / "targets", save_strategy="steps", save_steps=3, **targets)
    distributed.barrier()
    results["targets resumed"] = train(folder / "targets again", resume=folder / "targets/checkpoint-3", **targets)
    stream = StreamDataset(images(35))
    watches = [
        hfproj.SpectrumCallback(every=2, images=7, metrics=("rankme", "std", "positive_cosine", "whiteness")),
        hfproj.CurvatureCallback(every=2, images=7),
        hfproj.UpdateRatioCallback(every=2),
        hfproj.CollapseCallback(limits={"std_z": 10.0}, patience=2, warmup=0),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hfproj.CollapseWarning)
        results["watched"] = train(folder / "watched", extra={"callbacks": watches}, eval_strategy="no")
    results["watched"]["alarm"] = watches[-1].alarm.to_dict()
    h_watch = hfproj.CurvatureCallback(of="h", every=4, images=7)
    results["watched h"] = train(folder / "watched h", extra={"callbacks": [h_watch]}, eval_strategy="no")
    results["stream"] = train(folder / "stream", dataset=stream, max_steps=3, eval_strategy="no")
    # A teacher, prototypes that are frozen at first, a centre, and views of two sizes: two forward passes a step.
    crops = {"objective": {"name": "dino", "prototypes": 8}, "config": {"prototypes": 8}}
    crops["collator"] = views(local_views=2, local_size=8)
    crops |= {"patch_dropout": 0.0, "eval_strategy": "no"}
    results["multi-crop"] = train(folder / "crops", save_strategy="steps", save_steps=3, **crops)
    distributed.barrier()
    results["multi-crop resumed"] = train(folder / "crops again", resume=folder / "crops/checkpoint-3", **crops)
    crops |= {"extra": {"continue_from": folder / "crops/checkpoint-3"}, "max_steps": 2}
    results["multi-crop continued"] = train(folder / "crops on", **crops)
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    PartialState(cpu=True)  # joins the processes, so that the batch size can be divided by their number
    out = Path(sys.argv[1])
    found = cases(out)
    torch.save(found, out / f"{distributed.rank()}.pt")
