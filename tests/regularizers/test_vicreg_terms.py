"""VICReg's terms as an add-on, by the official code."""

import math

import pytest
import torch
from regularizers.models import features
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.regularizers import create_regularizer


def official(x, y):
    """facebookresearch/vicreg ``main_vicreg.py``: standard deviation and covariance loss, without their weights."""

    def off_diagonal(c):
        n, _ = c.shape
        return c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten()

    x, y = x - x.mean(0), y - y.mean(0)
    std_x, std_y = (x.var(0) + 0.0001).sqrt(), (y.var(0) + 0.0001).sqrt()
    std_loss = F.relu(1 - std_x).mean() / 2 + F.relu(1 - std_y).mean() / 2
    cov_x, cov_y = x.T @ x / (len(x) - 1), y.T @ y / (len(y) - 1)
    cov_loss = off_diagonal(cov_x).pow(2).sum().div(x.shape[1]) + off_diagonal(cov_y).pow(2).sum().div(x.shape[1])
    return std_loss, cov_loss


@pytest.mark.parametrize("on", ["h", "z"])
@pytest.mark.parametrize("variance_reduction", ["mean", "sum"])
def test_equals_the_official_code(on, variance_reduction):
    h, z = features().requires_grad_(), features(dim=4).requires_grad_()
    used = h if on == "h" else z
    term = create_regularizer("vicreg_terms", on=on, variance_reduction=variance_reduction)
    variance, covariance = official(*used)
    expected = 25 * variance * (2 if variance_reduction == "sum" else 1) + covariance
    value = term(None, h, z)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(v, used, retain_graph=True)[0] for v in (value, expected)), rtol=1e-10, atol=1e-12
    )
    (one, other) = ({"variance_weight": 0.0}, {"covariance_weight": 0.0})
    values = [create_regularizer("vicreg_terms", on=on, **o)(None, h, z) for o in (one, other)]
    torch.testing.assert_close(values, [covariance, 25 * variance], rtol=1e-12, atol=1e-14)


def test_collapse():
    z = torch.ones(3, 5, 4, dtype=torch.float64, requires_grad=True)
    value = create_regularizer("vicreg_terms")(None, z, z)
    value.backward()
    assert value.item() == pytest.approx(25 * (1 - 1e-2), abs=1e-12)
    assert not z.grad.any()


def test_one_image_is_refused():
    with pytest.raises(UsageError, match="at least 2 images, got 1"):
        create_regularizer("vicreg_terms")(None, torch.randn(2, 1, 4), torch.randn(2, 1, 4))


@pytest.mark.parametrize(
    "options",
    [{"on": "p"}, {"variance_reduction": "max"}, {"variance_weight": math.nan}, {"eps": 0.0}, {"target": -1.0}],
)
def test_options_that_cannot_work(options):
    with pytest.raises(UsageError):
        create_regularizer("vicreg_terms", **options)
