"""recipes/convert.py from a checkpoint file to a folder with a card, and recipes/geometry.py on what it wrote."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from official_files import CASES
from official_layers import Builder, wrapped
from transformers import AutoImageProcessor

import hfproj
from hfproj import cli
from hfproj.converters import FAMILIES
from hfproj.studies.head_geometry import analysis

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def load(name, patch):
    spec = importlib.util.spec_from_file_location(f"recipe_{Path(name).name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def run(*flags):
    with pytest.MonkeyPatch.context() as patch:
        module = load("convert", patch)
        patch.setattr("sys.argv", ["convert.py", *map(str, flags)])
        cli.run(module.main)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    builder = Builder()
    width = builder.resnet("encoder_q.", channels=(64, 128, 256, 512), layers=(2, 2, 2, 2), expansion=1)
    builder.mlp("encoder_q.fc.", width, 32, 16)
    place = tmp_path_factory.mktemp("convert")
    torch.save({"state_dict": {**wrapped(builder.tensors), "module.queue": torch.ones(2)}}, place / "moco.pth.tar")
    run(place / "moco.pth.tar", "--method", "moco_v2", "--output_dir", place / "out", "--license", "cc-by-nc-4.0",
        "--source", "https://example.org/moco.pth.tar")  # fmt: skip
    return place / "out"


def test_what_the_recipe_writes(folder):
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "results.json", "README.md", "preprocessor_config.json",
        "arguments.yaml",
    }  # fmt: skip
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "cc-by-nc-4.0"
    assert card.data.base_model is None  # timm's resnet18 without its weights is none
    for said in (
        "Converted from a moco_v2 checkpoint of facebookresearch/moco, from https://example.org/moco.pth.tar",
        "query network", "keys of past batches: 1 tensors", "SHA-256", "resnet18", "Nothing was measured",
        "--method moco_v2",
    ):  # fmt: skip
        assert said in card.content, said
    everything = "".join(file.read_text() for file in folder.iterdir() if file.suffix in (".json", ".md"))
    assert str(folder.parent) not in everything
    origin = json.loads((folder / "results.json").read_text())["config"]["conversion"]
    assert (origin["source"], origin["read"]["head"]) == ("facebookresearch/moco", 4)
    assert len(origin["sha256"]) == 64


def test_it_loads_as_it_is(folder):
    model = hfproj.from_pretrained(folder)
    assert isinstance(model.get_base_model(), torch.nn.Module)
    assert (model.peft_config["default"].in_dim, model.peft_config["default"].out_dim) == (512, 16)
    processor = AutoImageProcessor.from_pretrained(folder)
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]


def test_geometry_of_the_converted_head(folder, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        module = load("geometry", patch)
        for name, value in {"images": 2, "head_images": 2, "hessian_images": 1}.items():
            patch.setitem(analysis.ANALYSIS, name, value)
        patch.setattr("sys.argv", ["geometry.py", "head", "--adapter", str(folder), "--output_dir", str(tmp_path)])
        cli.run(module.main)
    found = hfproj.Results.load(tmp_path).geometry
    singular = found["jacobian"]["singular_values"]
    assert len(singular) == 16
    assert singular == sorted(singular, reverse=True)
    assert found["scalars"]["nullity of the metric (median)"] == 512 - 16
    assert found["scalars"]["smallest eigenvalue of its part M"] == 0  # ReLU
    assert list(found["metric_condition_number"]) == ["hidden.0.linear", "hidden.0.act", "last.linear"]
    assert "effective rank of J" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(("flags", "said"), [
    (("--method", "moco_v1"), "Its keys are those of method='moco_v2'."),
    (("--method", "moco"), "Unknown method 'moco'. Did you mean"),
    (("--method", "moco_v2", "--d0", 3), "'moco_v2' has no option 'd0'"),
    (("--method", "moco_v2", "--license", "My Licence"), "My Licence"),
])  # fmt: skip
def test_errors_are_one_line(folder, tmp_path, capsys, flags, said):
    with pytest.raises(SystemExit) as ended:
        run(folder.parent / "moco.pth.tar", *flags, "--output_dir", tmp_path / "out")
    assert ended.value.code
    message = capsys.readouterr().err.strip() or str(ended.value)
    assert said in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_the_table_of_the_docs():
    text = (RECIPES.parent / "docs" / "convert.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    found = {row[0].strip("`"): row[1] for row in rows}
    assert found == {name: family.source for name, family in FAMILIES.items()}
    for name in FAMILIES:
        assert f"`{name}`" in text


def test_the_committed_differences_at_official_size():
    results = RECIPES / "benchmarks" / "results"
    rows = json.loads((results / "convert.json").read_text(encoding="utf-8"))["layouts"]
    with pytest.MonkeyPatch.context() as patch:
        table = load("benchmarks/convert", patch).table(rows)
    assert (results / "convert.md").read_text(encoding="utf-8").splitlines() == table
    assert set(rows) == set(CASES)
    for name, row in rows.items():
        assert row["reloaded"] == 0
        registers = "registers" in name or "chunked SwiGLU" in name  # a sum that is rounded to float32
        assert max(row["difference"].values()) < (1e-5 if registers else 1e-10), name


def test_the_list(capsys):
    run("--list")
    assert len(capsys.readouterr().out.splitlines()) == 13
