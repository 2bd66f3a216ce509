"""`continue_from`: the first step is the next one of the run that it goes on from; what does not fit is refused."""

import gc
import json
import logging
import shutil

import pytest
import torch
from small import adapter, assert_equal, differs, head_model, trainer
from thinned import thinned
from transformers import TrainerCallback

import hfproj
from hfproj.objectives.buffers import Position, read_position

RUN = {"max_steps": 5, "save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 4}
# 12 images in batches of 4: step 4 is the first of epoch 2, so that a warm-up of epochs is not where it began.
METHODS = {
    "nt_xent": ({"name": "nt_xent"}, {}),
    "moco": ({"name": "moco", "queue_size": 16}, {}),
    "byol": ({"name": "byol"}, {"predictor": {"head": "mlp", "hidden_dim": 8}}),
    "dino": ({"name": "dino", "warmup_epochs": 4, "freeze_prototypes_epochs": 1.0}, {"prototypes": 8}),
    "lejepa": ({"name": "lejepa", "slices": 16}, {}),
    "full": ({"name": "vicreg"}, {"trainable": "full"}),
}


@pytest.fixture(scope="module", autouse=True)
def _quick_collection():
    """accelerate collects garbage after each training: looking through all that is imported takes most of its time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class FirstStep(TrainerCallback):
    """Keeps the gradients of one step as they come to the optimizer, and the step that the objective saw."""

    def __init__(self, at):
        self.at = at

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.at:
            grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
            self.grads = {n: None if g is None else g.clone() for n, g in grads.items()}


class Replays(hfproj.ProjectionTrainer):
    """Keeps the batch and the loss of one step, or takes the batch that another run kept."""

    at, batch = 0, None

    def compute_loss(self, model, inputs, *args, **kwargs):
        if not model.training or self.state.global_step != self.at:
            return super().compute_loss(model, inputs, *args, **kwargs)
        self.batch = inputs = self.batch or inputs
        self.at_step, self.before = self.position(), self.objective.state_dict()
        self.before = {n: b.clone() for n, b in self.before.items()}
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.first_loss = loss.detach().clone()
        return loss


def run(folder, objective, config, at, seed=0, name="default", batch=None, **extra):
    watch = FirstStep(at)
    made = trainer(
        folder,
        head_model(seed, name=name, **config),
        cls=Replays,
        extra={"objective": objective, "callbacks": [watch], **extra},
        **{**RUN, **({} if batch is None else {"max_steps": 1, "save_strategy": "no"})},
    )
    made.at, made.batch, made.watch = at, batch, watch
    return made


@pytest.mark.parametrize("method", thinned(METHODS))
def test_the_first_step_is_the_next_one_of_the_run_before(tmp_path, method):
    objective, config = METHODS[method]
    whole = run(tmp_path / "whole", objective, config, at=4)
    whole.train()
    again = run(
        tmp_path / "again",
        objective,
        config,
        at=0,
        seed=7,
        name="renamed",
        batch=whole.batch,
        continue_from=tmp_path / "whole/checkpoint-4",
    )
    again.train()
    assert again.at_step == whole.at_step == Position(4, 4 / 3)
    assert_equal(again.before, whole.before)
    assert torch.equal(again.first_loss, whole.first_loss)
    grads = {n.replace(".renamed.", ".default."): g for n, g in again.watch.grads.items()}
    assert grads.keys() == whole.watch.grads.keys()
    assert any(g is not None and g.abs().sum() > 0 for g in grads.values())
    for name, expected in whole.watch.grads.items():
        same = torch.equal(grads[name], expected) if expected is not None else grads[name] is None
        assert same, name


def test_what_starts_fresh_matters(tmp_path):
    """Without buffers and moving average the same step is another one: the test above sees them."""
    objective, config = METHODS["dino"]
    whole = run(tmp_path / "whole", objective, config, at=4)
    whole.train()
    for file in ("objective.safetensors", "ema.safetensors"):
        folder = shutil.copytree(tmp_path / "whole/checkpoint-4", tmp_path / file)
        (folder / file).unlink()
        again = run(tmp_path / "again", objective, config, at=0, batch=whole.batch, continue_from=str(folder))
        again.train()
        assert not torch.equal(again.first_loss, whole.first_loss)


def test_a_checkpoint_to_resume_from_wins(tmp_path):
    def make(folder, seed=0, **extra):
        return trainer(
            tmp_path / folder,
            head_model(seed),
            extra={"objective": "moco", **extra},
            **RUN | {"max_steps": 3, "save_steps": 2},
        )

    first, second = make("first"), make("second", seed=5, continue_from=None)
    first.train()
    second.train()
    resumed = make("third", seed=9, continue_from=tmp_path / "first/checkpoint-2")
    resumed.train(resume_from_checkpoint=str(tmp_path / "second/checkpoint-2"))
    assert_equal(adapter(resumed.model), adapter(second.model))
    assert_equal(adapter(resumed.ema.module), adapter(second.ema.module))
    assert_equal(dict(resumed.objective.state_dict()), dict(second.objective.state_dict()))
    assert resumed.position() == second.position() == Position(3, 1.0)

    # a run that goes on from another one is resumed like any other, with the steps before it
    on = make("on", continue_from=tmp_path / "first/checkpoint-2")
    on.train()
    assert on.position() == Position(5, 2 / 3 + 1.0)
    again = make("again", seed=3)
    again.train(resume_from_checkpoint=str(tmp_path / "on/checkpoint-2"))
    assert_equal(adapter(again.model), adapter(on.model))
    assert again.position() == on.position()
    assert read_position(tmp_path / "on/checkpoint-2") == Position(4, 4 / 3)


def test_the_log_says_what_goes_on_and_what_is_fresh(tmp_path, caplog):
    trainer(tmp_path / "first", extra={"objective": "moco"}, **RUN).train()
    with caplog.at_level(logging.WARNING, "hfproj.training"):
        made = trainer(tmp_path / "b", head_model(3), extra={"continue_from": tmp_path / "first/checkpoint-4"})
    [record] = caplog.records
    assert type(made.objective).__name__ == "MoCo"  # the one that it was trained on
    text = record.getMessage()
    assert "at step 4 and epoch 1.33: the adapter's tensors, buffers of MoCo, the EMA teacher." in text
    assert "Fresh: optimizer, schedules, epochs and views." in text

    caplog.clear()
    with caplog.at_level(logging.WARNING, "hfproj.training"):
        extra = {"objective": "nt_xent", "continue_from": tmp_path / "first/checkpoint-4"}
        made = trainer(tmp_path / "c", head_model(3), extra=extra)
    assert made.started == Position()
    assert "It was trained on moco, this run is on nt_xent." in caplog.records[0].getMessage()


@pytest.mark.parametrize(("config", "said"), [
    ({"out_dim": 8}, "out_dim is 6 there and 8 here"),
    ({"head": "linear", "head_options": {}}, "same parts: head is 'mlp' there and 'linear' here."),
    ({"head_options": {"hidden_dim": 12, "norm": None}}, "head_options.norm is 'batch' there and None here"),
    ({"head_options": {"hidden_dim": 13}}, "head_options.hidden_dim is 12 there and 13 here"),
    ({"predictor": "linear"}, "same parts: predictor is None there and 'linear' here."),
    ({"prototypes": 4}, "prototypes.count is None there and 4 here"),
    ({"lora": False}, "same parts: backbone_adapter is 'LORA' there and None here."),
    ({"trainable": 1}, "trainable is 'adapter' there and 1 here"),
    ({"pooling": "mean"}, "pooling is 'cls' there and 'mean' here"),
    ({"layer": 0}, "layer is -1 there and 0 here"),
])  # fmt: skip
def test_other_parts_are_listed(tmp_path, config, said):
    head_model().save_pretrained(tmp_path)
    with pytest.raises(hfproj.UsageError, match="do not have the same parts") as caught:
        trainer(tmp_path / "run", head_model(**config), extra={"continue_from": tmp_path})
    assert said in str(caught.value)


def test_options_that_mean_the_same_agree(tmp_path):
    head_model().save_pretrained(tmp_path)
    model = head_model(5, dropout=0.1, head_options={"hidden_dim": 12, "depth": 2})
    made = trainer(tmp_path / "run", model, extra={"continue_from": tmp_path})
    assert_equal(adapter(made.model), adapter(head_model()))
    assert differs(adapter(made.model), adapter(head_model(5)))


def test_what_is_missing_or_damaged(tmp_path):
    def refused(source, message, error=hfproj.AdapterFileError, **extra):
        with pytest.raises(error, match=message):
            trainer(tmp_path / "run", head_model(), extra={"continue_from": source, **extra})

    refused(tmp_path / "nowhere", "neither a folder nor a Hub repository")
    refused(3, "Expected continue_from to be a folder, a Hub repository", hfproj.UsageError)
    refused({"repo": "a/b", "adaptor": "c"}, "Unknown entry of continue_from: 'adaptor'", hfproj.UsageError)
    run = trainer(tmp_path / "first", extra={"objective": {"name": "moco", "queue_size": 16}}, **RUN)
    run.train()
    folder = tmp_path / "first/checkpoint-4"
    other = {"objective": {"name": "moco", "queue_size": 8}}
    refused(
        folder,
        r": queues.0.rows is \[16, 6\] there and \[8, 6\] here; .*remove that file to start with new ones",
        **other,
    )
    (folder / "objective.safetensors").write_bytes(b"\0" * 100)
    refused(folder, "objective.safetensors")


def test_one_of_several_adapters(tmp_path):
    model = head_model(1)
    model.add_adapter("other", head_model(2).peft_config["default"])
    model.set_adapter("other")
    run = trainer(tmp_path / "first", model, extra={"objective": "moco"}, **RUN)
    run.train()
    assert (tmp_path / "first/checkpoint-4/other/objective.safetensors").is_file()
    made = trainer(
        tmp_path / "b",
        head_model(5),
        extra={"continue_from": {"repo": tmp_path / "first/checkpoint-4", "adapter": "other"}},
    )
    assert made.started == Position(4, 4 / 3)
    assert made.objective.queues[0].state_dict()["rows"].abs().sum() > 0
    # the one in the root has no objective of its own, and takes none from elsewhere
    fresh = trainer(tmp_path / "c", head_model(5), extra={"continue_from": tmp_path / "first/checkpoint-4"})
    assert fresh.started == Position()
    config = json.loads((tmp_path / "first/checkpoint-4/adapter_config.json").read_text())
    assert config["peft_type"] == "PROJECTION_HEAD"


# --- under another objective ---

OTHER = {
    "byol": ({"name": "byol"}, {"predictor": {"head": "mlp", "hidden_dim": 8}}, "predictor"),
    "swav": ({"name": "swav"}, {"prototypes": 5}, "prototypes"),
    "dino": ({"name": "dino", "prototypes": 7}, {"prototypes": 7}, "prototypes"),
    "sigmoid": ({"name": "sigmoid"}, {"scales": {"log_inverse_temperature": 2.0, "bias": -5.0}}, "scales"),
    "vicreg": ({"name": "vicreg"}, {}, None),
}


def z_of(model):
    x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(x).projection


@pytest.mark.parametrize("prepared", [True, False], ids=["made with the part", "made without"])
@pytest.mark.parametrize("method", thinned(["byol", "swav", "dino", "sigmoid"]))
def test_what_a_new_objective_needs_in_addition_is_made(tmp_path, caplog, method, prepared):
    objective, parts, part = OTHER[method]
    trainer(tmp_path / "a", head_model(1), extra={"objective": "nt_xent"}, **RUN).train()
    source = tmp_path / "a/checkpoint-4"
    expected = z_of(loaded(source))
    model = head_model(5, **(parts if prepared else {}))
    with caplog.at_level(logging.WARNING, "hfproj.training"):
        made = trainer(tmp_path / "b", model, extra={"objective": objective, "continue_from": source}, **RUN)
    [text] = [record.getMessage() for record in caplog.records]
    assert "the adapter's tensors" in text
    assert f"Fresh: optimizer, schedules, epochs and views, the {part}" in text
    assert "It was trained on nt_xent, this run is on" in text
    assert torch.equal(z_of(made.model), expected)
    before = adapter(made.model)
    made.train()
    after = adapter(made.model)
    assert differs({n: t for n, t in before.items() if f".{part}." in n}, after)
    again = head_model(6)
    assert again.load_adapter(tmp_path / "b/checkpoint-4", "saved")
    assert getattr(again.peft_config["saved"], part)


def loaded(source):
    model = head_model(9)
    model.load_adapter(source, "saved")
    model.set_adapter("saved")
    return model


@pytest.mark.parametrize("method", ["byol", "swav", "sigmoid"])
def test_what_a_new_objective_has_no_use_for_is_left_behind(tmp_path, caplog, method):
    objective, parts, part = OTHER[method]
    trainer(tmp_path / "a", head_model(1, **parts), extra={"objective": objective}, **RUN).train()
    source = tmp_path / "a/checkpoint-4"
    expected = z_of(loaded(source))
    with caplog.at_level(logging.WARNING, "hfproj.training"):
        made = trainer(tmp_path / "b", head_model(5), extra={"objective": "vicreg", "continue_from": source}, **RUN)
    assert f"Left behind: the {part}." in caplog.records[-1].getMessage()
    assert torch.equal(z_of(made.model), expected)
    made.train()
    # a model that has the part keeps it, frozen
    kept = trainer(
        tmp_path / "c", head_model(5, **parts), extra={"objective": "vicreg", "continue_from": source}, **RUN
    )
    assert torch.equal(z_of(kept.model), expected)
    own = {n: p for n, p in kept.model.named_parameters() if f".{part}." in n}
    before = {n: p.detach().clone() for n, p in own.items()}
    kept.train()
    assert_equal(before, own)


def test_parts_that_both_use_are_kept_where_they_agree(tmp_path, caplog):
    predictor = {"predictor": {"head": "mlp", "hidden_dim": 8}}
    trainer(tmp_path / "a", head_model(1, **predictor), extra={"objective": "byol"}, **RUN).train()
    source = tmp_path / "a/checkpoint-4"
    made = trainer(tmp_path / "b", head_model(5, **predictor), extra={"objective": "simsiam", "continue_from": source})
    assert_equal(adapter(made.model), adapter(loaded(source), "saved"))
    wider = head_model(5, predictor={"head": "mlp", "hidden_dim": 9})
    with caplog.at_level(logging.WARNING, "hfproj.training"):
        made = trainer(tmp_path / "c", wider, extra={"objective": "simsiam", "continue_from": source})
    assert "the predictor" in caplog.records[-1].getMessage()
    assert torch.equal(z_of(made.model), z_of(loaded(source)))
    extra = {"objective": "byol", "continue_from": source}
    with pytest.raises(hfproj.UsageError, match=r"predictor\.hidden_dim is 8 there and 9 here"):
        trainer(tmp_path / "d", head_model(5, predictor={"head": "mlp", "hidden_dim": 9}), extra=extra)


def test_an_adapter_that_was_loaded_goes_on_under_another_objective(tmp_path, caplog):
    trainer(tmp_path / "a", head_model(1), extra={"objective": "nt_xent"}, **RUN).train()
    model = head_model(9)
    model.load_adapter(tmp_path / "a/checkpoint-4", "saved", is_trainable=True)
    model.set_adapter("saved")
    expected = z_of(model)
    with caplog.at_level(logging.WARNING, "hfproj.training"):
        made = trainer(tmp_path / "b", model, extra={"objective": "byol"}, **RUN)
    [record] = caplog.records
    text = "Kept: head and backbone as trained on nt_xent. New for BYOL: predictor={'head': 'mlp', 'hidden_dim': 512}."
    assert record.getMessage() == text
    assert torch.equal(z_of(made.model), expected)
    made.train()
