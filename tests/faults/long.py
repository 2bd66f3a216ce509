"""The long version of these tests, three quarters of an hour on two cores:

    python tests/faults/long.py              all stages, each in a process of its own
    python tests/faults/long.py SIG full     those whose names have one of these words; the others keep their counts
    python tests/faults/long.py table        only writes the counts into docs/faults.md

Counts what was tried and what failed in tests/records/faults.json, and in docs/faults.md.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), *(str(HERE.parent / name) for name in ("", "faults", "hub", "training"))]

import torch

from hfproj.files import installed_versions, write_json

RECORD, PAGE = HERE.parent / "records" / "faults.json", ROOT / "docs" / "faults.md"
KILL, HOSTILE = "checkpoint_faults:kills", "hostile_run:stage"
# name → what holds; the function that tries it, and its arguments
STAGES = {
    "SIGKILL, 1 process": (
        "at any moment, started again with `\"auto\"` until done: bit-equal to a run left alone",
        KILL, {"world": 1, "number": signal.SIGKILL, "wanted": 300, "max_steps": 24},
    ),
    "SIGKILL, 2 processes": (
        "the same, of one or both", KILL, {"world": 2, "number": signal.SIGKILL, "wanted": 120, "max_steps": 24},
    ),
    "SIGTERM, 2 processes": (
        "the same with 200 steps, stopped every few; each stop exits with 75",
        KILL, {"world": 2, "number": signal.SIGTERM, "wanted": 60, "max_steps": 200, "save_steps": 20},
    ),
    "file events": ("unsynced writes lost at each event of a save: bit-equal again", "checkpoint_faults:events", {}),
    "damaged checkpoints": (
        "each file missing, cut, empty, with other bits, of another step or thing: the one before is taken",
        "checkpoint_faults:damages", {},
    ),
    "full disks": ("each event of a save fails: one line, the last whole one stays", "checkpoint_faults:disks", {}),
    "images": ("broken, odd, large: one line, or finite numbers within 2 s and 200 MB", "input_faults:images", {}),
    "hostile adapters": ("one line, within the budget of `hfproj.limits`", HOSTILE, {"category": "hostile adapters"}),
    "adapters on the Hub": ("the same, pulled from a server", "hub_stages:served", {}),
    ".pth": ("for `hfproj.convert`: one line, within the budget", HOSTILE, {"category": ".pth"}),
    "history": ("`history.parquet`: one line, within the budget", HOSTILE, {"category": "history"}),
    "results": ("`results.json`: one line, within the budget", HOSTILE, {"category": "results"}),
    "command lines": ("secrets in any form are replaced, ordinary lines stay", "input_faults:command_lines", {}),
    "pushes": ("each request fails in each way: whole or unchanged at the Hub", "hub_stages:pushes", {}),
    "pulls": ("each request fails in each way: bit-equal, or one line", "hub_stages:pulls", {}),
    "numerics": ("objectives and regularizers: finite loss, finite gradient, or one line", "input_faults:numerics", {}),
    "features": ("heads, diagnostics, probes: a finite number, or one line", "input_faults:features", {}),
    "API fuzz": ("each argument of each public call, with each wrong value: one line", "input_faults:calls", {}),
}  # fmt: skip


def run_stage(name, **more):
    """Return the counts of one stage, in this process; `more` are arguments of its function."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.time()
        _, function, options = STAGES[name]
        module, _, function = function.partition(":")
        found = getattr(importlib.import_module(module), function)(Path(folder), **options, **more)
        os.chdir(ROOT)
    return {**found, "seconds": round(time.time() - begin)}


def write_table(record):
    """Put the counts into the page, between its two marks."""
    rows = ["| stage | what holds | tried | failed |", "|---|---|---|---|"]
    for name, (holds, *_) in STAGES.items():
        if name in record:
            rows.append(f"| {name} | {holds} | {record[name]['tried']:,} | {record[name]['failed']:,} |")
    before, mark, rest = PAGE.read_text(encoding="utf-8").partition("<!-- counts -->\n")
    after = rest.partition("<!-- end of counts -->")[2]
    PAGE.write_text(before + mark + "\n".join(rows) + "\n<!-- end of counts -->" + after, encoding="utf-8")


def main(words):
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    chosen = [name for name in STAGES if not words or any(word in name for word in words)]
    for name in chosen:
        done = subprocess.run([sys.executable, __file__, "--stage", name], stdout=subprocess.PIPE, text=True)
        lines = done.stdout.splitlines()
        found = (
            json.loads(lines[-1])
            if lines and not done.returncode
            else {"tried": 1, "failed": 1, "ended": done.returncode}
        )
        record[name] = {
            **found,
            "date": time.strftime("%Y-%m-%d"),
            "cpus": os.cpu_count(),
            "versions": installed_versions(),
        }
        print(name, json.dumps(found)[:2000], flush=True)
        write_json(RECORD, {known: record[known] for known in STAGES if known in record})
    write_table(record)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stage"]:
        print(json.dumps(run_stage(sys.argv[2])))
    else:
        main(sys.argv[1:])
