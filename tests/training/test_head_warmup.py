"""The head alone at first: the backbone keeps its values for so many steps, and its rate rises from there."""

import pytest
import torch
from small import adapter, head_model, images, trainer
from thinned import thinned
from transformers import TrainerCallback

import hfproj
from hfproj.features import mutual_knn


class Steps(TrainerCallback):
    """Keeps the adapter and the learning rate of the backbone at each step."""

    def __init__(self):
        self.tensors, self.rates = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.tensors.append(adapter(kwargs["model"]))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.rates.append(next(g["lr"] for g in kwargs["optimizer"].param_groups if g["part"] == "backbone"))


def run(folder, *, resume=None, model=None, **options):
    made = trainer(folder, model or head_model(), images(24), **{"max_steps": 6, "warmup_steps": 2, **options})
    made.add_callback(steps := Steps())
    made.train(resume_from_checkpoint=resume)
    return made, steps


@pytest.mark.parametrize("given", [2, 0.3], ids=["steps", "fraction"])
def test_the_backbone_waits(tmp_path, given):
    _, steps = run(tmp_path, head_warmup_steps=given, lr_scheduler_type="constant_with_warmup")
    first, second, third = steps.tensors[0], steps.tensors[1], steps.tensors[2]
    lora = [name for name in first if "lora" in name]
    assert lora
    assert all(torch.equal(first[name], second[name]) for name in lora)
    assert not any(torch.equal(first[name], second[name]) for name in first.keys() - set(lora))
    assert not any(torch.equal(third[name], second[name]) for name in lora)
    # The schedule has warmed up over two steps by then; the backbone's rate rises over two steps of its own.
    assert steps.rates[2:] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01])


def test_without_it_nothing_changes(tmp_path):
    _, steps = run(tmp_path, lr_scheduler_type="constant_with_warmup")
    assert steps.rates == pytest.approx([0, 0.005, 0.01, 0.01, 0.01, 0.01])


@pytest.mark.parametrize("at", thinned([1, 3]), ids=["while the head is alone", "while the rate rises"])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, at):
    options = {"head_warmup_steps": 2, "save_strategy": "steps", "save_steps": at}
    whole, _ = run(tmp_path, **options)
    again, _ = run(tmp_path, resume=tmp_path / f"checkpoint-{at}", model=head_model(seed=5), **options)
    expected = adapter(whole.model)
    assert all(torch.equal(expected[name], tensor) for name, tensor in adapter(again.model).items())


@pytest.mark.parametrize(
    ("config", "steps", "said"),
    [
        ({"trainable": "head"}, 2, "would have no effect: only the head is trained"),
        ({"head": "identity", "out_dim": None, "head_options": {}}, 2, "this one has no parameters"),
        ({}, 6, "below the 6 steps of this training, got 6"),
    ],
)
def test_refused(tmp_path, config, steps, said):
    with pytest.raises(hfproj.UsageError, match=said):
        run(tmp_path, model=head_model(**config), head_warmup_steps=steps)


def test_refused_where_gradients_are_used_up(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "hfproj.training.optimizer.why_not_asked", lambda trainer: "DeepSpeed keeps the gradients itself"
    )
    with pytest.raises(hfproj.UsageError, match="would have no effect: DeepSpeed keeps the gradients itself"):
        run(tmp_path, head_warmup_steps=2)


def test_a_negative_number(tmp_path):
    with pytest.raises(hfproj.UsageError, match="head_warmup_steps"):
        run(tmp_path, head_warmup_steps=-1)


def test_neighbours_that_stay_are_those_of_the_bare_backbone(tmp_path):
    """A limit on them brings its measure along, and its alarm ends the run."""
    alarm = hfproj.CollapseCallback(action="stop", limits={"knn_overlap_h": 1.1}, every=1)
    made = trainer(tmp_path, head_model(), images(24), max_steps=6)
    made.add_callback(alarm)
    with pytest.warns(hfproj.CollapseWarning, match="knn_overlap_h"):
        made.train()
    assert (alarm.alarm.metric, made.state.global_step) == ("knn_overlap_h", 2)
    dataset = hfproj.IndexedDataset(images(24))
    first = made.data_collator([dataset[i] for i in range(24)])["views"][0]
    with torch.no_grad():
        adapted = made.model.eval()(first).representation
        with made.model.disable_adapter():
            bare = made.model(first).last_hidden_state[:, 0]
    assert made.history[-1]["knn_overlap_h"] == pytest.approx(mutual_knn(adapted, bare, k=6))
    assert made.history[-1]["knn_overlap_h"] < 1
