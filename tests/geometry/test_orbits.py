"""Orbit metrics against loops over their definitions; what feeding unit rows to a trained BatchNorm does."""

import itertools
import math

import pytest
import torch
from geometry_cases import double
from torch import nn

import hfproj
from hfproj.errors import UsageError
from hfproj.geometry import (
    alignment_gain,
    compression,
    head_orbits,
    local_curvature,
    orbit_metrics,
    timescale_ratio,
    update_ratio,
)


@pytest.mark.parametrize("normalize", [True, False])
def test_metrics_are_their_definitions(normalize):
    f = 3 * double(3, 2, 5, 4)
    g = nn.functional.normalize(f, dim=-1) if normalize else f
    orbits = [g[c, o] for c in range(3) for o in range(2)]
    spread = sum(((orbit - orbit.mean(0)) ** 2).sum(1).mean() for orbit in orbits) / 6
    within = [(a - b).norm() for orbit in orbits for a, b in itertools.combinations(orbit, 2)]
    centroids = [g[c].flatten(0, 1).mean(0) for c in range(3)]
    between = [(a - b).norm() for a, b in itertools.combinations(centroids, 2)]
    found = orbit_metrics(f, normalize=normalize)
    assert found.spread == pytest.approx(spread.item())
    assert found.spread == pytest.approx(g.var(2, correction=0).sum(-1).mean().item())  # summed, not averaged
    assert found.d_intra == pytest.approx(torch.stack(within).mean().item())
    assert found.d_inter == pytest.approx(torch.stack(between).mean().item())
    assert found.ratio == pytest.approx(found.d_inter / found.d_intra)


def test_each_object_a_class_and_points():
    f = double(4, 5, 3)
    assert orbit_metrics(f) == orbit_metrics(f.unsqueeze(1))
    assert math.isnan(orbit_metrics(f.unsqueeze(0)).d_inter)
    points = f[:, :1].expand(4, 5, 3)
    found = orbit_metrics(points)
    assert found.spread == pytest.approx(0, abs=1e-30)
    assert found.d_intra == pytest.approx(0, abs=1e-15)
    assert compression(f, points) > 1e20
    rotated = f @ torch.linalg.qr(double(3, 3))[0]
    assert orbit_metrics(rotated) == pytest.approx(orbit_metrics(f))


def test_compression_and_alignment_gain():
    h = double(2, 3, 6, 8)
    centre = h.mean(2, keepdim=True)
    z = centre + (h - centre) / 3
    assert compression(h, z, normalize=False) == pytest.approx(9)
    assert compression(h, 7 * h) == pytest.approx(1)
    cosine = lambda f: torch.cosine_similarity(f[..., 1:, :], f[..., :1, :], dim=-1).mean().item()  # noqa: E731
    assert alignment_gain(h, z) == pytest.approx(cosine(z) - cosine(h))
    assert alignment_gain(h, h) == 0


def test_local_curvature():
    angles = torch.linspace(0, 1, 11, dtype=torch.float64)
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert local_curvature(circle) == pytest.approx(2 - 2 * math.cos(0.1))  # of a unit circle in steps of 0.1
    assert local_curvature(5 * circle, normalize=False) == pytest.approx(5 * local_curvature(circle))
    line = double(3, 1, 4) + torch.arange(6.0).view(1, 6, 1) * double(3, 1, 4, seed=1)
    assert local_curvature(line, normalize=False) == pytest.approx(0, abs=1e-14)
    sweeps = double(3, 6, 4)
    assert local_curvature(sweeps) == pytest.approx(sum(local_curvature(s) for s in sweeps) / 3)


def test_unit_input_fakes_compression_where_the_norm_was_calibrated_on_raw_h():
    """An untrained head neither contracts nor widens raw orbits by an order; on unit rows it seems to."""
    objects = 25 * nn.functional.normalize(double(5, 3, 1, 64), dim=-1)
    h = objects + 1.25 * double(5, 3, 12, 64, seed=1)
    head = hfproj.create_head("mlp", in_dim=64, out_dim=32, hidden_dim=128).double()
    with torch.no_grad():
        for _ in range(50):
            head(h.flatten(0, 2))
    head.eval()
    raw = compression(h, head_orbits(head, h))
    unit = compression(h, head_orbits(head, h, normalize_input=True))
    assert 0.1 < raw < 2
    assert unit > 10
    assert head_orbits(head, h).shape == (5, 3, 12, 32)
    torch.testing.assert_close(head_orbits(head, h)[1, 2], head(h[1, 2]).detach())
    with pytest.raises(UsageError, match=r"head.eval\(\)"):
        head_orbits(head.train(), h)


def test_update_and_timescale_ratios():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    model(double(5, 3)).square().sum().backward()

    def ratio(module, rate):
        w, g = (
            torch.cat([t.flatten() for t in ts]) for ts in zip(*((p.detach(), p.grad) for p in module.parameters()))
        )
        return rate * float(g.norm()) / (float(w.norm()) + 1e-7)

    backbone, head = model
    assert update_ratio(head, 0.3) == pytest.approx(ratio(head, 0.3))
    expected = ratio(head, 0.3) / ratio(backbone, 0.1)
    assert timescale_ratio(head, backbone, 0.3, backbone_learning_rate=0.1) == pytest.approx(expected)
    frozen = nn.Parameter(torch.ones(3))
    assert timescale_ratio(head, [*backbone.parameters(), frozen], 0.3) == pytest.approx(expected / 3)
    zero = nn.Parameter(torch.zeros(1))
    zero.grad = torch.ones(1)
    assert update_ratio([zero], 1.0) == pytest.approx(1e7)


def test_refusals():
    with pytest.raises(UsageError, match="at least 2 transforms"):
        orbit_metrics(double(3, 1, 4))
    f = double(3, 2, 5, 4)
    f[1, 1, 1, 1] = torch.nan
    with pytest.raises(UsageError, match="1 of 30 rows of the features are NaN"):
        orbit_metrics(f)
    with pytest.raises(UsageError, match="same orbits"):
        compression(double(3, 5, 4), double(3, 4, 4))
    with pytest.raises(UsageError, match="at least 3 steps"):
        local_curvature(double(2, 4))
    with pytest.raises(UsageError, match="after backward"):
        update_ratio(nn.Linear(2, 2), 0.1)
