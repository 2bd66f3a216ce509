"""The study of the geometry of heads, with settings that finish in seconds, and the document of its numbers."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import hfproj
from hfproj.studies.head_geometry import analysis, collapse, measures, models
from hfproj.studies.head_geometry import study as shared
from hfproj.studies.head_geometry.claims import deepening, verdict
from hfproj.studies.head_geometry.collapse_claims import conditioned
from hfproj.studies.head_geometry.document import FIGURES, document
from hfproj.studies.head_geometry.figures import draw, over
from hfproj.studies.head_geometry.study import Study

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def run(name, *arguments, out, runs):
    """Run a recipe in this process, with its files below other folders."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        module.RUNS, module.OUT = runs, out
        patch.setattr("sys.argv", [f"{name}.py", *arguments])
        hfproj.cli.run(module.main)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("geometry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "HEAD", {"hidden_dim": 16, "activation": "silu"})
        patch.setattr(models, "OUT_DIM", 16)
        patch.setattr(models, "CALIBRATION_IMAGES", 60)
        kinds = ("rotated views", "rotated views, head only", "untrained")
        patch.setattr(models, "MODELS", {name: models.MODELS[name] for name in kinds})
        patch.setattr(models, "COMPARED", kinds)
        patch.setattr(models, "DEPTHS", kinds[:2])
        for settings in models.TRAINING.values():
            patch.setitem(settings, "steps", 1)
            patch.setitem(settings, "batch", 16)
        patch.setitem(models.TRAINING["head"], "passes", 1)
        patch.setattr(measures, "CONDITIONED_IMAGES", 4)
        for settings, changes in (
            (measures.PROBES, {"train": 60, "test": 20, "mlp_width": 4, "mlp_epochs": 2}),
            (measures.SWEEP, {"images": 4, "points": 4}),
            (measures.ORBITS, {"classes": 3, "images": 2, "rotations": 4, "draws": 1}),
            (analysis.ANALYSIS, {"images": 4, "orbits": 2, "rotations": 3, "hessian_images": 2}),
        ):
            for name, value in changes.items():
                patch.setitem(settings, name, value)
        patch.setattr(shared, "load_image_dataset", few_images(shared.load_image_dataset))
        made = Study("digits", folder / "runs", folder / "results", seeds=[0])
        models.train(made)
        yield made


def few_images(load):
    def limited(name, *, split, limit=None):
        return load(name, split=split, limit=limit or 96)

    return limited


def measured(study, what):
    study.save(what, getattr(measures, what)(study))
    return json.loads((study.out / "results.json").read_text())["digits"][what]


@pytest.mark.long
def test_each_measure_has_a_row_a_model_and_a_figure(study):
    rows = {what: measured(study, what)["rows"] for what in ("guillotine", "curvature", "orbits", "depth")}
    names = {what: [row["model"] for row in of] for what, of in rows.items()}
    assert names["guillotine"] == names["orbits"] == list(models.MODELS)
    assert names["curvature"] == list(models.COMPARED)
    assert names["depth"] == list(models.DEPTHS)
    assert {row["seed"] for of in rows.values() for row in of} == {0}
    figures = {path.stem for path in study.out.glob("*.png")}
    assert figures == {
        "guillotine_linear", "guillotine_mlp", "curvature", "orbits", "compression", "depth", "depth_condition",
        "depth_condition_head_only",
    }  # fmt: skip
    by_model = {row["model"]: row for row in rows["guillotine"]}
    frozen, untrained = by_model["rotated views, head only"], by_model["untrained"]
    assert frozen["rotation_linear_h"] == untrained["rotation_linear_h"]  # the backbone is the same
    assert frozen["rotation_linear_z"] != untrained["rotation_linear_z"]


def test_what_was_measured_is_not_measured_again(study, monkeypatch):
    first = measured(study, "curvature")

    def refuse(*_, **__):
        pytest.fail("measured or trained again")

    for module, name in ((measures, "bent"), (measures, "load"), (models, "attach")):
        monkeypatch.setattr(module, name, refuse)
    models.train(study)
    assert measured(study, "curvature") == first


def test_the_command_measures_and_writes_beside_what_is_there(study):
    measured(study, "curvature")
    run("geometry", "orbits", "--seeds", "0", out=study.out, runs=study.runs)
    results = json.loads((study.out / "results.json").read_text())["digits"]
    assert {"curvature", "orbits"} <= set(results)
    assert results["orbits"]["settings"] == measures.ORBITS


def test_a_missing_adapter_is_one_line(study):
    with pytest.raises(hfproj.UsageError, match=r"no adapter .*rotated_views-7.*train` first"):
        models.load(study, "rotated views", 7)


def test_analysis_of_an_adapter(study, tmp_path, capsys):
    folder = models.adapter_folder(study, "rotated views", 0)
    run("geometry", "adapter", "--adapter", str(folder), "--output_dir", str(tmp_path), out=study.out, runs=study.runs)
    geometry = hfproj.Results.load(tmp_path).geometry
    assert geometry["scalars"]["smallest eigenvalue of its part M"] < 0  # SiLU
    assert set(geometry["orbits"]) == set(geometry["covariance"]) == {"h", "z"}
    assert len(geometry["metric_condition_number"]["hidden.0.linear"]) == analysis.ANALYSIS["images"]
    assert (tmp_path / "report.html").is_file()
    assert not (folder / "results.json").exists()
    assert "compression of rotation orbits" in capsys.readouterr().out


@pytest.mark.long
def test_collapse_and_hessian(tmp_path, monkeypatch):
    small = {"images": 24, "batch": 8, "width": 16, "steps": 3}
    for settings, changes in (
        (collapse.SGD, small),
        (collapse.FLOW, {"images": 4, "width": 8, "time": 0.01, "records": 2, "learning_rate": 1e-3}),
        (collapse.EQUILIBRIUM, {"width": 256, "alphas": [64.0]}),
        (collapse.HESSIAN, {**small, "steps": 4, "every": 2, "probe_images": 2, "lanczos_steps": 60}),
    ):
        for name, value in changes.items():
            monkeypatch.setitem(settings, name, value)
    monkeypatch.setattr(shared, "load_image_dataset", few_images(shared.load_image_dataset))
    runs, out = tmp_path / "runs", tmp_path / "results"
    run("collapse_geometry", "collapse", "--seeds", "0", runs=runs, out=out)
    found = json.loads((out / "results.json").read_text())["digits"]["collapse"]
    assert [(row["head"], row["norm"]) for row in found["sgd"]] == [
        (head, norm) for head in collapse.HEADS for norm in (None, "batch")
    ]
    for row in found["equilibrium"]:
        smooth = row["head"] in ("GELU", "SiLU")
        assert (row["n_neg"][-1] > 0) == smooth
        assert row["rate"] == pytest.approx([-value for value in row["lambda_min"]], rel=1e-2)
    for row in found["flow"]:
        assert len(row["std_z"]) == len(row["times"]) == 3
        assert row["loss"][-1] < row["loss"][0]
        if row["head"] == "linear":
            assert row["drift_flow"] < 1e-2 * row["drift_sgd"]
    run("collapse_geometry", "hessian", "--seeds", "0", runs=runs, out=out)
    runs = json.loads((out / "results.json").read_text())["digits"]["hessian"]["runs"]
    assert [row["step"] for row in runs] == [[0, 2, 4]] * 4
    for row in runs:
        assert all(low < high for low, high in zip(row["lambda_min_h"], row["lambda_max_h"]))
        if row["head"] == "ReLU":
            assert max(map(abs, row["lambda_min_M"])) == 0.0  # no curvature of its own
    kept = json.loads((out / "results.json").read_text())
    kept["digits"]["hessian"]["runs"] = [{**row, "condition_number": [9.0], "rank": [1]} for row in runs]
    (out / "results.json").write_text(json.dumps(kept))
    run("collapse_geometry", "conditioning", "--seeds", "0", runs=tmp_path / "runs", out=out)
    assert json.loads((out / "results.json").read_text())["digits"]["hessian"]["runs"] == runs
    kept["digits"]["hessian"]["runs"][0]["std_h"][0] *= 1.01
    with pytest.raises(hfproj.UsageError, match="to be the recorded one, got another spread of h"):
        collapse.conditioning(shared.Study("digits", tmp_path / "runs", out), kept["digits"]["hessian"]["runs"])
    assert {path.stem for path in out.glob("*.png")} == {
        "collapse_sgd_without_batchnorm", "collapse_sgd_with_batchnorm", "collapse_flow", "collapse_equilibrium",
        "hessian", "hessian_smallest",
    }  # fmt: skip


def test_the_document_has_the_numbers_of_the_committed_results():
    spec = importlib.util.spec_from_file_location("recipe_geometry_table", RECIPES / "geometry_table.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    found = json.loads(recipe.RESULTS.read_text(encoding="utf-8"))["digits"]
    assert recipe.DOCS.read_text(encoding="utf-8").rstrip() == "\n".join(document(found, "digits")).rstrip()
    assert set(FIGURES) == {path.stem for path in recipe.RESULTS.parent.glob("*.png")}
    for line in recipe.DOCS.read_text(encoding="utf-8").splitlines():
        if line.startswith("!["):
            assert (recipe.DOCS.parent / line.rpartition("(")[2].rstrip(")")).is_file(), line


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.0, 1.1, 0.9], "reproduced"),
        ([-1.0, -1.1, -0.9], "not reproduced"),
        ([0.1, 2.0, 0.1], "cannot be judged"),  # one seed stands for the mean
        ([1.0, 1.0, -0.01], "cannot be judged"),
        ([1.0], "cannot be judged"),
    ],
)
def test_a_verdict_asks_all_seeds(differences, expected):
    assert verdict(differences).startswith(expected)


