"""The recipes run, write what they promise, and end in one line where the command is wrong."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from peft.utils import load_peft_weights

import hfproj
from hfproj import cli

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SMALL = ("--max_steps", 2, "--train_limit", 64, "--test_limit", 64, "--per_device_train_batch_size", 32, "--use_cpu", 1)


def run(recipe, *flags):
    """Run a recipe in this process, since most of a command's time here would go into imports."""
    spec = importlib.util.spec_from_file_location(f"recipe_{recipe}", RECIPES / f"{recipe}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        patch.setattr("sys.argv", [f"{recipe}.py", *map(str, flags)])
        spec.loader.exec_module(module)
        cli.run(module.main)


def as_command(recipe, *flags):
    command = [sys.executable, str(RECIPES / f"{recipe}.py"), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simclr") / "out"
    flags = ("--output_dir", folder, "--save_strategy", "steps", "--save_steps", 2)
    done = as_command("simclr_vit", *SMALL, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder.parent / "stdout").write_text(done.stdout)
    return folder


def test_what_the_recipe_writes(folder):
    printed = (folder.parent / "stdout").read_text()
    assert all(word in printed for word in ("before", "after", "RankMe", f"Saved to {folder}")), printed
    files = {p.name for p in folder.iterdir()}
    assert files == {
        "adapter_config.json", "adapter_model.safetensors", "results.json", "history.parquet", "report.html",
        "spectrum.png", "training.png", "README.md", "objective.safetensors", "checkpoint-2", "arguments.yaml",
        "views.png", "neighbours.png", "map.png",
    }  # fmt: skip
    assert not list(folder.rglob("*.bin"))
    assert (folder / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3  # views, neighbours and map of the images
    assert len(page) < 3_000_000
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert not any(name in card for name in ("views.png", "neighbours.png", "map.png"))
    assert str(folder) not in card


def test_its_arguments_give_the_same_run(folder):
    given = yaml.safe_load((folder / "arguments.yaml").read_text())
    flags = dict(zip(SMALL[::2], SMALL[1::2]))
    expected = {name.lstrip("-"): value for name, value in flags.items()} | {"use_cpu": True}
    assert given == expected | {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 2}


def test_its_results(folder):
    results = hfproj.Results.load(folder)
    stored = json.loads((folder / "results.json").read_text())
    assert stored["config"]["recipe"]["head"] == "mlp"
    found = {(m.name, m.layer, m.when): m for m in results.measurements}
    for what in ("knn", "rankme", "representation_std", "positive_cosine"):
        for layer in ("h", "z"):
            before, after = (found[what, layer, when] for when in ("before", "after"))
            assert np.isfinite([before.value, after.value]).all()
            assert before.protocol == after.protocol
    assert found["knn", "h", "before"].protocol["bank"] == 64
    assert found["rankme", "z", "after"].value != found["rankme", "z", "before"].value
    assert str(folder.parent) not in (folder / "results.json").read_text()


def test_its_adapter_gives_the_numbers_of_the_results(folder):
    model = hfproj.from_pretrained(folder)
    test = hfproj.load_image_dataset("digits", split="test", limit=64)
    features = hfproj.extract_features(model, test)
    stored = {(m.name, m.layer, m.when): m.value for m in hfproj.Results.load(folder).measurements}
    assert hfproj.diagnostics.rankme(features.z) == pytest.approx(stored["rankme", "z", "after"], rel=1e-4)
    head = hfproj.load_head(folder)
    with torch.no_grad():
        torch.testing.assert_close(head(features.h), features.z)
    final, last = load_peft_weights(str(folder)), load_peft_weights(str(folder / "checkpoint-2"))
    assert final.keys() == last.keys()
    assert all(torch.equal(final[name], last[name]) for name in final)


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """A parquet file with a column that is no image."""
    file = tmp_path_factory.mktemp("wrong") / "train.parquet"
    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(str(file))
    return file


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--backbone no/such", "No backbone could be loaded from 'no/such'"),
        ("--dataset no/such/place", "no file or folder 'no/such/place'"),
        ("--head mpl", "Unknown head 'mpl'. Did you mean 'mlp'?"),
        ("--dataset WRONG --image_column text --holdout 1", "column 'text'"),
        ("--push_to_hub", "HF_HUB_OFFLINE=1 keeps this process from reaching the Hub"),
        ("--push_to_hub me/mine", "HF_HUB_OFFLINE=1 keeps this process from reaching the Hub"),
        ("--hub_strategy all_checkpoints", "nothing pickled is pushed"),
        ("--continue_from no/such/folder", "neither a folder nor a Hub repository"),
        ("--prototypes many", "or JSON in braces, got 'many'"),
        ("--objective bayol", "Unknown objective 'bayol'. Did you mean 'byol'?"),
        ("--regularizers werank=0.1,koleo", "or JSON in braces, got 'koleo'"),
        ("--preset simclr_cifa", "Did you mean 'simclr_cifar'?"),
        ("--no_such_flag 3", "Unknown arguments: --no_such_flag"),
        ("--hub_tok enterprise-token", "Unknown arguments: --hub_tok (did you mean --hub_token?)"),
        ("--trainable 2", "trains the backbone itself"),
        ("--train_limit 8", "fewer than one batch"),
    ],
)
def test_errors_are_one_line(tmp_path, wrong, flags, message, capsys):
    line = [wrong if flag == "WRONG" else flag for flag in flags.split()]
    with pytest.raises(SystemExit) as end:
        run("simclr_vit", *SMALL, "--output_dir", tmp_path, *line)
    assert end.value.code == 2
    *bars, last = capsys.readouterr().err.splitlines()  # progress of loading may come before
    assert last.startswith("error: ")
    assert message in last
    assert not any("Traceback" in line or line.startswith("error:") for line in bars)


@pytest.mark.long
def test_last_blocks_without_lora(tmp_path):
    run("simclr_vit", *SMALL, "--lora_r", 0, "--trainable", 2, "--output_dir", tmp_path, "--max_steps", 1)
    names = load_peft_weights(str(tmp_path))
    assert any(".hfproj.backbone." in name for name in names)
    assert not any("lora" in name for name in names)


@pytest.mark.long
def test_a_preset_and_other_methods(tmp_path):
    run("simclr_vit", *SMALL, "--output_dir", tmp_path, "--preset", "werank_last_layer", "--max_steps", 1)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["head"], config["objective"]["name"]) == (hfproj.get_preset("werank_last_layer").head, "nt_xent")
    assert config["regularizers"]["werank"]["layers"] == "last"
    flags = ("--objective", "swav", "--prototypes", 12, "--regularizers", "koleo.weight=0.1,koleo.on=z")
    run(
        "simclr_vit",
        *SMALL,
        "--output_dir",
        tmp_path,
        *flags,
        "--views",
        "local_views=2,local_size=16",
        "--max_steps",
        1,
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["objective"], config["prototypes"]) == ({"name": "swav"}, 12)
    assert config["regularizers"] == {"koleo": {"weight": 0.1, "on": "z"}}


