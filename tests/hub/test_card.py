import sys

import numpy as np
import pytest
from huggingface_hub import ModelCard

from hfproj.errors import UsageError
from hfproj.hub.card import render_card, write_card
from hfproj.results import Measurement, Results, pack_outcomes


def a_result(base="facebook/dinov2-small", before=0.8, after=0.9, dataset="uoft-cs/cifar10", **changes):
    measurements = []
    for when, value in (("before", before), ("after", after)):
        protocol = {"k": 20, "temperature": 0.07, "bank": 1000, "queries": 100, "seed": 0}
        outcomes = pack_outcomes(np.arange(100) < 100 * value)
        measurements += [
            Measurement("knn", "h", when, value, dataset, "accuracy", protocol, outcomes),
            Measurement("rankme", "z", when, 10 * value, dataset, "", {"rows": 100, "eps": 1e-7, "seed": 0}),
        ]
    settings = {
        "config": {
            "base_model": base,
            "adapter": {"head": "mlp", "out_dim": 128, "backbone_adapter": {"peft_type": "LORA"}},
        },
        "seeds": [0],
        "command": "python simclr_vit.py --epochs 3",
        "measurements": measurements,
        "spectra": {"h before": [1.0, 0.1], "h after": [1.0, 0.5]},
    }
    return Results(**{**settings, **changes})


def test_front_matter_is_what_the_hub_reads():
    data = ModelCard(render_card(a_result(), repo_id="me/dinov2-small-simclr")).data
    assert data.library_name == "peft"
    assert data.base_model == "facebook/dinov2-small"
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "image-feature-extraction"
    assert {"hfproj", "projection-head", "self-supervised-learning"} <= set(data.tags)
    assert data.datasets == ["uoft-cs/cifar10"]
    assert data.model_name == "dinov2-small-simclr"
    [knn] = [r for r in data.eval_results if r.metric_name.startswith("20-NN accuracy of h, after")]
    assert knn.metric_value == 0.9
    assert knn.metric_type == "accuracy"
    assert "temperature 0.07, bank 1000" in knn.metric_name
    assert len(data.eval_results) == 4


@pytest.mark.parametrize("base", ["./my_vit", "vit_nano", "./vit_nano", "hfproj/vit_nano", "./a/b", None, ""])
def test_no_base_model_that_the_hub_does_not_have(base):
    text = render_card(a_result(base=base))
    assert "base_model" not in text.split("---")[1]
    assert ("research use" in text and "Apache-2.0" in text) == ("vit_nano" in (base or ""))


def test_a_timm_id_and_a_local_data_set():
    data = ModelCard(render_card(a_result(base="hf-hub:timm/vit_tiny", dataset="digits"))).data
    assert data.base_model == "timm/vit_tiny"
    assert data.datasets is None
    assert {r.dataset_name for r in data.eval_results} == {"digits"}


def test_the_body_says_what_a_reader_needs():
    text = render_card(a_result(notes=["Single run."]), repo_id="me/x")
    for part in (
        "# x",
        "| 20-NN accuracy | 0.8000 | 0.9000 | – | – |",
        "import hfproj",
        'hfproj.from_pretrained("me/x")',
        "python simclr_vit.py --epochs 3",
        "temperature = 0.07",
        "LORA",
        "torch ",
        "Single run.",
        "(`mlp`, z of width 128)",
    ):
        assert part in text
    assert "worse" not in text
    assert "spectrum.png" not in text


def test_a_worse_representation_is_said_first():
    text = render_card(a_result(before=0.9, after=0.8))
    assert "**The representation got worse**: 20-NN accuracy of h went from 0.9000 to 0.8000" in text
    assert "difference -0.1000, 95 % interval -0.16" in text
    assert text.index("got worse") < text.index("## Measured")
    bare = [Measurement("probe", "h", when, v, unit="accuracy") for when, v in (("before", 0.9), ("after", 0.8))]
    text = render_card(a_result(measurements=bare))
    assert "probe of h went from 0.9000 to 0.8000. Use" in text


def test_a_difference_within_its_interval_is_no_gain_and_no_loss():
    for after in (0.8, 0.79, 0.81):
        text = render_card(a_result(before=0.8, after=after))
        assert "**No gain was measured**" in text
        assert "worse" not in text


def test_write_card(tmp_path):
    path = write_card(a_result(), tmp_path, repo_id="me/x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "results.json", "spectrum.png"]
    assert "(spectrum.png)" in path.read_text()
    again = render_card(Results.load(tmp_path), repo_id="me/x", picture="spectrum.png")
    assert path.read_text() == again
    with pytest.raises(UsageError, match="no folder"):
        write_card(a_result(), tmp_path / "missing")


def test_write_card_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "spectrum.png" not in write_card(a_result(), tmp_path).read_text()


def test_nothing_measured_and_no_machine_paths(tmp_path):
    assert "Nothing was measured" in render_card(Results())
    result = a_result(command="python /home/someone/simclr.py", base="/home/someone/vit")
    assert "/home/" not in write_card(result, tmp_path).read_text()
