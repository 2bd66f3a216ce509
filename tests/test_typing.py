"""mypy and pyright find exactly the planted mistakes in `tests/typing/uses.py`."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
USES = ROOT / "tests" / "typing" / "uses.py"
LINES = USES.read_text(encoding="utf-8").splitlines()
PLANTED = {number for number, line in enumerate(LINES, 1) if line.endswith("# wrong")}

pytestmark = pytest.mark.long  # a type checker reads all of torch and transformers first


def installed(module):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


def run(*command):
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def compare(found, output):
    named = {n: LINES[n - 1].strip() for n in sorted(PLANTED ^ found)}
    assert found == PLANTED, f"missed, or wrong where nothing is: {named}\n{output}"


@installed("mypy")
def test_mypy(tmp_path):
    settings = tmp_path / "mypy.ini"  # a user's, not ours: our own files are read as those of an installed package
    settings.write_text("[mypy]\nignore_missing_imports = True\nfollow_imports = silent\n")
    done = run("mypy", "--config-file", str(settings), "--cache-dir", str(tmp_path), str(USES))
    compare({int(n) for n in re.findall(r"^\S+?:(\d+): error:", done.stdout, re.MULTILINE)}, done.stdout + done.stderr)


@installed("basedpyright")
def test_pyright(tmp_path):
    settings = tmp_path / "pyrightconfig.json"
    settings.write_text(
        json.dumps(
            {
                "typeCheckingMode": "basic",
                "include": [str(USES)],
                "extraPaths": [str(ROOT)],
                "reportUnusedExpression": False,
            }
        )
    )
    done = run("basedpyright", "--project", str(settings), "--pythonpath", sys.executable, "--outputjson")
    report = json.loads(done.stdout)["generalDiagnostics"]
    errors = {d["range"]["start"]["line"] + 1 for d in report if d["severity"] == "error"}
    compare(errors, done.stdout + done.stderr)
