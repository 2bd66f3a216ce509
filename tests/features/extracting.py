"""A small model and its cached extraction, and what `test_feature_store` runs of them in processes of their own."""

import hashlib
import json
import os
import resource
import signal
import time
import traceback
import warnings
from pathlib import Path

import torch
from torch import nn

import hfproj

ROWS, BATCH = 1100, 64  # shards of 256 rows, the last of 76


class Net(nn.Module):
    """A backbone of two layers; it counts the rows it has seen."""

    def __init__(self, dim=24):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, dim)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        return self.second(torch.tanh(self.first(x)))


class Rows:
    """Items made when they are read: row i is a function of i."""

    cache_key = "rows"

    def __init__(self, rows=ROWS):
        self.rows = rows

    def __len__(self):
        return self.rows

    def __getitem__(self, i):
        return {"x": torch.sin(torch.arange(1.0, 7) * (i + 1)), "label": i % 5}


class Collator:
    """Stacks items; on request it is slow, fails at some batch, or kills its process there."""

    cache_key = "stacked"

    def __init__(self, kill_at=None, stop_at=None, sleep=0.0):
        self.kill_at, self.stop_at, self.sleep, self.batches = kill_at, stop_at, sleep, 0

    def __call__(self, items):
        self.batches += 1
        if self.batches == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.batches == self.stop_at:
            raise OSError(f"batch {self.batches}")
        time.sleep(self.sleep)
        labels = torch.tensor([item["label"] for item in items])
        return {"pixel_values": torch.stack([item["x"] for item in items]), "labels": labels}


def extract(folder, model=None, data=None, collator=None, **options):
    """Return the features of the model, cached below a folder."""
    options = {"batch_size": BATCH, "layers": ["first"], **options}
    model, data = model if model is not None else Net(), data if data is not None else Rows()
    return hfproj.extract_features(model, data, collator=collator or Collator(), cache_dir=folder, **options)


def files(folder):
    """Return name → bytes of what lies in the caches below a folder, but for locks."""
    found = (path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def killed(folder):
    extract(folder, collator=Collator(kill_at=11))


def together(folder, name):
    """Extract when the other one is ready too; return the rows that the model saw, a digest of h, and the warnings."""
    model = Net()
    folder.mkdir(exist_ok=True)
    (folder / f"ready-{name}").touch()
    while len(list(folder.glob("ready-*"))) < 2:
        time.sleep(0.01)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        features = extract(folder / "cache", model, collator=Collator(sleep=0.03))
    h = hashlib.sha256(features.h.numpy().tobytes()).hexdigest()
    return {"rows": sum(model.seen), "h": h, "told": [str(w.message) for w in told]}


def memory(folder):
    """Return the peak memory, in MiB, after caches of 16 and of 128 MiB, and after reading rows of the larger one."""
    peaks = []
    for rows in (1024, 8192):
        features = extract(folder, Net(dim=4096), Rows(rows), batch_size=256)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
    assert features.h.shape == (8192, 4096)
    features.h[4000:4100].sum()
    return [*peaks, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10]


def forked(function, *arguments):
    """Start a function in a process of its own, and return a function that waits for (exit status, what it returned).

    This process has one thread, so that it may be forked: starting Python anew takes seconds each time.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(send, json.dumps(function(*arguments)).encode())
            code = 0
        except BaseException:
            os.write(send, json.dumps(traceback.format_exc()).encode())
        finally:
            os._exit(code)
    os.close(send)

    def wait():
        with os.fdopen(receive, "rb") as pipe:
            said = pipe.read()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), json.loads(said) if said else None

    return wait


def main(folder):
    """Run everything below a folder, and return what came of it."""
    results = {"killed": forked(killed, folder / "killed")()}
    both = [forked(together, folder / "together", name) for name in "ab"]
    results["together"] = [wait() for wait in both]
    results["memory"] = forked(memory, folder / "memory")()
    return results
