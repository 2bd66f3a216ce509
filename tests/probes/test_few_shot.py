import pytest
import torch
from probes.classifier_cases import HARD, check_hard, check_modes, check_refusals, clusters

from hfproj.errors import UsageError
from hfproj.probes.few_shot import FewShotProbe
from hfproj.probes.knn import KNNProbe
from hfproj.probes.linear import LinearProbe
from hfproj.results.verdict import paired_interval


class Recorder:
    """A probe that only keeps what it is fitted on, and answers with the smallest label."""

    name = "recorder"

    def fit(self, f, y):
        self.f, self.y = f, y
        return self

    def predict(self, f):
        return torch.full((len(f),), int(self.y.min()))

    def score(self, f, y):
        return 0.0


def test_each_draw_has_n_rows_of_each_class_without_repetition():
    y = torch.tensor([5] * 40 + [-2] * 3 + [9] * 20)
    f = torch.arange(63.0)[:, None]
    probe = FewShotProbe(n=6, draws=50, probe=Recorder()).fit(f, y)
    seen = torch.zeros(63)
    for inner in probe.probes_:
        rows = inner.f[:, 0].long()
        assert len(rows.unique()) == len(rows) == 15
        assert y[rows].equal(inner.y)
        assert [(inner.y == c).sum().item() for c in (5, -2, 9)] == [6, 3, 6]
        seen[rows] += 1
    assert seen[40:43].eq(50).all()
    # Each of 40 rows is in a draw with probability 6/40: over 50 draws its count has mean 7.5, deviation 2.5.
    assert (seen[:40] - 7.5).abs().max() < 12
    assert seen[:40].mean() == pytest.approx(7.5)
    probe.score(f, y)
    assert probe.results_["protocol"]["classes_with_fewer_rows"] == 1


def test_mean_and_deviation_over_draws():
    (f, y), (test, truth) = clusters(300, 8, 4, 1), clusters(100, 8, 4, 2)
    probe = FewShotProbe(n=2, draws=5, probe=KNNProbe(k=1)).fit(f, y)
    value = probe.score(test, truth)
    each = torch.tensor([inner.score(test, truth) for inner in probe.probes_], dtype=torch.float64)
    values = probe.results_["values"]
    assert value == pytest.approx(each.mean().item())
    assert values["std"] == pytest.approx(each.std().item())
    assert probe.results_["draws"] == pytest.approx(each.tolist())
    assert paired_interval(probe.correct_draws_, probe.correct_draws_).difference == 0
    votes = torch.stack([inner.predict(test) for inner in probe.probes_])
    counts = torch.stack([(votes == c).sum(0) for c in range(4)])
    assert probe.predict(test).equal(counts.argmax(0))  # the first of equal counts is the smallest label


def test_more_rows_are_better_and_all_rows_are_the_probe_itself():
    (f, y), (test, truth) = clusters(400, 16, 4, 1, 2.0), clusters(200, 16, 4, 2, 2.0)
    values = [FewShotProbe(n=n, draws=4).fit(f, y).score(test, truth) for n in (1, 10, 400)]
    assert values[0] < values[1] < values[2]
    assert values[2] == LinearProbe(l2=0.01).fit(f, y).score(test, truth)


def test_results_carry_the_protocol():
    f, y = clusters(60, 4, 3, 1)
    probe = FewShotProbe(n=1, draws=1, probe=KNNProbe(k=1), seed=7).fit(f, y)
    probe.score(f, y)
    assert probe.results_["values"]["std"] == 0.0
    expected = {"n": 1, "draws": 1, "probe": repr(KNNProbe(k=1)), "probe_seed": 7, "classes": 3}
    assert probe.results_["protocol"] == {**expected, "classes_with_fewer_rows": 0, "train_rows": 60, "test_rows": 60}


@pytest.mark.parametrize("case", HARD)
def test_hard_cases(case):
    check_hard(FewShotProbe(n=3, draws=2), case)


def test_modes():
    check_modes(FewShotProbe(n=3, draws=2))


def test_refusals():
    check_refusals(FewShotProbe(draws=2))
    assert repr(FewShotProbe(probe={"name": "knn", "k": 1})) == repr(FewShotProbe(probe=KNNProbe(k=1)))
    for options in ({"n": 0}, {"draws": 0}, {"probe": "liner"}, {"probe": {"k": 1}}):
        with pytest.raises(UsageError):
            FewShotProbe(**options)
