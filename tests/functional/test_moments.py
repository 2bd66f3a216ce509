"""Means over entries; several processes are tested with the objectives, joint_moments with BatchNorm."""

import pytest
import torch

from hfproj.errors import UsageError
from hfproj.functional.moments import check_rows, joint_centred, joint_mean, joint_moments


def test_joint_mean_counts_entries():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(joint_mean(x), x.mean(), rtol=1e-14, atol=1e-15)
    assert torch.autograd.gradcheck(joint_mean, x)


def test_moments_of_rows_far_from_zero():
    x = torch.randn(2, 50, 3, dtype=torch.float64)
    n, mean, var = joint_moments((x + 1e4).float())
    assert n.item() == 50
    torch.testing.assert_close(mean.double() - 1e4, x.mean(1), rtol=0, atol=2e-3)
    torch.testing.assert_close(var.double(), x.var(1, correction=0), rtol=1e-3, atol=0)


def test_centred_rows():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    n, centred, var = joint_centred(x)
    expected = (x - x.mean(1, keepdim=True), x.var(1, correction=0))
    assert n.item() == 5
    torch.testing.assert_close((centred, var), expected, rtol=1e-12, atol=1e-15)
    assert torch.autograd.gradcheck(lambda x: joint_centred(x)[1:], x)


def test_check_rows():
    check_rows("It", 2, torch.tensor(2.0))
    check_rows("It", 0, torch.tensor(7.0))  # other processes have them
    with pytest.raises(UsageError, match="It needs at least 3 images, got 2 over all processes"):
        check_rows("It", 2, torch.tensor(2.0), fewest=3)