def track(condition, *, std=(1.0, 2.0, 3.0, 4.0), clamped=(10.0, 20.0, 30.0, 40.0), **more):
    """A training whose clamped condition number rises with the spread, whatever the one on the support does."""
    return {"std_h": list(std), "condition_number": condition, "condition_number_clamped": list(clamped), **more}


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0], "reproduced"),
        ([4.0, 3.0, 2.0, 1.0], "not reproduced: the opposite"),
        ([1.0, 1e4, 1e4 + 1e-6, 1e4 + 2e-6], "cannot be judged: it moves by"),  # less than float32 resolves
    ],
)
def test_the_condition_number_on_the_support_decides_and_not_the_clamped_one(condition, expected):
    claim, control = conditioned([track(condition, rank=[7] * 4) for _ in range(3)], "SiLU, usual start", ".3")
    assert claim.verdict.startswith(expected)
    assert claim.claim.endswith("rank 7)")
    assert control.measured == "1.00 ± 0.00"


def test_seeds_that_disagree_and_a_clamped_number_alone_are_not_judged():
    up, down = [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]
    rows = [track(way, rank=[7] * 4) for way in (up, down, up)]
    assert conditioned(rows, "SiLU", ".3")[0].verdict == "cannot be judged: within the spread of seeds"
    alone = [{name: value for name, value in row.items() if name != "rank"} for row in rows]
    assert conditioned(alone, "SiLU", ".3")[0].verdict == "cannot be judged: only the clamped number was recorded"


