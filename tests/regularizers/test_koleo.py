"""KoLeo by DINOv2's code, closed forms, invariances, gradcheck, and duplicates."""

import math

import pytest
import torch
from regularizers.models import features
from torch import nn
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.regularizers import create_regularizer
from hfproj.regularizers.koleo import koleo_loss


def official(f, eps=1e-8):
    """facebookresearch/dinov2 ``koleo_loss.py``."""
    f = F.normalize(f, eps=eps, p=2, dim=-1)
    dots = torch.mm(f, f.t())
    dots.view(-1)[:: f.shape[0] + 1].fill_(-1)
    nearest = dots.max(dim=1).indices
    return -torch.log(nn.PairwiseDistance(2, eps=eps)(f, f[nearest]) + eps).mean()


def test_equals_the_official_code():
    f = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    values = [koleo_loss(f), official(f)]
    torch.testing.assert_close(*values, rtol=1e-13, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(v, f)[0] for v in values), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("count", [2, 5])
def test_orthonormal_rows(count):
    f = 3 * torch.eye(count, 6, dtype=torch.float64)
    assert koleo_loss(f).item() == pytest.approx(-math.log(2) / 2, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [4, 256])
def test_duplicates(dtype, dim):
    f = torch.randn(1, dim).expand(6, dim).clone().to(dtype).requires_grad_()
    value = koleo_loss(f)
    value.backward()
    assert value.item() == pytest.approx(-math.log(1e-8 * (math.sqrt(dim) + 1)), rel=1e-5)
    assert not f.grad.any()


def test_near_duplicates_are_pushed_apart():
    """METHODS: a gradient of order 4e5 at a jitter of 1e-6."""
    f = F.normalize(torch.randn(1, 8, dtype=torch.float64)).expand(6, 8) + 1e-6 * torch.randn(6, 8, dtype=torch.float64)
    f.requires_grad_()
    koleo_loss(f).backward()
    assert 1e4 < f.grad.norm() < 1e7
    assert koleo_loss(f - 1e-13 * f.grad) < koleo_loss(f)


def test_invariances():
    f = torch.randn(12, 5, dtype=torch.float64)
    value = koleo_loss(f)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    scale = torch.logspace(-3, 3, 12, dtype=torch.float64)[:, None]
    for same in (f @ rotation, f * scale, f[torch.randperm(12)]):
        torch.testing.assert_close(koleo_loss(same), value, rtol=0, atol=1e-6)  # ε is no invariant


def test_gradcheck():
    assert torch.autograd.gradcheck(koleo_loss, torch.randn(6, 4, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("on", ["h", "z"])
@pytest.mark.parametrize("views", [1, 3])
def test_regularizer_sums_over_views(on, views):
    h, z = features(views), features(views, dim=4)
    value = create_regularizer("koleo", on=on)(None, h, z)
    torch.testing.assert_close(value, sum(official(view) for view in (h if on == "h" else z)), rtol=1e-12, atol=0)


def test_zero_rows_are_finite():
    f = torch.randn(5, 3)
    f[1:3] = 0
    f.requires_grad_()
    value = koleo_loss(f)
    value.backward()
    assert value.isfinite()
    assert f.grad.isfinite().all()


def test_one_image_has_no_neighbour():
    with pytest.raises(UsageError, match="at least 2 rows to find a neighbour among, got 1"):
        create_regularizer("koleo")(None, torch.randn(2, 1, 4), torch.randn(2, 1, 4))


@pytest.mark.parametrize("options", [{"on": "p"}, {"eps": 0.0}, {"eps": math.nan}])
def test_options_that_cannot_work(options):
    with pytest.raises(UsageError):
        create_regularizer("koleo", **options)
