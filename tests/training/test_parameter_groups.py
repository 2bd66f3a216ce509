"""Learning rate and decay of each group of parameters."""

import re

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from small import (
    adapter,
    assert_equal,
    backbone,
    differs,
    head_model,
    trainable,
    trainer,
)
from transformers import TrainerCallback

import hfproj
from hfproj.training.optimizer import parameter_groups


def group_of(model, **options):
    """Name of each trainable parameter → (in the head, decays, learning rate)."""
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=0.1, **options)
    found = [(names[id(p)], (g["weight_decay"], g.get("lr"))) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found)) == len(trainable(model))
    return dict(found)


def test_decay_and_learning_rate_by_parameter():
    model = head_model(backbone_adapter=LoraConfig(r=2, use_dora=True), prototypes=4)
    groups = group_of(model, head_learning_rate=0.5)
    for name, (decay, rate) in groups.items():
        assert rate == (0.5 if ".hfproj." in name else None), name
        scale = name.endswith(".bias") or "magnitude" in name or ".norm" in name
        assert decay == (0 if scale else 0.1), name
    parts = ("lora_A", "lora_B", "lora_magnitude_vector", "prototypes.weight", ".bias", ".norm")
    assert all(any(part in name for name in groups) for part in parts)


def test_scales_and_tokens_do_not_decay():
    ia3 = get_peft_model(backbone(), hfproj.ProjectionHeadConfig(head="linear", backbone_adapter=IA3Config()))
    assert {decay for name, (decay, _) in group_of(ia3).items() if "ia3_l" in name} == {0}
    full = group_of(head_model(trainable="full"))
    none = {name for name, (decay, _) in full.items() if decay == 0}
    assert {n.rpartition(".")[2] for n in none} == {"bias", "weight", "cls_token", "position_embeddings"}
    assert all("norm" in n for n in none if n.endswith(".weight"))
    assert any("layernorm_before.weight" in n for n in none)
    [of_blocks] = {v for n, v in full.items() if re.search(r"(mlp.fc1|intermediate.dense)\.weight$", n)}
    assert of_blocks == (0.1, None)


def test_the_heads_learning_rate_is_scheduled(tmp_path):
    rates = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append([group["lr"] for group in optimizer.param_groups])

    run = trainer(
        tmp_path, max_steps=4, warmup_steps=0, head_learning_rate=0.2, lr_scheduler_type="linear",
        extra={"callbacks": [Rates()]},
    )  # fmt: skip
    run.train()
    backbone_rates, head_rates = ([r for r in rates[0] if r < 0.1], [r for r in rates[0] if r > 0.1])
    assert set(backbone_rates) == {1e-2}
    assert set(head_rates) == {0.2}
    assert max(rates[2]) == pytest.approx(0.1)
    assert min(rates[2]) == pytest.approx(5e-3)


def test_a_frozen_head_by_learning_rate(tmp_path):
    run = trainer(tmp_path, max_steps=2, head_learning_rate=0.0)
    start = trainable(run.model)
    run.train()
    moved = {n for n, p in trainable(run.model).items() if not torch.equal(p, start[n])}
    assert moved
    assert not any(".hfproj." in n for n in moved)


def test_learning_rate_zero_changes_no_parameter(tmp_path):
    run = trainer(tmp_path, max_steps=3, learning_rate=0.0)
    start = trainable(run.model)
    run.train()
    assert_equal(trainable(run.model), start)


def test_an_optimizer_of_ones_own(tmp_path):
    model = head_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    run = trainer(tmp_path, model, max_steps=2, extra={"optimizers": (optimizer, None)})
    start = adapter(model)
    run.train()
    assert run.optimizer.optimizer is optimizer
    assert len(optimizer.param_groups) == 1
    assert differs(start, adapter(model))


def test_nothing_trainable(tmp_path):
    head_model().save_pretrained(tmp_path / "saved")
    frozen = hfproj.from_pretrained(tmp_path / "saved", backbone=backbone())
    with pytest.raises(hfproj.UsageError, match=r"No parameter is trainable.*is_trainable=True"):
        trainer(tmp_path, frozen).train()
