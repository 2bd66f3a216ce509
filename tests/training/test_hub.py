"""How the trainer gets ready to push: its card, what it refuses at once, and how its images were made ready."""

import json

import pytest
from small import PIXELS, head_model, trainer, views

import hfproj
from hfproj.objectives.buffers import Position
from hfproj.results import Measurement


def test_the_card_is_ours(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.save_model()
    run.create_model_card(license="mit")
    text = (tmp_path / "README.md").read_text()
    assert "Nothing was measured" in text
    assert "license: mit" in text
    assert not (tmp_path / "results.json").exists()
    measured = hfproj.Results(measurements=[Measurement("rankme", "h", "after", 5.25)], config={})
    run.create_model_card(results=measured)
    assert "| RankMe" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["measurements"][0]["value"] == 5.25
    run.save_model()  # keeps it
    assert "| RankMe" in (tmp_path / "README.md").read_text()


def test_options_of_transformers_that_have_no_place_are_refused(tmp_path):
    run = trainer(tmp_path)
    for call in (run.create_model_card, run.push_to_hub):
        with pytest.raises(hfproj.UsageError, match="takes no tags, dataset: the card is made of results="):
            call(tags=["a"], dataset="b")


def test_offline_and_a_backbone_of_this_machine_are_said_at_once(tmp_path, monkeypatch):
    with pytest.raises(hfproj.UsageError, match="HF_HUB_OFFLINE=1 keeps this process"):
        trainer(tmp_path, push_to_hub=True)
    with pytest.raises(hfproj.UsageError, match="HF_HUB_OFFLINE=1 keeps this process"):
        trainer(tmp_path).push_to_hub()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("hfproj.hub.push.get_token", lambda: None)
    with pytest.raises(hfproj.UsageError, match="There is no access token"):
        trainer(tmp_path, push_to_hub=True)
    model = head_model()
    model.peft_config["default"].backbone = {"library": "transformers", "id": "/models/vit", "kwargs": {}}
    with pytest.raises(hfproj.UsageError, match="a folder of this machine"):
        trainer(tmp_path, model, push_to_hub=True, hub_token="hf_x")


def test_set_push_to_hub_is_checked_too(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    run = trainer(tmp_path)
    run.args.set_push_to_hub("me/x", strategy="all_checkpoints", token="hf_x")
    with pytest.raises(hfproj.UsageError, match="nothing pickled is pushed"):
        run.init_hf_repo()


def test_images_were_made_ready_as_the_collator_did(tmp_path):
    settings = trainer(tmp_path)._preprocessing()
    assert (settings.size, settings.mean, settings.std) == (PIXELS["size"], PIXELS["mean"], PIXELS["std"])
    collator = views()
    made = trainer(tmp_path, collator=lambda items: collator(items))
    assert made._preprocessing() is None  # nothing is known of a backbone made here


def test_the_position_is_where_training_stands(tmp_path):
    run = trainer(tmp_path, max_steps=4)  # three steps an epoch
    run.train()
    assert run.position() == run.objective.position == Position(4, run.state.epoch)
    assert run.step().global_step == 4
