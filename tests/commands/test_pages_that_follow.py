"""Pages whose commands and blocks follow each other run as shown, in one empty folder, with fewer steps."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

import hfproj
from hfproj.commands import program
from hfproj.commands.arguments import read_arguments

DOCS = Path(__file__).resolve().parents[2] / "docs"
# Page → how many blocks of each kind run, and files that are there in the end.
PAGES = {
    "command": (
        {"bash": 4, "python": 2},
        ["digits.parquet", "mine.py", "out/first/report.html", "out/mine/results.json"],
    ),
    "tutorial": ({"bash": 3, "python": 3}, ["my/images/0000.jpg", "out/mine/README.md", "out/judged/report.html"]),
}
FLAGS = {"train_limit": 64, "per_device_train_batch_size": 32, "use_cpu": True}
OF_RECIPE = {"simclr_vit": {"test_limit": 64, "watch_every": 0}, "adapt": {"max_steps": 3, "holdout": 64}}


def blocks(page):
    """Return language and text of each block but those that need the Hub."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    found = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(kind, block) for kind, block in found if not block.startswith("# needs the Hub\n")]


def run(line, monkeypatch):
    monkeypatch.setattr("os.environ", dict(os.environ))
    name, *words = shlex.split(line, comments=True)
    assert name == "hfproj"
    if "--num_processes" in words:
        return  # test_launching.py
    if words[0] == "run" and "--help" not in words:
        few = FLAGS | OF_RECIPE["adapt" if words[1] == "adapt" else "simclr_vit"]
        words += [f"--{flag}={value}" for flag, value in few.items()]
    monkeypatch.setattr("sys.argv", ["hfproj", *words])
    program.main()


@pytest.mark.long  # half a minute a page; continuous integration runs it
@pytest.mark.parametrize("page", PAGES)
def test_the_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("hfproj.reporting.page.pictures_of", lambda results: [])  # what takes longest
    few = hfproj.load_image_dataset
    monkeypatch.setattr(hfproj, "load_image_dataset", lambda *args, **options: few(*args, **{**options, "limit": 160}))
    count, written = PAGES[page]
    kinds = [kind for kind, _ in blocks(page)]
    assert {kind: kinds.count(kind) for kind in ("bash", "python")} == count
    for kind, text in blocks(page):
        text = text.replace("--max_steps 20", "--max_steps 1").replace("max_steps=20", "max_steps=1")
        if kind == "python":
            exec(compile(text, f"docs/{page}.md", "exec"), {"__name__": "__main__"})
        for line in text.splitlines() if kind == "bash" else ():
            run(line, monkeypatch)
    assert [name for name in written if not (tmp_path / name).is_file()] == []
    printed = capsys.readouterr().out
    if page == "command":
        assert read_arguments("out/second/arguments.yaml")["max_steps"] == 1
        assert "nearest to a" in printed
    else:
        assert "Without labels, " in printed
        assert "Verdict: " in hfproj.Results.load("out/judged").notes[0]


def test_its_file_of_arguments(tmp_path):
    from hfproj.commands import launching, tables

    [text] = [text for kind, text in blocks("command") if kind == "yaml"]
    (tmp_path / "run.yaml").write_text(text)
    known = {flag[0].lstrip("-") for flag in tables.read()["recipes"]["simclr_vit"]["flags"]}
    assert set(read_arguments(tmp_path / "run.yaml")) <= known | {"num_processes"}
    assert launching.split([str(tmp_path / "run.yaml")])[0] == ["--num_processes", "2"]