def test_accelerate_loop(capsys):
    assert len((RECIPES / "accelerate_loop.py").read_text().splitlines()) < 80
    run("accelerate_loop", "--epochs", 1, "--limit", 64, "--batch_size", 32)
    *steps, result = capsys.readouterr().out.splitlines()
    assert len(steps) == 2
    assert result.startswith("20-NN accuracy of h: 0.")


def test_probe_of_an_adapter_beside_its_backbone(folder, tmp_path, capsys):
    flags = {"model": folder, "probes": "knn,linear", "probe_options": "knn.k=5,linear.l2=0.01", "layers": "0,5"}
    flags |= {"train_limit": 48, "test_limit": 32, "output_dir": tmp_path, "device": "cpu"}
    run("probe", *(text for name, value in flags.items() for text in (f"--{name}", value)))
    printed = capsys.readouterr().out
    results = hfproj.Results.load(tmp_path)
    inner, other, *rest = results.layers
    assert rest == ["h", "z"]
    for layer in (inner, other, "h"):
        assert results.value("knn", layer, "before", k=5) <= 1
        assert results.value("linear", layer, "after", l2=0.01) <= 1
    with pytest.raises(hfproj.UsageError, match="No measurement 'knn z before'"):
        results.value("knn", "z", "before")
    assert results.value("rankme", "h", "before") != results.value("rankme", "h", "after")
    assert "5-NN accuracy of h on digits" in printed
    assert "layer by layer" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "results.md").read_text() == results.to_markdown() + "\n"


def test_probe_without_labels_and_of_a_bare_backbone(tmp_path, capsys):
    run("probe", "--model", "vit_nano", "--labels", "false", "--test_limit", 32, "--output_dir", tmp_path)
    names = {(m.name, m.layer) for m in hfproj.Results.load(tmp_path).measurements}
    assert {("rankme", "h"), ("alpha_req", "h"), ("uniformity", "h")} <= names
    assert {layer for _, layer in names} == {"h"}
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("probe", "--model", "vit_nano", "--probe_options", "mlp.hidden=8")
    assert "error: --probe_options has options of 'mlp', which is not among" in capsys.readouterr().err


def pictures(folder, count, broken=()):
    folder.mkdir(parents=True)
    for number, item in enumerate(hfproj.load_image_dataset("digits", split="train", limit=count)):
        item["image"].save(folder / f"{number:03}.png")
    for number in broken:
        (folder / f"{number:03}.png").write_bytes(b"no picture")


