"""A value of another type gets one clear UsageError. In a process of its own: the tests' beartype would be first."""

import tempfile
import warnings

import forked
import pytest

import hfproj
from hfproj import Results, diagnostics, geometry


def answers():
    """Return what each call says."""
    warnings.simplefilter("ignore")
    rows, folder = [[1.0, 2.0], [3.0, 4.0]], tempfile.mkdtemp()
    calls = {
        "report": lambda: hfproj.report(3),
        "write_card": lambda: hfproj.write_card(3, folder),
        "write_card without a folder": lambda: hfproj.write_card(Results(), 3),
        "save": lambda: Results().save(3),
        "load": lambda: Results.load(None),
        "merge": lambda: Results().merge({}),
        "evaluate": lambda: hfproj.evaluate(3, test=rows),
        "extract_features": lambda: hfproj.extract_features(3, rows),
        "load_backbone": lambda: hfproj.load_backbone(3),
        "rankme": lambda: diagnostics.rankme(rows),
        "positive_cosine": lambda: diagnostics.positive_cosine([rows, rows]),
        "lidar": lambda: diagnostics.lidar([rows, rows]),
        "weight_inequality": lambda: diagnostics.weight_inequality([1.0]),
        "layer_inequality": lambda: diagnostics.layer_inequality(rows),
        "linear_cka": lambda: hfproj.features.linear_cka(rows, rows),
        "orbit_metrics": lambda: geometry.orbit_metrics([rows, rows]),
        "compression": lambda: geometry.compression([rows, rows], [rows, rows]),
        "jacobian": lambda: geometry.jacobian(hfproj.create_head("linear", in_dim=2, out_dim=2).eval(), rows),
        "head": lambda: hfproj.create_head("linear", in_dim=2, out_dim=2)(rows),
        "probe": lambda: hfproj.KNNProbe().fit(rows, [0, 1]),
        "export": lambda: hfproj.export_program(3, 3),
        "layer": lambda: hfproj.ProjectionHeadConfig(layer="last"),
        "head's name": lambda: hfproj.ProjectionHeadConfig(head=["mlp"]),
        "head_options": lambda: hfproj.ProjectionHeadConfig(head_options=[1]),
        "backbone_adapter": lambda: hfproj.ProjectionHeadConfig(backbone_adapter="lora"),
    }
    said = {}
    for name, call in calls.items():
        try:
            said[name] = repr(call())
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


@pytest.fixture(scope="module")
def said():
    return forked.returned(answers)[0]


def test_a_value_of_another_type_is_refused_in_words(said):
    assert {
        n: text for n, text in said.items() if not text.startswith("UsageError: Expected ") or "; " not in text
    } == {}
    assert (
        said["rankme"] == "UsageError: Expected features as Tensor, got list; make a tensor of them: torch.tensor(…)."
    )
