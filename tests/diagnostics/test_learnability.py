import math

import numpy as np
import pytest
import torch
from diagnostics.features import normal

from hfproj.diagnostics import Clid, clid, clid_scores, cluster_learnability, intrinsic_dimension
from hfproj.errors import UsageError
from hfproj.functional.assignments import spherical_kmeans


def clusters(count=6, rows=120, noise=0.05, dim=8):
    centres = torch.linalg.qr(normal(dim, dim)).Q[:count]
    return centres.repeat(rows // count, 1) + noise * normal(rows, dim, seed=1)


def uniform(rows, dim, seed=0):
    return torch.rand(rows, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def reference_ratios(f):
    distance = np.sort(np.linalg.norm(f[:, None] - f[None], axis=2), axis=1)
    return distance[:, 2] / distance[:, 1]


@pytest.mark.parametrize("protocol", ["prequential", "split"])
def test_learnability_row_by_row(protocol):
    f, seed = normal(60, 5) * 3, 4
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(f)
    labels = spherical_kmeans(unit, 8, iterations=100, init="k-means++", generator=generator).assignments
    order = torch.randperm(60, generator=generator)
    unit, labels = unit[order], labels[order]
    right = []
    for i in range(1 if protocol == "prequential" else 30, 60):
        known = i if protocol == "prequential" else 30
        right.append(labels[(unit[:known] @ unit[i]).argmax()] == labels[i])
    assert cluster_learnability(f, protocol=protocol, seed=seed) == torch.stack(right).double().mean().item()


def test_learnability_in_tiles(monkeypatch):
    f = normal(90, 4)
    whole = [cluster_learnability(f, protocol=protocol) for protocol in ("prequential", "split")]
    dimension = intrinsic_dimension(f)

    monkeypatch.setattr("hfproj.diagnostics.learnability._TILE", 7 * 90)
    assert [cluster_learnability(f, protocol=protocol) for protocol in ("prequential", "split")] == whole
    assert intrinsic_dimension(f) == pytest.approx(dimension, rel=1e-12)


def test_clusters_that_are_apart_are_learnt_at_once():
    # prequential: only the first row of each cluster is a surprise, and the very first is not counted
    assert cluster_learnability(clusters(), clusters=6) == pytest.approx(1 - 5 / 119, rel=1e-12)
    assert cluster_learnability(clusters(), clusters=6, protocol="split") == 1
    assert cluster_learnability(normal(1, 8).expand(50, 8)) == 1
    assert cluster_learnability(normal(200, 50)) < 0.3  # no structure


def test_learnability_sees_directions_only():
    f = normal(100, 6)
    lengths = torch.rand(100, 1, dtype=torch.float64) + 0.1
    assert cluster_learnability(f * lengths) == cluster_learnability(f)
    assert cluster_learnability(f, seed=1) == cluster_learnability(f, seed=1)


@pytest.mark.parametrize("estimator", ["fit", "likelihood"])
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_the_dimension_of_a_cube(estimator, dim):
    f = uniform(2000, dim) @ normal(dim, 20)
    assert intrinsic_dimension(f, estimator=estimator) == pytest.approx(dim, rel=0.12)


def test_estimators_are_their_definitions():
    f = normal(80, 6) + 50
    ratios = np.sort(reference_ratios(f.numpy()))
    assert intrinsic_dimension(f, estimator="likelihood") == pytest.approx(79 / np.log(ratios).sum(), rel=1e-9)
    x, y = np.log(ratios[:72]), -np.log(1 - np.arange(1, 73) / 80)
    assert intrinsic_dimension(f) == pytest.approx((x @ y) / (x @ x), rel=1e-9)


@pytest.mark.parametrize("estimator", ["fit", "likelihood"])
def test_rows_that_are_equal_count_once(estimator):
    f = normal(60, 4)
    value = intrinsic_dimension(f, estimator=estimator)
    assert intrinsic_dimension(torch.cat([f, f[:50], f]), estimator=estimator) == pytest.approx(value, rel=1e-12)


def test_invariances_of_the_dimension():
    f = normal(100, 6)
    q, _ = torch.linalg.qr(normal(6, 6, seed=1))
    for g in (f @ q, f + 1e4, 1e50 * f, 1e-50 * f, f[torch.randperm(100)]):
        assert intrinsic_dimension(g) == pytest.approx(intrinsic_dimension(f), rel=1e-7)


def test_neighbours_that_nearly_coincide():
    """Distances from products of rows would round to 0 here."""
    f = normal(40, 3)
    close = f + 1e-9 * normal(40, 3, seed=1)
    pairs = torch.cat([f, close])
    ratios = reference_ratios(pairs.numpy())
    assert intrinsic_dimension(pairs, estimator="likelihood") == pytest.approx(79 / np.log(ratios).sum(), rel=1e-6)


def test_points_and_lattices():
    assert intrinsic_dimension(normal(1, 4).expand(30, 4)) == 0
    assert intrinsic_dimension(normal(2, 4).repeat(9, 1)) == 0
    assert intrinsic_dimension(torch.eye(6)) == math.inf
    assert intrinsic_dimension(torch.eye(6), estimator="likelihood") == math.inf


def test_clid_is_the_pair():
    f = normal(60, 4)
    found = clid(f, protocol="split", estimator="likelihood", seed=3, clusters=5)
    assert found.cluster_learnability == cluster_learnability(f, protocol="split", seed=3, clusters=5)
    assert found.intrinsic_dimension == intrinsic_dimension(f, estimator="likelihood")


def test_scores_are_standardised_over_the_models():
    models = {name: Clid(a, b) for name, a, b in (("x", 0.5, 10.0), ("y", 0.9, 14.0), ("z", 0.7, 30.0))}
    columns = np.array([list(parts) for parts in models.values()])
    expected = ((columns - columns.mean(0)) / columns.std(0)).sum(1)
    assert list(clid_scores(models).values()) == pytest.approx(expected)
    assert sum(clid_scores(models).values()) == pytest.approx(0, abs=1e-12)
    scaled = {name: Clid(parts[0], 100 * parts[1]) for name, parts in models.items()}
    assert clid_scores(scaled) == pytest.approx(clid_scores(models))
    equal = {name: Clid(0.7, parts[1]) for name, parts in models.items()}
    assert clid_scores(equal)["z"] == pytest.approx(((columns - columns.mean(0)) / columns.std(0))[2, 1])


def test_refusals():
    f = normal(9, 3)
    with pytest.raises(UsageError, match="Did you mean 'split'"):
        clid(f, protocol="splits")
    with pytest.raises(UsageError, match="Unknown estimator"):
        intrinsic_dimension(f, estimator="mle")
    with pytest.raises(UsageError, match="at least 4 rows"):
        cluster_learnability(f[:3])
    with pytest.raises(UsageError, match="10 clusters of 9 rows"):
        clid(f, clusters=10)
    with pytest.raises(UsageError, match="at least two"):
        clid_scores({"a": Clid(0.5, 3.0)})
    with pytest.raises(UsageError, match="not finite: b"):
        clid_scores({"a": Clid(0.5, 3.0), "b": Clid(0.5, math.inf)})
    f[2, 0] = math.nan
    for measure in (cluster_learnability, intrinsic_dimension):
        with pytest.raises(UsageError, match="row 2"):
            measure(f)
