import copy
import itertools

import numpy as np
import pytest
import torch
from probes.knn_cases import clusters

from hfproj.errors import UsageError
from hfproj.probes.clustering import KMeansProbe


def nmi(a, y):
    """From the definition: 2 I/(H(a) + H(y)) of the joint counts."""
    joint = np.array([[np.mean((a == c) & (y == d)) for d in np.unique(y)] for c in np.unique(a)])
    outer = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    information = (joint[seen] * np.log(joint[seen] / outer[seen])).sum()
    entropies = [-(p * np.log(p)).sum() for p in (joint.sum(1), joint.sum(0))]
    return 2 * information / sum(entropies)


def ari(a, y):
    """From the definition, over all pairs of rows."""
    first, second = np.triu_indices(len(a), 1)
    together, alike = (a[first] == a[second]), (y[first] == y[second])
    pairs, expected = len(first), together.sum() * alike.sum() / len(first)
    both, most = (together & alike).sum(), (together.sum() + alike.sum()) / 2
    assert pairs
    return (both - expected) / (most - expected)


def best_match(a, y):
    """The accuracy of the best of all one-to-one maps."""
    names, classes = np.unique(a), np.unique(y)
    return max(
        np.mean([dict(zip(names, chosen)).get(c) == d for c, d in zip(a, y)])
        for chosen in itertools.permutations(classes, len(names))
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_against_the_definitions(normalize):
    f, y = clusters(300, 6, 4, 1, 1.5)
    probe = KMeansProbe(normalize=normalize, matching="scored").fit(f, y * 10 - 7)
    value = probe.score(f, y * 10 - 7)
    found, values = probe._kmeans.labels_, probe.results_["values"]
    assert values["NMI"] == pytest.approx(nmi(found, y.numpy()), abs=1e-12)
    assert values["ARI"] == pytest.approx(ari(found, y.numpy()), abs=1e-12)
    assert value == values["accuracy"] == probe.correct_.double().mean().item() == best_match(found, y.numpy())
    assert 0.4 < value < 1
    assert probe.predict(f).sub(-7).div(10).unique().tolist() == [0, 1, 2, 3]


def test_centroids_are_those_of_lloyd():
    """At the end every row is with its nearest centroid, and every centroid is the mean of its rows."""
    f, y = clusters(400, 6, 4, 1, 1.0)
    probe = KMeansProbe().fit(f, y)
    unit = torch.nn.functional.normalize(f.double(), dim=1)
    found = torch.from_numpy(probe._kmeans.labels_).long()
    means = torch.stack([unit[found == c].mean(0) for c in range(4)])
    torch.testing.assert_close(torch.from_numpy(probe._kmeans.cluster_centers_), means, rtol=0, atol=1e-12)
    assert torch.cdist(unit, means).argmin(1).equal(found)


def test_matching_of_the_training_rows_needs_no_test_labels():
    (f, y), (g, truth) = clusters(300, 6, 4, 1, 1.5), clusters(200, 6, 4, 2, 1.5)
    fitted, scored = (KMeansProbe(matching=matching).fit(f, y) for matching in ("fitted", "scored"))
    assert fitted.score(g, truth) <= scored.score(g, truth)
    assert fitted.correct_.equal(fitted.predict(g) == truth)
    swapped = truth.roll(1)  # labels that say nothing: the best match of the scored rows is above chance
    assert fitted.predict(g).equal(scored.predict(g))
    assert scored.score(g, (truth + 1) % 4) == pytest.approx(scored.score(g, truth))
    assert fitted.score(g, (truth + 1) % 4) < 0.3 < fitted.score(g, truth)
    assert fitted.score(g, swapped) <= scored.score(g, swapped)
    for probe in (fitted, scored):
        protocol = probe.results_["protocol"]
        assert (protocol["train"], protocol["test"], protocol["classes"], protocol["clusters"]) == (300, 200, 4, 4)


def test_separated_clusters_and_their_unit_rows():
    directions = torch.eye(5)[torch.arange(100) % 5]
    generator = torch.Generator().manual_seed(0)
    f = directions * (10 * torch.rand(100, 1, generator=generator) + 1)
    probe = KMeansProbe().fit(f, torch.arange(100) % 5)
    assert probe.score(f, torch.arange(100) % 5) == 1
    assert probe.results_["values"] == {"accuracy": 1.0, "NMI": pytest.approx(1.0), "ARI": 1.0}


def test_more_and_fewer_clusters_than_classes():
    y = torch.arange(40) % 4
    f = torch.eye(4)[y]
    fewer = KMeansProbe(clusters=2).fit(f, y)
    assert fewer.score(f, y) == 0.5
    f = torch.cat([torch.eye(8)[torch.arange(40) % 4], torch.eye(8)[4 + torch.arange(40) % 4]])
    more = KMeansProbe(clusters=8).fit(f, y.repeat(2))
    assert more.score(f, y.repeat(2)) == 0.5  # a class of two clusters takes one of them
    assert sorted(more.predict(f).unique().tolist()) == [-1, 0, 1, 2, 3]
    assert KMeansProbe(clusters=8).fit(f, y.repeat(2) - 9).predict(f).min() == -10


def test_same_seed_same_clusters():
    f, y = clusters(300, 6, 8, 1, 3.0)
    np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002  (the state that must not matter)
    state = torch.random.get_rng_state()
    first = KMeansProbe(n_init=1, clusters=8).fit(f, y).predict(f)
    np.random.seed(4)  # noqa: NPY002
    assert KMeansProbe(n_init=1, clusters=8).fit(f, y).predict(f).equal(first)
    assert not KMeansProbe(n_init=1, clusters=8, seed=1).fit(f, y).predict(f).equal(first)
    assert torch.random.get_rng_state().equal(state)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert copy.deepcopy(KMeansProbe(n_init=1, clusters=8)).fit(f, y).predict(f).equal(first)


def test_degenerate_features():
    y = torch.arange(30) % 3
    for f in (torch.ones(30, 4), torch.zeros(30, 4), torch.full((30, 4), 1e30), torch.full((30, 4), 1e-30)):
        for normalize in (True, False):
            probe = KMeansProbe(normalize=normalize).fit(f, y)
            assert probe.score(f, y) == pytest.approx(1 / 3)
            assert probe.results_["values"]["NMI"] == pytest.approx(0, abs=1e-12)
            assert probe.results_["protocol"]["clusters_found"] == 1
    f = torch.randn(30, 4)
    assert KMeansProbe().fit(f, torch.full((30,), 7)).score(f, torch.full((30,), 7)) == 1  # one class
    assert KMeansProbe().fit(f, torch.arange(30)).score(f, torch.arange(30)) == 1  # one row a class
    assert KMeansProbe().fit(f, y).score(f, torch.full((30,), 9)) == 0  # a class of the scored rows only
    huge = torch.cat([f[:15] + 50, f[15:] - 50]) * 1e30
    assert (
        KMeansProbe(normalize=False)
        .fit(huge, (torch.arange(30) < 15).long())
        .score(huge, (torch.arange(30) < 15).long())
        == 1
    )


def test_refusals():
    f, y = torch.randn(10, 4), torch.arange(10) % 2
    for options in ({"clusters": 0}, {"n_init": 0}, {"max_iter": 0}, {"matching": "score"}):
        with pytest.raises(UsageError):
            KMeansProbe(**options)
    with pytest.raises(UsageError, match="fit"):
        KMeansProbe().predict(f)
    with pytest.raises(UsageError, match="11 clusters of 10 rows"):
        KMeansProbe(clusters=11).fit(f, y)
    with pytest.raises(UsageError, match="4 columns, these features have 5"):
        KMeansProbe().fit(f, y).predict(torch.randn(2, 5))
    with pytest.raises(UsageError, match="integer label"):
        KMeansProbe().fit(f, [0, 1])
    f[3, 1] = torch.inf
    with pytest.raises(UsageError, match="row 3"):
        KMeansProbe().fit(f, y)
    options = "clusters=None, normalize=True, n_init=10, max_iter=300, matching='fitted', seed=0"
    assert repr(KMeansProbe()) == f"KMeansProbe({options})"
