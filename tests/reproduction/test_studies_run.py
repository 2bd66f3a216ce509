"""Studies are run, resumed, shared and controlled: on random images, and on images whose colour is their class."""

import dataclasses
import json
import math
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hfproj.errors import NotMeasurableError, UsageError
from hfproj.files import write_json
from hfproj.plots import plot_curves, plot_spectrum
from hfproj.reproduction import (
    Cells,
    Claim,
    Column,
    More,
    Row,
    Scale,
    Source,
    Study,
    document,
    get_study,
    registry,
    reproduce,
    running,
)
from hfproj.reproduction.document import _ticks
from hfproj.reproduction.judging import FAILS, HOLDS, UNCLEAR, judge
from hfproj.reproduction.measures import Trained, along, check_measure
from hfproj.reproduction.running import Job, trial_of, work
from hfproj.reproduction.setting import Setting, plain, scaled
from hfproj.reproduction.store import Store
from hfproj.saving.locks import locked

KNN = Column(name="20-NN", measure="knn", unit="%")
RUN = {"row": "a", "data": "x", "seed": 0, "values": {}, "outcomes": {}, "cpu_seconds": 1.0}


@dataclasses.dataclass(frozen=True)
class Colours(Source):
    """Images of one of four colours, with noise; the colour is the label."""

    def load(self, places, images, test_images):
        made = []
        for split, rows in (("train", images), ("test", test_images)):
            rng = np.random.default_rng(len(split))
            label = np.arange(rows) % 4
            colour = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220], [220, 220, 40]])[label]
            pixels = np.clip(colour[:, None, None] + rng.normal(0, 30, (rows, 16, 16, 3)), 0, 255).astype(np.uint8)
            features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=4)})
            columns = {"image": [Image.fromarray(p) for p in pixels], "label": label.tolist()}
            made.append(datasets.Dataset.from_dict(columns, features=features))
        return self.splits(*made)


SCALE = Scale(
    backbone={"name": "timm/resnet18", "pretrained": False, "stem": "cifar", "width": 0.125}, heads=1 / 32,
    training={"max_steps": 1, "per_device_train_batch_size": 16, "learning_rate": 1e-4, "warmup_steps": 0},
    views={"size": 16}, images=64, test_images=48, seeds=(0, 1, 2),
)  # fmt: skip
LESS = More(Cells("20-NN", ("a",)), 0.5)
BETTER = More(Cells("20-NN", ("a",)), Cells("20-NN", ("b",)))


@pytest.fixture
def colours(monkeypatch):
    """A study that claims that a 20-NN knows colours, registered under a name."""
    study = Study(
        name="colours.table", title="Are colours seen?", source="made up", data={"colours": Colours("cifar10")},
        rows=(Row(name="a", preset="inside_projector_simclr", trained=False),
              Row(name="b", preset="inside_projector_no_projector", trained=False)),
        columns=(KNN, Column(name="rank", measure="covariance_rank", log=True)),
        claims=(Claim(text="Colours are seen", tests=(LESS,), source="made up"),
                Claim(text="a sees them better", tests=(BETTER,), source="made up")),
        scales={"paper": SCALE, "mini": SCALE}, spectra=("h",), drawn=("h",),
    )  # fmt: skip
    monkeypatch.setattr(registry, "all_studies", lambda: {study.name: study})
    return study


def files(folder):
    return sorted(file.name for file in (folder / "runs").iterdir())


def test_what_is_finished_is_not_made_again(tmp_path, monkeypatch):
    first = reproduce("last_layer.table1", scale="trial", output_dir=tmp_path, rows=["d0 = 0.39 d, c = 0"])
    before = {file: (tmp_path / "runs" / file).stat().st_mtime_ns for file in files(tmp_path)}
    assert len(first.runs) == len(before) == 1
    ran = []
    monkeypatch.setattr(running, "run", lambda setting, *_, **__: ran.append(setting.row.name) or pytest.fail("ran"))
    again = reproduce("last_layer.table1", scale="trial", output_dir=tmp_path, rows=["d0 = 0.39 d, c = 0"])
    assert again.runs == first.runs
    assert {file: (tmp_path / "runs" / file).stat().st_mtime_ns for file in files(tmp_path)} == before