@pytest.mark.parametrize(("last", "expected"), [(0.9, "yes: at both steps"), (0.4, "no"), (0.5, "cannot be judged")])
def test_variation_of_the_metric_has_to_grow_at_both_steps_of_depth(last, expected):
    values = {"depth 1": 0.0, "rotated views": 0.5, "depth 3": last}
    values |= {"depth 1, head only": 0.0, "rotated views, head only": 0.5, "depth 3, head only": last}
    measures = ("rotation_linear_z", "compression_unit_input", "compression", "ratio_z", "variation")
    rows = [
        {"model": model, "seed": seed, **dict.fromkeys(measures, value + 0.01 * seed)}
        for model, value in values.items()
        for seed in range(3)
    ]
    found = [claim for claim in deepening(rows, rows, rows) if "metric" in claim.claim]
    assert len(found) == 2
    assert all(claim.verdict.startswith(expected) for claim in found)


def test_curves_of_a_logarithmic_axis_are_geometric_over_seeds():
    rows = [{"seed": seed, "step": [0, 1], "std": [value, 4.0]} for seed, value in enumerate((1.0, 10.0, 100.0))]
    x, mean, std = over(rows, "step", "std", log=True)
    assert x == [0, 1]
    assert mean == pytest.approx([10.0, 4.0])
    assert std == pytest.approx([10 * 2.302585093, 0.0])  # 10 · ln 10
    assert over(rows, "step", "std")[1] == pytest.approx([37.0, 4.0])


@pytest.mark.long
def test_committed_figures_can_be_drawn_from_the_committed_results(tmp_path):
    found = json.loads((RECIPES / "results" / "geometry" / "results.json").read_text(encoding="utf-8"))["digits"]
    draw(found, tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == set(FIGURES)
