"""The card: what the Hub reads of it, and what people read."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from card_results import ROWS, a_result, blocks, body, knn, rank
from huggingface_hub import ModelCard, parse_eval_result_entries
from loopback_card import complaints

import hfproj
from hfproj import filenames
from hfproj.errors import UsageError
from hfproj.reporting.card import render_card, write_card, write_eval_results
from hfproj.reporting.metadata import modality_of
from hfproj.results import Measurement, Results, paired_interval

CARDS = sorted(path.parent for path in (Path(__file__).resolve().parents[2] / "model_cards").glob("*/results.json"))
DIGITS = next(path for path in CARDS if path.name == "vit_nano_digits_simclr")


def test_front_matter_is_what_the_hub_reads():
    data = ModelCard(render_card(a_result(), repo_id="me/dinov2-small-simclr")).data
    assert data.library_name == "peft"
    assert data.base_model == "facebook/dinov2-small"
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert data.pipeline_tag == "image-feature-extraction"
    assert data.tags == ["hfproj", "projection-head", "self-supervised-learning", "peft", "lora", "nt_xent"]
    assert data.datasets == ["uoft-cs/cifar10"]
    assert data.model_name == "dinov2-small-simclr"
    assert data.license is None


def test_the_licence_is_the_authors_choice(tmp_path):
    assert "The author chose no licence." in render_card(a_result())
    for text in (render_card(a_result(), license="mit"), render_card(a_result(config={"license": "mit"}))):
        assert ModelCard(text).data.license == "mit"
        assert "no licence" not in text
    write_card(a_result(), tmp_path, license="mit")
    assert Results.load(tmp_path).config["license"] == "mit"
    with pytest.raises(UsageError, match=r"such as 'apache-2\.0'"):
        render_card(a_result(), license="Apache 2.0")
    with pytest.raises(UsageError, match="got 'x: y'"):
        write_card(a_result(), tmp_path, license="x: y")


@pytest.mark.parametrize(
    "base",
    ["./my_vit", "vit_nano", "./vit_nano", "hfproj/vit_nano", "./a/b", "a/b/c", "a--b/c", "../x", None, "", "é/x"],
)
def test_no_base_model_that_the_hub_does_not_have(base):
    text = render_card(a_result(base=base))
    assert ModelCard(text).data.base_model is None
    assert ("research use" in text and "Apache-2.0" in text) == ("vit_nano" in (base or ""))


@pytest.mark.parametrize(
    ("base", "named"), [("hf-hub:timm/vit_tiny", "timm/vit_tiny"), ("bert-base-uncased", "bert-base-uncased")]
)
def test_other_ids_of_the_hub(base, named):
    assert ModelCard(render_card(a_result(base=base))).data.base_model == named


def test_data_sets_are_those_of_training_and_hub_ids_only():
    local = a_result(config={"dataset": ["digits", "./cifar10", "a/b", "c/d, 500 held out of train"]})
    assert ModelCard(render_card(local)).data.datasets == ["a/b"]
    unknown = a_result(config={"recipe": {}})
    assert ModelCard(render_card(unknown)).data.datasets is None
    assert {r.dataset_type for r in ModelCard(render_card(unknown)).data.eval_results} == {"uoft-cs/cifar10"}


@pytest.mark.parametrize(
    ("config", "modality", "tag"),
    [
        ({"modality": "text", "language": "en"}, "text", "feature-extraction"),
        ({"recipe": {}, "adapter": {"objective": {"name": "simcse"}}}, "text", "feature-extraction"),
        ({"recipe": {}, "adapter": {"backbone": {"library": "timm"}}}, "image", "image-feature-extraction"),
        ({"recipe": {}, "base_model": "vit_nano"}, "image", "image-feature-extraction"),
        ({"recipe": {}}, None, "feature-extraction"),
    ],
)
def test_what_the_backbone_reads(config, modality, tag):
    results = a_result(config=config)
    data = ModelCard(render_card(results)).data
    assert (modality_of(results), data.pipeline_tag) == (modality, tag)
    assert data.language == (["en"] if "language" in config else None)
    assert {r.task_type for r in data.eval_results} == {tag}
    used = body(render_card(results))
    assert ("AutoTokenizer" in used, "EvalImages" in used) == (modality == "text", modality == "image")


def test_a_preprocessor_beside_the_card_is_that_of_images():
    unknown = a_result(config={"recipe": {}})
    assert (
        ModelCard(render_card(unknown, files=[filenames.PREPROCESSING])).data.pipeline_tag == "image-feature-extraction"
    )
    assert "modality" not in unknown.config


def test_the_index_has_the_mean_over_seeds_with_its_protocol_and_nothing_from_before():
    values = {0: 0.9, 1: 0.85, 2: 0.8}
    measured = [knn("h", "after", value, seed=seed) for seed, value in values.items()]
    measured += [knn("h", "before", 0.5), knn("layers.3", "after", 0.6), knn("z", "after", 0.7)]
    found = ModelCard(render_card(a_result(measurements=measured, seeds=[0, 1, 2]))).data.eval_results
    assert [r.metric_name for r in found] == ["20-NN accuracy of h", "20-NN accuracy of z"]
    assert [r.metric_type for r in found] == ["accuracy", "accuracy"]
    assert found[0].metric_value == pytest.approx(0.85, abs=1e-9)
    protocol = {"k": 20, "temperature": 0.07, "bank": 1000, "queries": ROWS}
    assert found[0].metric_args.pop("std") == pytest.approx(0.05, abs=1e-9)
    assert found[0].metric_args == {**protocol, "layer": "h", "seeds": 3}
    assert found[1].metric_args == {**protocol, "layer": "z"}


def test_two_protocols_of_one_probe_are_two_metrics_with_names_of_their_own():
    linear = [
        Measurement("linear", "h", "after", v, "d", "accuracy", {"epochs": n, "rows": 9})
        for n, v in ((10, 0.5), (100, 0.6))
    ]
    card = ModelCard(render_card(a_result(measurements=linear)))
    assert [(r.metric_name, r.metric_value, r.metric_args["epochs"]) for r in card.data.eval_results] == [
        ("linear accuracy (epochs = 10) of h", 0.5, 10),
        ("linear accuracy (epochs = 100) of h", 0.6, 100),
    ]
    assert "| linear accuracy (epochs = 100) | h | 0.6000 |" in card.text


def test_it_goes_through_model_card_unchanged_and_the_hub_has_no_complaint():
    for results in (a_result(), a_result(base=None, config={"recipe": {}}), Results(), *map(Results.load, CARDS)):
        text = render_card(results, repo_id="me/x", license="apache-2.0")
        assert ModelCard(text).content == text
        assert complaints(text) == ([], [])


@pytest.mark.parametrize("whens", [("before",), ("after",), ("before", "after")])
@pytest.mark.parametrize("dataset", ["", "digits"])
def test_it_has_no_superfluous_blanks_and_says_only_what_was_measured(whens, dataset):
    measured = [Measurement("rankme", layer, when, 3.0, dataset) for when in whens for layer in ("h", "z", "block_1")]
    card = render_card(Results(measurements=measured))
    assert "\n\n\n" not in card
    assert all(line == line.rstrip() for line in card.splitlines())
    assert ("Before and after training:" in card) == (len(whens) == 2)
    assert ("Before training: h is" in card) == (whens == ("before",))


def test_eval_results(tmp_path):
    measured = [*a_result().measurements, knn("h", "after", 0.5, "c/d"), knn("h", "after", 0.5, "digits")]
    measured.append(knn("h", "after", 0.91, bank=50))
    paths = write_eval_results(a_result(measurements=measured), tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in paths] == [
        ".eval_results/uoft-cs--cifar10.yaml",
        ".eval_results/c--d.yaml",
    ]
    import yaml

    entries = parse_eval_result_entries(yaml.safe_load(paths[0].read_text()))
    assert {e.dataset_id for e in entries} == {"uoft-cs/cifar10"}
    assert [(e.task_id, e.value) for e in entries] == [("knn_h", 0.9), ("knn_z", 0.85), ("knn_h_2", 0.91)]
    assert entries[0].notes.startswith("20-NN accuracy (bank = 1000) of h (k 20, temperature 0.07, bank 1000")
    assert write_eval_results(Results(), tmp_path) == []
    with pytest.raises(UsageError, match="no folder"):
        write_eval_results(a_result(), tmp_path / "missing")


def test_the_length_is_that_of_the_training():
    """`max_steps` ends a training before its epochs."""
    result = a_result()
    result.config["training"]["max_steps"] = 2
    assert "| length | 2 steps, 256 a step and process |" in render_card(result)


def test_the_body_says_what_a_reader_needs():
    text = body(render_card(a_result(), repo_id="me/x"))
    blank = "\u00a0"  # one that does not break
    after, before = (np.arange(ROWS) < round(ROWS * share) for share in (0.9, 0.8))
    gain = paired_interval(after, before)
    interval = f"**{gain.difference:+.4f}** ({gain.low:+.4f}{blank}to{blank}{gain.high:+.4f})"
    for part in (
        "# x\n",
        "[facebook/dinov2-small](https://huggingface.co/facebook/dinov2-small), trained without labels",
        f"| 20-NN accuracy | h | 0.8000 | 0.9000 | {interval} |",
        "| RankMe | z | 20.0 | 30.0 | +10.0 |",
        "import hfproj",
        'hfproj.from_pretrained("me/x")',
        "```bash\npython simclr_vit.py --epochs 3\n```",
        "Run with seed 0.",
        "| head | `mlp`, 384 → 128, `hidden_dim=512`, `depth=2` |",
        "| on the backbone | LoRA, `r=8`, 2 modules |",
        "| regularizer | `werank`, `weight=0.1` |",
        "| views | `crop_scale=0.4` |",
        "| length | 3 epochs, 2 steps, 256 a step and process |",
        "- **20-NN accuracy**: k = 20, temperature = 0.07, bank = 1000, queries = 400\n",
        "- Not measured: linear probe, fine-tuning.",
        "- One training run: the spread over seeds was not measured.",
        "[arXiv:2002.05709](https://arxiv.org/abs/2002.05709)",
        "torch ",
        "- Trained at night.",
    ):
        assert part in text, part
    assert "worse" not in text
    assert "spectrum.png" not in text


def test_a_worse_representation_is_said_before_anything_else():
    text = body(render_card(a_result(h=(0.9, 0.8))))
    went = "20-NN accuracy of h on uoft-cs/cifar10 went from 0.9000 to 0.8000 (−0.1000, 95 %"
    assert f"> ⚠️ **The representation got worse**: {went}" in text
    assert "Use the bare backbone" in text
    assert "The projection got" not in text
    assert text.index("got worse") < text.index("## Results")
    bare = [Measurement("probe", "h", when, v, unit="accuracy") for when, v in (("before", 0.9), ("after", 0.8))]
    assert "(−0.1000; no interval, since" in render_card(a_result(measurements=bare))


def test_a_worse_projection_is_told_apart():
    text = body(render_card(a_result(z=(0.9, 0.8))))
    assert "> ⚠️ **The projection got worse**: 20-NN accuracy of z on uoft-cs/cifar10 went from" in text
    assert "Use h, not z" in text
    assert "**The representation got better**" in text


def test_a_difference_within_its_interval_is_no_gain_and_no_loss():
    for after in (0.8, 0.7975, 0.8025):
        text = render_card(a_result(h=(0.8, after)))
        assert "> **No gain was measured**: 20-NN accuracy of h" in text
        assert "got worse" not in text.replace("nor that it got worse", "")


def test_signs_of_collapse_are_warnings():
    alarm = {"collapse": {"step": 40, "cause": "rate", "what": "RankMe of z fell."}}
    text = body(render_card(a_result(ranks=(20.0, 9.9), geometry=alarm)))
    assert "> ⚠️ **The collapse alarm rang while it trained at step 40**: RankMe of z fell." in text
    assert (
        "> ⚠️ **A sign of dimensional collapse**: RankMe of z went from 20.0 to 9.9 (less than half) on uoft-cs" in text
    )
    assert "collapse**" not in render_card(a_result(ranks=(20.0, 10.0)))


def test_several_data_sets_have_a_table_each_and_share_the_protocol():
    measured = [m for d in ("a/b", "digits") for m in (knn("h", "before", 0.8, d), knn("h", "after", 0.9, d))]
    measured.append(knn("h", "after", 0.7, "digits", bank=5))
    text = body(render_card(a_result(measurements=measured)))
    assert text.index("### `a/b`") < text.index("### `digits`")
    assert "20-NN accuracy of h on a/b went from" in text
    assert "alone" not in text.split("## Limits")[1].split("##")[0]
    same = [m for d, n in (("a/b", 3), ("digits", 4)) for m in [knn("h", "after", 0.8, d, bank=n)]]
    lines = body(render_card(a_result(measurements=same))).splitlines()
    assert (
        "- **20-NN accuracy**: k = 20, temperature = 0.07, queries = 400; `a/b`: bank = 3; `digits`: bank = 4" in lines
    )


def test_layers_have_a_table():
    inner = [knn(f"layers.{i}", when, (i + 5) / 10) for i in (0, 1) for when in ("before", "after")]
    text = body(render_card(a_result(measurements=[*inner, *a_result().measurements])))
    header = "| layer | 20-NN accuracy before | 20-NN accuracy after |\n| --- | ---: | ---: |\n"
    assert f"### Layer by layer\n\n{header}" in text
    assert "| `layers.1` | 0.6000 | 0.6000 |" in text
    assert "Layer by layer" not in render_card(a_result())


def test_without_labels_and_without_anything():
    text = body(render_card(a_result(measurements=[rank("h", "after", 30.0)])))
    assert "|  | of | after training |" in text
    assert "No label was used: whether the representation got better for any task is not known." in text
    assert "Scored with labels" not in text
    empty = body(render_card(a_result(measurements=[], seeds=[])))
    assert "Nothing was measured." in empty
    assert "## Protocol" not in empty
    assert "generated from" not in empty
    assert "Nothing was measured" in render_card(Results())


def test_a_run_that_went_on_says_what_came_before():
    assert "before it h is the bare backbone's, z an untrained head's." in render_card(a_result())
    went_on = {**a_result().config, "recipe": {"continue_from": "me/heads"}}
    assert "before it h and z are those of `me/heads`." in render_card(a_result(config=went_on))


def test_each_number_of_a_real_card_is_that_of_its_results():
    content = json.loads((DIGITS / "results.json").read_text())
    text = (DIGITS / "README.md").read_text().replace("\u00a0", " ").replace("−", "-")
    labels = {"knn": ("20-NN accuracy", 4), "rankme": ("RankMe", 1), "positive_cosine": ("positive cosine", 4)}
    for name, (label, digits) in labels.items():
        for layer in "hz":
            before, after = (
                np.array(
                    [
                        m["value"]
                        for m in content["measurements"]
                        if (m["name"], m["layer"], m["when"]) == (name, layer, when)
                    ]
                )
                for when in ("before", "after")
            )
            assert len(after) == 3
            spread = f"{after.mean():.{digits}f} ± {after.std(ddof=1):.{digits}f} |"
            [row] = re.findall(rf"^\| (?:{label})? \| {layer} \| .*{re.escape(spread)}.*$", text, re.M)
            assert f"{after.mean() - before.mean():+.{digits}f}" in row


@pytest.mark.parametrize("folder", CARDS, ids=lambda path: path.name)
def test_cards_and_their_results_do_not_drift_apart(folder):
    files = [path.name for path in folder.iterdir()]
    assert {filenames.PICTURE, filenames.TRAINING_PICTURE} <= set(files)
    text = render_card(Results.load(folder), files=files)
    assert (folder / "README.md").read_text(encoding="utf-8") == text, f"run python model_cards/render.py {folder.name}"


def test_the_code_on_the_card_runs(tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model
    from PIL import Image

    model = get_peft_model(
        hfproj.load_backbone("vit_nano"),
        hfproj.ProjectionHeadConfig(head="linear", out_dim=8, backbone_adapter=LoraConfig(r=2)),
    )
    model.save_pretrained(tmp_path / "adapter")
    Image.new("RGB", (40, 50), "red").save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    first, second = blocks(render_card(Results.load(DIGITS), repo_id="adapter"))
    names = {}
    exec(compile(first, "card", "exec"), names)
    assert (names["h"].shape, names["z"].shape) == ((1, 128), (1, 8))
    names["backbone"] = hfproj.load_backbone("vit_nano")
    exec(compile(second, "card", "exec"), names)
    assert names["model"](names["x"]).projection.equal(names["z"])
    assert names["head"](names["h"]).equal(names["z"])


def test_several_adapters():
    first, second = blocks(render_card(a_result(), repo_id="me/x", adapters=["default", "swav"]))
    assert 'hfproj.from_pretrained("me/x")  #' in first
    text = render_card(a_result(), repo_id="me/x", adapters=["default", "swav"], adapter="swav")
    first, second = blocks(text)
    assert 'hfproj.from_pretrained("me/x", adapter="swav")' in first
    assert 'PeftModel.from_pretrained(backbone, "me/x", subfolder="swav")' in second
    assert 'hfproj.load_head("me/x", adapter="swav")' in second
    assert 'Other adapters here: `default`; `adapter="default"` loads the first of them.' in text
    rootless = render_card(a_result(), repo_id="me/x", adapters=["byol"])
    assert 'hfproj.from_pretrained("me/x", adapter="byol")' in rootless
    assert "Other adapters" not in rootless


def test_files_beside_it_are_explained():
    text = render_card(a_result(), files=[filenames.OBJECTIVE, filenames.EMA, filenames.PREPROCESSING, "other"])
    assert "`objective.safetensors` and `ema.safetensors` are for going on" in text
    assert "AutoImageProcessor" in text


def test_write_card(tmp_path):
    path = write_card(a_result(), tmp_path, repo_id="me/x")
    names = ["README.md", "results.json", "spectrum.png", "training.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert path.read_text(encoding="utf-8") == render_card(Results.load(tmp_path), repo_id="me/x", files=names)
    assert "](spectrum.png)" in path.read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="no folder"):
        write_card(a_result(), tmp_path / "missing")


def test_write_card_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    path = write_card(Results(config=a_result().config), tmp_path, keep_results=False)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert "spectrum.png" not in write_card(a_result(), tmp_path).read_text(encoding="utf-8")


def test_no_paths_of_this_machine(tmp_path):
    result = a_result(command="python /home/someone/simclr.py", base="/home/someone/vit", notes=["see /home/x/y"])
    assert "/home/" not in write_card(result, tmp_path).read_text(encoding="utf-8")
