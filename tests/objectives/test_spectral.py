"""The spectral loss as its authors write it, closed forms, invariances and gradcheck."""

import pytest
import torch
from inputs import extreme_projections, projections

from hfproj.errors import UsageError
from hfproj.objectives.spectral import Spectral, spectral_loss


def as_haochen_et_al_write_it(z_a, z_b):
    """``models/spectral.py`` at μ = 1, whose rows are no longer than 1."""
    n, d = z_a.shape
    attract = -2 * (z_a * z_b).mean() * d
    square = (z_a @ z_b.T) ** 2
    off_diagonal = torch.triu(square, diagonal=1) + torch.tril(square, diagonal=-1)
    return attract + off_diagonal.mean() * n / (n - 1)


def test_equals_the_authors_form():
    z = projections()
    torch.testing.assert_close(Spectral()(z).loss, as_haochen_et_al_write_it(*z), rtol=1e-12, atol=0)


def test_more_views_are_averaged_over_pairs():
    z = projections(3)
    pairs = [spectral_loss(z[[a, b]]) for a, b in [(0, 1), (0, 2), (1, 2)]]
    torch.testing.assert_close(Spectral()(z).loss, sum(pairs) / 3, rtol=1e-13, atol=0)


def test_closed_forms():
    z = torch.full((2, 5, 3), 0.5, dtype=torch.float64)  # collapsed to a row of square length s = 3/4: s² − 2s
    assert spectral_loss(z).item() == pytest.approx(0.75**2 - 1.5, rel=1e-14)
    assert spectral_loss(3 * torch.eye(4, dtype=torch.float64).expand(2, 4, 4)).item() == -18
    collapsed = torch.zeros(2, 5, 3, dtype=torch.float64, requires_grad=True)
    spectral_loss(collapsed).backward()
    assert not collapsed.grad.any()


def test_estimator_is_unbiased():
    """Over many batches of rows drawn from a population, the mean is that population's loss."""
    population = torch.randn(2, 6, 3, dtype=torch.float64)
    draws = [spectral_loss(population[:, torch.randint(6, (4,))]) for _ in range(1000)]
    products = population[0] @ population[1].T
    expected = products.square().mean() - 2 * products.diagonal().mean()
    error = torch.stack(draws).std() / len(draws) ** 0.5
    assert abs(sum(draws) / len(draws) - expected) < 4 * error


def test_invariances():
    z = projections(3, 7)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    for same in (z @ rotation, z[:, torch.randperm(7)], z.flip(0), -z):
        torch.testing.assert_close(Spectral()(same).loss, Spectral()(z).loss, rtol=1e-12, atol=1e-13)


def test_gradcheck():
    z = projections(3, 3).requires_grad_()
    assert torch.autograd.gradcheck(spectral_loss, z)
    assert torch.autograd.gradgradcheck(spectral_loss, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes(dtype):
    z = extreme_projections(dtype).detach().clamp(-100, 100).requires_grad_()  # squared products leave float16's range
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = Spectral()(z)
    loss.backward()
    assert loss.dtype == torch.float32
    assert terms["positive_cosine"].isfinite()
    assert z.grad.isfinite().all()
    torch.testing.assert_close(loss.double(), spectral_loss(z.detach().double()), rtol=1e-5, atol=1e-2)


def test_refused():
    with pytest.raises(UsageError, match=r"at least 2 views.*got 1"):
        Spectral()(torch.randn(1, 5, 4))
    with pytest.raises(UsageError, match="Spectral tells images"):
        Spectral()(torch.randn(2, 1, 4))
