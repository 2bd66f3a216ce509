"""Every mistake of the list ends in one line of ours that says what to do. In a process of its own: the tests' type
checker would see the arguments first.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mistakes.run_mistakes import LONGEST, MISTAKES, PARTS, make, wrong

import hfproj

RUN = Path(__file__).with_name("run_mistakes.py")
# Without an error: what goes on is right, or was allowed before.
WARNED = {
    "evaluate: labelled test set, no training set", "forward: a side that the patches do not fill",
    "push: an own head", "results: before and after of other test sets",
    "texts: a tokenizer larger than the vocabulary", "views: a mean of 255",
}  # fmt: skip


@pytest.fixture(scope="module")
def ends():
    done = subprocess.run([sys.executable, "-W", "ignore", str(RUN)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_list():
    parts = [part.MISTAKES for part in PARTS]
    assert len(MISTAKES) == sum(map(len, parts)) > 400  # no name twice
    assert all(len(entry) > 1 for entry in MISTAKES.values())  # each says the cure


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line_with_its_cure(ends, name):
    end = ends[name]
    assert end["wrong"] is None, f"{end['wrong']}: {end['type']}: {end['message']}"
    assert (end["kind"] == "warning") == (name in WARNED)


def test_what_would_be_found():
    def raising(error):
        def call():
            raise error

        return make(call)

    assert wrong(["a"], *raising(hfproj.UsageError("a"))[::2]) is None
    assert wrong(["a"], *raising(hfproj.UsageError("b"))[::2]) == "does not say 'a'"
    assert wrong([], *raising(hfproj.AdapterFileError("a\nb"))[::2]) == "more than one line"
    assert wrong([], *raising(hfproj.UsageError("a" * (LONGEST + 1)))[::2]) == "more than one line"
    assert wrong([], *raising(ValueError("a"))[::2]) == "another library's words"
    assert wrong([], *make(lambda: None)[::2]) == "nothing was said"
