"""No CUDA call without a guard: the library is used on CPUs and on Apple's MPS, too."""

import re
from pathlib import Path

import pytest
import torch

from hfproj.functional.feature_rows import double

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted({*ROOT.glob("hfproj/**/*.py"), *ROOT.glob("recipes/*.py")})  # recipes/benchmarks/gpu.py is about one
CALLS = re.compile(r"\.cuda\(|torch\.cuda\.|[\"']cuda(:\d+)?[\"']|\.is_cuda\b")
GUARDED = [  # files and what stands in the line, which is asked or is a name
    ("hfproj/backbones/dry_run.py", 'if device.type == "cuda"'),
    ("hfproj/backbones/sketches.py", 'not in ("cpu", "cuda")'),
    ("hfproj/training/checks.py", 'if device.type == "cuda"'),
    ("hfproj/probes/finetune.py", 'if device.type == "cuda"'),
    ("hfproj/checking.py", "a device such as"),
    ("hfproj/reproduction/running.py", "if torch.cuda.is_available()"),
    ("recipes/probe.py", "if torch.cuda.is_available()"),
]


def found():
    for file in FILES:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if CALLS.search(line):
                yield str(file.relative_to(ROOT)), number, line.strip()


def test_cuda_is_asked_for_first():
    unguarded = [
        f"{name}:{number}: {line}"
        for name, number, line in found()
        if not any(name == file and guard in line for file, guard in GUARDED)
    ]
    assert unguarded == []


@pytest.mark.parametrize(("file", "guard"), GUARDED)
def test_each_exception_is_needed(file, guard):
    assert any(name == file and guard in line for name, _, line in found())


@pytest.mark.parametrize("call", ["x.cuda()", 'x.to("cuda")', "torch.cuda.synchronize()", 'torch.device("cuda:1")'])
def test_what_it_looks_for(call):
    assert CALLS.search(call)


class OfApple(torch.Tensor):
    """As much of a tensor on MPS as is asked for: float64 is refused there."""

    device = torch.device("mps")

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self):
        return torch.ones(2)


def test_float64_is_the_processor_s_where_the_device_has_none():
    assert double(torch.ones(2).as_subclass(OfApple)).dtype == torch.float64
    assert double(torch.ones(2)).device.type == "cpu"
