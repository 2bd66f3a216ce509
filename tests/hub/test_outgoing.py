"""What leaves this machine: the staged folder of a push is validated before anything is sent."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from cases import make_backbone, make_config
from peft import get_peft_model
from safetensors.torch import save_file
from scripts_push import Buffers, results
from torch import nn

import hfproj
from hfproj.hub.push import Target, check_repo_id
from hfproj.hub.staging import check_outgoing, header, hub_base, stage
from hfproj.objectives.buffers import Position, load_buffers, read_position, save_buffers
from hfproj.redaction import redacted

TOKEN = "hf_" + 34 * "t"


@pytest.fixture(scope="module")
def model():
    return get_peft_model(make_backbone("vit"), make_config("vit", "lora"))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    return stage(model, tmp_path_factory.mktemp("whole"), "me/heads", results=results())


@pytest.fixture
def staged(whole, tmp_path):
    return dataclasses.replace(whole, folder=Path(shutil.copytree(whole.folder, tmp_path / "staged")))


def check(folder, adapters=("default",), **texts):
    check_outgoing(folder, adapters=adapters, owner="me", token=TOKEN, texts=texts)


def refused(folder, *said, **texts):
    with pytest.raises(hfproj.UsageError) as caught:
        check(folder, **texts)
    assert TOKEN not in str(caught.value)
    assert all(part in str(caught.value) for part in said), str(caught.value)


def test_a_staged_folder_passes(staged):
    check(staged.folder, commit_message="By Jane Doe, see https://example.org/home/x and a/b and/or c")


@pytest.mark.parametrize("name", [
    "training_args.bin", "optimizer.pt", "adapter_model.bin", "a.pkl", "model.py", ".env", "notes.txt", "config.json",
    "checkpoint-1/adapter_config.json", "default/adapter_config.json", ".eval_results/a.json", "other/README.md",
    "adapter_model.safetensors.part", "a b.png", ".hidden.png",
    "views.png", "neighbours.png", "map.png",
])  # fmt: skip
def test_other_files_are_refused(staged, name):
    (staged.folder / name).parent.mkdir(exist_ok=True)
    (staged.folder / name).write_text("{}")
    refused(staged.folder, f"{name} is no file of an adapter")


def test_a_link_is_refused(staged):
    (staged.folder / "picture.png").symlink_to("/etc/hostname")
    refused(staged.folder, "picture.png is no file of an adapter")


SECRETS = {
    f"token: {TOKEN}": "the access token",
    "hf_" + 34 * "a": "an access token",
    "api_org_" + 34 * "a": "an access token",
    "the password is open-sesame-123": "the value of $DATABASE_PASSWORD",
    f"at {Path.cwd()}": "of this machine",
    f"at {Path.home()}.": "of this machine",
}
WORDS = {
    **SECRETS,
    "in /home/somebody/data": "a path of this machine",
    "in ~/data": "a path of this machine",
    "in ~jane/data": "a path of this machine",
    "C:\\Users\\jane": "a path of this machine",
    "kept in /scratch/jane": "a path of this machine",
    "see jane-doe about it": "the name of this machine's user",
    "in ../jane-doe/data": "the name of this machine's user",
}


@pytest.mark.parametrize("file", ["README.md", "results.json", "adapter_model.safetensors", "spectrum.png"])
def test_private_words_are_found_in_every_kind_of_file(staged, monkeypatch, file):
    monkeypatch.setenv("USER", "jane-doe")
    monkeypatch.setenv("DATABASE_PASSWORD", "open-sesame-123")
    path = staged.folder / file
    good = path.read_bytes()
    for text, said in (SECRETS if file == "spectrum.png" else WORDS).items():
        if file == "results.json":
            path.write_text(json.dumps({**json.loads(good), "notes": [text]}))
        elif file.endswith("safetensors"):
            save_file({"weight": torch.zeros(2)}, path, metadata={"format": "pt", "by": text})
        else:
            path.write_bytes(good + text.encode())
        refused(staged.folder, f"Nothing was sent: {file} holds {said}" if "of this" not in said else file, said)


def test_what_only_looks_private_passes(staged, monkeypatch):
    monkeypatch.setenv("USER", "jane-doe")
    monkeypatch.setenv("SOME_TOKEN", "short")
    card = staged.folder / "README.md"
    words = "jane-doe/vit on the Hub, jane-doe-2, short, h/z, </details> https://x.org/home/y and `torch/nn`"
    card.write_text(f"{card.read_text()}\n{words}\nhf_hub_download, hf_transfer\n")
    check(staged.folder)
    monkeypatch.setenv("USER", "me")  # the owner's own name
    card.write_text(f"{card.read_text()}\nme and me\n")
    check(staged.folder)


def test_a_path_in_a_config_is_found_where_it_is(staged):
    config = json.loads((staged.folder / "adapter_config.json").read_text())
    config["backbone"] = {"library": "transformers", "id": "/models/vit", "kwargs": {}}
    (staged.folder / "adapter_config.json").write_text(json.dumps(config))
    refused(staged.folder, "adapter_config.json", "a path of this machine in backbone.id")


def test_what_is_typed_may_name_people_but_no_secrets(staged, monkeypatch):
    monkeypatch.setenv("USER", "jane-doe")
    check(staged.folder, commit_message="Trained by jane-doe")
    refused(staged.folder, "commit_description", commit_description=f"with {TOKEN}")
    refused(staged.folder, "commit_message", commit_message="from /home/jane-doe/out")


def test_tokens_in_results_become_the_variable():
    kept = redacted(results(command=f"python a.py --hub_token {TOKEN}", notes=[TOKEN], log=[{"a": [TOKEN, 1.5]}]))
    assert kept.command == "python a.py --hub_token $HF_TOKEN"
    assert (kept.notes, kept.log) == (["$HF_TOKEN"], [{"a": ["$HF_TOKEN", 1.5]}])


@pytest.mark.parametrize("repo_id", ["heads", "a/b/c", "", "me/", "/heads", "me/he ads", "me/..", "./out", None])
def test_no_repository(repo_id):
    with pytest.raises(hfproj.UsageError, match="to be 'user/name'"):
        check_repo_id(repo_id)


@pytest.mark.parametrize(("options", "said"), [
    ({"revision": 40 * "a"}, "is a commit, and pushes go to branches"),
    ({"revision": "dev", "create_pr": True}, "create_pr=True opens a pull request against main"),
    ({}, "HF_HUB_OFFLINE=1 keeps this process from reaching the Hub"),
])  # fmt: skip
def test_no_target(options, said):
    with pytest.raises(hfproj.UsageError, match=said):
        Target("me/heads", **options)


def test_offline_is_said_before_any_work(tmp_path):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(hfproj.UsageError, match="HF_HUB_OFFLINE=1"):
        hfproj.push_to_hub(nn.Linear(2, 2), "me/heads")


@pytest.mark.parametrize(("options", "said"), [
    ({"adapters": ["defualt"]}, "Unknown adapter 'defualt'. Did you mean 'default'?"),
    ({"adapters": []}, "leaves nothing to push"),
    ({"results": {"knn": 0.5}}, "results is a dict; expected hfproj.Results"),
    ({"objective": "moco"}, "objective is a str; expected the module"),
    ({"license": "Do what you want!"}, "licen[cs]e"),
])  # fmt: skip
def test_what_cannot_be_staged(model, tmp_path, options, said):
    with pytest.raises(hfproj.UsageError, match=said):
        stage(model, tmp_path, "me/heads", **options)


def test_models_that_cannot_be_staged(tmp_path, monkeypatch):
    with pytest.raises(hfproj.UsageError, match="Linear has no projection head to push"):
        stage(nn.Linear(2, 2), tmp_path, "me/heads")
    made = get_peft_model(make_backbone("vit"), make_config("vit"), adapter_name="a/b")
    with pytest.raises(hfproj.UsageError, match="would lie in a folder of that name"):
        stage(made, tmp_path, "me/heads")
    made = get_peft_model(make_backbone("vit"), make_config("vit"))
    made.add_adapter("other", make_config("vit"))
    with pytest.raises(hfproj.UsageError, match=r"but 'default' is, and it is not among those to push, other; switch"):
        stage(made, tmp_path, "me/heads", results=results(), adapters=["other"])


@pytest.mark.parametrize("base", ["/models/vit", "./vit", "../vit", "~/vit", "a/b/c", "folder", "C:\\models\\vit"])
def test_a_backbone_of_this_machine_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    config = make_config("vit", backbone={"library": "transformers", "id": base, "kwargs": {}})
    with pytest.raises(hfproj.UsageError, match=r"a folder of this machine.*Push the backbone itself.*say where it is"):
        hub_base(config)


@pytest.mark.parametrize(("backbone", "path", "expected"), [
    (None, None, None),
    ({"library": "torch", "id": None}, "", None),
    ({"library": "transformers", "id": "vit_nano", "kwargs": {}}, None, "vit_nano"),
    ({"library": "timm", "id": "timm/vit_tiny.augreg_in1k", "kwargs": {}}, None, "timm/vit_tiny.augreg_in1k"),
    ({"library": "timm", "id": "hf-hub:timm/vit_tiny", "kwargs": {}}, None, "timm/vit_tiny"),
    ({"library": "transformers", "id": "me/vit", "kwargs": {}}, "/models/vit", "me/vit"),
    (None, "bert-base-uncased", "bert-base-uncased"),
])  # fmt: skip
def test_backbones_that_others_find_too(backbone, path, expected, model, tmp_path, monkeypatch):
    config = model.peft_config["default"]
    monkeypatch.setattr(config, "backbone", backbone)
    monkeypatch.setattr(config, "base_model_name_or_path", path)
    assert hub_base(config) == expected
    check(stage(model, tmp_path, "me/heads").folder)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert saved in (expected, None, "")


def test_buffers_and_where_training_stood(tmp_path):
    objective = Buffers(3.0)
    objective.position = Position(12, 3.25)
    save_buffers(objective, tmp_path, before=Position(8, 2.0))
    first = (tmp_path / "objective.safetensors").read_bytes()
    save_buffers(objective, tmp_path, before=Position(8, 2.0))
    assert (tmp_path / "objective.safetensors").read_bytes() == first
    assert json.loads(header(tmp_path / "objective.safetensors"))["__metadata__"] == {"format": "pt"}
    other = Buffers()
    load_buffers(other, tmp_path, hint="")
    assert torch.equal(other.queue, objective.queue)
    assert (read_position(tmp_path), read_position(tmp_path, "before")) == (Position(12, 3.25), Position(8, 2.0))

    wrong = {"position.step": torch.tensor(-1), "position.epoch": torch.tensor(0.5)}
    save_file(wrong, tmp_path / "objective.safetensors")
    with pytest.raises(hfproj.AdapterFileError, match="is damaged"):
        read_position(tmp_path)
    (tmp_path / "objective.safetensors").unlink()
    assert read_position(tmp_path) == Position()
    save_buffers(nn.Identity(), tmp_path)  # nothing to keep
    assert not list(tmp_path.iterdir())


def test_a_backbone_without_a_public_source_goes_with_its_digest_and_the_words(model, tmp_path):
    staged = stage(model, tmp_path, "me/heads", results=results())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    digest = config["fingerprint"]["sha256"]
    card = (tmp_path / "README.md").read_text()
    assert len(digest) == 64
    assert digest in card
    assert "Its backbone has no public source" in card
    check(staged.folder)


def test_a_backbone_that_nobody_could_recognise_is_not_pushed(tmp_path):
    features = hfproj.FeatureBackbone(16)
    unknown = get_peft_model(features, hfproj.ProjectionHeadConfig(head="linear", out_dim=4))
    with pytest.raises(hfproj.UsageError, match="no public source, and no digest"):
        stage(unknown, tmp_path / "a", "me/heads")
    backbone = make_backbone("vit")
    with pytest.warns(UserWarning, match="keep_original"):
        lost = get_peft_model(backbone, make_config("vit", "two_blocks", keep_original=False))
    with pytest.raises(hfproj.UsageError, match="no public source, and no digest"):
        stage(lost, tmp_path / "b", "me/heads")
