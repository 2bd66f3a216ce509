import math

import pytest
import torch
from diagnostics.features import decaying, normal

from hfproj.diagnostics import representation_std, uniformity, wasserstein_uniformity
from hfproj.errors import UsageError
from hfproj.functional.distributions import wasserstein_to_uniform


def test_representation_std_is_the_formula():
    f = torch.randn(50, 9) * 3 + 1
    expected = torch.nn.functional.normalize(f.double(), dim=1).std(0).mean().item()
    assert representation_std(f) == pytest.approx(expected, rel=1e-12)
    assert representation_std(f * torch.rand(50, 1).add(0.1)) == pytest.approx(expected, rel=1e-6)


def test_representation_std_of_spread_and_of_collapsed_rows():
    f = torch.cat([torch.eye(64), -torch.eye(64)]).repeat(50, 1)
    assert representation_std(f) == pytest.approx(1 / math.sqrt(64), rel=1e-3)
    assert representation_std(f) == pytest.approx(math.sqrt(6400 / 6399 / 64), rel=1e-12)
    assert representation_std(torch.randn(1, 8).expand(30, 8)) == 0
    assert representation_std(torch.randn(1, 8) * torch.rand(30, 1, dtype=torch.float64)) == 0  # one direction


def cross_polytope(dim, used):
    axes = torch.eye(dim, dtype=torch.float64)[:used]
    return torch.cat([axes, -axes])


def test_uniformity_is_the_formula():
    f = normal(60, 7) * 3
    unit = torch.nn.functional.normalize(f)
    expected = torch.pdist(unit).square().mul(-2).exp().mean().log().item()
    assert uniformity(f) == pytest.approx(expected, rel=1e-12)
    assert uniformity(f, kernel_scale=0.5) == pytest.approx(
        torch.pdist(unit).square().mul(-0.5).exp().mean().log().item(), rel=1e-12
    )


def test_uniformity_at_its_ends():
    assert uniformity(torch.eye(9)) == pytest.approx(-4, rel=1e-12)
    assert uniformity(normal(1, 5).expand(20, 5)) == pytest.approx(0, abs=1e-14)
    assert uniformity(torch.zeros(20, 5)) == 0
    assert uniformity(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(-8, rel=1e-12)  # the lowest there is


def test_uniformity_misses_dimensional_collapse_and_wasserstein_does_not():
    full, collapsed = cross_polytope(8, 8), cross_polytope(8, 2)
    assert uniformity(full) == pytest.approx(-4.07, abs=5e-3)
    assert uniformity(collapsed) == pytest.approx(-4.40, abs=5e-3)  # "better"
    assert uniformity(full.repeat(2, 1)) > uniformity(full) + 0.5  # duplicated rows
    assert wasserstein_uniformity(full) == pytest.approx(0, abs=1e-14)
    assert wasserstein_uniformity(collapsed) == pytest.approx(math.sqrt(2 - 2 * math.sqrt(2 / 8)), rel=1e-12)


@pytest.mark.parametrize("r", [1, 3, 7, 16])
def test_wasserstein_of_r_of_16_dimensions(r):
    f = cross_polytope(16, r)
    expected = math.sqrt(2 - 2 * math.sqrt(r / 16))
    assert wasserstein_uniformity(f) == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert wasserstein_uniformity(f.repeat(3, 1)) == pytest.approx(expected, rel=1e-12, abs=1e-14)
    lengths = torch.linspace(1, 5, 2 * r, dtype=torch.float64)[:, None]
    assert wasserstein_uniformity(f * lengths) == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_wasserstein_of_a_point():
    assert wasserstein_uniformity(normal(1, 9).expand(20, 9)) == pytest.approx(math.sqrt(2), rel=1e-15)


@pytest.mark.parametrize(("rows", "dim"), [(80, 12), (9, 30)])
def test_wasserstein_is_the_formula(rows, dim):
    f = decaying(rows, dim, 0.3) + 0.1
    unit = torch.nn.functional.normalize(f)
    mean = unit.mean(0)
    values = torch.linalg.eigvalsh(torch.cov(unit.T, correction=0)).clamp_min(0)
    square = mean.square().sum() + 1 + values.sum() - 2 / math.sqrt(dim) * values.sqrt().sum()
    assert wasserstein_uniformity(f) == pytest.approx(square.sqrt().item(), abs=1e-7)  # √ of rounding in `values`
    assert wasserstein_uniformity(f) == pytest.approx(wasserstein_to_uniform(f, floor=0.0).item(), abs=1e-7)
    q, _ = torch.linalg.qr(normal(dim, dim, seed=1))
    assert wasserstein_uniformity(f @ q) == pytest.approx(wasserstein_uniformity(f), rel=1e-12)


def test_refusals():
    for measure in (representation_std, uniformity, wasserstein_uniformity):
        with pytest.raises(UsageError, match="at least 2 rows"):
            measure(torch.ones(1, 3))
        with pytest.raises(UsageError, match="row 1"):
            measure(torch.tensor([[0.0], [math.nan]]))
    with pytest.raises(UsageError, match="kernel_scale"):
        uniformity(torch.eye(3), kernel_scale=0.0)
