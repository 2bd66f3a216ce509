"""What watching costs: the time of a measurement of each callback against that of the steps between two of them.

    python recipes/benchmarks/watching.py    # vit_nano with LoRA on handwritten digits, two minutes on 2 CPU cores

Each callback has its defaults; a step is NT-Xent on two views of a batch. The shares of regularizers in the gradient
are of four terms (on z, on h, on weights of head and LoRA), at a log every 50 steps. Times are CPU seconds of this
process, the smallest of `ROUNDS` measurements and the median of the steps. Writes
recipes/benchmarks/results/watching.json and .md.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import statistics
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, set_seed

import hfproj
from hfproj.files import installed_versions, write_atomic, write_json

OUT = Path(__file__).resolve().parent / "results" / "watching"
STEPS, BATCHES, ROUNDS = 8, (64, 256), 3
LOGGED = 50
TERMS = {"wasserstein": 0.1, "koleo": {"weight": 0.1, "on": "h"}, "orthogonality": 1e-3, "werank": 1e-3}


class Stopwatch(TrainerCallback):
    """Takes the CPU time of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        """Start."""
        self.start = time.process_time()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        """Stop."""
        self.seconds.append(time.process_time() - self.start)


def measure(batch: int) -> list[dict]:
    set_seed(0)
    head = {"head": "mlp", "head_options": {"hidden_dim": 512}, "out_dim": 128}
    config = hfproj.ProjectionHeadConfig(**head, backbone_adapter=LoraConfig(r=8))
    model = get_peft_model(hfproj.load_backbone("vit_nano"), config)
    watches = [hfproj.SpectrumCallback(), hfproj.CurvatureCallback()]
    clock, ratios = Stopwatch(), hfproj.UpdateRatioCallback()
    trainer = hfproj.ProjectionTrainer(
        model,
        hfproj.ProjectionTrainingArguments(
            output_dir="runs/watching",
            max_steps=STEPS,
            per_device_train_batch_size=batch,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=hfproj.load_image_dataset("digits", split="train"),
        eval_dataset=hfproj.load_image_dataset("digits", split="test"),
        data_collator=hfproj.ImageViews.for_model(model, flip_probability=0.0),
        callbacks=[clock],
    )
    trainer.train()
    step = statistics.median(clock.seconds[1:])  # the first also makes buffers
    rows = []
    for watch in watches:
        watch.bind(trainer)
        watch.measure()  # makes the probe batch, once in a training
        seconds = []
        for _ in range(ROUNDS):
            start = time.process_time()
            watch.measure()
            seconds.append(time.process_time() - start)
        rows.append(row(type(watch).__name__, batch, min(seconds), watch.steps_between, step))
    ratios.bind(trainer)
    ratios.every = 1  # each step, to be measured
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        ratios.on_pre_optimizer_step(trainer.args, trainer.state, None, optimizer=trainer.optimizer)
        ratios.on_step_end(trainer.args, trainer.state, None, optimizer=trainer.optimizer)
        seconds.append(time.process_time() - start)
    rows.append(row("UpdateRatioCallback", batch, min(seconds), hfproj.UpdateRatioCallback().steps_between, step))
    return rows


def shares(batch: int) -> dict:
    """Return what the shares of `TERMS` cost: the times of their calls in steps that are all logged."""
    set_seed(0)
    config = hfproj.ProjectionHeadConfig(
        head="mlp", head_options={"hidden_dim": 512}, out_dim=128, backbone_adapter=LoraConfig(r=8)
    )
    model = get_peft_model(hfproj.load_backbone("vit_nano"), config)
    clock = Stopwatch()
    trainer = hfproj.ProjectionTrainer(
        model,
        hfproj.ProjectionTrainingArguments(
            output_dir="runs/watching", max_steps=STEPS, per_device_train_batch_size=batch, save_strategy="no",
            report_to="none", disable_tqdm=True, logging_steps=1, log_representation=False,
        ),
        regularizers=TERMS,
        train_dataset=hfproj.load_image_dataset("digits", split="train"),
        data_collator=hfproj.ImageViews.for_model(model, flip_probability=0.0),
        callbacks=[clock],
    )  # fmt: skip
    spent = []

    def timed(call):
        def run(*args):
            start = time.process_time()
            call(*args)
            spent.append(time.process_time() - start)

        return run

    trainer.shares.take, trainer.shares.finish = timed(trainer.shares.take), timed(trainer.shares.finish)
    trainer.train()
    each = [take + finish for take, finish in zip(spent[::2], spent[1::2])]
    step = statistics.median(clock.seconds[1:]) - statistics.median(each)
    return row("shares of four regularizers", batch, statistics.median(each), LOGGED, step)


def row(name: str, batch: int, seconds: float, every: int, step: float) -> dict:
    return {
        "callback": name,
        "batch": batch,
        "measurement_s": seconds,
        "step_s": step,
        "every": every,
        "share": seconds / (every * step),
    }


def main() -> None:
    ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args()
    rows = [found for batch in BATCHES for found in [*measure(batch), shares(batch)]]
    content = {"settings": {"steps": STEPS, "rounds": ROUNDS}, "versions": installed_versions(), "rows": rows}
    lines = ["# What watching costs", "", "Written by `recipes/benchmarks/watching.py`; CPU seconds, defaults.", ""]
    lines += ["| callback | batch | a measurement | a step | every so many steps | fraction of the training |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for r in rows:
        times = f"{r['measurement_s']:.3f} | {r['step_s']:.2f}"
        lines.append(f"| {r['callback']} | {r['batch']} | {times} | {r['every']} | {r['share']:.2%} |")
    write_json(OUT.with_suffix(".json"), content)
    write_atomic(OUT.with_suffix(".md"), ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
