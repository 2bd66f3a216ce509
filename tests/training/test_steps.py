"""Around the optimizer step: frozen parts, fixed learning rates, LARS, proximal steps, unused parts."""

import pytest
import torch
from small import adapter, assert_equal, differs, head_model, trainer
from torch import nn

from hfproj.regularizers import Weighted, create_regularizer
from hfproj.training.optimizer import lars, parameter_groups

PREDICTOR = {"predictor": {"head": "mlp", "hidden_dim": 8}}


class Frozen(nn.Module):
    """A toy objective that pulls p to z, and freezes `parts` in the first epoch."""

    views = (2, None)
    needs = frozenset({"prediction", "scores"})

    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def frozen(self, step):
        return self.parts if step.epoch < 1 else frozenset()

    def forward(self, z, *, prediction=None, scores=None, **given):
        return (prediction - z).square().mean() + scores.square().mean(), {}


def part(model, name):
    return {n: t for n, t in adapter(model).items() if f".{name}." in n and "num_batches" not in n}


@pytest.mark.parametrize("name", ["predictor", "prototypes", "head"])
def test_frozen_parts_do_not_move_in_the_steps_that_freeze_them(tmp_path, name):
    model = head_model(prototypes=3, **PREDICTOR)
    weights = {n: p for n, p in model.named_parameters() if f".{name}." in n}
    start = {n: p.detach().clone() for n, p in weights.items()}
    others = part(model, "predictor" if name == "head" else "head")
    run = trainer(tmp_path, model, max_steps=3, extra={"objective": Frozen(frozenset({name}))})
    run.train()
    assert_equal(start, {n: p.detach() for n, p in weights.items()})
    assert differs(others, part(model, "predictor" if name == "head" else "head"))
    run = trainer(tmp_path, model, max_steps=4, extra={"objective": Frozen(frozenset({name}))})
    run.train()  # the fourth step is in epoch 2
    assert differs(start, {n: p.detach() for n, p in weights.items()})


def test_the_rate_of_the_predictor_is_fixed_where_asked_for(tmp_path):
    model = head_model(prototypes=3, **PREDICTOR)
    run = trainer(
        tmp_path, model, max_steps=3, lr_scheduler_type="linear", warmup_steps=0, learning_rate=0.5,
        head_learning_rate=0.4, fixed_predictor_rate=True, extra={"objective": Frozen(frozenset())},
    )  # fmt: skip
    seen = []

    def record(optimizer, *_):
        seen.append({group["part"]: group["lr"] for group in optimizer.param_groups})

    run.create_optimizer().register_step_pre_hook(record)
    run.train()
    assert [rates["predictor"] for rates in seen] == [0.4] * 3
    assert [rates["backbone"] for rates in seen] == pytest.approx([0.5, 0.5 * 2 / 3, 0.5 / 3])
    assert [rates["head"] for rates in seen] == pytest.approx([0.4, 0.4 * 2 / 3, 0.4 / 3])


@pytest.mark.parametrize("clip", [False, True])
def test_lars_is_its_formula(clip):
    """q = η‖w‖ / (‖g‖ + wd‖w‖ + 1e-8), clipped to min(q / lr, 1), scales g + wd·w of matrices; SGD for the rest."""
    model = head_model(lora=False).double()
    rate, trust, decay, momentum = 0.3, 0.02, 1e-2, 0.9
    optimizer = lars(parameter_groups(model, weight_decay=decay), rate, trust, clip=clip)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.ndim for p in parameters.values()} == {1, 2}
    expected = {n: p.detach().clone() for n, p in parameters.items()}
    buffers = {n: torch.zeros_like(p) for n, p in expected.items()}
    for _ in range(3):
        for name, p in parameters.items():
            p.grad = torch.randn_like(p)
            g, w = p.grad.clone(), expected[name]
            if p.ndim > 1:
                q = trust * w.norm() / (g.norm() + decay * w.norm() + 1e-8)
                g = (min(q / rate, 1) if clip else q) * (g + decay * w)
            buffers[name] = momentum * buffers[name] + g
            expected[name] = w - rate * buffers[name]
        optimizer.step()
    for name, p in parameters.items():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=1e-14)


def test_lars_trains(tmp_path):
    run = trainer(tmp_path, max_steps=1, lars=True, learning_rate=0.1)
    start = adapter(run.model)
    run.train()
    assert type(run.optimizer.optimizer).__name__ == "Lars"
    assert differs(start, adapter(run.model))


def test_proximal_steps_switch_features_off(tmp_path):
    model = head_model(lora=False, head_options={"hidden_dim": 12, "norm": None})
    regularizer = Weighted(create_regularizer("sparse_head", method="proximal"), 2.0)
    run = trainer(
        tmp_path, model, max_steps=6, optim="sgd", learning_rate=0.1, extra={"regularizers": {"l21": regularizer}}
    )
    run.train()
    weight = next(p for n, p in model.named_parameters() if n.endswith("hidden.0.linear.weight"))
    off = (weight.norm(dim=0) == 0).float().mean().item()
    assert off > 0
    assert [e["l21_sparsity"] for e in run.state.log_history if "l21_sparsity" in e][-1] == pytest.approx(off)


def test_parts_that_the_objective_does_not_use_are_frozen(tmp_path):
    model = head_model(prototypes=3, scales={"bias": 1.0}, **PREDICTOR)
    trainer(tmp_path, model, extra={"objective": "nt_xent"})
    trainable = {
        n.split(".default.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad and "hfproj" in n
    }
    assert trainable == {"head"}
    trainer(tmp_path, model, extra={"objective": Frozen(frozenset())})
    assert all(p.requires_grad for n, p in model.named_parameters() if ".predictor." in n or ".prototypes." in n)
