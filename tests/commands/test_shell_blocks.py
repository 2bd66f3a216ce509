"""Commands of README and docs: each block runs in a test, or says in its first lines what it needs, or is listed here.

docs/command.md and docs/tutorial.md are run by test_pages_that_follow.py.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from hfproj.commands import program, tables

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
FOLLOWED = ("command.md", "tutorial.md")
NEEDS = re.compile(r"\A(#!.*\n)?# needs (the Hub|a download|a GPU|SLURM)\n")
ELSEWHERE = {  # page → the beginning of what is run elsewhere, and where
    "README.md": {"python3 -m venv": "it installs, and runs the suite: .ci/run"},
    "CONTRIBUTING.md": {
        "python3 -m venv": "it installs, and runs the suite: .ci/run",
        "python -m sphinx": "tests/test_site.py, tests/test_notebooks.py",
        "rm -rf dist": "by hand, before a release; .ci/run does it with the wheel",
        "python -m tests.hub.loopback": "it serves until it is stopped; the fixture `hub` is the same server",
    },
    "faults.md": {"python tests/faults/long.py": "an hour and a half; tests/faults has a part of it"},
    "command.md": {"hfproj run simclr_vit run.yaml": "two processes; test_its_file_of_arguments reads the file"},
}
FEW = "--train_limit 64 --test_limit 64 --per_device_train_batch_size 16 --watch_every 0 --disable_tqdm True"


def blocks():
    """Yield page, line and text of each block of commands: those in bash or text, or without a language."""
    for page in PAGES:
        for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
            languages = ("text",) if page.name in FOLLOWED else ("bash", "text", "")
            if token.type == "fence" and token.info in languages:
                yield page, token.map[0] + 1, token.content


def reason(page, text):
    """Return why a block is not run here; empty where it is."""
    if needs := NEEDS.match(text):
        return needs[2]
    return next((why for start, why in ELSEWHERE.get(page.name, {}).items() if text.startswith(start)), "")


ALL = list(blocks())
HERE = [pytest.param(page, text, id=f"{page.name}:{line}") for page, line, text in ALL if not reason(page, text)]
RUN = {"probes.md": 1, "reproduce.md": 1, "several_gpus.md": 1}  # page → blocks that run here


def test_what_runs_and_what_does_not():
    names = [param.values[0].name for param in HERE]
    assert {name: names.count(name) for name in names} == RUN
    for name, starts in ELSEWHERE.items():
        for start in starts:
            assert any(page.name == name and text.startswith(start) for page, _, text in ALL), (name, start)


@pytest.mark.parametrize(("page", "line", "text"), ALL, ids=[f"{page.name}:{line}" for page, line, _ in ALL])
def test_bash_reads_it(page, line, text):
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_recipes_have_the_flags():
    known = tables.read()["recipes"]
    count = 0
    for page, line, text in ALL:
        for command in text.replace("\\\n", " ").splitlines():
            if found := re.search(r"(?:recipes/(\w+)\.py|hfproj (?:run )?(probe|simclr_vit))(.*)", command):
                recipe = known[found[1] or found[2]]
                flags = set(re.findall(r"(?<= )--\w+", found[3]))
                assert flags <= {flag[0] for flag in recipe["flags"]}, f"{page.name}:{line}"
                count += 1
    assert count >= 8


def test_a_probe_from_the_command_line(tmp_path, monkeypatch, capsys):
    [text] = [param.values[1] for param in HERE if param.values[0].name == "probes.md"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.environ", dict(os.environ))
    name, *words = shlex.split(text)
    assert name == "hfproj"
    monkeypatch.setattr("sys.argv", [name, *words, "--train_limit", "80", "--test_limit", "60"])
    program.main()
    assert "layers.5" in capsys.readouterr().out
    assert (tmp_path / "out" / "probe" / "report.html").is_file()


@pytest.mark.long
def test_two_processes(tmp_path):
    [text] = [param.values[1] for param in HERE if param.values[0].name == "several_gpus.md"]
    assert "--max_steps 20" in text
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    python = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": python, "HF_HOME": str(tmp_path)}
    command = text.strip().replace("--max_steps 20", f"--max_steps 1 {FEW}")
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "simclr_vit" / "results.json").is_file()


def test_studies_from_the_command_line(tmp_path, monkeypatch, capsys):
    [text] = [param.values[1] for param in HERE if param.values[0].name == "reproduce.md"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.environ", dict(os.environ))
    for command in text.strip().splitlines():
        monkeypatch.setattr("sys.argv", shlex.split(command, comments=True))
        program.main()
    shown = capsys.readouterr().out
    assert "last_layer.table2 " in shown
    assert "# last_layer.figure2: Does InfoNCE decorrelate z, and not h?" in shown
    assert (tmp_path / "out" / "reproduce" / "last_layer.figure2-trial.md").is_file()
