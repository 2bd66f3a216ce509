"""``hfproj autopsy``: table, JSON, picture and card of a saved adapter."""

import json
import sys

import pytest
from peft import get_peft_model

import hfproj
from hfproj.commands import program
from hfproj.results.inside import Autopsy


def command(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["hfproj", "autopsy", *map(str, words)])
    monkeypatch.setattr("sys.path", list(sys.path))
    program.main()


@pytest.fixture
def folder(tmp_path):
    options = {"hidden_dim": 24, "depth": 3, "norm": None}
    config = hfproj.ProjectionHeadConfig(head_options=options, out_dim=8)
    model = get_peft_model(hfproj.load_backbone("vit_nano"), config)
    model.save_pretrained(str(tmp_path / "adapter"))
    hfproj.Results(config={"base_model": "vit_nano"}).save(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_it_writes_what_it_prints(folder, monkeypatch, capsys):
    command(monkeypatch, folder, "digits", "--limit", 60, "--views", "rotation_degrees=30,scale=null", "--card")
    said = capsys.readouterr().out
    found = Autopsy.from_dict(json.loads((folder / "autopsy.json").read_text()))
    assert found.table() in said
    assert [layer.name for layer in found.layers][1:] == ["h", "head.0", "head.1", "z"]
    assert "rotation" in [one.transform for one in found.invariance.moved]
    assert (folder / "autopsy.png").stat().st_size > 10_000
    assert "### Inside the head" in (folder / "README.md").read_text()
    assert hfproj.Results.load(folder).geometry["autopsy"]["cuts"]


def test_elsewhere_and_mistakes(folder, monkeypatch, capsys, tmp_path):
    command(monkeypatch, folder, "digits", "--limit", 40, "--out", tmp_path / "out", "--layers", "0,2")
    assert (tmp_path / "out" / "autopsy.json").is_file()
    assert not (folder / "autopsy.json").exists()
    (folder / "results.json").unlink()
    with pytest.raises(SystemExit):
        command(monkeypatch, folder, "digits", "--card")
    assert "results.json" in capsys.readouterr().err
