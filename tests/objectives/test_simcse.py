"""SimCSE as its authors write it, with and without hard negatives; closed forms, invariances and gradcheck."""

import math

import pytest
import torch
from inputs import extreme_projections, projections, same_directions
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.objectives import create_objective
from hfproj.objectives.info_nce import info_nce_loss
from hfproj.objectives.simcse import SimCSE


def as_simcse_writes_it(z, temperature, z3_weight=0.0):
    """``simcse/models.py``: cosines of all pairs, the weights as a list of lists, cross entropy."""
    cos_sim = F.cosine_similarity(z[0][:, None], z[1][None], dim=-1) / temperature
    n = len(cos_sim)
    if len(z) == 3:
        z1_z3 = F.cosine_similarity(z[0][:, None], z[2][None], dim=-1) / temperature
        cos_sim = torch.cat([cos_sim, z1_z3], 1)
        weights = [[0.0] * n + [0.0] * i + [z3_weight] + [0.0] * (n - i - 1) for i in range(n)]
        cos_sim = cos_sim + torch.tensor(weights)
    return F.cross_entropy(cos_sim, torch.arange(n))


@pytest.mark.parametrize("temperature", [0.01, 0.05, 10.0])
def test_unsupervised_equals_the_official_code(temperature):
    z = projections()
    loss = SimCSE(temperature=temperature)(z).loss
    torch.testing.assert_close(loss, as_simcse_writes_it(z, temperature), rtol=1e-12, atol=1e-13)
    one_direction = info_nce_loss(z, temperature=temperature, symmetric=False)
    torch.testing.assert_close(loss, one_direction, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("weight", [0.0, 1.0, -2.0])
def test_supervised_equals_the_official_code(weight):
    z = projections(3)
    loss, terms = SimCSE(hard_negatives=True, hard_negative_weight=weight)(z)
    torch.testing.assert_close(loss, as_simcse_writes_it(z, 0.05, weight), rtol=1e-12, atol=1e-13)
    for name, view in [("positive_cosine", 1), ("hard_negative_cosine", 2)]:
        expected = F.cosine_similarity(z[0], z[view], dim=-1).mean()
        torch.testing.assert_close(terms[name], expected, rtol=1e-12, atol=1e-14)


def test_closed_forms():
    z = torch.ones(3, 4, 8, dtype=torch.float64, requires_grad=True)
    loss = SimCSE(hard_negatives=True, hard_negative_weight=math.log(3))(z).loss  # one's own counts three times
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4 + 3 + 3), rel=1e-13)
    assert z.grad.abs().max() < 1e-12
    orthogonal = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    assert SimCSE(temperature=0.5)(orthogonal).loss.item() == pytest.approx(math.log1p(5 * math.exp(-2)), rel=1e-13)


def test_invariances():
    z, objective = projections(3, 7), SimCSE(hard_negatives=True, hard_negative_weight=0.7)
    for same in same_directions(z):
        torch.testing.assert_close(objective(same).loss, objective(z).loss, rtol=1e-12, atol=0)
    assert objective(z[[1, 0, 2]]).loss != objective(z).loss  # one direction


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_gradcheck(weight):
    objective = SimCSE(temperature=0.5, hard_negatives=True, hard_negative_weight=weight)
    assert torch.autograd.gradcheck(lambda z: objective(z).loss, projections(3, 3).requires_grad_())


@pytest.mark.parametrize("temperature", [0.01, 0.05, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes(temperature, dtype):
    z = extreme_projections(dtype, views=3)
    objective = SimCSE(temperature=temperature, hard_negatives=True, hard_negative_weight=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(z).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert z.grad.isfinite().all()
    assert not z.grad[:, 0].any()
    torch.testing.assert_close(loss.double(), objective(z.detach().double()).loss, rtol=1e-5, atol=1e-5)


def test_refused():
    with pytest.raises(UsageError, match=r"SimCSE needs 2 views.*got 3"):
        SimCSE()(torch.randn(3, 5, 4))
    with pytest.raises(UsageError, match=r"SimCSE needs 3 views.*got 2"):
        SimCSE(hard_negatives=True)(torch.randn(2, 5, 4))
    with pytest.raises(UsageError, match="SimCSE tells images"):
        SimCSE()(torch.randn(2, 1, 4))
    with pytest.raises(UsageError, match="set hard_negatives=True"):
        create_objective("simcse", hard_negative_weight=1.0)
    with pytest.raises(UsageError, match="to be a finite number, got inf"):
        create_objective("simcse", hard_negatives=True, hard_negative_weight=math.inf)
