"""Regularizers by target in a training: sparsity under every optimizer, resumed; a value by its weight."""

import math

import pytest
import torch
from small import adapter, assert_equal, head_model, images, trainer

from hfproj.regularizers import Weighted, create_regularizer

OPTIMIZERS = {
    "adamw": {},
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1},
    "lars": {"lars": True, "learning_rate": 0.5},
}
OBJECTIVES = {"nt_xent": {}, "byol": {"predictor": {"head": "mlp", "hidden_dim": 8}}, "barlow_twins": {}}


def model(norm="batch", seed=0, **options):
    return head_model(seed, head_options={"hidden_dim": 12, "norm": norm}, **options)


def first(run):
    return next(p for n, p in run.model.named_parameters() if n.endswith("head.hidden.0.linear.weight")).detach()


def zeros(run, group):
    return int((first(run) == 0).all({"input": 0, "output": 1}[group]).sum())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("norm", ["batch", None])
def test_sparsity_is_reached_under_every_optimizer(tmp_path, optimizer, norm):
    given = {"regularizers": {"sparse_head": {"sparsity": 0.5}}}
    run = trainer(tmp_path, model(norm), max_steps=9, num_train_epochs=3, extra=given, **OPTIMIZERS[optimizer])
    run.train()
    assert zeros(run, "input") == 8  # of 16
    logged = [e["sparse_head_sparsity"] for e in run.state.log_history if "loss" in e]
    assert logged[0] == 0
    assert logged == sorted(logged)
    assert logged[-1] == 0.5
    row = next(e for e in run.state.log_history if "loss" in e)
    assert row["loss"] == pytest.approx(row["objective"], abs=1e-3)  # it adds nothing


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(("group", "target"), [("input", 0.25), ("output", 0.75), ("input", 0.9)])
def test_sparsity_is_reached_under_objectives(tmp_path, name, group, target):
    given = {"objective": name, "regularizers": {"sparse_head": {"sparsity": target, "group": group}}}
    run = trainer(tmp_path, model(**OBJECTIVES[name]), max_steps=4, num_train_epochs=2, extra=given)
    run.train()
    count = {"input": 16, "output": 12}[group]
    assert zeros(run, group) == min(math.ceil(target * count), count - 1)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_end_at_the_target(tmp_path, steps):
    run = trainer(tmp_path, model(), max_steps=steps, extra={"regularizers": {"sparse_head": {"sparsity": 0.5}}})
    run.train()
    assert zeros(run, "input") == 8


def test_a_target_of_zero_changes_no_bit(tmp_path):
    def weights(name, regularizers):
        run = trainer(tmp_path / name, model(), max_steps=4, num_train_epochs=2, extra={"regularizers": regularizers})
        run.train()
        return adapter(run.model)

    assert_equal(weights("zero", {"sparse_head": {"sparsity": 0.0}}), weights("none", {}))


@pytest.mark.parametrize("kind", ["at_most", "keep_at"])
def test_resumed_equals_uninterrupted(tmp_path, kind):
    def make(name, seed=0):
        given = {"sparse_head": {"sparsity": 0.5, "shrink": 0.3}, "bottleneck": {kind: 0.5}}
        run = {"max_steps": 10, "num_train_epochs": 4, "save_strategy": "steps", "save_steps": 2}
        return trainer(tmp_path / name, model(seed=seed), extra={"regularizers": given}, **run)

    whole = make("whole")
    whole.train()
    found = {e["step"]: e["bottleneck_weight"] for e in whole.state.log_history if "bottleneck_weight" in e}
    assert len(set(found.values())) > 5
    for step in (4, 8):  # before and after three quarters
        resumed = make(f"from {step}", seed=7)
        resumed.train(resume_from_checkpoint=tmp_path / "whole" / f"checkpoint-{step}")
        assert_equal(adapter(resumed.model), adapter(whole.model))
        again = {e["step"]: e["bottleneck_weight"] for e in resumed.state.log_history if "bottleneck_weight" in e}
        assert again == found
    whole.train()  # begins again
    assert whole.state.log_history[0]["bottleneck_weight"] != found[10] * 1.05


class Size(torch.nn.Module):
    """Mean square of z, which the objective wants to be large."""

    def forward(self, model, h, z, *, step=None):
        return z.square().mean()


class Grow(torch.nn.Module):
    views, needs = (2, 2), frozenset()

    def forward(self, z, **others):
        return -z.square().mean().sqrt(), {}


def test_weight_follows_the_target_step_by_step(tmp_path):
    given = {"objective": Grow(), "regularizers": {"size": Weighted(Size(), 0.2, at_most=0.7, weight_rate=0.05)}}
    run = trainer(
        tmp_path, head_model(head_options={"hidden_dim": 12, "norm": None}), images(24), extra=given, max_steps=6,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    run.train()
    log_weight, smooth = math.log(0.2), None
    rows = [e for e in run.state.log_history if "size_weight" in e]
    assert len(rows) == 6
    for row in rows:  # "size" is the mean over the step's micro-batches
        excess = row["size"] / 0.7 - 1
        before, smooth = smooth, excess if smooth is None else 0.8 * smooth + 0.2 * max(min(excess, 1), -1)
        change = 0.05 * excess + (0 if before is None else smooth - before)
        log_weight += min(max(change, -math.log(1.05)), math.log(1.05))
        assert row["size_weight"] == pytest.approx(math.exp(log_weight), rel=1e-5)


def test_no_warning_of_a_term_that_keeps_its_target(tmp_path):
    given = {"regularizers": {"size": Weighted(Size(), 1e-9, at_most=1e6)}}
    trainer(tmp_path, None, images(40), extra=given, max_steps=8).train()  # a warning would be an error


def test_dead_head_is_an_alarm_in_the_log(tmp_path):
    given = {"regularizers": {"sparse_head": Weighted(create_regularizer("sparse_head", method="proximal"), 1e4)}}
    run = trainer(tmp_path, model(None), max_steps=3, extra=given)
    with pytest.warns(UserWarning, match="sparsity 1"):
        run.train()