def test_probe_of_a_folder_without_a_test_split_holds_images_out(tmp_path, capsys):
    pictures(tmp_path / "images" / "one", 40)
    (tmp_path / "images" / "two").mkdir()
    for number in range(20, 40):
        (tmp_path / "images" / "one" / f"{number:03}.png").rename(tmp_path / "images" / "two" / f"{number:03}.png")
    run("probe", "--model", "vit_nano", "--probes", "knn", "--datasets", tmp_path / "images", "--output_dir", tmp_path)
    assert "has no test split: 8 of its images are measured on" in capsys.readouterr().out
    assert hfproj.Results.load(tmp_path).select("knn", "h", "after")[0].protocol["bank"] == 32


def test_adapting_to_few_images_some_of_which_are_broken(tmp_path, capsys, monkeypatch):
    """Batches fit, and what is measured goes without the broken ones, as what is trained on does."""
    monkeypatch.setattr("hfproj.reporting.write_image_pictures", lambda *args, **options: [])
    monkeypatch.setattr("hfproj.report", lambda folder: None)
    pictures(tmp_path / "images", 60, broken=range(0, 60, 6))
    places = ("--dataset", tmp_path / "images", "--output_dir", tmp_path / "out", "--holdout", 30, "--max_steps", 2)
    run("adapt", *places, "--on_bad_image", "skip", "--use_cpu", 1)
    printed = capsys.readouterr().out
    assert "30 images are fewer than a batch: batches of 15 on each process instead." in printed
    held_out = int(re.search(r"30 images to train on, (\d+) others to measure on", printed)[1])
    assert 20 <= held_out < 30
    results = hfproj.Results.load(tmp_path / "out")
    assert results.select("rankme", "h", "after")[0].protocol["rows"] == held_out
    assert {m.unit for m in results.measurements} == {""}
    assert results.notes[0].endswith(", as far as can be told without labels.")


ADAPT = ("--max_steps", 4, "--train_limit", 64, "--per_device_train_batch_size", 32, "--use_cpu", 1, "--save_steps", 1)


@pytest.mark.long
def test_adapting_to_a_folder_without_labels(tmp_path, capsys):
    """Photographs in a folder, a few sorted ones to judge by, and a guard that ends the run at a checkpoint before."""
    for split, count in (("train", 120), ("test", 40)):
        for number, item in enumerate(hfproj.load_image_dataset("digits", split=split, limit=count)):
            folder = tmp_path / ("plain" if split == "train" else f"sorted/{item['label'] % 2}")
            folder.mkdir(parents=True, exist_ok=True)
            item["image"].save(folder / f"{number}.jpg")
    places = ("--dataset", tmp_path / "plain", "--labelled", tmp_path / "sorted", "--output_dir", tmp_path / "out")
    with pytest.warns(hfproj.CollapseWarning, match="The adapter is that of checkpoint-1 again"):
        run("adapt", *ADAPT, *places, "--holdout", 40, "--guard_every", 1, "--least_overlap", 0.999)
    printed = capsys.readouterr().out
    assert "64 images to train on, 40 others to measure on." in printed
    results = hfproj.Results.load(tmp_path / "out")
    assert results.geometry["collapse"]["restored"] == "checkpoint-1"
    final, first = (load_peft_weights(str(tmp_path / "out" / name)) for name in ("", "checkpoint-1"))
    assert all(torch.equal(final[name], tensor) for name, tensor in first.items())
    verdict, *reasons = results.notes
    assert verdict in {f"Verdict: {word}." for word in ("better", "worse", "cannot tell")}
    assert [reason.partition(":")[0].partition(", ")[0] for reason in reasons[2:5]] == ["Without labels"] * 3
    assert all(word in reasons[number] for number, word in enumerate(("20-NN", "linear")))
    assert verdict in printed
    assert verdict in (tmp_path / "out/README.md").read_text()


@pytest.mark.long
def test_adapting_without_labels_says_how_far_it_can_tell(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hfproj.reporting.write_image_pictures", lambda *args, **options: [])  # what takes longest
    monkeypatch.setattr("hfproj.report", lambda folder: None)
    run("adapt", *ADAPT, "--use_labels", "false", "--holdout", 40, "--output_dir", tmp_path, "--max_steps", 2)
    results = hfproj.Results.load(tmp_path)
    assert {m.unit for m in results.measurements} == {""}
    assert results.notes[0].endswith(", as far as can be told without labels.")
    assert "on digits it ranked checkpoints as a k-NN did by +0.85 (+0.26 to +0.96)" in "".join(results.notes)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("adapt", *ADAPT, "--labelled", "digits", "--use_labels", "false", "--output_dir", tmp_path)
    assert "--labelled digits has no effect with --use_labels false" in capsys.readouterr().err