def test_an_interrupted_run_leaves_nothing_and_others_are_kept(tmp_path, monkeypatch):
    job = Job(get_study("last_layer.figure5"), "trial", tmp_path, {})
    real, calls = running.measured, []

    def fails_at_the_second(trained, **options):
        calls.append(trained.setting.row.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(trained, **options)

    monkeypatch.setattr(running, "measured", fails_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        work(job)
    assert len(job.records()) == 1
    assert [name for name in files(tmp_path) if name.endswith(".json")] == [f"{job.settings()[0].key}-0.json"]
    work(job)
    assert [record["row"] for record in job.records()] == [row.name for row in job.study.rows]


def test_a_run_that_another_process_is_making_is_left_to_it(tmp_path):
    job = Job(get_study("last_layer.figure3"), "trial", tmp_path, {})
    taken = job.settings()[0]
    with locked(tmp_path / "runs" / f".{taken.key}-0"):
        work(job)
        assert [record["row"] for record in job.records()] == ["Without projector"]
    work(job)
    assert len(job.records()) == 2


def test_runs_are_shared_by_studies_and_kept_in_one_file(tmp_path, monkeypatch):
    reproduce("last_layer.figure3", scale="trial", output_dir=tmp_path)
    for file in (tmp_path / "runs").iterdir():
        file.unlink()  # only last_layer-trial.json is left, as in a repository
    monkeypatch.setattr(running, "run", lambda *_, **__: pytest.fail("ran"))
    found = reproduce("last_layer.figure2", scale="trial", output_dir=tmp_path)
    assert [run["row"] for run in found.runs] == ["SimCLR"]
    kept = json.loads((tmp_path / "last_layer-trial.json").read_text())
    assert len(kept["runs"]) == 2
    assert {name.split("-")[0] for name in kept["runs"]} == set(kept["settings"])
    assert not any("setting" in run for run in kept["runs"].values())


def test_every_value_that_decides_a_run_changes_its_key(colours):
    row, scale = colours.rows[0], SCALE
    key = Setting(colours, row, "colours", scale).key
    others = [
        Setting(colours, replace(row, start=0.5), "colours", scale),
        Setting(colours, replace(row, trained=True), "colours", scale),
        Setting(colours, replace(row, changes={"objective": {"temperature": 0.3}}), "colours", scale),
        Setting(colours, row, "colours", scale.but(training={"learning_rate": 0.2})),
        Setting(colours, row, "colours", scale.but(views={"size": 12})),
        Setting(colours, row, "colours", scale.but(images=65)),
        Setting(colours, row, "colours", scale.but(heads=0.5)),
        Setting(colours, row, "colours", scale.but(backbone={**scale.backbone, "width": 0.25})),
        Setting(replace(colours, spectra=("h", "z")), row, "colours", scale),
        Setting(replace(colours, measured=(Column(name="x", measure="rankme"),)), row, "colours", scale),
    ]
    assert len({key, *(other.key for other in others)}) == len(others) + 1
    same = Setting(
        replace(colours, title="another", columns=colours.columns[::-1]), replace(row, x=3.0), "colours", scale
    )
    assert same.key == key  # what is shown, and in which order, decides nothing


def test_a_field_at_its_default_is_not_in_the_key():
    assert plain(Column(name="a", measure="knn")) == {"name": "a", "measure": "knn"}


def test_widths_of_heads_are_scaled_at_every_depth():
    assert scaled("mlp", {"hidden_dim": 64}, 0.5, out_dim=8) == ({"hidden_dim": 32}, 4)
    options, out_dim = scaled("quantized", {"head": "simclr_solo", "levels": 8}, 0.25)
    assert options["head_options"]["hidden_dim"] == 512
    assert (options["levels"], out_dim) == (8, 64)
    assert scaled("identity", {}, 0.25) == ({}, None)
    assert scaled("topk", {"width": 400, "top_k": 40}, 0.1) == ({"width": 40, "top_k": 4}, None)


def test_claims_hold_turned_round_they_fail_and_of_shuffled_labels_nothing_is_known(colours, tmp_path):
    found = reproduce("colours.table", output_dir=tmp_path)
    assert [one["verdict"] for one in found.verdicts] == [HOLDS, UNCLEAR]
    assert min(run["values"]["20-NN"] for run in found.runs) > 0.9
    turned = reproduce("colours.table", output_dir=tmp_path, control="turned")
    assert [one["verdict"] for one in turned.verdicts] == [FAILS, UNCLEAR]
    assert turned.verdicts[0]["claim"] == "Turned round: Colours are seen"
    shuffled = reproduce("colours.table", output_dir=tmp_path, control="shuffled")
    assert max(run["values"]["20-NN"] for run in shuffled.runs) < 0.5
    assert shuffled.verdicts[1]["verdict"] == UNCLEAR
    assert "**holds**" in found.path.read_text()
    assert (tmp_path / "colours.table-mini-colours-h.png").is_file()


def test_a_sign_of_a_difference_between_rows_is_not_found_in_shuffled_labels(colours, tmp_path):
    """What holds between two rows on real labels cannot be judged on shuffled ones."""
    blind = Row(name="b", preset="simclr_cifar", trained=False, evaluated="z", start=0.0)  # z is the last bias
    study = replace(
        colours, rows=(colours.rows[0], blind), columns=(replace(KNN, layer="evaluated"),), spectra=(), drawn=()
    )
    runs = {}
    for shuffled in (False, True):
        job = Job(study, "mini", tmp_path, {}, shuffled=shuffled)
        work(job)
        runs[shuffled] = job.records()
    assert judge(study, study.claims[1], runs[False])[0] == HOLDS
    assert judge(study, study.claims[1], runs[True])[0] == UNCLEAR


def test_seeds_differ_and_repeat(colours, tmp_path):
    def values(folder):
        job = Job(colours, "mini", folder, {}, rows=("a",), seeds=(0, 1))
        work(job)
        return [record["values"]["rank"] for record in job.records()]

    first, again = values(tmp_path / "1"), values(tmp_path / "2")
    assert first == again
    assert first[0] != first[1]


def test_weights_are_made_small_before_training(colours):
    usual, small = (Setting(colours, replace(colours.rows[0], start=s), "colours", SCALE).model(0) for s in (1.0, 0.1))
    for (name, a), (_, b) in zip(usual.named_parameters(), small.named_parameters(), strict=True):
        in_head = "projection_head_modules" in name and a.ndim == 2
        assert torch.allclose(0.1 * a if in_head else a, b), name


def test_tasks_are_trained_one_after_the_other(tmp_path):
    found = reproduce("sparse_head.tasks", scale="trial", output_dir=tmp_path, rows=["SimCLR"])
    assert found.runs[0]["values"]["linear of h, first task"] is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "last_layer.table9"}, "Unknown study 'last_layer.table9'. Did you mean 'last_layer.table"),
        ({"name": "last_layer.table2", "scale": "large"}, "scale"),
        ({"name": "last_layer.table2", "rows": ["SimCRL"]}, "Did you mean 'SimCLR'"),
        ({"name": "last_layer.table2", "workers": 0}, "Expected workers to be at least 1, got 0"),
        ({"name": "last_layer.table2", "seeds": [1, 1]}, "Expected seeds as different whole numbers from 0"),
        (
            {"name": "last_layer.table2", "data": {"cifar-10": "here"}},
            "Unknown data set 'cifar-10'. Did you mean 'cifar10'",
        ),
        ({"name": "last_layer.table2", "control": "reversed"}, "control"),
    ],
)
def test_mistakes(options, message, tmp_path):
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        reproduce(output_dir=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_data_sets_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"Expected a folder with data sets \(cifar10, .* leave it out to use the Hub"):
        reproduce("last_layer.table2", data=tmp_path, output_dir=tmp_path / "out")


