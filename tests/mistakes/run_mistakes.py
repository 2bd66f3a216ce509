"""Make every mistake, in a process without the tests' type checker, and print how each ended as JSON.

PYTHONPATH=tests:tests/training python tests/mistakes/run_mistakes.py [--table]
"""

import contextlib
import io
import json
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "training", "faults")]

import torch

torch.set_num_threads(1)

from mistakes import input_mistakes, measuring_mistakes, model_mistakes, sharing_mistakes, training_mistakes

import hfproj

PARTS = (input_mistakes, measuring_mistakes, model_mistakes, sharing_mistakes, training_mistakes)
MISTAKES = {name: mistake for part in PARTS for name, mistake in part.MISTAKES.items()}
LONGEST = 700  # characters of one line that somebody reads


def make(call):
    """Return how a call ends: (kind, type, message); kind is "ours", "theirs", "warning" or "nothing"."""
    quiet = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(quiet):
        warnings.simplefilter("always")
        with contextlib.redirect_stderr(quiet):
            try:
                call()
            except hfproj.HfprojError as error:
                return "ours", type(error).__name__, str(error)
            except BaseException as error:
                return "theirs", type(error).__name__, str(error)
    said = [w for w in caught if issubclass(w.category, UserWarning)]
    return ("warning", said[-1].category.__name__, str(said[-1].message)) if said else ("nothing", "", "")


def wrong(words, kind, message):
    """Return what is wrong with an end, or None: one line of ours that says what it has to."""
    if kind not in ("ours", "warning"):
        return {"theirs": "another library's words", "nothing": "nothing was said"}[kind]
    if "\n" in message or len(message) > LONGEST:
        return "more than one line"
    missing = [word for word in words if word not in message]
    return f"does not say {missing[0]!r}" if missing else None


def main():
    found = {}
    for name, (call, *words) in MISTAKES.items():
        kind, error, message = make(call)
        found[name] = {"kind": kind, "type": error, "message": message, "wrong": wrong(words, kind, message)}
    if "--table" in sys.argv:
        for name, end in found.items():
            print(f"{'ok ' if end['wrong'] is None else 'BAD'} {name}: {end['wrong'] or ''}")
            print(f"      {end['type']}: {end['message'][:400]}")
        ours = [e for e in found.values() if e["kind"] in ("ours", "warning") and e["wrong"] != "more than one line"]
        good = [e for e in found.values() if e["wrong"] is None]
        print(f"{len(found)} mistakes, {len(ours)} end in one line of ours, {len(good)} of them with the cure")
    else:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
