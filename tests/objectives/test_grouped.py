"""Random disjoint groups: DirectCLR's form, what is drawn, and what is passed to the inner objective."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.objectives import OBJECTIVES, create_objective
from hfproj.objectives.base import ObjectiveOutput, Step
from hfproj.objectives.grouped import draw_groups


def projections(views=2, batch=5, dim=8):
    return torch.randn(views, batch, dim, dtype=torch.float64)


def directclr(z, order, groups, size, temperature=0.1):
    """Mode "group" of its main.py, for a given permutation."""

    def info_nce(nn_, p):
        logits = F.normalize(nn_, dim=1) @ F.normalize(p, dim=1).T / temperature
        return F.cross_entropy(logits, torch.arange(len(p)))

    loss = 0
    for i in range(groups):
        idx = order[i * size : (i + 1) * size]
        z1, z2 = z[0][:, idx], z[1][:, idx]
        loss = loss + info_nce(z1, z2) / 2 + info_nce(z2, z1) / 2
    return loss


@pytest.mark.parametrize("options", [{"groups": 2}, {"groups": 2, "group_dim": 3}, {"groups": 8}])
def test_equals_directclrs_form_with_gradients(options):
    z = projections().requires_grad_()
    size = options.get("group_dim", 8 // options["groups"])
    order = torch.randperm(8, generator=Step.at(3, 5, 0.0).generator)
    loss = create_objective("grouped", **options)(z, step=Step.at(3, 5, 0.0)).loss
    expected = directclr(z, order, options["groups"], size)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    # groups of one dimension have cosines of ±1: their gradient is 0 but for rounding
    torch.testing.assert_close(
        *(torch.autograd.grad(value, z)[0] for value in (loss, expected)), rtol=1e-12, atol=1e-13
    )


def test_groups_are_disjoint_and_drawn_anew_each_step():
    def draw(step):
        return draw_groups(12, 3, 4, Step.at(0, step, 0.0).generator)

    assert sorted(torch.cat(draw(0)).tolist()) == list(range(12))
    assert [len(group) for group in draw(0)] == [4, 4, 4]
    assert [g.tolist() for g in draw(0)] == [g.tolist() for g in draw(0)]
    assert [g.tolist() for g in draw(0)] != [g.tolist() for g in draw(1)]
    objective, z = create_objective("grouped", groups=2), projections()
    losses = [objective(z, step=Step.at(0, step, 0.0)).loss.item() for step in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_one_group_of_all_dimensions_is_the_inner_objective():
    z = projections()
    inner = create_objective("nt_xent", temperature=0.5)(z)
    grouped = create_objective("grouped", objective="nt_xent", objective_options={"temperature": 0.5}, groups=1)(z)
    torch.testing.assert_close(grouped.loss, inner.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(grouped.terms, inner.terms, rtol=1e-13, atol=0)


def test_terms_are_means_over_groups():
    z, step = projections(), Step.at(0, 0, 0.0)
    groups = draw_groups(8, 2, 4, Step.at(0, 0, 0.0).generator)
    cosines = [F.cosine_similarity(z[0][:, g], z[1][:, g], dim=-1).mean() for g in groups]
    term = create_objective("grouped", groups=2)(z.requires_grad_(), step=step).terms["positive_cosine"]
    torch.testing.assert_close(term, torch.stack(cosines).mean().detach(), rtol=1e-13, atol=1e-15)
    assert not term.requires_grad


class Difference(nn.Module):
    """An objective that needs a target and a prediction."""

    views = (2, 2)
    needs = frozenset({"target", "prediction", "labels"})
    target_of = "projection"

    def forward(self, z, *, target=None, prediction=None, labels=None, **given: Any):
        loss = (z - 2 * target + 3 * prediction).square().sum() + labels.sum()
        return ObjectiveOutput(loss, {})


class Counting(Difference):
    """An objective that remembers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))


@pytest.fixture
def _registered(monkeypatch):
    for cls in (Difference, Counting):
        monkeypatch.setitem(OBJECTIVES._entries, cls.__name__, (cls, cls.__doc__, {}))


@pytest.mark.usefixtures("_registered")
def test_target_and_prediction_are_grouped_with_z():
    objective = create_objective("grouped", objective="Difference", groups=4)
    assert (objective.views, objective.needs) == (Difference.views, Difference.needs)
    assert objective.target_of == "projection"
    z, target, prediction = projections(), projections(), projections()
    given = {"target": target, "prediction": prediction, "labels": torch.arange(5)}
    expected = (z - 2 * target + 3 * prediction).square().sum() + 4 * 10
    torch.testing.assert_close(objective(z, **given).loss, expected, rtol=1e-13, atol=0)
    with pytest.raises(UsageError, match="needs 'labels'"):
        objective(z, **(given | {"labels": None}))


def test_gradcheck():
    objective = create_objective("grouped", groups=2)
    z = projections(batch=3, dim=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: objective(z, step=Step.at(0, 0, 0.0)).loss, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_are_finite(dtype):
    z = torch.randn(2, 6, 8)
    z[:, 0] = 0
    z[:, 1] = z[:, 2]
    z[..., 3] = 0  # a dimension without any signal
    z = z.to(dtype).requires_grad_()
    loss = create_objective("grouped", groups=8)(z).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "groups to be at least 1, got 0"),
        ({"group_dim": 0}, "at least 1"),
        ({"objective": "nt_xnet"}, "Did you mean 'nt_xent'"),
        ({"objective_options": {"temprature": 1.0}}, "Did you mean 'temperature'"),
        ({"objective": "swav"}, "needs prototypes or keeps state"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(UsageError, match=message):
        create_objective("grouped", **options)


@pytest.mark.parametrize("options", [{"groups": 9}, {"groups": 2, "group_dim": 5}])
def test_too_few_dimensions(options):
    with pytest.raises(UsageError, match=r"z has 8 dimensions, which is too few.*fewer or smaller groups"):
        create_objective("grouped", **options)(projections())


@pytest.mark.usefixtures("_registered")
def test_objectives_with_state_are_refused():
    with pytest.raises(UsageError, match="keeps state between steps"):
        create_objective("grouped", objective="Counting")
