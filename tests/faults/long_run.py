"""Try categories of faults and count: tried and failed, as JSON.

    PYTHONPATH=tests:tests/training:. python -W ignore tests/faults/long_run.py --write tests/records/edges.json

It takes about ten minutes on one core. Failures are listed on standard error.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MPLBACKEND", "agg")

import torch
from faults import api_fuzz, feature_inputs, image_inputs, numeric_inputs


def categories(count, seed):
    yield "images", lambda: image_inputs.all_tries(damages=6, seed=seed)
    yield "numerics", numeric_inputs.all_tries
    yield "features", feature_inputs.all_tries
    yield "api_fuzz", lambda: api_fuzz.all_tries(seed, count)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("category", nargs="*", default=[])
    parser.add_argument("--count", type=int, help="of the API fuzz, drawn by the seed; all without")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    write = options.write and options.write.resolve()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    found = {}
    os.chdir(tempfile.mkdtemp(prefix="hfproj-fuzz-"))  # a path of the pool may be written to
    for name, tries in categories(options.count, options.seed):
        if options.category and name not in options.category:
            continue
        counts = found[name] = {"tried": 0, "failed": 0}
        for what, function, arguments in tries():
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    wrong = function(*arguments)
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            counts["tried"] += 1
            if wrong:
                counts["failed"] += 1
                print(f"{what[:120]} → {wrong[:160]}", file=sys.stderr)
    print(json.dumps(found))
    if write:
        write.write_text(json.dumps({"seed": options.seed, **found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
