"""SupCon row by row, as SupContrast writes it, closed forms, equality with NT-Xent, invariances and gradcheck."""

import math

import pytest
import torch
from inputs import extreme_projections, projections, same_directions
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.objectives import create_objective
from hfproj.objectives.nt_xent import nt_xent_loss
from hfproj.objectives.supcon import SupCon

LABELS = torch.tensor([2, 0, 2, 1, 2])  # a class of three and two of one


def as_supcontrast_writes_it(z, labels, temperature, base_temperature):
    """``losses.py``: shifted by the row maximum, masks of floats, a count of 0 positives becomes 1."""
    views, batch, _ = z.shape
    features = F.normalize(z, dim=-1).flatten(0, 1)
    mask = (labels[:, None] == labels).to(z).repeat(views, views)
    logits = features @ features.T / temperature
    logits = logits - logits.max(1, keepdim=True).values.detach()
    off_diagonal = 1 - torch.eye(views * batch).to(z)
    mask = mask * off_diagonal
    log_prob = logits - (logits.exp() * off_diagonal).sum(1, keepdim=True).log()
    count = mask.sum(1)
    per_row = (mask * log_prob).sum(1) / torch.where(count < 1e-6, 1, count)
    return -(temperature / base_temperature) * per_row.mean()


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.05, 0.5, 10.0])
def test_equals_supcontrast(views, temperature):
    z = projections(views)
    loss = SupCon(temperature=temperature, base_temperature=0.07)(z, labels=LABELS).loss
    torch.testing.assert_close(loss, as_supcontrast_writes_it(z, LABELS, temperature, 0.07), rtol=1e-12, atol=0)
    plain = SupCon(temperature=temperature)(z, labels=LABELS).loss
    torch.testing.assert_close(plain, loss * 0.07 / temperature, rtol=1e-13, atol=0)


def test_valid_rows_only_and_the_cosine_of_positives():
    z = projections(1)
    everything, terms = SupCon(temperature=0.5)(z, labels=LABELS)
    valid = SupCon(temperature=0.5, reduction="valid")(z, labels=LABELS).loss
    torch.testing.assert_close(valid, everything * 5 / 3, rtol=1e-13, atol=0)  # rows 0, 2 and 4
    u = F.normalize(z[0], dim=-1)
    expected = (u[0] @ u[2] + u[0] @ u[4] + u[2] @ u[4]) / 3
    torch.testing.assert_close(terms["positive_cosine"], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", ["all", "valid"])
@pytest.mark.parametrize("views", [2, 3])
def test_unique_labels_give_nt_xent(views, reduction):
    z = projections(views)
    loss = SupCon(temperature=0.2, reduction=reduction)(z, labels=torch.randperm(5)).loss
    torch.testing.assert_close(loss, nt_xent_loss(z, temperature=0.2), rtol=1e-13, atol=0)


@pytest.mark.parametrize("reduction", ["all", "valid"])
def test_nobody_has_a_positive(reduction):
    z = projections(1).requires_grad_()
    loss, terms = SupCon(reduction=reduction)(z, labels=torch.arange(5))
    loss.backward()
    assert loss.item() == 0
    assert terms["positive_cosine"].item() == 0
    assert not z.grad.any()


def test_collapsed_projections():
    z = torch.ones(2, 5, 8, dtype=torch.float64, requires_grad=True)
    loss = SupCon(temperature=0.01)(z, labels=LABELS).loss
    loss.backward()
    torch.testing.assert_close(loss.item(), math.log(9), rtol=1e-12, atol=0)
    assert z.grad.abs().max() < 1e-11


def test_invariances():
    z, objective = projections(2, 5), SupCon()
    loss = objective(z, labels=LABELS).loss
    for same in [*same_directions(z)[:2], z.flip(0)]:
        torch.testing.assert_close(objective(same, labels=LABELS).loss, loss, rtol=1e-12, atol=0)
    order = torch.randperm(5)
    torch.testing.assert_close(objective(z[:, order], labels=LABELS[order]).loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(objective(z, labels=7 - LABELS).loss, loss, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["all", "valid"])
def test_gradcheck(reduction):
    objective, z = SupCon(temperature=0.3, reduction=reduction), projections(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: objective(z, labels=LABELS).loss, z)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes(temperature, dtype):
    z, labels = extreme_projections(dtype), torch.tensor([0, 1, 1, 0, 2, 3])
    with torch.autocast("cpu", torch.bfloat16):
        loss = SupCon(temperature=temperature)(z, labels=labels).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert z.grad.isfinite().all()
    assert not z.grad[:, 0].any()
    exact = SupCon(temperature=temperature)(z.detach().double(), labels=labels).loss
    torch.testing.assert_close(loss.double(), exact, rtol=2e-5, atol=2e-5)


def test_refused():
    with pytest.raises(UsageError, match=r"SupCon needs 'labels'.*label column"):
        SupCon()(torch.randn(2, 5, 4))
    for labels in [torch.arange(10), torch.zeros(5, 3, dtype=torch.int64), torch.zeros(5)]:
        with pytest.raises(UsageError, match=r"each of the 5 images as labels, got torch\."):
            SupCon()(torch.randn(2, 5, 4), labels=labels)
    with pytest.raises(UsageError, match="SupCon tells images"):
        SupCon()(torch.randn(2, 1, 4), labels=torch.zeros(1, dtype=torch.int64))
    with pytest.raises(UsageError, match=r"Unknown reduction 'vaild'. Did you mean 'valid'"):
        create_objective("supcon", reduction="vaild")
    with pytest.raises(UsageError, match="base_temperature to be a positive number"):
        create_objective("supcon", base_temperature=0.0)
