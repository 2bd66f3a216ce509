"""`hfproj run` on several processes: whose flag is whose, and a user's error is one line."""

import os
import signal
import subprocess
import sys
import time

import pytest

import hfproj
from hfproj.commands import launching, outcome
from hfproj.saving.signals import EXIT_CODE

RECIPE = '''"""A recipe that fails as it is told to."""
import argparse, os, signal, sys, time
from hfproj import UsageError, cli

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--how")
    how = cli.arguments(parser).how
    rank = os.environ["RANK"]
    if how == "wrong":
        raise UsageError(f"Expected another --how, got {how!r}.")
    if how == "killed" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "bug" and rank == "1":
        raise KeyError("a bug of ours")
    if how == "stopped":
        sys.exit(75)
    if how == "waits":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        open(f"there-{rank}", "w").close()
        time.sleep(60)
    print("rank", rank, "of", os.environ["WORLD_SIZE"])

if __name__ == "__main__":
    cli.run(main)
'''


def start(folder, how):
    (folder / "mine.py").write_text(RECIPE)
    (folder / "run.yaml").write_text(f"num_processes: 2\nhow: {how}\n")
    command = [sys.executable, "-m", "hfproj", "run", "mine.py", "run.yaml"]
    root = os.path.dirname(os.path.dirname(hfproj.__file__))
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(folder), "PYTHONWARNINGS": "ignore"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def launch(folder, how):
    process = start(folder, how)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_a_mistake_is_one_line_of_all_processes(tmp_path):
    done = launch(tmp_path, "wrong")
    assert done.stderr == "error: Expected another --how, got 'wrong'.\n"
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("fine", 0, None),
        ("stopped", 75, None),
        ("bug", 1, "KeyError: 'a bug of ours'"),
        ("killed", 137, "error: process 1 was ended by SIGKILL, as the system does where memory is short."),
    ],
)
def test_other_ends(tmp_path, how, code, said):
    done = launch(tmp_path, how)
    assert done.returncode == code
    assert "ChildFailedError" not in done.stderr
    if said is None:
        assert done.stderr == ""
    else:
        assert said in done.stderr.splitlines()[-1]
    if how == "fine":
        assert sorted(done.stdout.splitlines()) == ["rank 0 of 2", "rank 1 of 2"]


@pytest.mark.long
def test_a_signal_to_the_launcher(tmp_path):
    process = start(tmp_path, "waits")
    until = time.monotonic() + 60
    while len(list(tmp_path.glob("there-*"))) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "Traceback" not in err


def test_one_code_for_runs_that_a_signal_ended():
    assert outcome.STOPPED == EXIT_CODE


def test_whose_flag_is_whose(tmp_path):
    (tmp_path / "a.yaml").write_text("num_processes: 4\nseed: 1\n")
    file = str(tmp_path / "a.yaml")
    words = ["--num-processes=2", "--seed", "1", "--mixed_precision", "bf16", "--multi_gpu", "--bf16", "true"]
    ours, theirs = launching.split(words)
    assert ours == ["--multi_gpu", "--num_processes", "2", "--mixed_precision", "bf16"]
    assert theirs == ["--seed", "1", "--bf16", "true"]
    assert launching.split([file, "--seed", "2"]) == (["--num_processes", "4"], [file, "--seed", "2"])
    assert launching.split([file, "--num_processes", "3"])[0] == ["--num_processes", "3"]


def test_no_recipe_has_a_flag_of_the_launcher():
    from hfproj.commands import tables

    for recipe in tables.read()["recipes"].values():
        names = {flag[0].lstrip("-") for flag in recipe["flags"]}
        assert not names & {*launching._FLAGS, *launching._SWITCHES}


def test_the_first_process_says_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HFPROJ_SAID", str(tmp_path / "said"))
    outcome.say_once("error: one")
    outcome.say_once("error: two")
    assert capsys.readouterr().err == "error: one\n"
    monkeypatch.setenv("HFPROJ_SAID", str(tmp_path / "gone" / "said"))
    outcome.say_once("error: three")
    assert capsys.readouterr().err == "error: three\n"
