"""Spherical k-means against plain loops, on separated directions, empty clusters and rows all alike."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.functional import assignments as kmeans
from hfproj.functional.assignments import INITS, nearest_centroids, spherical_kmeans

every_init = pytest.mark.parametrize("init", INITS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def around(centers, rows, noise=0.05):
    """Rows of any length around directions, in turn."""
    x = centers.repeat(rows, 1)
    x = x + noise * torch.randn(x.shape, dtype=x.dtype)
    return x * (0.1 + torch.rand(len(x), 1, dtype=x.dtype))


def by_loops(x, count, iterations, seed):
    """The official loop over clusters, from the same random rows; it keeps the centroid of an empty cluster."""
    x = F.normalize(x, dim=1)
    centroids = x[torch.randperm(len(x), generator=generator(seed))[:count]]
    for _ in range(iterations):
        assignments = (x @ centroids.T).max(1).indices
        for k in range(count):
            if (assignments == k).any():
                centroids[k] = F.normalize(x[assignments == k].mean(0), dim=0)
    return centroids, (x @ centroids.T).max(1).indices


@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_equals_the_official_loop(iterations):
    x = torch.randn(60, 5, dtype=torch.float64)
    found = spherical_kmeans(x, 4, iterations=iterations, generator=generator(3))
    centroids, assignments = by_loops(x, 4, iterations, seed=3)
    torch.testing.assert_close(found.centroids, centroids, rtol=0, atol=1e-12)
    assert torch.equal(found.assignments, assignments)


def test_separated_directions_are_found():
    x = around(torch.eye(6, dtype=torch.float64), 20)
    for seed in range(5):
        found = spherical_kmeans(x, 6, init="k-means++", generator=generator(seed))
        clusters = found.assignments.view(20, 6)
        assert (clusters == clusters[0]).all()
        assert clusters[0].unique().numel() == 6
        assert found.cosines.min() > 0.9


@every_init
def test_the_sum_of_cosines_never_falls(init):
    x = torch.randn(80, 4, dtype=torch.float64)
    sums = [
        spherical_kmeans(x, 7, iterations=n, init=init, generator=generator()).cosines.sum() for n in (1, 2, 4, 8, 16)
    ]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(sums))
    assert sums[-1] > sums[0]


@every_init
def test_invariances(init):
    x = torch.randn(40, 4, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    expected = spherical_kmeans(x, 5, init=init, generator=generator())
    scaled = spherical_kmeans(x * torch.rand(40, 1), 5, init=init, generator=generator())
    rotated = spherical_kmeans(x @ rotation, 5, init=init, generator=generator())
    assert torch.equal(expected.assignments, scaled.assignments)
    assert torch.equal(expected.assignments, rotated.assignments)
    torch.testing.assert_close(rotated.centroids, expected.centroids @ rotation)


@every_init
def test_tiles_change_nothing(init, monkeypatch):
    x = torch.randn(50, 4, dtype=torch.float64)
    whole = spherical_kmeans(x, 6, init=init, generator=generator())
    monkeypatch.setattr(kmeans, "_ENTRIES", 40)
    torch.testing.assert_close(spherical_kmeans(x, 6, init=init, generator=generator()), whole)


def test_an_empty_cluster_takes_the_row_that_fits_worst():
    x = torch.tensor([[1.0, 0.0, 0.0]] * 8 + [[0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])
    assignments, cosines = nearest_centroids(F.normalize(x, dim=1), torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]))
    assert assignments.unique().tolist() == [0]
    centroids = kmeans._mean_directions(F.normalize(x, dim=1), assignments, cosines, 2)
    assert centroids[1].tolist() == [0.0, 0.0, 1.0]
    # whichever rows it starts from, duplicates among them included
    for seed in range(10):
        found = spherical_kmeans(x, 2, generator=generator(seed)).assignments
        assert found[9] != found[0] == found[8]


@every_init
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_all_alike_and_zero_rows(init, dtype):
    x = torch.ones(6, 3, dtype=dtype)
    found = spherical_kmeans(x, 4, init=init, generator=generator())
    assert found.centroids.dtype == torch.float32
    torch.testing.assert_close(found.cosines, torch.ones(6))
    x[::2] = 0
    for values in spherical_kmeans(x, 3, init=init, generator=generator()):
        assert values.isfinite().all()


@every_init
def test_draws_come_from_the_generator_only(init):
    x = torch.randn(30, 4)
    first = spherical_kmeans(x, 5, iterations=1, init=init, generator=generator(1))
    torch.manual_seed(99)
    torch.testing.assert_close(spherical_kmeans(x, 5, iterations=1, init=init, generator=generator(1)), first)
    other = spherical_kmeans(x, 5, iterations=1, init=init, generator=generator(2))
    assert not torch.equal(other.centroids, first.centroids)


def test_as_many_clusters_as_rows():
    x = torch.eye(4)
    assert spherical_kmeans(x, 4, generator=generator()).assignments.unique().numel() == 4


def test_autocast_does_not_lower_the_precision():
    x = torch.randn(30, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = spherical_kmeans(x, 4, generator=generator())
    torch.testing.assert_close(found, spherical_kmeans(x, 4, generator=generator()))


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (0, {}, "0 clusters of 6 rows"),
        (7, {}, r"7 clusters of 6 rows; ask for 1 to 6 \(prototypes="),
        (2, {"iterations": 0}, "at least 1 iteration"),
        (2, {"init": "kmeans++"}, "Did you mean 'k-means\\+\\+'"),
    ],
)
def test_options_that_cannot_work(count, options, message):
    with pytest.raises(UsageError, match=message):
        spherical_kmeans(torch.randn(6, 2), count, **options)
