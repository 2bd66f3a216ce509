"""What no study can be, and run files and places that can't be used: told before anything is trained."""

import json
import math
from dataclasses import replace

import pytest
import torch

from hfproj.errors import UsageError
from hfproj.reproduction import (
    Agree,
    Cells,
    Claim,
    Column,
    More,
    Row,
    Same,
    Scale,
    Source,
    Splits,
    Study,
    Trend,
    document,
    reproduce,
)  # fmt: skip
from hfproj.reproduction.sources import places_of
from hfproj.reproduction.store import Store
from hfproj.studies import papers

SCALE = Scale(backbone={"name": "vit_nano"}, training={"num_train_epochs": 1.0, "learning_rate": 0.1})
ACCURACY, A, B = "accuracy", Cells("accuracy", ("a",)), Cells("accuracy", ("b",))


def study(*tests, **changes):
    given = {
        "name": "made.up", "title": "", "source": "", "data": {"x": Source("cifar10"), "y": Source("cifar10")},
        "rows": (Row(name="a", preset="simclr_cifar", data=("x",)), Row(name="b", preset="simclr_cifar")),
        "columns": (Column(name=ACCURACY, measure="knn", unit="%"),), "scales": {"paper": SCALE, "mini": SCALE},
        "claims": (Claim(text="better", tests=tests, source=""),) if tests else (),
    }  # fmt: skip
    return Study(**{**given, **changes})


@pytest.mark.parametrize(
    ("test", "match"),
    [
        (More(Cells(ACCURACY, ("a",), ("y",)), 0.5), "got 'a', not on 'y'"),
        (More(Cells(ACCURACY, ("a", "b"), ("y",)), 0.5), "got 'a', not on 'y'"),
        (More(A, B, -0.1), "margin .* as a number from 0"),
        (More(A, B, math.nan), "margin .* as a number from 0"),
        (Same(A, B, 0.0), "of Same above 0"),
        (Trend(A), "two rows at least, got one"),
        (Agree(Cells(ACCURACY), ACCURACY), "rank 5 rows on data at least, got 3"),
    ],
)
def test_claims_that_can_not_be_judged(test, match):
    with pytest.raises(UsageError, match=match):
        study(test)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data": {}}, "Expected data, rows and columns"),
        ({"columns": ()}, "Expected data, rows and columns"),
        ({"claims": (Claim(text="better", tests=(), source=""),)}, "Expected tests of the claim 'better'"),
        ({"spectra": ("h",), "drawn": ("z",)}, "drawn layer .*'z'"),
        ({"rows": (Row(name="a|b", preset="simclr_cifar"),)}, r"without '\|', got 'a\|b'"),
        ({"claims": (Claim(text="", tests=(More(Cells(ACCURACY, data=("y",)), 0.5),), source=""),),
          "rows": (Row(name="a", preset="simclr_cifar", data=("x",)),)}, "no row is on y"),
    ],
)  # fmt: skip
def test_studies_that_are_none(changes, match):
    with pytest.raises(UsageError, match=match):
        study(**changes)


@pytest.mark.parametrize(("changes", "match"), [({"unit": "percent"}, "as '%' or ''"), ({"share": 50}, "fraction")])
def test_columns_that_are_none(changes, match):
    with pytest.raises(UsageError, match=match):
        Column(name=ACCURACY, measure="knn", **changes)


RUN = {"row": "a", "data": "x", "seed": 0, "values": {"accuracy": 0.5}, "outcomes": {}, "cpu_seconds": 1.0}


@pytest.mark.parametrize(
    "content", [{}, [], None, {"values": {}}, {**RUN, "values": {"accuracy": "0.5"}}, {**RUN, "values": None}]
)
def test_run_files_of_something_else(tmp_path, content):
    store = Store(tmp_path, "made", "mini")
    store.file("key-0").parent.mkdir()
    store.file("key-0").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"key-0.json to be finished runs as hfproj writes them, got .*; delete it"):
        store.read("key-0")
    store.kept.write_text(json.dumps({"settings": {}, "runs": {"key-1": content}}))
    with pytest.raises(UsageError, match=r"made-mini.json .*, got of the run key-1 "):
        store.read("key-1")
    store.file("key-0").write_text(json.dumps(RUN))
    assert store.read("key-0") == RUN


@pytest.mark.parametrize("content", [{}, [], {"runs": {}}, {"settings": {}, "runs": []}])
def test_a_file_of_all_runs_that_is_none(tmp_path, content):
    store = Store(tmp_path, "made", "mini")
    store.kept.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"made-mini.json to be finished runs as hfproj writes them"):
        store.read("key-0")


@pytest.mark.parametrize("place", ["/proc/none", "file/below"])
def test_places_that_can_not_be_written_to(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="Expected output_dir to be a folder that can be written to, got"):
        reproduce("last_layer.figure2", scale="trial", output_dir=tmp_path / place)


def test_a_data_set_without_a_place():
    with pytest.raises(UsageError, match="a folder or a Hub id of cifar10, got nothing"):
        places_of({"cifar10": ""})


def test_data_differ_if_further_data_do():
    def splits(label, others):
        images = [{"image": [0]}]
        return Splits(images, images, {"label": (torch.tensor([label]), torch.tensor([label]))}, others=others)

    one, other = ({"flowers": splits(label, {})} for label in (1, 2))
    assert splits(0, one).fingerprint == splits(0, dict(one)).fingerprint != splits(0, other).fingerprint
    assert splits(0, one).fingerprint != splits(0, {}).fingerprint


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", r"Expected a function studies\(\) in .*seventh.py"),
        ("from hfproj.studies.papers.last_layer import PRESETS, studies", "'inside_projector"),
        ("from hfproj.studies.papers.last_layer import studies", "'last_layer"),
    ],
)
def test_a_paper_that_is_none_or_takes_names_of_others(tmp_path, monkeypatch, text, match):
    (tmp_path / "seventh.py").write_text(text)
    monkeypatch.setattr(papers, "__path__", [*papers.__path__, str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, "hfproj.studies.papers.seventh", raising=False)
    with pytest.raises(UsageError, match=match):
        _ = papers.PRESETS, papers.STUDIES


def test_pictures_of_names_that_become_one_are_two_files(tmp_path):
    rows = tuple(replace(row, x=x, data=()) for x, row in enumerate(study().rows))
    columns = tuple(Column(name=name, measure="knn") for name in ("ρ", "λ"))
    made = study(rows=rows, columns=columns, axis="x", data={"x": Source("cifar10")})
    runs = [
        {**RUN, "row": row, "seed": seed, "values": {"ρ": 0.1, "λ": 0.2}, "spectra": {}, "history": []}
        for row in "ab" for seed in (0, 1)
    ]  # fmt: skip
    drawn = document.draw(made, runs, tmp_path / "page")
    assert len(set(drawn)) == 2
    assert all((tmp_path / name).is_file() for name in drawn)
