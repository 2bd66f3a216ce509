import math
import warnings

import numpy as np
import pytest
import torch
from diagnostics.features import normal

from hfproj.diagnostics import ViewState, lidar, lidar_of_views
from hfproj.errors import UsageError

EPS = 1e-8


def reference(f, ridge=1e-4):
    """The definition, with a symmetric inverse root."""
    f = f.double().numpy()
    objects, views, dim = f.shape
    means = f.mean(1)
    between = np.cov(means.T).reshape(dim, dim)
    deviations = (f - means[:, None]).reshape(-1, dim)
    within = deviations.T @ deviations / (objects * (views - 1)) + ridge * np.eye(dim)
    values, vectors = np.linalg.eigh(within)
    root = vectors / np.sqrt(values) @ vectors.T
    p = np.linalg.eigvalsh(root @ between @ root).clip(0) + EPS
    p = p / p.sum()
    return math.exp(-(p * np.log(p)).sum())


def objects_apart(objects=300, views=4, dim=8, directions=3, strength=10.0):
    """Objects that differ in `directions` dimensions, views that differ in all."""
    apart = normal(objects, dim)
    apart[:, directions:] = 0
    return strength * apart[:, None] + normal(objects * views, dim, seed=1).view(objects, views, dim)


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 1.0])
@pytest.mark.parametrize("views", [2, 5])
def test_the_definition(ridge, views):
    f = objects_apart(views=views)
    assert lidar(f, ridge=ridge) == pytest.approx(reference(f, ridge), rel=1e-10)
    assert lidar(f.float(), ridge=ridge) == pytest.approx(reference(f.float(), ridge), rel=1e-10)


def test_it_counts_the_directions_that_tell_objects_apart():
    assert lidar(objects_apart(directions=4, dim=32, objects=1000, strength=20.0)) == pytest.approx(4.2, rel=0.05)
    assert lidar(objects_apart(directions=8)) == pytest.approx(8, rel=0.05)


def test_without_a_ridge_it_is_invariant_to_invertible_linear_maps():
    f = objects_apart()
    mixing = normal(8, 8, seed=2) * torch.logspace(0, -2, 8, dtype=torch.float64)
    assert lidar(f @ mixing, ridge=0.0) == pytest.approx(lidar(f, ridge=0.0), rel=1e-9)
    assert lidar(1e6 * f + 3, ridge=0.0) == pytest.approx(lidar(f, ridge=0.0), rel=1e-9)
    assert lidar(f @ mixing) != pytest.approx(lidar(f), rel=1e-6)  # the ridge has a unit


def test_duplicated_views_and_rotations():
    f = objects_apart()
    q, _ = torch.linalg.qr(normal(8, 8, seed=2))
    assert lidar(f @ q) == pytest.approx(lidar(f), rel=1e-10)
    assert lidar(f[torch.randperm(300)][:, [2, 0, 3, 1]]) == pytest.approx(lidar(f), rel=1e-10)


def test_view_major_features():
    z = objects_apart().transpose(0, 1)
    assert lidar_of_views(z) == lidar(z.transpose(0, 1))


def test_swapped_axes_and_few_views_are_warned_of():
    f = objects_apart(objects=40, views=4)
    with pytest.warns(UserWarning, match="If these axes are swapped"):
        lidar(f.transpose(0, 1))
    with pytest.warns(UserWarning, match="If these axes are swapped"):
        lidar_of_views(f)
    with pytest.warns(UserWarning, match="the ridge 0.0001 decides"):
        lidar(objects_apart(objects=10, views=2, dim=11))
    with pytest.warns(UserWarning, match="the ridge 0.0001 decides"):
        ViewState().update(objects_apart(objects=10, views=2, dim=11).transpose(0, 1)).lidar()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lidar(objects_apart(objects=11, views=2, dim=11))


def test_where_the_ridge_decides_it_still_is_the_definition():
    f = objects_apart(objects=6, views=2, dim=9)
    with pytest.warns(UserWarning, match="decides"):
        assert lidar(f) == pytest.approx(reference(f), rel=1e-9)


def test_collapse():
    row = normal(1, 5)
    assert lidar(row.expand(40, 3, 5)) == 0  # all alike: the formula's ε alone would give 5
    views = row + normal(3, 5, seed=1).expand(40, 3, 5)  # views differ, objects do not
    assert lidar(views) == 0
    line = normal(40, 1)[:, None] * row.expand(40, 3, 5) * torch.tensor([1.0, 1.1, 0.9])[:, None]
    assert lidar(line) == pytest.approx(1, abs=1e-5)


def test_refusals():
    f = objects_apart(objects=20)
    with pytest.raises(UsageError, match="at least two objects of at least two views"):
        lidar(f[:1])
    with pytest.raises(UsageError, match="at least two objects of at least two views"):
        lidar(f[:, :1])
    with pytest.raises(UsageError, match="positive ridge"):
        lidar(f, ridge=-1.0)
    with pytest.raises(UsageError, match="positive ridge"):
        lidar(f * torch.tensor([1.0] * 7 + [0.0]), ridge=0.0)
    f[3, 2, 0] = torch.nan
    with pytest.raises(UsageError, match=r"object · views \+ view\) .* row 14"):
        lidar(f)
