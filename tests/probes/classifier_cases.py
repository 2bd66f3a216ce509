"""Training sets that classifiers have to cope with, and what every one of them has to do."""

import copy

import pytest
import torch

from hfproj.errors import UsageError


def clusters(rows, dim, classes, seed, noise=1.5):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (rows,), generator=generator)
    return centres[labels] + noise * torch.randn(rows, dim, generator=generator), labels


def separable(rows):
    y = torch.arange(rows) % 3
    return torch.nn.functional.one_hot(y, 3).float() * 5 + 0.01 * torch.randn(rows, 3), y


def with_constants(f, y):
    return torch.cat([f, torch.full((len(f), 2), 0.1)], 1), y


HARD = {
    "very unbalanced": lambda: (clusters(400, 6, 2, 1)[0], (torch.arange(400) < 3).long()),
    "one sample a class": lambda: (torch.randn(7, 5), torch.arange(7) * 3 - 5),
    "one class": lambda: (torch.randn(20, 5), torch.full((20,), 6)),
    "one row": lambda: (torch.randn(1, 5), torch.tensor([2])),
    "separable": lambda: separable(60),
    "constant columns": lambda: with_constants(*clusters(90, 4, 3, 1)),
    "all columns constant": lambda: (torch.full((12, 3), 0.7), torch.arange(12) % 2),
    "fewer rows than columns": lambda: clusters(12, 40, 3, 1),
    "duplicated rows": lambda: (torch.randn(4, 5).repeat(20, 1), torch.arange(80) % 3),
    "large offset and scale": lambda: (clusters(90, 4, 3, 1)[0] * 1e3 + 1e5, clusters(90, 4, 3, 1)[1]),
    "half precision": lambda: (clusters(90, 4, 3, 1)[0].half(), clusters(90, 4, 3, 1)[1]),
}  # fmt: skip


def check_hard(probe, case):
    """Fit, score with a class that training lacks, and see that nothing depends on the global random state."""
    f, y = HARD[case]()
    fitted = copy.deepcopy(probe).fit(f, y)
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    again = copy.deepcopy(probe).fit(f, y.tolist())
    assert torch.random.get_rng_state().equal(state)
    predicted = fitted.predict(f)
    assert predicted.equal(again.predict(f))
    assert predicted.device.type == "cpu"
    assert set(predicted.tolist()) <= set(y.tolist())
    unseen = y.clone()
    unseen[0] = 1000
    assert not hasattr(fitted, "results_")
    score = fitted.score(f, unseen)
    assert score == fitted.results_["value"]
    if hasattr(fitted, "correct_"):
        assert not fitted.correct_[0]
        assert score == pytest.approx(((predicted == y)[1:].sum() / len(y)).item())
    return fitted


def check_modes(probe):
    """Fit and predict under inference mode and autocast, and from a copy: all the same."""
    f, y = clusters(200, 6, 3, 1)
    expected = copy.deepcopy(probe).fit(f, y)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inner, labels = clusters(200, 6, 3, 1)
        fitted = copy.deepcopy(probe).fit(inner, labels)
        predicted = fitted.predict(inner)
    assert predicted.equal(expected.predict(f))
    assert copy.deepcopy(expected).predict(f).equal(predicted)
    assert not expected.predict(f.requires_grad_()).requires_grad


def check_refusals(probe):
    f, y = torch.randn(10, 4), torch.arange(10) % 2
    with pytest.raises(UsageError, match="fit"):
        copy.deepcopy(probe).predict(f)
    bad = f.clone()
    bad[3] = float("nan")
    with pytest.raises(UsageError, match="row 3"):
        copy.deepcopy(probe).fit(bad, y)
    with pytest.raises(UsageError, match="at least 1 row"):
        copy.deepcopy(probe).fit(f[:0], y[:0])
    with pytest.raises(UsageError, match="integer label for each of 10 rows"):
        copy.deepcopy(probe).fit(f, y[:9].tolist())
    fitted = copy.deepcopy(probe).fit(f, y)
    with pytest.raises(UsageError, match="row 3"):
        fitted.score(bad, y)
    with pytest.raises(UsageError, match="4 columns, these features have 5"):
        fitted.predict(torch.randn(2, 5))
    with pytest.raises(UsageError, match="integer label for each of 10 rows"):
        fitted.score(f, y[:9].tolist())
