"""The lowest versions that pyproject.toml declares are those of `.ci/lowest`; our own is the same everywhere."""

import re
from pathlib import Path

import hfproj

ROOT = Path(__file__).resolve().parents[1]


def release(version):
    """Return a version's numbers without zeros at the end: 1.11 and 1.11.0 are the same."""
    return tuple(int(part) for part in re.sub(r"(\.0)+$", "", version).split("."))


def test_the_lowest_versions_are_those_declared():
    declared = re.findall(r'"([\w-]+)>=([\d.]+),<', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    tools = {
        "ruff",
        "mypy",
        "basedpyright",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "sphinx",
        "myst-nb",
        "sphinx-copybutton",
    }  # not needed to run or test it
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / ".ci" / "lowest.txt").read_text(), re.MULTILINE))
    assert pinned.pop("torchvision") == "0.24.0"  # timm's, the one that was released with that torch
    assert {n: release(v) for n, v in pinned.items()} == {n: release(v) for n, v in declared if n not in tools}


def test_our_own_version_is_one():
    [declared] = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    [cited] = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert hfproj.__version__ == declared == cited
