"""The study of the geometry of heads, with settings that finish in seconds, and the document of its numbers."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import hfproj

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def loaded(name, patch, tmp_path=None):
    """Return a recipe as a module that keeps its files below `tmp_path`."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    if tmp_path is not None:
        module.RUNS, module.OUT = tmp_path / "runs", tmp_path / "results"
    return module


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        module = loaded("geometry", patch, tmp_path_factory.mktemp("geometry"))
        module.HEAD, module.OUT_DIM = {"hidden_dim": 16, "activation": "silu"}, 16
        kinds = ("rotated views", "rotated views, head only", "untrained")
        module.MODELS = {name: module.MODELS[name] for name in kinds}
        module.COMPARED, module.DEPTHS = kinds, kinds[:2]
        for settings in module.TRAINING.values():
            settings |= {"steps": 1, "batch": 16}
        module.TRAINING["head"]["passes"] = 1
        module.PROBES |= {"train": 60, "test": 20, "mlp_width": 4, "mlp_epochs": 2}
        module.SWEEP |= {"images": 4, "points": 4}
        module.ORBITS |= {"classes": 3, "images": 2, "rotations": 4, "draws": 1}
        module.ANALYSIS |= {"images": 4, "orbits": 2, "rotations": 3, "hessian_images": 2}
        patch.setattr(hfproj, "load_image_dataset", few_images(hfproj.load_image_dataset))
        module.train("digits", [0])
        yield module


def few_images(load):
    def limited(name, *, split, limit=96):
        return load(name, split=split, limit=limit)

    return limited


def measured(study, what):
    study.save("digits", what, getattr(study, what)("digits", [0]))
    return json.loads((study.OUT / "results.json").read_text())["digits"][what]


def test_each_measure_has_a_row_a_model_and_a_figure(study):
    rows = {what: measured(study, what)["rows"] for what in ("guillotine", "curvature", "orbits", "depth")}
    models = {what: [row["model"] for row in of] for what, of in rows.items()}
    assert models["guillotine"] == models["orbits"] == list(study.MODELS)
    assert models["curvature"] == list(study.COMPARED)
    assert models["depth"] == list(study.DEPTHS)
    assert {row["seed"] for of in rows.values() for row in of} == {0}
    figures = {path.stem for path in study.OUT.glob("*.png")}
    assert figures == {
        "guillotine_linear", "guillotine_mlp", "curvature", "orbits", "compression", "depth", "depth_condition"
    }  # fmt: skip
    by_model = {row["model"]: row for row in rows["guillotine"]}
    frozen, untrained = by_model["rotated views, head only"], by_model["untrained"]
    assert frozen["rotation_linear_h"] == untrained["rotation_linear_h"]  # the backbone is the same
    assert frozen["rotation_linear_z"] != untrained["rotation_linear_z"]


def test_what_was_measured_is_not_measured_again(study, monkeypatch):
    first = measured(study, "curvature")

    def refuse(*_, **__):
        pytest.fail("measured or trained again")

    for name in ("bent", "load", "attach"):
        monkeypatch.setattr(study, name, refuse)
    study.train("digits", [0])
    assert measured(study, "curvature") == first


def test_a_missing_adapter_is_one_line(study):
    with pytest.raises(hfproj.UsageError, match=r"no adapter .*rotated_views-7.*train` first"):
        study.load("digits", "rotated views", 7)


def test_analysis_of_an_adapter(study, tmp_path, capsys):
    folder = study.adapter_folder("digits", "rotated views", 0)
    study.adapter(str(folder), "digits", str(tmp_path))
    geometry = hfproj.Results.load(tmp_path).geometry
    assert geometry["scalars"]["smallest eigenvalue of its part M"] < 0  # SiLU
    assert set(geometry["orbits"]) == set(geometry["covariance"]) == {"h", "z"}
    assert len(geometry["metric_condition_number"]["hidden.0.linear"]) == study.ANALYSIS["images"]
    assert (tmp_path / "report.html").is_file()
    assert not (folder / "results.json").exists()
    assert "compression of rotation orbits" in capsys.readouterr().out


def test_collapse_and_hessian(tmp_path, monkeypatch):
    module = loaded("collapse_geometry", monkeypatch, tmp_path)
    module.SGD |= {"images": 24, "batch": 8, "width": 16, "steps": 3}
    module.FLOW |= {"images": 4, "width": 8, "time": 0.01, "records": 2, "learning_rate": 1e-3}
    module.EQUILIBRIUM |= {"width": 256, "alphas": [64.0]}
    module.HESSIAN |= {**module.SGD, "steps": 4, "every": 2, "probe_images": 2, "lanczos_steps": 60}
    patched = few_images(hfproj.load_image_dataset)
    monkeypatch.setattr(hfproj, "load_image_dataset", patched)
    found = module.collapse("digits", [0])
    assert [(row["head"], row["norm"]) for row in found["sgd"]] == [
        (head, norm) for head in module.HEADS for norm in (None, "batch")
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
    runs = module.hessian("digits", [0])["runs"]
    assert [row["step"] for row in runs] == [[0, 2, 4]] * 4
    for row in runs:
        assert all(low < high for low, high in zip(row["lambda_min_h"], row["lambda_max_h"]))
        if row["head"] == "ReLU":
            assert max(map(abs, row["lambda_min_M"])) == 0.0  # no curvature of its own
    assert {path.stem for path in module.OUT.glob("*.png")} == {
        "collapse_sgd_without_batchnorm", "collapse_sgd_with_batchnorm", "collapse_flow", "collapse_equilibrium",
        "hessian", "hessian_smallest",
    }  # fmt: skip


def test_the_document_has_the_numbers_of_the_committed_results(monkeypatch):
    module = loaded("geometry_table", monkeypatch)
    found = json.loads(module.RESULTS.read_text(encoding="utf-8"))["digits"]
    assert module.DOCS.read_text(encoding="utf-8").rstrip() == "\n".join(module.document(found, "digits")).rstrip()
    for line in module.DOCS.read_text(encoding="utf-8").splitlines():
        if line.startswith("!["):
            assert (module.DOCS.parent / line.rpartition("(")[2].rstrip(")")).is_file(), line


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
def test_a_verdict_asks_all_seeds(differences, expected, monkeypatch):
    assert loaded("geometry_table", monkeypatch).verdict(differences).startswith(expected)
