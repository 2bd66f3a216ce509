"""What the long run does to checkpoints: kills, lost writes, damage, full disks; each counts what it tried."""

import errno
import hashlib
import shutil
import signal
from pathlib import Path

import numpy as np
import runs
import torch
from layer import LOSSES, Layer, put
from test_damage import NOISE, cases, damage, foreign_cases

import hfproj
from hfproj.saving.folders import checkpoint_to_resume, checkpoints
from hfproj.saving.manifest import flaw

SHORT = {"max_steps": 4, "save_total_limit": 1}
ERRORS = ("ENOSPC", "EIO")


def equal(there, here):
    return there.keys() == here.keys() and all(torch.equal(here[n], t) for n, t in there.items())


def kills(folder, *, world, number, wanted, **options):
    """Count kills until there were `wanted`; a run whose weights then differ fails with all of its own."""
    expected = folder / "expected"
    runs.wait(runs.start(expected, world, resume=None, result=f"{expected}.pt", **options))
    rng, tried, failed, ended = np.random.default_rng([world, number]), 0, 0, 0
    while tried < wanted:
        run = folder / str(tried)
        codes = runs.interrupted(run, world, number, rng, result=f"{run}.pt", **options)
        here = torch.load(f"{run}.pt")
        failed += 0 if equal(torch.load(f"{expected}.pt"), here) else len(codes) - 1
        failed += sum(set(row) != {75} for row in codes[:-2]) if number == signal.SIGTERM else 0
        tried, ended = tried + len(codes) - 1, ended + 1
        shutil.rmtree(run)
    return {"tried": tried, "failed": failed, "runs": ended, "processes": world, **options}


def events(folder):
    """Resume from the state of the disk at every event of two saves, for each kind of loss; from equal states once."""
    (folder / "whole").mkdir()
    with Layer(folder / "whole") as layer:
        expected = runs.weights(runs.train(folder / "whole", resume=None, **SHORT))
    found = {}
    states = [states[loss] for states in layer.states for loss in LOSSES]
    keys = [hashlib.sha256(repr(sorted(state.items())).encode()).digest() for state in states]
    for key, state in zip(keys, states):
        if key not in found:
            put(state, folder / "state")
            found[key] = equal(expected, runs.weights(runs.train(folder / "state", **SHORT)))
            shutil.rmtree(folder / "state")
    failed = sum(not found[key] for key in keys)
    return {"tried": len(states), "failed": failed, "events": len(layer.states), "different states": len(found)}


def damages(folder):
    """Resume with each file of a checkpoint damaged: the one before has to be taken, and the weights be the same."""
    expected = runs.weights(runs.train(folder / "whole", resume=None, max_steps=4))
    tried = failed = 0
    for file, how in [*cases(folder / "whole"), *foreign_cases(), *cases(folder / "whole", NOISE)]:
        place = folder / "damaged"
        shutil.copytree(folder / "whole", place)
        damage(place / "checkpoint-4" / file, how)
        taken = Path(checkpoint_to_resume("auto", place)).name
        right = taken == "checkpoint-2" or flaw(place / "checkpoint-4") is None
        if how not in NOISE[1:]:  # one of them a file; resuming takes most of the time
            right &= equal(expected, runs.weights(runs.train(place, max_steps=4)))
        tried, failed = tried + 1, failed + (not right)
        shutil.rmtree(place)
    return {"tried": tried, "failed": failed}


def disks(folder):
    """Let every event from one on fail, for each event and kind of error."""
    with Layer(folder / "whole", keep=False) as layer:
        runs.train(folder / "whole", resume=None, **SHORT)
    tried = failed = 0
    for name in ERRORS:
        number = getattr(errno, name)
        for k in range(len(layer.events)):
            place = folder / f"{name} {k}"
            place.mkdir()
            said = None
            with Layer(place, fail_at=k, error=number, keep=False):
                try:
                    runs.train(place, resume=None, **SHORT)
                except hfproj.SaveError as error:
                    said = str(error)
                except Exception as error:  # any other one is a failure of the test, whatever it is
                    said = f"\n{error}"
            left = [flaw(path) for path in checkpoints(place).values()]
            good = "\n" not in (said or "") and not any(left)
            good &= said is not None or max(checkpoints(place), default=0) == 4  # what fails after it was only clearing
            tried, failed = tried + 1, failed + (not good)
            shutil.rmtree(place)
    return {"tried": tried, "failed": failed}
