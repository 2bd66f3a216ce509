"""The studies of the five papers: each is whole, each runs at a size of seconds, and a sixth paper is one file."""

import textwrap

import pytest

import hfproj
from hfproj.reproduction import all_studies, get_study, reproduce
from hfproj.reproduction.judging import FAILS, HOLDS, UNCLEAR
from hfproj.reproduction.measures import check_measure
from hfproj.reproduction.running import trial_of
from hfproj.studies import papers

STUDIES = all_studies()
TABLES = {
    "geometry": "table1 table3 table5 depth collapse hessian whitening whitening_alone tradeoff checkpoints",
    "feature_weighting": "digits coarse_to_fine spurious corruptions reweighting",
    "last_layer": "table1 table2 figure1 figure2 figure3 figure4 figure5 figure6",
    "bottleneck": "table1 table2 figure4c figure4d figure4e bounds",
    "sparse_head": "linear few_labels transfer figure3 penalties tasks",
}
every_study = pytest.mark.parametrize("name", STUDIES)


def test_every_table_and_figure_is_there():
    assert {*STUDIES} == {f"{paper}.{table}" for paper, tables in TABLES.items() for table in tables.split()}
    assert {*hfproj.list_studies()} == {*STUDIES}


@every_study
def test_a_study_is_whole(name):
    study = get_study(name)
    assert study.claims
    assert study.source.endswith((".", "…"))
    assert all(claim.text and claim.source and claim.tests for claim in study.claims)
    for column in study.every_column:
        check_measure(column)
    for scale in study.scales.values():
        assert scale.note.endswith(".")
        assert scale.machine
        assert scale.seconds
    mini = study.scales["mini"]
    assert len(mini.seeds) == 3
    hours = len(study.runs()) * len(mini.seeds) * mini.seconds / 3600
    assert hours <= 2 * 2  # of two cores


def test_the_papers_numbers_are_those_of_the_text():
    rows = {row.name: row.paper for row in get_study("last_layer.table2").rows}
    assert rows["SimCLR"] == {"CIFAR-10": {"200-NN": 86.1}, "CIFAR-100": {"200-NN": 56.3}}
    assert rows["SimCLR + last layer"] == {"CIFAR-10": {"200-NN": 86.3}, "CIFAR-100": {"200-NN": 57.5}}
    assert rows["Without projector + WERank"]["CIFAR-100"]["200-NN"] == 52.6
    table_1 = {row.name: row.paper["CIFAR-100"]["200-NN"] for row in get_study("last_layer.table1").rows}
    assert [table_1[f"d0 = {d} d, c = 1"] for d in ("0.39", "0.78", "0.94")] == [41.1, 44.3, 45.9]
    assert get_study("geometry.table1").rows[0].paper["CIFAR-10"]["compression, h of unit length"] == 21.85


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trials")


@every_study
def test_a_trial(name, folder):
    """The first and the last row of each study, with every column; studies of a paper share runs as users' do."""
    study = get_study(name)
    rows = list(dict.fromkeys((study.rows[0].name, study.rows[-1].name)))
    found = reproduce(name, scale="trial", output_dir=folder, rows=rows)
    made = [run for run in found.runs if run["row"] in rows]  # other rows may be there from other studies
    assert [run["row"] for run in made] == rows
    assert {one["verdict"] for one in found.verdicts} <= {HOLDS, FAILS, UNCLEAR}
    numbers = [run["values"][column.name] for run in made for column in study.columns]
    reasons = {name for run in made for name in run["missing"]}
    named = [c.name for _ in made for c in study.columns]
    assert all(value is not None or column in reasons for value, column in zip(numbers, named, strict=True))
    assert study.title in found.text
    assert all(f"-{followed}.png)" in found.text for followed in study.followed)
    assert trial_of(study).note in found.text


def test_a_sixth_paper_is_one_file(tmp_path, monkeypatch):
    """A file beside the others is found, with its presets and its studies, and runs."""
    file = tmp_path / "sixth.py"
    file.write_text(
        textwrap.dedent(
            '''
            """A sixth paper."""

            from hfproj.presets.settings import Preset
            from hfproj.reproduction import Cells, Claim, Column, More, Row, Study
            from hfproj.reproduction.measures import register_measure
            from hfproj.studies.papers._reductions import CIFAR, FROM_SCRATCH, as_published

            VICREG = {"name": "vicreg"}
            PRESETS = {"sixth": Preset(line="A sixth", source="Here.", objective=VICREG, head="linear", out_dim=8)}

            @register_measure("width")
            def width(trained, column):
                return trained.of("test", column.layer).shape[1]

            def studies():
                return [Study(
                    name="sixth.table1", title="How wide is z?", source="Table 1.", data=CIFAR,
                    rows=(Row(name="linear", preset="sixth"),),
                    columns=(Column(name="width", measure="width", layer="z"),),
                    claims=(Claim(text="z has some width", source="Table 1", tests=(More(Cells("width"), 1.0),)),),
                    scales={"paper": as_published(1, "All.", num_train_epochs=1.0, learning_rate=0.1),
                            "mini": FROM_SCRATCH},
                )]
            '''
        )
    )
    monkeypatch.setattr(papers, "__path__", [*papers.__path__, str(tmp_path)])
    for cached in (all_studies, hfproj.presets.all_presets):
        cached.cache_clear()
    try:
        assert hfproj.list_presets()["sixth"] == "A sixth"
        found = reproduce("sixth.table1", scale="trial", output_dir=tmp_path / "out")
        assert [run["values"] for run in found.runs] == [{"width": 1.0}]  # heads are scaled: 8 · 1/16, at least 1
    finally:
        monkeypatch.undo()
        for cached in (all_studies, hfproj.presets.all_presets):
            cached.cache_clear()
