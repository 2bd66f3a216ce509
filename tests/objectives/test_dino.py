"""DINO by the official loss, closed forms, invariances and gradcheck; centre, temperatures, frozen prototypes."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.objectives import create_objective
from hfproj.objectives.base import Step
from hfproj.objectives.dino import DINO, dino_loss, teacher_probabilities

K = 7


def batch(views=5, images=6, dtype=torch.float64):
    """Scores of the student and of the teacher's two views, and a centre."""
    student, teacher = torch.randn(views, images, K, dtype=dtype), torch.randn(2, images, K, dtype=dtype)
    return student, teacher, torch.randn(K, dtype=dtype)


def objective(**options):
    return DINO(**{"prototypes": K, **options}).double()


def call(module, student, teacher, **given):
    return module(torch.randn(len(student), student.shape[1], 3), scores=student, target=teacher, **given)


def officially(student, teacher, center, student_temperature, teacher_temperature):
    """DINOLoss.forward on rows [views · batch, K]; returns the loss and the number of its terms."""
    crops = (student.flatten(0, 1) / student_temperature).chunk(len(student))
    targets = F.softmax((teacher.flatten(0, 1) - center) / teacher_temperature, dim=-1).chunk(len(teacher))
    losses = [
        torch.sum(-q * F.log_softmax(crop, dim=-1), dim=-1).mean()
        for i, q in enumerate(targets)
        for v, crop in enumerate(crops)
        if v != i
    ]
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("views", [2, 5])
@pytest.mark.parametrize("temperatures", [(0.1, 0.04), (0.5, 0.07)])
def test_equals_the_official_loss(views, temperatures):
    student, teacher, center = batch(views)
    expected, terms = officially(student, teacher, center, *temperatures)
    assert terms == 2 * (views - 1)
    loss = dino_loss(student, teacher, center, student_temperature=temperatures[0], teacher_temperature=temperatures[1])
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    module = objective(student_temperature=temperatures[0], teacher_temperature=temperatures[1])
    module.center.copy_(center)
    torch.testing.assert_close(call(module, student, teacher).loss, expected, rtol=1e-13, atol=0)


def test_closed_forms():
    student, teacher, center = batch()
    zero = torch.zeros(4, 6, K, dtype=torch.float64)
    uniform = teacher_probabilities(center.repeat(2, 6, 1), center, 0.04)
    torch.testing.assert_close(uniform, torch.full_like(uniform, 1 / K), rtol=1e-13, atol=0)
    for loss in (dino_loss(zero, zero[:2], center * 0), dino_loss(zero, teacher, center)):
        torch.testing.assert_close(loss.item(), math.log(K), rtol=1e-14, atol=0)
    # A teacher that is sure of one prototype: minus the student's mean log-probability of it.
    teacher = 100 * F.one_hot(torch.arange(6), K).double().expand(2, 6, K)
    log_p = (student / 0.1).log_softmax(-1)[:, torch.arange(6), torch.arange(6)].mean(1)
    expected = -(log_p.sum() * 2 - log_p[:2].sum()) / 8
    torch.testing.assert_close(dino_loss(student, teacher, center), expected, rtol=1e-12, atol=0)


def test_terms():
    student, teacher, _ = batch(3)
    loss, terms = call(objective(), student, teacher)
    p = F.softmax(teacher / 0.07, dim=-1)
    torch.testing.assert_close(terms["teacher_entropy"], torch.distributions.Categorical(p).entropy().mean())
    log_p = F.log_softmax(student / 0.1, dim=-1)
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2)]
    kl = sum(F.kl_div(log_p[v], p[i], reduction="batchmean") for i, v in pairs) / 4
    torch.testing.assert_close(terms["kl"], kl)
    torch.testing.assert_close(loss, terms["kl"] + terms["teacher_entropy"])


def test_invariances():
    student, teacher, center = batch()
    loss = dino_loss(student, teacher, center)
    order, images = torch.randperm(K), torch.randperm(6)
    small = torch.tensor([1, 0, 4, 2, 3])  # the large views in another order, and so the others
    for same in (
        (student[..., order], teacher[..., order], center[order]),
        (student[:, images], teacher[:, images], center),
        (student[small], teacher.flip(0), center),
        (student + torch.randn(5, 6, 1), teacher + torch.randn(2, 6, 1), center + 3),
    ):
        torch.testing.assert_close(dino_loss(*same), loss, rtol=1e-12, atol=0)


def test_gradcheck_and_no_gradient_for_the_teacher():
    student, teacher, center = batch(3, 3)
    student.requires_grad_(), teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: dino_loss(s, teacher, center), student)
    module = objective()
    loss, terms = call(module, student, teacher)
    loss.backward()
    assert student.grad.abs().max() > 1e-3
    assert teacher.grad is None
    assert not any(t.requires_grad for t in (*terms.values(), module.center))


