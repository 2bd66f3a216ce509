"""Opens every file of `hostile_files` under the budget of `hfproj.limits`, and counts what each took.

Each category runs in a process of its own, whose address space and processor time are limited (`RLIMIT_AS`,
`RLIMIT_CPU`): a file beyond them is a failure, and so is any error but `AdapterFileError`, `UsageError` or `HubError`
of one line.
"""

import csv
import json
import resource
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import forked

HERE = Path(__file__).resolve().parent
TOOK = HERE.parent / "records" / "hostile.csv"


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def _opened(call) -> str | None:
    """Return what is wrong about how a call ended."""
    import hfproj

    try:
        call()
    except (hfproj.AdapterFileError, hfproj.UsageError, hfproj.errors.HubError) as error:
        return None if "\n" not in str(error) and len(str(error)) < 20_000 else f"a long message: {str(error)[:200]}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def run_category(category: str, every: int = 1) -> None:
    """Open every so manieth file of a category, a line of JSON each."""
    import torch
    from hostile import save_adapter
    from hostile_files import cases

    from hfproj import limits

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        whole, folder = Path(place) / "whole", Path(place) / "copy"
        whole.mkdir()
        shutil.copytree(save_adapter(whole), folder)
        for number, (name, call) in enumerate(cases(category, folder, whole)):
            if number % every:
                continue
            size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
            memory, seconds = limits.MEMORY + limits.COPIES * size, limits.SECONDS + size // limits.PER_SECOND
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before, started = _status("VmRSS"), time.process_time()
            unlimited = resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + memory, unlimited))
            resource.setrlimit(resource.RLIMIT_CPU, (int(started) + 1 + seconds, unlimited))
            print(json.dumps({"begun": name}), flush=True)
            problem = _opened(call)
            resource.setrlimit(resource.RLIMIT_AS, (unlimited, unlimited))
            resource.setrlimit(resource.RLIMIT_CPU, (unlimited, unlimited))
            took = {"seconds": round(time.process_time() - started, 2), "bytes": max(_status("VmHWM") - before, 0)}
            print(json.dumps({"name": name, "size": size, **took, "problem": problem}), flush=True)


def run(categories, every: int = 1) -> dict:
    """Return what became of all files (or of every fourth): counts and the largest by category, and each failure."""
    found = {}
    for category in categories:
        with tempfile.NamedTemporaryFile("r") as output:
            (code,) = forked.wait(forked.start(run_category, category, every, log=output.name), timeout=3600)
            said = output.read()
        rows = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        opened = [row for row in rows if "name" in row]
        failed = [row for row in opened if row["problem"]]
        if code:
            last = next((row["begun"] for row in reversed(rows) if "begun" in row), "its start")
            failed.append({"name": last, "problem": f"ended with {code}: {said[-300:]}"})
        found[category] = {
            "opened": opened, "tried": len(opened) + bool(code), "failed": len(failed), "failures": failed,
            "most_bytes": sorted(opened, key=lambda row: -row["bytes"])[:5],
            "most_seconds": sorted(opened, key=lambda row: -row["seconds"])[:5],
        }  # fmt: skip
    return found


def stage(folder: Path, category: str) -> dict:
    """Return the counts of a category, as the long run keeps them; what each file took goes into hostile.csv."""
    found = run([category])[category]
    rows = [row for row in csv.reader(TOOK.read_text(encoding="utf-8").splitlines()) if row[0] != category]
    rows += [[category, row["name"], row["size"], row["seconds"], row["bytes"] >> 20] for row in found.pop("opened")]
    with TOOK.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return found
