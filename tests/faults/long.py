"""The long version of these tests: `python tests/faults/long.py [stage …]`, about half an hour on two cores.

Counts what was tried and what failed, and writes both to tests/records/faults.json, stage by stage. A word of its name
chooses a stage; those that are not chosen keep their counts.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import runs
import torch
from layer import LOSSES, Layer, put
from test_damage import cases, damage

import hfproj
from hfproj.files import installed_versions, write_json
from hfproj.saving.folders import checkpoint_to_resume, checkpoints
from hfproj.saving.manifest import flaw

RECORD = Path(__file__).resolve().parents[1] / "records" / "faults.json"
SHORT = {"max_steps": 4, "save_total_limit": 1}
ERRORS = ("ENOSPC", "EIO")


def equal(there, here):
    return there.keys() == here.keys() and all(torch.equal(here[n], t) for n, t in there.items())


def kills(folder, world, number, wanted, **options):
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
    for file, how in cases(folder / "whole"):
        place = folder / f"{file} {how}"
        shutil.copytree(folder / "whole", place)
        damage(place / "checkpoint-4" / file, how)
        taken = Path(checkpoint_to_resume("auto", place)).name
        right = taken == "checkpoint-2" or flaw(place / "checkpoint-4") is None
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
        number = getattr(__import__("errno"), name)
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


def main():
    runs.prepare()
    torch.set_num_threads(1)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    stages = {
        "file events": events,
        "damaged checkpoints": damages,
        "full disks": disks,
        "SIGTERM, 200 steps": lambda f: kills(f, 2, signal.SIGTERM, 1, max_steps=200, save_steps=20),
        "SIGKILL, 1 process": lambda f: kills(f, 1, signal.SIGKILL, 100, max_steps=24),
        "SIGKILL, 2 processes": lambda f: kills(f, 2, signal.SIGKILL, 60, max_steps=24),
    }
    for name, stage in stages.items():
        if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
            continue
        with tempfile.TemporaryDirectory() as folder:
            begin = time.time()
            record[name] = {**stage(Path(folder)), "seconds": round(time.time() - begin)}
        record[name] |= {"date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "versions": installed_versions()}
        print(name, json.dumps(record[name]), flush=True)
        write_json(RECORD, record)


if __name__ == "__main__":
    main()
