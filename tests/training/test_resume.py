"""A run that was interrupted and resumed gives the weights of one that was not, bit for bit."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from small import Counting, adapter, assert_equal, backbone, differs, head_model, images, trainer
from thinned import thinned
from transformers import BertConfig, BertModel

import hfproj
from hfproj.saving.folders import last_complete_checkpoint, replacing
from hfproj.tuner.comparison import differences

# 12 images, batches of 2, 2 batches a step: 3 steps an epoch. Step 4 lies within epoch 2, step 6 ends it.
RUN = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 7,
    "save_strategy": "steps",
    "save_steps": 2,
}
MODELS = {
    "lora": {"dropout": 0.2},
    "full": {"trainable": "full", "dropout": 0.2},
    "last block": {"trainable": 1},
    "head": {"trainable": "head"},
}


@pytest.mark.parametrize(
    ("model", "workers", "patch_dropout"),
    thinned([("lora", 2, 0.5), ("lora", 0, 0.0), ("full", 0, 0.0), ("last block", 0, 0.5), ("head", 0, 0.0)]),
)
def test_resumed_equals_uninterrupted(tmp_path, model, workers, patch_dropout):
    run = {**RUN, "dataloader_num_workers": workers, "patch_dropout": patch_dropout}
    whole = trainer(tmp_path / "whole", head_model(**MODELS[model]), **run)
    start = adapter(whole.model)
    whole.train()
    expected = adapter(whole.model)
    assert differs(start, expected)
    assert any("running_mean" in name for name in expected)
    if MODELS[model].get("trainable") in ("full", 1):
        assert any(".hfproj.backbone." in name for name in expected)
    for step in (4, 6) if model == "lora" and workers == 0 else (4,):
        # Another initialisation and another global state: everything that matters has to come from the checkpoint.
        resumed = trainer(tmp_path / f"from {step}", head_model(seed=7, **MODELS[model]), **run)
        torch.manual_seed(99)
        np.random.seed(99)  # noqa: NPY002
        resumed.train(resume_from_checkpoint=tmp_path / "whole" / f"checkpoint-{step}")
        assert resumed.state.global_step == 7
        assert_equal(adapter(resumed.model), expected)


def test_resume_with_evaluation_named_adapter_and_buffers_of_the_objective(tmp_path):
    def make(folder, seed=0):
        return trainer(
            tmp_path / folder,
            head_model(seed, dropout=0.2, name="mine"),
            extra={"objective": Counting(), "eval_dataset": images(7, seed=1)},
            **RUN,
            eval_strategy="steps",
            eval_steps=1,
        )

    whole = make("whole")
    whole.train()
    resumed = make("resumed", seed=7)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_equal(adapter(resumed.model, "mine"), adapter(whole.model, "mine"))
    assert torch.equal(resumed.objective.center, whole.objective.center)
    assert resumed.objective.center.abs().sum() > 0
    metrics = [{n: v for n, v in e.items() if "runtime" not in n} for e in whole.state.log_history if "eval_loss" in e]
    again = [{n: v for n, v in e.items() if "runtime" not in n} for e in resumed.state.log_history if "eval_loss" in e]
    assert again == metrics


def test_true_takes_the_last_complete_checkpoint(tmp_path):
    whole = trainer(tmp_path / "whole", **RUN)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut/checkpoint-7/trainer_state.json").unlink()
    state = tmp_path / "cut/checkpoint-6/trainer_state.json"
    state.write_text(state.read_text()[:100])
    (tmp_path / "cut/checkpoint-10").mkdir()
    assert last_complete_checkpoint(tmp_path / "cut").endswith("checkpoint-4")
    resumed = trainer(tmp_path / "cut", head_model(seed=7), **RUN)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(adapter(resumed.model), adapter(whole.model))
    with pytest.raises(hfproj.UsageError, match=r"checkpoint-10 can't be resumed from.*resume_from_checkpoint=True"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-10"))


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(hfproj.UsageError, match=r"holds no whole checkpoint; start without"):
        trainer(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_damaged_and_foreign_checkpoints(tmp_path):
    trainer(tmp_path, **RUN).train()
    with pytest.raises(hfproj.AdapterFileError, match="no buffers of Counting"):
        trainer(tmp_path, extra={"objective": Counting()}, **RUN).train(resume_from_checkpoint=True)
    file = tmp_path / "checkpoint-7/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    run = trainer(tmp_path, **RUN)
    with pytest.raises(hfproj.UsageError, match=r"adapter_model.safetensors has [\d,]+ bytes instead of.*another one"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    with pytest.raises(hfproj.AdapterFileError, match=r"checkpoint-7 holds a damaged adapter.*another checkpoint"):
        run.load_checkpoint(str(tmp_path / "checkpoint-7"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head_options": {"hidden_dim": 12, "activation": "gelu"}}, "activation is 'relu' there and 'gelu' here"),
        ({"pooling": "mean"}, "pooling is 'cls' there and 'mean' here"),
        ({"weights": 1}, "This backbone has other weights"),
    ],
)
def test_a_checkpoint_of_another_computation_is_refused(tmp_path, change, said):
    """Though its tensors would fit."""
    run = {**RUN, "max_steps": 2}
    trainer(tmp_path, **run).train()
    with pytest.raises(hfproj.AdapterFileError, match=said):
        trainer(tmp_path, head_model(**change), **run).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objective": {"name": "nt_xent", "temperature": 0.2}}, None),  # the default, of which the file is silent
        ({"objective": {"name": "nt_xent", "temperature": 0.25}}, "objective.temperature was 0.2, is 0.25 now."),
        ({"objective": "barlow_twins"}, "objective was 'nt_xent', is 'barlow_twins' now."),
        ({"regularizers": {"koleo": 0.1}}, "regularizer koleo was None, is {'weight': 0.1} now."),
    ],
)
def test_a_checkpoint_of_another_objective_is_warned_of(tmp_path, change, said, caplog):
    run = {**RUN, "max_steps": 2}
    trainer(tmp_path, extra={"objective": "nt_xent"}, **run).train()
    caplog.clear()
    trainer(tmp_path, extra={"objective": "nt_xent", **change}, **run).train(resume_from_checkpoint=True)
    found = [record.message for record in caplog.records if "trained on other terms" in record.message]
    assert len(found) == (said is not None)
    assert said is None or found[0].endswith(f"than this run has: {said}")


def test_rules_of_reading_are_compared_where_they_matter():
    """A class token of an image is read alike by both versions; of texts, padding is treated otherwise."""
    bert = BertModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    for bare, differ in ((backbone(), False), (bert, True)):
        config = hfproj.ProjectionHeadConfig(head="linear", out_dim=4, pooling="cls")
        model = get_peft_model(bare, config)
        own = model.peft_config["default"]
        found = differences(model, dataclasses.replace(own, reading=1), own)
        assert found == ({"reading": ["reading is 1 there and 2 here"]} if differ else {})


def test_what_a_checkpoint_holds(tmp_path):
    run = trainer(tmp_path, extra={"objective": Counting()}, **{**RUN, "save_steps": 7})
    run.train()
    run.save_model(str(tmp_path / "final"))
    adapter_files = {"adapter_config.json", "adapter_model.safetensors", "objective.safetensors", "README.md"}
    state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest.json"}
    assert {p.name for p in (tmp_path / "checkpoint-7").iterdir()} == adapter_files | state
    assert {p.name for p in (tmp_path / "final").iterdir()} == adapter_files  # nothing pickled is shared

    loaded = hfproj.from_pretrained(tmp_path / "checkpoint-7", backbone=head_model().unload())
    assert_equal(adapter(loaded), adapter(run.model))


def test_saving_keeps_a_written_card_and_replaces_the_rest(tmp_path):
    run = trainer(tmp_path / "run")
    folder = tmp_path / "final"
    run.save_model(str(folder))
    (folder / "README.md").write_text("my card")
    before = (folder / "adapter_model.safetensors").read_bytes()
    run.train()
    run.save_model(str(folder))
    assert (folder / "README.md").read_text() == "my card"
    assert (folder / "adapter_model.safetensors").read_bytes() != before


def test_an_interrupted_save_leaves_the_one_before(tmp_path):
    (tmp_path / "a.json").write_text("old")
    (tmp_path / ".part-left").mkdir()

    def interrupted():
        with replacing(tmp_path) as part:
            (part / "a.json").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "a.json").read_text() == "old"
    with replacing(tmp_path) as part:
        (part / "deep").mkdir()
        (part / "deep/b.json").write_text(json.dumps({}))
    assert sorted(str(p.relative_to(tmp_path)) for p in Path(tmp_path).rglob("*")) == ["a.json", "deep", "deep/b.json"]


def test_a_stream_is_not_resumed_unless_asked_for(tmp_path):
    def stream():
        return hfproj.data.StreamDataset(images(12))

    run = {**RUN, "max_steps": 4}
    trainer(tmp_path, dataset=stream(), **run).train()
    with pytest.raises(hfproj.UsageError, match=r"stream can't be resumed exactly.*ignore_data_skip=True"):
        trainer(tmp_path, dataset=stream(), **run).train(resume_from_checkpoint=True)
    again = trainer(tmp_path, dataset=stream(), **{**run, "max_steps": 6}, ignore_data_skip=True)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