def test_center_moves_after_the_loss_in_training_only():
    student, teacher, _ = batch()
    module = objective(center_momentum=0.8)
    first = call(module, student, teacher).loss
    mean = teacher.mean((0, 1))
    torch.testing.assert_close(module.center, 0.2 * mean)
    torch.testing.assert_close(first, dino_loss(student, teacher, mean * 0, teacher_temperature=0.07))
    second = call(module.eval(), student, teacher).loss
    torch.testing.assert_close(module.center, 0.2 * mean)
    torch.testing.assert_close(second, dino_loss(student, teacher, 0.2 * mean, teacher_temperature=0.07))
    call(module.train(), student, teacher)
    torch.testing.assert_close(module.center, 0.36 * mean)


@pytest.mark.parametrize("warmup", [0, 1, 2, 30])
def test_teacher_temperature_is_the_official_schedule(warmup):
    module = objective(warmup_epochs=warmup)
    schedule = np.concatenate((np.linspace(0.04, 0.07, warmup), np.full(40 - warmup, 0.07)))
    for epoch, expected in enumerate(schedule):
        for part in (0.0, 0.99):
            assert module.teacher_temperature_at(Step.at(0, 0, epoch + part)) == pytest.approx(expected, abs=1e-15)
    assert module.teacher_temperature_at(None) == 0.07
    student, teacher, center = batch()
    cold = call(objective(warmup_epochs=3), student, teacher, step=Step.at(0, 0, 0.5)).loss
    torch.testing.assert_close(cold, dino_loss(student, teacher, center * 0, teacher_temperature=0.04))


def test_prototypes_are_frozen_in_the_first_epoch():
    assert [objective().frozen(Step.at(0, 0, epoch)) for epoch in (0.0, 0.99, 1.0)] == [
        {"prototypes"},
        {"prototypes"},
        set(),
    ]
    assert objective(freeze_prototypes_epochs=0.0).frozen(Step.at(0, 0, 0.0)) == set()


@pytest.mark.parametrize("temperature", [0.001, 0.04, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_are_finite(temperature, dtype):
    student, teacher, _ = batch(dtype=torch.float32)
    student[0], teacher[0] = 0, 0
    student[1] = 1e4 * student[1]
    teacher[1] = teacher[1, :1]  # collapsed
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    options = {"student_temperature": temperature, "teacher_temperature": temperature, "warmup_epochs": 0}
    module = DINO(prototypes=K, **options)
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = call(module, student, teacher)
    loss.backward()
    assert loss.dtype == module.center.dtype == torch.float32
    assert student.grad.isfinite().all()
    assert all(t.isfinite() for t in terms.values())
    exact = call(objective(**options), student.detach().double(), teacher.double()).loss
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


def test_refused():
    student, teacher, _ = batch()
    with pytest.raises(UsageError, match=r"made for 9: pass prototypes=7"):
        call(DINO(prototypes=9), student, teacher)
    with pytest.raises(UsageError, match=r"needs 'target'.*EMA teacher"):
        call(objective(), student, None)
    with pytest.raises(UsageError, match=r"needs 'scores'.*ProjectionHeadConfig\(prototypes="):
        objective()(torch.randn(2, 6, 3), target=teacher)
    with pytest.raises(UsageError, match="at least 2 views"):
        call(objective(), student[:1], teacher)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prototypes": 1}, "prototypes to be at least 2, got 1"),
        ({"student_temperature": 0.0}, "student_temperature to be a positive number"),
        ({"teacher_temperature": -0.1}, "teacher_temperature.* got -0.1"),
        ({"warmup_teacher_temperature": math.inf}, "warmup_teacher_temperature"),
        ({"warmup_epochs": -1}, "warmup_epochs to be at least 0, got -1"),
        ({"freeze_prototypes_epochs": -1.0}, "freeze_prototypes_epochs to be at least 0"),
        ({"center_momentum": 1.5}, r"center_momentum to be from 0 to 1, got 1.5"),
        ({"centre_momentum": 0.9}, "Did you mean 'center_momentum'"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(UsageError, match=message):
        create_objective("dino", **options)


def test_anatomy():
    module = create_objective("dino", prototypes=K)
    assert module.views == (2, None)
    assert module.needs == {"scores", "target"}
    assert (module.target_of, module.target_views, module.ema_momentum) == ("scores", 2, (0.996, 1.0))
    assert not list(module.parameters())
    assert {name: tuple(b.shape) for name, b in module.state_dict().items()} == {"center": (K,)}
