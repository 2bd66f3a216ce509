"""A small run that can be killed: in this process, or in one or two others, which start in a moment."""

import time
from pathlib import Path

import forked
from forked import kill, wait

# 24 images in batches of 4: 6 steps an epoch. Dropout, a centre, an EMA teacher and Adam's moments: all that a
# checkpoint has to hold.
RUN = {"per_device_train_batch_size": 4, "max_steps": 8, "save_strategy": "steps", "save_steps": 2}


def make(folder, seed=0, eval_dataset=None, **options):
    """Return the trainer of the small run; another `seed` gives other first values, which a checkpoint replaces."""
    from small import Seen, head_model, images, trainer

    return trainer(
        folder,
        head_model(seed, dropout=0.2, prototypes=8),
        images(24),
        extra={"objective": {"name": "dino", "prototypes": 8}, "eval_dataset": eval_dataset},
        cls=Seen,
        **{**RUN, **options},
    )


def weights(run):
    """Return all tensors that tell one run from another."""
    from small import adapter

    tensors = {**adapter(run.model), **{f"ema.{n}": t for n, t in adapter(run.ema.module).items()}}
    return tensors | {f"objective.{n}": t.clone() for n, t in run.objective.state_dict().items()}


def train(folder, resume="auto", result=None, watched=False, **options):
    """Train in this process; write the weights into `result`, and where it is `watched` a dot for each step."""
    import torch
    from transformers import TrainerCallback

    from hfproj import distributed

    class Steps(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            if watched and distributed.rank() == 0:
                with open(f"{folder}.steps", "a") as file:
                    file.write(".")

    run = make(folder, seed=7, **options)
    run.add_callback(Steps())
    run.train(resume_from_checkpoint=resume)
    if result is not None and distributed.rank() == 0:
        torch.save(weights(run), result)
    return run


def start(folder, world=1, **options):
    """Start the run on so many processes; return them. Their output goes to `folder`.log."""
    return forked.start(_train, str(folder), options, world=world, log=f"{folder}.log")


def _train(folder, options):
    train(folder, **options)


def steps(folder):
    """Return how many steps were begun in the watched runs in `folder`."""
    file = Path(f"{folder}.steps")
    return file.stat().st_size if file.exists() else 0


def interrupted(folder, world, number, rng, *, few=5, most=1000, **options):
    """Start a run again and again with "auto", and send it a signal after some steps, until it ends by itself.

    After so many signals as are `most`, it gets no more. They come at any moment after the first step, to all processes
    or to one.

    Returns:
        The exit codes of each start.
    """
    codes = []
    while not codes or codes[-1] != [0] * world:
        before, processes = steps(folder), start(folder, world, watched=True, **options)
        wanted = before + 1 + int(rng.integers(0, few))
        while len(codes) < most and steps(folder) < wanted and all(p.is_alive() for p in processes):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        for p in processes if rng.random() < 0.5 else [processes[int(rng.integers(world))]]:
            if len(codes) < most:
                kill(p, number)
        codes.append(wait(processes))
        if len(codes) > most + 20:
            raise AssertionError(f"{folder} does not end: {codes[-5:]}")
    return codes
