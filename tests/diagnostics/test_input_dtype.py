"""Tolerances follow the dtype of the features: what its rounding leaves of a missing direction is no direction."""

import math

import pytest
import torch
from torch import nn

from hfproj import diagnostics as d
from hfproj.diagnostics import SpectrumState, ViewState
from hfproj.diagnostics._factors import noise
from hfproj.errors import NotMeasurableError, UsageError
from hfproj.functional.matrices import cholesky_whiten
from hfproj.probes.base import Scaling


def network(norm, width=48, depth=3):
    torch.manual_seed(width)
    blocks = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(nn.Linear(20, width), *blocks, norm)


def both(norm, *, rows=400, width=48, offset=0.0):
    """Return features of a network in float32, and the same computed in float64."""
    net, x = network(norm, width), torch.randn(rows, 20, generator=torch.Generator().manual_seed(1))
    if offset:
        net[-2] = nn.Sequential(nn.GELU(), nn.Linear(width, width))
        nn.init.constant_(net[-2][1].bias, offset)  # the input of the norm is far from zero
    with torch.no_grad():
        return net(x), net.double()(x.double())


def affine(width):
    norm = nn.LayerNorm(width)
    nn.init.uniform_(norm.weight, 0.3, 3.0)
    nn.init.normal_(norm.bias)
    return norm


def plain(width):
    return nn.LayerNorm(width, elementwise_affine=False)


@pytest.mark.parametrize("offset", [0.0, 0.3])
@pytest.mark.parametrize("norm", [plain, affine])
def test_the_direction_that_a_layer_norm_takes_away_is_no_support(norm, offset):
    single, double = both(norm(48), offset=offset)
    for options in ({"normalize": False}, {"normalize": False, "tol": 0.0}):
        found, expected = (d.covariance_condition_number(f, **options) for f in (single, double))
        assert (found.rank, found.full) == (47, math.inf) == (expected.rank, expected.full)
        assert found.on_support == pytest.approx(expected.on_support, rel=1e-3)
    assert d.numerical_rank(single, center=True) == 47
    assert d.covariance_condition_number(single[:, 1:], normalize=False).full < math.inf  # nothing is missing there
    state = SpectrumState()
    for part in single.split(70):
        state.update(part)
    assert state.covariance_condition_number().rank == state.numerical_rank(center=True) == 47
    again = SpectrumState()
    again.load_state_dict(state.state_dict())
    assert again.covariance_condition_number() == state.covariance_condition_number()
    old = {name: tensor for name, tensor in state.state_dict().items() if name != "eps"}
    again.load_state_dict(old)  # of before: its rows count as float64
    assert again.numerical_rank(center=True, tol=0.0) == 48


def test_pooled_tokens_behind_a_layer_norm_and_cosines():
    tokens, _ = both(plain(48), rows=1200)
    pooled = tokens.view(300, 4, 48).mean(1)
    assert d.covariance_condition_number(pooled, normalize=True).rank == 47
    assert d.pseudo_condition_number(pooled) == 0.0


@pytest.mark.parametrize(("rows", "dim"), [(500, 64), (3000, 16), (40, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_bound_is_above_rounding_and_below_features(rows, dim, dtype):
    f = torch.randn(rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) @ torch.randn(
        8, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    given = f.to(dtype)
    error = torch.linalg.matrix_norm(given.double() - f, 2) / torch.linalg.matrix_norm(f)
    bound = noise(torch.finfo(dtype).eps, rows, dim)
    assert 4 * error < bound
    assert d.numerical_rank(given) == d.numerical_rank(f) == 8
    weak = f.clone()
    weak[:, 0] += 20 * bound * f.norm() * torch.nn.functional.normalize(torch.randn(rows, dtype=torch.float64), dim=0)
    assert d.numerical_rank(weak.to(dtype)) == 9


def test_features_that_are_constant_but_for_rounding_are_constant():
    value = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    f = (value * (1 + 4e-8 * torch.randn(200, 32, dtype=torch.float64))).float()
    assert len(f.unique(dim=0)) > 1
    assert d.effective_rank(f, center=True) == d.nesum(f) == d.participation_ratio(f) == 0.0
    assert d.numerical_rank(f, center=True) == 0
    assert d.lidar(f.view(50, 4, 32)) == ViewState().update(f.view(50, 4, 32).transpose(0, 1)).lidar() == 0.0
    assert d.whiteness(f) == 0.0
    state = SpectrumState().update(f[:90]).update(f[90:])
    assert state.nesum() == state.effective_rank(center=True) == 0.0
    with pytest.raises(NotMeasurableError, match="above rounding"):
        d.alpha_req(f)
    assert not Scaling.of(f).factor.any()
    assert d.nesum(f.double()) > 1  # in float64 these are differences


def test_widths_of_one_power_law_in_every_dtype():
    exact = torch.linalg.qr(torch.randn(600, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(5))).Q
    f = exact * torch.arange(1, 41).double() ** -0.5
    f = torch.cat([f, -f])
    for dtype, error in ((torch.float64, 1e-6), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        assert d.alpha_req(f.to(dtype)).alpha == pytest.approx(d.alpha_req(f).alpha, abs=error)
    flat = torch.cat([exact, -exact])
    assert d.alpha_req(flat.float()).r_squared == 1.0


def test_rank_me_is_that_of_the_paper_in_any_dtype():
    f = torch.randn(500, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    f = f * torch.arange(1, 65).double() ** -1.5
    assert d.rankme(f.float()) == pytest.approx(d.rankme(f), rel=1e-5)
    assert d.rankme(f.bfloat16()) == pytest.approx(d.rankme(f), rel=5e-2)


def test_whitening_refuses_what_bfloat16_made_up():
    z = torch.randn(64, 1, generator=torch.Generator().manual_seed(7)) @ torch.randn(1, 8) + 2
    with pytest.raises(UsageError, match="collapsed"):
        cholesky_whiten(z.bfloat16())
    assert cholesky_whiten(torch.randn(64, 8).bfloat16()).isfinite().all()
