import math

import pytest
import torch
from diagnostics.features import decaying, heavy_tailed, normal, rank_deficient

from hfproj.diagnostics import coherence, self_cluster
from hfproj.errors import UsageError


@pytest.mark.parametrize(("rows", "dim"), [(60, 8), (5, 12)])
@pytest.mark.parametrize("make", [decaying, heavy_tailed])
def test_coherence_is_the_definition(make, rows, dim):
    f = make(rows, dim)
    u = torch.linalg.svd(f, full_matrices=False).U
    assert coherence(f) == pytest.approx(u.square().sum(1).max().item() * rows / dim, rel=1e-9)


def test_coherence_of_the_support():
    f = rank_deficient(60, 12)  # 5 directions and an offset
    u = torch.linalg.svd(f, full_matrices=False).U[:, :6]
    assert coherence(f) == pytest.approx(u.square().sum(1).max().item() * 60 / 12, rel=1e-9)
    assert coherence(f, tol=0.5) < coherence(f)


def test_coherence_at_its_ends():
    axes = torch.eye(8, dtype=torch.float64)
    assert coherence(torch.cat([axes, -axes])) == pytest.approx(1, rel=1e-12)
    assert coherence(torch.cat([axes, -axes])[:, :4]) == pytest.approx(2, rel=1e-12)  # half of the rows are zero
    assert coherence(normal(1, 8).expand(30, 8)) == pytest.approx(1 / 8, rel=1e-12)  # rank/dim
    assert coherence(torch.zeros(30, 8)) == 0


def test_coherence_is_invariant_to_invertible_maps():
    f = decaying(60, 8)
    assert coherence(f @ normal(8, 8, seed=1)) == pytest.approx(coherence(f), rel=1e-9)
    assert coherence(torch.cat([f, f])) == pytest.approx(coherence(f), rel=1e-10)


def test_self_cluster_is_the_definition():
    f = decaying(50, 7, 0.5) + 0.3
    unit = torch.nn.functional.normalize(f)
    expected = 50 + 50 * 49 / 7
    actual = (unit @ unit.T).square().sum().item()
    assert self_cluster(f) == pytest.approx((actual - expected) / (2500 - expected), rel=1e-11)


def test_self_cluster_at_its_ends():
    assert self_cluster(normal(20, 1) * normal(1, 6)) == pytest.approx(1, rel=1e-12)
    assert self_cluster(normal(4000, 16)) == pytest.approx(0, abs=1e-3)
    axes = torch.eye(6, dtype=torch.float64)
    assert self_cluster(torch.cat([axes, -axes])) == pytest.approx(-1 / 11, rel=1e-12)
    assert self_cluster(axes[:4]) == pytest.approx(-1 / 5, rel=1e-12)


def test_refusals():
    with pytest.raises(UsageError, match="fraction of the largest"):
        coherence(torch.eye(3), tol=2.0)
    with pytest.raises(UsageError, match="at least 2 dimensions"):
        self_cluster(torch.ones(5, 1))
    for measure in (coherence, self_cluster):
        with pytest.raises(UsageError, match="row 1"):
            measure(torch.tensor([[0.0, 1.0], [math.nan, 1.0]]))
