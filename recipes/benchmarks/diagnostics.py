"""What RankMe of a feature queue costs, and how exact it is, against the singular values of the whole matrix.

    python recipes/benchmarks/diagnostics.py

25,600 float32 rows (RankMe's number) of 384, 768 and 2048 dimensions, one thread. Features are `flat` (Gaussian),
`decaying` (singular values i^(−1)) or `collapsed` (ten directions, the rest 1e-6 of them). Each way runs in turn, two
rounds; the smallest wall and CPU time count. Memory is what a process of its own needs beyond the features. Errors are
those of RankMe against singular values in float64. Writes recipes/benchmarks/results/diagnostics.json and .md; about
ten minutes of one core.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import math
import multiprocessing
import re
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hfproj.diagnostics import SpectrumState, rankme
from hfproj.files import installed_versions, write_atomic, write_json

OUT = Path(__file__).resolve().parent / "results" / "diagnostics"
ROWS, DIMS, ROUNDS, BLOCK = 25_600, (384, 768, 2048), 2, 512
KINDS = ("flat", "decaying", "collapsed")
EPS = 1e-7


def features(kind: str, dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(ROWS, dim, generator=generator)
    if kind == "flat":
        return f
    ranks = torch.arange(1, dim + 1.0)
    scales = ranks**-1 if kind == "decaying" else torch.where(ranks <= 10, 1.0, 1e-6)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    return f * scales @ rotation


def whole(f: Tensor, dtype: torch.dtype) -> float:
    """RankMe by its definition, from the singular values of the whole matrix."""
    sigma = torch.linalg.svdvals(f.to(dtype)).double()
    return math.exp(torch.special.entr(sigma / sigma.sum() + EPS).sum().item())


def stream(f: Tensor) -> SpectrumState:
    state = SpectrumState()
    for rows in f.split(BLOCK):
        state.update(rows)
    state.mean()  # the last rows are taken in
    return state


def streamed(f: Tensor) -> float:
    return stream(f).rankme()


WAYS: dict[str, Callable[[Tensor], float]] = {
    "svdvals, float32": lambda f: whole(f, torch.float32),
    "svdvals, float64": lambda f: whole(f, torch.float64),
    "rankme": rankme,
    "SpectrumState": streamed,
}


def timed(function: Callable[[], object]) -> tuple[object, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    value = function()
    return value, time.perf_counter() - wall, time.process_time() - cpu


def memory(way: str, dim: int) -> float:
    """Return the MB that one way needs beyond the features, in this process, which must be new."""
    torch.set_num_threads(1)
    f = features("flat", dim)
    WAYS[way](f[: 2 * dim])  # libraries load what they need
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, _ = (read(status.read_text(), name) for name in ("VmRSS", "VmHWM"))
    WAYS[way](f)
    return (read(status.read_text(), "VmHWM") - before) / 1024


def read(status: str, name: str) -> float:
    return float(re.search(rf"{name}:\s+(\d+) kB", status)[1])


def add(row: dict, value: object, wall: float, cpu: float) -> None:
    row["value"] = value
    row["wall"].append(wall)
    row["cpu"].append(cpu)


def measure(kind: str, dim: int) -> list[dict]:
    f = features(kind, dim)
    rows = {way: {"features": kind, "dim": dim, "way": way, "wall": [], "cpu": []} for way in [*WAYS, "read-out"]}
    for _ in range(ROUNDS):
        for way, function in WAYS.items():
            if way == "SpectrumState":
                state, wall, cpu = timed(lambda: stream(f))
                value, more_wall, more_cpu = timed(state.rankme)
                add(rows["read-out"], value, more_wall, more_cpu)
                add(rows[way], value, wall + more_wall, cpu + more_cpu)
            else:
                add(rows[way], *timed(lambda function=function: function(f)))
    exact = rows["svdvals, float64"]["value"]
    for row in rows.values():
        row["error"] = abs(row["value"] / exact - 1)
    return list(rows.values())


def markdown(rows: list[dict]) -> list[str]:
    lines = ["# RankMe of a feature queue", "", "Written by `recipes/benchmarks/diagnostics.py`.", ""]
    lines += [
        f"{ROWS:,} float32 rows, one thread, smallest of {ROUNDS} interleaved rounds. Ratios: CPU time of singular "
        "values",
        f"of the whole matrix over that of the row. `SpectrumState` takes in blocks of {BLOCK} rows and is read out "
        "once;",
        "`read-out` is the reading alone. MB: beyond the features.",
        "",
        "| features | dim | way | wall s | CPU s | against float32 | against float64 | RankMe | relative error | MB |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        peers = [
            next(min(r["cpu"]) for r in rows if r["way"] == way and all(r[k] == row[k] for k in ("features", "dim")))
            for way in ("svdvals, float32", "svdvals, float64")
        ]
        cpu = min(row["cpu"])
        needed = f"{row['memory_mb']:.0f}" if "memory_mb" in row else ""
        lines.append(
            f"| {row['features']} | {row['dim']} | {row['way']} | {min(row['wall']):.3f} | {cpu:.3f} "
            f"| {peers[0] / cpu:.2f} | {peers[1] / cpu:.2f} | {row['value']:.3f} | {row['error']:.1e} | {needed} |"
        )
    return lines


def main() -> None:
    ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    rows = []
    context = multiprocessing.get_context("spawn")
    for dim in DIMS:
        needed = {}
        for way in WAYS:
            with context.Pool(1) as pool:
                needed[way] = pool.apply(memory, (way, dim))
        for kind in KINDS:
            found = measure(kind, dim)
            for row in found:
                if row["way"] in needed and kind == "flat":
                    row["memory_mb"] = needed[row["way"]]
            rows += found
            print(*markdown(found)[-len(found) :], sep="\n", flush=True)
    content = {"rows": rows, "count": ROWS, "rounds": ROUNDS, "block": BLOCK, "eps": EPS}
    content["versions"] = installed_versions()
    write_json(OUT.with_suffix(".json"), content)
    write_atomic(OUT.with_suffix(".md"), ("\n".join(markdown(rows)) + "\n").encode())


if __name__ == "__main__":
    main()
