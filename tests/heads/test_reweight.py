"""The reweight head: its weights, what half precision would lose of them, and the effective dimension."""

import pytest
import torch

from hfproj.heads import create_head


@pytest.mark.parametrize("kappa", [1.0, 1.01, 1.05, 1.5])
def test_entries_are_multiplied_with_powers(kappa):
    head = create_head("reweight", in_dim=64, kappa=kappa)
    h = torch.randn(4, 64)
    expected = h * torch.tensor([kappa**-i for i in range(64)])
    assert torch.equal(head(h), h if kappa == 1 else expected)


def test_nothing_is_trained_or_saved():
    head = create_head("reweight", in_dim=8)
    assert not list(head.parameters())
    assert not head.state_dict()
    assert head.kappa == 1.05


def test_jacobian():
    head = create_head("reweight", in_dim=5, kappa=2.0).double()
    jacobian = torch.func.jacrev(lambda h: head(h.unsqueeze(0))[0])(torch.randn(5, dtype=torch.float64))
    assert torch.equal(jacobian, torch.diag(torch.tensor([1, 0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)))


@pytest.mark.parametrize(("kappa", "lost"), [(1.01, 0), (1.2, 1477), (1.5, 1791)])
def test_far_weights_underflow_and_none_overflows(kappa, lost):
    """The counts of 1.01 and 1.2 are known; that of 1.5 is where 1.5^(-i) is below half the least float32, 2^(-150)."""
    weights = create_head("reweight", in_dim=2048, kappa=kappa).weights
    assert weights.isfinite().all()
    assert (weights == 0).sum() == lost


@pytest.mark.parametrize("kappa", [1.01, 1.05, 1.2, 1.5])
def test_effective_dimension(kappa):
    """Of the infinite geometric series it is (κ² + 1) / (κ² − 1)."""
    known = {1.01: 100.5, 1.05: 20.5, 1.2: 5.5, 1.5: 2.6}[kappa]
    dimension = create_head("reweight", in_dim=2048, kappa=kappa).effective_dimension
    assert dimension == pytest.approx(known, abs=0.05)
    assert dimension == pytest.approx((kappa**2 + 1) / (kappa**2 - 1), rel=1e-6)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cast", [False, True])
def test_half_precision_loses_no_weight(half, cast):
    head = create_head("reweight", in_dim=2048, kappa=1.01)
    expected = head.weights.clone()
    assert (expected.half() == 0).sum() == 306  # what float16 weights would lose
    if cast:
        head.to(half)
    with torch.autocast("cpu", torch.bfloat16):
        z = head(torch.ones(2, 2048, dtype=half))
    assert z.dtype == torch.float32
    assert torch.equal(z, expected.expand(2, 2048))
