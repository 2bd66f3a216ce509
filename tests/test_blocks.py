"""Every Python block of README and docs runs alone, as it stands, in an empty folder.

Those of docs/command.md and docs/tutorial.md follow each other: tests/commands/test_pages_that_follow.py.
"""

import contextlib
import io
import re
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser

import hfproj
from hfproj.heads import HEADS
from hfproj.objectives import OBJECTIVES
from hfproj.probes import PROBES
from hfproj.regularizers import REGULARIZERS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted({*ROOT.glob("docs/*.md")} - {ROOT / "docs" / f"{name}.md" for name in ("command", "tutorial")}),
]
PAGES += [*ROOT.glob("hfproj/assets/*/*.md")]
NEEDS = re.compile(r"# needs (the Hub|a download|a GPU)\n")  # the first line of a block that can't run here
STEPS, IMAGES = 2, 96


def blocks(language):
    """Return (page, line, code) of each block of a language."""
    found = []
    for page in PAGES:
        document = Sybil([CodeBlockParser(language=language, evaluator=lambda example: None)]).parse(page)
        found += [(page, example.line, str(example.parsed)) for example in document.examples()]
    return found


PYTHON = blocks("python")
RUN = [pytest.param(code, id=f"{page.name}:{line}") for page, line, code in PYTHON if not NEEDS.match(code)]


class Short(hfproj.ProjectionTrainingArguments):
    """Few steps of small batches: how long a block trains is not what is tested."""

    def __init__(self, *args, num_train_epochs=1.0, max_steps=STEPS, per_device_train_batch_size=16, **options):
        batch = min(per_device_train_batch_size, 16)
        super().__init__(*args, max_steps=min(max_steps, STEPS), per_device_train_batch_size=batch, **options)


def few(*args, **options):
    return hfproj.data.load_image_dataset(*args, **{"limit": IMAGES, **options})


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(hfproj, "ProjectionTrainingArguments", Short)
    monkeypatch.setattr(hfproj, "load_image_dataset", few)
    for registry in (HEADS, OBJECTIVES, REGULARIZERS, PROBES):  # what a block registers is gone after it
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


@pytest.mark.parametrize("code", RUN)
@pytest.mark.filterwarnings("default")
def test_it_runs(code, tmp_path, monkeypatch, short):
    if "onnx" in code:
        pytest.importorskip("onnxruntime", reason="hfproj[export] is not installed")
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "block", "exec"), {"__name__": "__main__"})


def test_a_block_that_cannot_run_here_has_a_sibling_that_does():
    for page, line, code in PYTHON:
        if NEEDS.match(code):
            assert any(other == page and not NEEDS.match(text) for other, _, text in PYTHON), f"{page.name}:{line}"


def test_there_are_blocks():
    assert len(RUN) >= 15
