"""Shares of regularizers in the gradient: against gradients that were taken one by one, and the warning."""

import pytest
import torch
from small import adapter, assert_equal, head_model, images, trainer
from torch import nn
from unlearned import Ruler

import hfproj
from hfproj.regularizers import Weighted
from hfproj.training import shares


class Both(nn.Module):
    """A term on h and z, so that its gradient at h has two ways."""

    def forward(self, model, h, z, *, step=None):
        return h.square().mean() + 3 * z.pow(4).mean()


class Norms(nn.Module):
    """A term on the trained weights of head and LoRA."""

    def forward(self, model, h, z, *, step=None):
        return sum(p.square().sum() for p in model.parameters() if p.requires_grad)


class Nothing(nn.Module):
    """A term without a gradient, or with one of zero."""

    def __init__(self, zero=False):
        super().__init__()
        self.zero = zero

    def forward(self, model, h, z, *, step=None):
        return z.sum() * 0 if self.zero else z.new_ones(())


class Keeps(hfproj.ProjectionTrainer):
    """Takes the same shares by itself in each training step: each loss by a pass of its own."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        own, at = [p for p in self.model.parameters() if p.requires_grad], {}

        def keep(module, args, output):
            at["h"], at["z"] = args[0], output

        handle = hfproj.tuner.active.active_modules(self.bare_model()).head.register_forward_hook(keep)
        state = {n: b.clone() for n, b in self.model.named_buffers()}
        x = torch.cat([view.to(self.args.device) for view in inputs["views"]])
        self.model.train()
        out = self.model(x, num_views=2)
        handle.remove()
        z, h = (out[name].unflatten(0, (2, -1)) for name in ("projection", "representation"))
        objective = self.objective(z)[0]

        def norm(loss, variables):
            found = torch.autograd.grad(loss, variables, retain_graph=True, allow_unused=True)
            return sum(g.square().sum() for g in found if g is not None) ** 0.5

        terms = {name: r.weight * r.module(self.model, h, z) for name, r in self.regularizers.items()}
        variables = {"ruler": [at["z"]], "both": [out["representation"]], "norms": own}
        base = {"norms": objective + terms["ruler"] + terms["both"]}
        expected = {
            f"{name}_grad_share": float(norm(terms[name], v) / norm(base.get(name, objective), v))
            for name, v in variables.items()
        }
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(state[name])
        self.expected = [*getattr(self, "expected", []), expected]
        return super().training_step(model, inputs, num_items_in_batch)


def test_shares_are_ratios_of_gradients(tmp_path):
    given = {"ruler": Weighted(Ruler(), 0.3), "both": Weighted(Both(), 0.2), "norms": Weighted(Norms(), 0.01)}
    run = trainer(tmp_path, extra={"objective": "nt_xent", "regularizers": given}, cls=Keeps, max_steps=3)
    run.train()
    rows = [row for row in run.state.log_history if "loss" in row]
    assert len(rows) == len(run.expected) == 3
    for row, expected in zip(rows, run.expected):
        found = {name: row[name] for name in expected}
        assert found == pytest.approx(expected, rel=1e-4)
        assert min(found.values()) > 0


@pytest.mark.parametrize(("options", "steps"), [
    ({"logging_steps": 2}, [2, 4, 6]),
    ({"logging_steps": 4, "logging_first_step": True}, [1, 4]),
    ({"logging_strategy": "epoch"}, [3, 6]),
    ({"logging_steps": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 4, "max_steps": 4}, [2, 4]),
    ({"logging_strategy": "no"}, []),
])  # fmt: skip
def test_they_are_measured_when_the_step_is_logged_and_only_then(tmp_path, options, steps, monkeypatch):
    taken, take = [], shares.GradientShares.take
    monkeypatch.setattr(shares.GradientShares, "take", lambda self, *args: (taken.append(1), take(self, *args)))
    options = {"max_steps": 6, "num_train_epochs": 2, **options}
    run = trainer(tmp_path, extra={"regularizers": {"ruler": Ruler(), "norms": Norms()}}, **options)
    run.train()
    for name in ("ruler_grad_share", "norms_grad_share"):
        assert [row["step"] for row in run.state.log_history if name in row] == steps
    assert len(taken) == len(steps)


def test_measuring_does_not_change_the_run(tmp_path):
    def weights(name, every):
        regularizers = {"koleo": 0.1, "werank": 0.01, "sparse_head": {"weight": 0.1, "method": "proximal"}}
        model = head_model(dropout=0.1, head_options={"hidden_dim": 12, "norm": None})
        run = trainer(tmp_path / name, model, logging_steps=every, max_steps=4, extra={"regularizers": regularizers})
        run.train()
        assert not any("sparse_head_grad" in key for row in run.state.log_history for key in row)
        return adapter(run.model)

    assert_equal(weights("each", 1), weights("none", 100))


@pytest.mark.parametrize(("module", "weight", "said"), [
    (Ruler(), 1e-7, r"does next to nothing: at 5 logging steps in a row.*grad_share, .*Raise its weight, 1e-07 now"),
    (Nothing(), 1.0, r"grad_share, 0\.0e\+00 now.*at its minimum"),
    (Nothing(zero=True), 1.0, "at its minimum"),
    (Ruler(), 0.0, "its weight is 0"),
    (Norms(), 1e-9, "'term' does next to nothing"),
])  # fmt: skip
def test_what_does_nothing_at_five_logging_steps_is_warned_of_once(tmp_path, module, weight, said):
    given = {"term": Weighted(module, weight), "other": Weighted(Ruler(), 1.0)}
    run = trainer(tmp_path, None, images(24), extra={"regularizers": given}, max_steps=7)
    with pytest.warns(UserWarning, match=said) as caught:
        run.train()
    assert len([w for w in caught if "does next to nothing" in str(w.message)]) == 1
    assert all(row["term_grad_share"] < 1e-4 for row in run.state.log_history if "loss" in row)


def test_four_logging_steps_are_no_warning(tmp_path):
    given = {"term": Weighted(Ruler(), 1e-7), "other": Weighted(Ruler(), 1.0)}
    trainer(tmp_path, None, images(24), extra={"regularizers": given}, max_steps=4).train()


def test_a_weight_that_is_wound_down_is_no_fault(tmp_path):
    given = {"ruler": Weighted(Ruler(), 1.0, schedule="cosine", end_weight=0.0)}
    run = trainer(tmp_path, max_steps=12, num_train_epochs=4, extra={"regularizers": given})
    run.regularizers["ruler"].at = lambda progress: 1e-9  # as at its end
    run.train()


@pytest.mark.parametrize("objective", ["byol", "swav"])
def test_objectives_that_read_predictions_or_prototypes(tmp_path, objective):
    """Their loss does not depend on the projections themselves, but on what is computed of them."""
    parts = {"byol": {"predictor": {"head": "linear"}}, "swav": {"prototypes": 4}}[objective]
    extra = {"objective": objective, "regularizers": {"ruler": Ruler(), "koleo": {"weight": 0.1, "on": "h"}}}
    run = trainer(tmp_path, head_model(**parts), extra=extra, max_steps=2)
    run.train()
    rows = [row for row in run.state.log_history if "loss" in row]
    assert all(row["ruler_grad_share"] > 1e-4 and row["koleo_grad_share"] > 1e-4 for row in rows)