def test_runs_of_other_data_are_not_taken_for_these(colours, tmp_path, monkeypatch):
    reproduce("colours.table", output_dir=tmp_path, rows=["a"], seeds=[0])
    real = Colours.load
    monkeypatch.setattr(Colours, "load", lambda self, places, images, tests: real(self, places, images, tests + 1))
    with pytest.raises(UsageError, match=r"Expected colours to be the images that .* has runs of, got others"):
        reproduce("colours.table", output_dir=tmp_path)
    with pytest.raises(UsageError, match="has runs of, got others"):  # also where nothing is left to run
        reproduce("colours.table", output_dir=tmp_path, rows=["a"], seeds=[0], data={"cifar10": "elsewhere"})


def test_a_part_of_the_rows_does_not_hide_the_others(colours, tmp_path):
    whole = reproduce("colours.table", output_dir=tmp_path)
    part = reproduce("colours.table", output_dir=tmp_path, rows=["a"], seeds=[1])
    assert (part.text, len(part.runs)) == (whole.text, 6)


def test_a_change_of_what_is_no_part_of_a_preset_is_refused(colours):
    wrong = replace(colours.rows[0], changes={"obiective": {"temperature": 0.1}})
    with pytest.raises(
        UsageError, match=r"part of a preset, changed by row 'a'.* 'obiective'. Did you mean 'objective'"
    ):
        Setting(colours, wrong, "colours", SCALE).written()


