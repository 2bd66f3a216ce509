"""Sinkhorn codes by the official form, the doubly balanced limit, shifts that change nothing, small ε."""

import math

import pytest
import torch
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.functional.assignments import sinkhorn


def cosines(rows=12, prototypes=5, dtype=torch.float64):
    return torch.tanh(torch.randn(rows, prototypes, dtype=dtype))


def by_scaling(scores, epsilon, iterations):
    """SwAV's own steps on exp(S/ε)ᵀ [K, N], after one scalar shift."""
    q = ((scores - scores.max()) / epsilon).exp().T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True) * len(q)
        q /= q.sum(0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.parametrize("iterations", [1, 3, 20])
@pytest.mark.parametrize("epsilon", [0.03, 0.05, 1.0])
def test_equals_the_official_form(epsilon, iterations):
    scores = cosines()
    codes = sinkhorn(scores, epsilon=epsilon, iterations=iterations)
    torch.testing.assert_close(codes, by_scaling(scores, epsilon, iterations), rtol=1e-12, atol=1e-14)


def test_rows_sum_to_one_and_prototypes_become_equal():
    few, many = (sinkhorn(cosines(), iterations=iterations) for iterations in (3, 2000))
    for codes in (few, many):
        torch.testing.assert_close(codes.sum(1), torch.ones(12, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(many.sum(0), torch.full((5,), 12 / 5, dtype=torch.float64), rtol=0, atol=1e-9)
    assert (few.sum(0) - 12 / 5).abs().max() > 1e-3


def test_shifts():
    """One number for all scores or one for each prototype is scaled away; one for each row is not, at 3 iterations."""
    scores = cosines()
    codes = sinkhorn(scores)
    for same in (scores + 5, scores + torch.randn(5)):
        torch.testing.assert_close(sinkhorn(same), codes, rtol=0, atol=1e-12)
    by_row = sinkhorn(scores - scores.amax(1, keepdim=True))
    assert (by_row - codes).abs().max() > 0.1


def test_order_of_rows_and_prototypes():
    scores, rows, columns = cosines(), torch.randperm(12), torch.randperm(5)
    torch.testing.assert_close(sinkhorn(scores[rows][:, columns]), sinkhorn(scores)[rows][:, columns])


def test_rows_of_a_queue_are_rows_without_codes():
    scores = cosines(20)
    codes = sinkhorn(scores[:8], queue=scores[8:])
    torch.testing.assert_close(codes, sinkhorn(scores)[:8], rtol=0, atol=1e-13)


def test_small_epsilon_gives_the_balanced_hard_assignment():
    """exp(S/ε) would underflow for the row that is far from everything, and its code would be 0/0."""
    scores = torch.eye(6)
    scores[0] = torch.linspace(-1.0, -0.9, 6)
    codes = sinkhorn(scores, epsilon=1e-3, iterations=3)
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.sum(1), torch.ones(6))
    assert torch.equal(codes[1:].argmax(1), torch.arange(1, 6))
    assert codes[0].argmax() == 0  # the only prototype that nobody else has


def test_collapsed_rows_are_spread_evenly():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        codes = sinkhorn(torch.tensor([0.9, 0.1, -1.0], dtype=dtype).repeat(4, 1))
        assert codes.dtype == torch.float32
        torch.testing.assert_close(codes, torch.full((4, 3), 1 / 3))


def test_half_precision_scores_are_computed_in_float32():
    scores = F.normalize(torch.randn(64, 32), dim=1).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        codes = sinkhorn(scores)
    torch.testing.assert_close(codes.double(), sinkhorn(scores.double()), rtol=0, atol=1e-5)


def test_no_gradient():
    assert not sinkhorn(cosines().requires_grad_()).requires_grad


@pytest.mark.parametrize("options", [{"epsilon": 0.0}, {"epsilon": math.nan}, {"iterations": 0}])
def test_options_that_cannot_work(options):
    with pytest.raises(UsageError, match="epsilon above 0"):
        sinkhorn(cosines(), **options)
