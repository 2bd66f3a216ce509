"""Every committed study says what its runs say, judged again; turned round it fails; so does its page."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hfproj.reproduction import document, get_study
from hfproj.reproduction.judging import FAILS, HOLDS, UNCLEAR, judge
from hfproj.reproduction.running import Job

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "recipes" / "results" / "reproduce"
PUBLISHED = sorted(file.name.removesuffix("-mini.json") for file in FOLDER.glob("*.*-mini.json"))
every_published = pytest.mark.parametrize("name", PUBLISHED)
OPPOSITE = {HOLDS: FAILS, FAILS: HOLDS, UNCLEAR: UNCLEAR}


def runs_of(name):
    return Job(get_study(name), "mini", FOLDER, {}).records()


def test_there_are_some():
    assert len(PUBLISHED) > 5


@every_published
def test_verdicts_follow_from_the_runs(name):
    study, runs = get_study(name), runs_of(name)
    kept = json.loads((FOLDER / f"{name}-mini.json").read_text(encoding="utf-8"))
    assert runs  # those of today's settings
    assert document.verdicts(study, runs) == kept["verdicts"]


@every_published
def test_the_page_follows_from_the_runs(name):
    study = get_study(name)
    page = (FOLDER / f"{name}-mini.md").read_text(encoding="utf-8")
    pictures = [line.split("(")[1].rstrip(")") for line in page.splitlines() if line.startswith("![")]
    assert document.page(study, "mini", study.scales["mini"], runs_of(name), pictures) == page
    assert all((FOLDER / picture).is_file() for picture in pictures)


@every_published
def test_turned_round_what_holds_fails(name):
    """The negative control of every claim of a single test; of several, what holds fails, whichever of them."""
    study, runs = get_study(name), runs_of(name)
    for claim in study.claims:
        verdict, turned = (judge(study, one, runs)[0] for one in (claim, claim.turned()))
        if len(claim.tests) == 1 and not getattr(claim.tests[0], "margin", 0):
            assert turned == OPPOSITE[verdict]
        elif verdict == HOLDS:
            assert turned == FAILS


def test_the_table_in_the_docs_is_the_one_that_follows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "benchmarks"))
    import reproduce_table

    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    kept = page.split(reproduce_table.BEGIN)[1].split(reproduce_table.END)[0].strip()
    assert kept == reproduce_table.section().strip()
    sys.modules.pop("reproduce_table")


def test_a_verdict_changes_with_the_runs():
    """The test above could fail: with the values of two rows exchanged a claim of theirs is turned."""
    name = "last_layer.figure2"
    study, runs = get_study(name), runs_of(name)
    exchanged = []
    for run in runs:
        values = dict(run["values"])
        values["correlation in h"], values["correlation in z"] = values["correlation in z"], values["correlation in h"]
        exchanged.append({**run, "values": values})
    first, second = (judge(replace(study), study.claims[0], own)[0] for own in (runs, exchanged))
    assert second == OPPOSITE[first]