def test_a_damaged_file_of_runs_is_told(tmp_path):
    (tmp_path / "last_layer-trial.json").write_text("{")
    with pytest.raises(UsageError, match=r"last_layer-trial.json to be JSON of finished runs, got a damaged file"):
        reproduce("last_layer.table2", scale="trial", output_dir=tmp_path)


def test_a_study_that_leaves_something_open_is_refused(colours):
    silent = SCALE.but(training={})
    silent = replace(silent, training={})
    with pytest.raises(UsageError, match="Expected num_train_epochs and learning_rate in the scales of study"):
        replace(colours, scales={"paper": silent, "mini": SCALE}, rows=(replace(colours.rows[0], trained=True),))
    with pytest.raises(UsageError, match="Unknown row of a claim"):
        replace(colours, claims=(Claim(text="", tests=(More(Cells("20-NN", ("c",)), 0.5),), source=""),))
    with pytest.raises(UsageError, match="Unknown column of a claim"):
        replace(colours, claims=(Claim(text="", tests=(More(Cells("21-NN"), 0.5),), source=""),))
    with pytest.raises(UsageError, match=r"Expected the measure of column 'x' to be one of .* got 'knm'"):
        check_measure(Column(name="x", measure="knm"))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"measure": "rankme", "options": {"eps": 1.0}}, "Unknown option of column 'x' of the measure 'rankme': 'eps'"),
        ({"measure": "knn", "options": {"kk": 3}}, "kk"),
        ({"measure": "along", "options": {"of": "std", "what": "median", "wiht": "a"}}, "Did you mean 'with'"),
        ({"measure": "along", "options": {"of": "std"}}, "to have the options of, what, got no what; add it"),
        ({"measure": "positive_cosine"}, "to be of single images, got one of views"),
    ],
)
def test_options_that_a_measure_does_not_have_are_told(column, message):
    with pytest.raises(UsageError, match=message):
        check_measure(Column(name="x", **column))


def test_what_is_followed_along_training_is_drawn(colours, tmp_path, monkeypatch):
    rows = (replace(colours.rows[0], trained=True), colours.rows[1])
    study = replace(colours, rows=rows, watched=("std",), followed={"std_z": "std of z"}, drawn=(), claims=())
    monkeypatch.setattr(registry, "all_studies", lambda: {study.name: study})
    found = reproduce(study.name, output_dir=tmp_path, seeds=[0, 1])
    assert "![colours.table-mini-colours-std_z](colours.table-mini-colours-std_z.png)" in found.text
    steps = document._along({"a": [run for run in found.runs if run["row"] == "a"], "b": []}, "std_z")
    assert [*steps] == ["a"]  # an untrained row has no curve
    with pytest.raises(UsageError, match=r"Unknown number along training in followed: 'std_x'. Did you mean 'std_"):
        document._along({"a": found.runs}, "std_x")
    assert steps["a"][0].tolist() == [0, 1]
    history = [run["history"] for run in found.runs if run["row"] == "a"]
    assert steps["a"][1].tolist() == pytest.approx([sum(h[i]["std_z"] for h in history) / 2 for i in (0, 1)])


