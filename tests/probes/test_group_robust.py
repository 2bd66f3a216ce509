import pytest
import torch
from probes.classifier_cases import clusters

from hfproj.errors import UsageError
from hfproj.probes.group_robust import GroupRobustProbe, _balanced, group_accuracies
from hfproj.probes.linear import LinearProbe


def spurious(rows, seed, share=0.95):
    """The class is in one noisy column, an attribute that mostly goes along with it in one without noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (rows,), generator=generator)
    attribute = torch.where(torch.rand(rows, generator=generator) < share, y, 1 - y)
    f = torch.randn(rows, 6, generator=generator)
    f[:, 0] += 3.0 * y
    f[:, 1] = 0.3 * f[:, 1] + 2.0 * attribute
    return f, y, attribute


def test_the_worst_group_gains():
    (f, y, a), (test, truth, b) = spurious(2000, 1), spurious(2000, 2, share=0.5)
    cells = 2 * truth + b
    plain = LinearProbe(l2=1e-3).fit(f, y)
    plain.score(test, truth)
    worst = min(group_accuracies(plain.correct_, cells).values())
    robust = GroupRobustProbe().fit(f, y, a)
    value = robust.score(test, truth, b)
    assert value > worst + 0.1
    groups = group_accuracies(robust.correct_, cells)
    assert value == min(groups.values())
    values = robust.results_["values"]
    assert values["average"] == robust.correct_.double().mean().item()
    assert [values[f"class {c}, group {g}"] for c in (0, 1) for g in (0, 1)] == list(groups.values())


def test_balanced_draws():
    cells = torch.tensor([0] * 30 + [1] * 4 + [2] * 9)
    generator = torch.Generator().manual_seed(0)
    seen = torch.zeros(43)
    for _ in range(200):
        rows = _balanced(cells, generator)
        assert torch.bincount(cells[rows]).tolist() == [4, 4, 4]
        assert len(rows.unique()) == 12
        seen[rows] += 1
    assert seen[30:34].eq(200).all()
    assert (seen[:30] / 200 - 4 / 30).abs().max() < 0.09  # deviation 0.024


def test_balanced_groups_leave_the_linear_probe():
    f, y = clusters(60, 5, 2, 1)
    order = torch.cat([(y == 0).nonzero().flatten()[:20], (y == 1).nonzero().flatten()[:20]])
    f, y = f[order].double(), y[order]
    robust = GroupRobustProbe(l2=1e-2, draws=3).fit(f, y, [0] * 40)
    plain = LinearProbe(l2=1e-2).fit(f, y)
    torch.testing.assert_close(robust._theta, plain._theta, rtol=1e-4, atol=1e-5)


def test_groups_are_crossed_with_classes():
    f, y, a = spurious(300, 1)
    by_attribute = GroupRobustProbe(draws=2).fit(f, y, a)
    by_group = GroupRobustProbe(draws=2).fit(f, y, 2 * y + a)
    assert by_attribute._theta.equal(by_group._theta)


def test_results_carry_the_protocol():
    f, y, a = spurious(300, 1)
    probe = GroupRobustProbe(draws=2, seed=3).fit(f, y, a)
    probe.score(f, y, a)
    protocol = dict(probe.results_["protocol"])
    assert protocol.pop("chosen")["l2"] == probe.l2_
    smallest = torch.bincount(2 * y + a).min().item()
    expected = {"draws": 2, "standardize": True, "probe_seed": 3, "l2_path": list(probe.l2_path), "train_rows": 300}
    expected |= {"train_groups": 4, "classes": 2, "rows_of_each_group": smallest, "test_rows": 300, "test_groups": 4}
    assert protocol == expected
    fixed = GroupRobustProbe(l2=0.1, draws=1).fit(f, y, a)
    fixed.score(f, y, a)
    assert fixed.results_["protocol"]["l2"] == 0.1


HARD = {
    "a group of one row": (torch.arange(20) % 2, (torch.arange(20) == 0).long()),
    "one row a group": (torch.arange(20), torch.arange(20)),
    "one class": (torch.zeros(20, dtype=torch.long), torch.arange(20) % 2),
    "a class in one group only": (torch.arange(20) % 3, (torch.arange(20) % 3 == 0).long()),
}


@pytest.mark.parametrize("case", HARD)
def test_hard_cases(case):
    y, groups = HARD[case]
    f = torch.cat([torch.randn(20, 4), torch.full((20, 1), 0.1)], 1)
    fitted = [GroupRobustProbe(draws=2).fit(f, y, groups) for _ in range(2)]
    assert fitted[0].predict(f).equal(fitted[1].predict(f))
    assert 0 <= fitted[0].score(f, y, groups) <= 1
    assert fitted[0].score(f, y + 100, groups + 100) == 0.0  # classes and groups that training lacks


def test_inference_mode_and_autocast_change_nothing():
    f, y, a = spurious(200, 1)
    expected = GroupRobustProbe(draws=2).fit(f, y, a).predict(f)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert GroupRobustProbe(draws=2).fit(*spurious(200, 1)).predict(f).equal(expected)


def test_refusals():
    f, y, a = spurious(30, 1)
    for options in ({"l2": 0.0}, {"l2_path": []}, {"l2_path": [-1.0]}, {"draws": 0}):
        with pytest.raises(UsageError):
            GroupRobustProbe(**options)
    with pytest.raises(UsageError, match="fit"):
        GroupRobustProbe().predict(f)
    with pytest.raises(UsageError, match="integer label for each of 30 rows"):
        GroupRobustProbe().fit(f, y, [0] * 29)
    bad = f.clone()
    bad[3] = float("inf")
    with pytest.raises(UsageError, match="row 3"):
        GroupRobustProbe().fit(bad, y, a)
    with pytest.raises(UsageError, match="at least one row"):
        group_accuracies(torch.zeros(0, dtype=torch.bool), [])
