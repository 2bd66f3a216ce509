"""docs/command.md: its commands and blocks run as shown, in one empty folder, with fewer steps."""

import os
import re
import shlex
import sys
from pathlib import Path

from hfproj.commands import program
from hfproj.commands.arguments import read_arguments

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "command.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
FLAGS = {"train_limit": 64, "test_limit": 64, "per_device_train_batch_size": 32, "use_cpu": True, "watch_every": 0}
FEW = [f"--{name}={value}" for name, value in FLAGS.items()]


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("hfproj.reporting.page.pictures_of", lambda results: [])  # what takes longest
    kinds = [kind for kind, _ in BLOCKS]
    assert (kinds.count("bash"), kinds.count("python"), kinds.count("yaml")) == (4, 2, 1)
    for kind, text in BLOCKS:
        text = text.replace("--max_steps 20", "--max_steps 1").replace("max_steps=20", "max_steps=1")
        if kind == "python":
            exec(compile(text, "docs/command.md", "exec"), {"__name__": "__main__"})
        for line in text.splitlines() if kind == "bash" else ():
            monkeypatch.setattr("os.environ", dict(os.environ))
            program_, *words = shlex.split(line, comments=True)
            assert program_ == "hfproj"
            trains = words[0] == "run" and "--help" not in words
            if "--num_processes" in words:
                continue  # test_launching.py
            monkeypatch.setattr("sys.argv", ["hfproj", *words, *(FEW if trains else [])])
            program.main()
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {"digits.parquet", "mine.py", "out/first/report.html", "out/mine/results.json"} <= written
    assert read_arguments("out/second/arguments.yaml")["max_steps"] == 1
    assert "nearest to a" in capsys.readouterr().out


def test_its_file_of_arguments(tmp_path, monkeypatch):
    from hfproj.commands import launching, tables

    [text] = [text for kind, text in BLOCKS if kind == "yaml"]
    (tmp_path / "run.yaml").write_text(text)
    known = {flag[0].lstrip("-") for flag in tables.read()["recipes"]["simclr_vit"]["flags"]}
    assert set(read_arguments(tmp_path / "run.yaml")) <= known | {"num_processes"}
    assert launching.split([str(tmp_path / "run.yaml")])[0] == ["--num_processes", "2"]