def test_what_became_of_a_number_along_training():
    history = [
        {"step": 0, "a": 1.0}, {"step": 1, "a": -3.0, "b": 2.0}, {"step": 2, "a": 0.5, "b": 3.0}, {"step": 3, "b": 1.0},
        {"step": 4, "a": math.nan, "b": 9.0}, {"step": 5, "a": 2.0, "b": 4.0},
    ]  # fmt: skip
    trained = Trained.__new__(Trained)
    trained.history = history

    def value(**options):
        return along(trained, Column(name="", measure="along", options=options))

    assert value(**{"of": "a", "what": "spearman", "with": "b"}) == pytest.approx(1.0)  # of the three steps with both
    assert value(of="a", what="negative", error="b") == pytest.approx(1 / 3)  # −3 is below −2
    assert value(of="a", what="median") == 0.75
    with pytest.raises(NotMeasurableError, match="a and c were watched together at fewer than three steps"):
        value(**{"of": "a", "what": "spearman", "with": "c"})
    with pytest.raises(UsageError, match=r"Unknown what of a number along training 'mode'. Available"):
        value(of="a", what="mode")


def test_a_layer_that_is_not_there_is_told_before_training(colours, tmp_path, monkeypatch):
    rows = (replace(colours.rows[0], trained=True),)
    study = replace(colours, columns=(replace(KNN, layer="layer5.0"),), rows=rows, claims=())
    monkeypatch.setattr(Setting, "trainer", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(UsageError, match=r"Unknown layer of colours.table, for a timm/resnet18: 'layer5.0'. Did you"):
        work(Job(study, "mini", tmp_path, {}))


def test_gathering_keeps_what_another_process_gathered(tmp_path):
    """A store that read the file before another one wrote to it adds to what is there now."""
    first, second = (Store(tmp_path, "paper", "mini") for _ in range(2))
    assert first.read("a-0") is None
    for store, name in ((second, "b-0"), (first, "a-0")):
        write_json(store.file(name), RUN | {"row": name})
        store.gather([name])
    assert {*json.loads(first.kept.read_text())["runs"]} == {"a-0", "b-0"}


@pytest.mark.parametrize("wrong", [{"labels": "colour"}, {"other": "cifar100"}])
def test_labels_that_are_not_there_are_told_before_training(colours, tmp_path, monkeypatch, wrong):
    study = replace(colours, columns=(replace(KNN, **wrong),))
    monkeypatch.setattr(running, "run", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(UsageError, match=r"of column '20-NN': '(colour|cifar100)'"):
        work(Job(study, "mini", tmp_path, {}))


def test_a_trial_is_small():
    scale = trial_of(get_study("last_layer.table2"))
    assert (scale.images, scale.seeds, scale.training["max_steps"]) == (32, (0,), 2)


def test_spectra_of_many_rows_look_different():
    figure = plot_spectrum({f"row {i}": [1.0, 0.1, 0.01] for i in range(15)})
    lines = figure.axes[0].get_lines()
    assert len({(line.get_color(), str(line._dash_pattern), line.get_marker()) for line in lines}) == 15


def test_the_points_of_a_sweep_stand_below_it():
    sweep = get_study("bottleneck.figure4d")
    ticks = _ticks(sweep)
    assert ticks == {100.0: "SimCLR", 30: "30", 8: "8", 5: "5", 3: "3", 2: "2"}
    axes = plot_curves({"linear of h": ([2, 8, 100], [0.3, 0.4, 0.5])}, "levels", "linear of h (%)", x_ticks=ticks,
                       x_scale="log").axes[0]  # fmt: skip
    assert [label.get_text() for label in axes.get_xticklabels()] == list(ticks.values())
    assert not axes.figure.legends
    assert not axes.get_xticks(minor=True).size
    with pytest.raises(UsageError, match="places on the log axis, got 0"):
        plot_curves({"a": ([1, 2], [1.0, 2.0])}, "x", "y", x_ticks={0: "none"}, x_scale="log")
    several = get_study("sparse_head.linear")
    assert set(_ticks(several).values()) == {f"{row.x:g}" for row in several.rows}
