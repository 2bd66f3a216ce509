"""Run in a process that never imports hfproj: does what the README of each exported folder says, and compares h."""

import json
import re
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file


def h_by_readme(job):
    """Return h by the lines of the README; `base` is made by the job's own lines where they load it from the Hub."""
    text = Path(job["folder"], "README.md").read_text(encoding="utf-8")
    code = job.get("code") or re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    code = code.replace("path/to/this/folder", job["folder"])
    if "base" in job:
        code, replaced = re.subn(r"^base = .*$", lambda match: job["base"], code, flags=re.MULTILINE)
        assert replaced == 1, code
    inputs = {n: t for n, t in load_file(job["tensors"]).items() if n != "h"}
    names = {"inputs": inputs} if "input_ids" in inputs else {"images": next(iter(inputs.values()))}
    exec(code, names)
    return names["h"]


def main(jobs_file):
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)  # PEFT only warns of missing tensors
    warnings.filterwarnings("ignore", "Unsupported layer type")  # it measures the width of a norm, for LN tuning
    answers = []
    for job in json.loads(Path(jobs_file).read_text()):
        h, expected = h_by_readme(job), load_file(job["tensors"])["h"]
        assert h.shape == expected.shape
        assert h.dtype == expected.dtype
        answers.append(((h - expected).abs().max() / expected.abs().max()).item())
    assert not any(name.split(".")[0] == "hfproj" for name in sys.modules)
    print(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1])
