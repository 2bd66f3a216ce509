"""Wrong arguments, and the words that must name them; run in a process of its own, without the tests' type checker."""

import functools
import json
import logging
import math
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), *(str(TESTS / name) for name in ("faults", "training"))]

from small import trainer

import hfproj

ARGUMENTS = {
    "save_total_limit": "x", "learning_rate": "1e-3", "warmup_steps": math.nan, "seed": 2**32, "max_steps": None,
    "per_device_train_batch_size": 0, "gradient_accumulation_steps": -1, "weight_decay": math.nan, "fp16": "no",
    "adam_beta1": 1.0, "num_train_epochs": math.inf, "lr_scheduler_kwargs": 3, "accelerator_config": True,
    "dataloader_num_workers": 1.5, "metric_for_best_model": 3, "report_to": ("a", "b"), "optim": 3, "debug": 3,
}  # fmt: skip
CHECKPOINTS = [6, 1.5, math.nan, b"x", [1], {}, 0, 0.0, (), torch.zeros(2), np.zeros((0, 3)), ""]


def tries(folder):
    """Yield (call, words of its error)."""
    model, make = hfproj.load_backbone("vit_nano"), hfproj.ProjectionTrainingArguments
    for name, wrong in ARGUMENTS.items():
        yield functools.partial(make, **{"output_dir": folder, "use_cpu": True, name: wrong}), [f"Expected {name} "]
    yield (
        functools.partial(make, output_dir=folder, eval_strategy="never"),
        ["Expected eval_strategy to be one of", "never"],
    )
    run = trainer(folder, max_steps=1)
    for wrong in CHECKPOINTS:
        yield functools.partial(run.train, resume_from_checkpoint=wrong), ["Expected resume_from_checkpoint"]
    yield lambda: trainer(folder, lr_scheduler_kwargs={"no": 1}).train(), ["transformers refuses", "'no'"]
    yield lambda: trainer(folder, report_to="nowhere"), ["Expected report_to to be one of", "nowhere"]
    yield lambda: trainer("", max_steps=1), ["Expected output_dir"]
    for collator in (hfproj.EvalImages, hfproj.ImageViews):
        for wrong in ("x", None, [], 1.5, math.nan, (1, 2), torch.zeros(2)):
            words = [f"Expected size of {collator.__name__} to be a whole number"]
            yield functools.partial(collator.for_model, model, size=wrong), words
    yield lambda: hfproj.ImageViews.for_model(model, blur_probability="x"), ["blur_probability", "'auto' or None"]
    yield lambda: hfproj.TextViews.for_model(3), ["Expected model of tokenizer_of"]


def main():
    """Print what was tried, and what else came of it."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    tried, failures = 0, []
    with tempfile.TemporaryDirectory() as folder:
        for call, words in tries(folder):
            tried += 1
            try:
                found = f"returned {call()}"
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            if not found.startswith("UsageError") or "\n" in found or not all(word in found for word in words):
                failures.append(f"{words}: {found}")
        if any(Path(folder).glob("checkpoint-*")):
            failures.append("trained")
    print(json.dumps({"tried": tried, "failures": failures}))


if __name__ == "__main__":
    main()
