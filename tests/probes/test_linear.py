import warnings

import numpy as np
import pytest
import torch
from probes.classifier_cases import HARD, check_hard, check_modes, check_refusals, clusters
from sklearn.linear_model import LogisticRegression
from thinned import thinned

from hfproj.errors import UsageError
from hfproj.probes import linear
from hfproj.probes.base import Scaling
from hfproj.probes.linear import L2_PATH, LinearProbe


def objective(f, y, coef, intercept, l2, scale):
    """The stated objective in float64; `coef` is for columns divided by `scale`."""
    logits = (f.double().numpy() - f.double().numpy().mean(0)) / scale @ coef.T + intercept
    codes = np.unique(y.numpy(), return_inverse=True)[1]
    top = logits.max(1, keepdims=True)
    loss = np.log(np.exp(logits - top).sum(1)) + top[:, 0] - logits[np.arange(len(codes)), codes]
    size = ((coef[1] - coef[0]) ** 2).sum() if len(coef) == 2 else (coef**2).sum()
    return loss.mean() + l2 / 2 * size


def scale_of(f, standardize):
    scale = f.double().numpy().std(0)
    return np.where(scale > 1e-9, scale, 1.0) if standardize else np.ones_like(scale)


def peer(f, y, l2, scale):
    """Return coefficients and intercepts of scikit-learn, as many rows as classes."""
    x = (f.double().numpy() - f.double().numpy().mean(0)) / scale
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it stops where rounding hides any progress
        model = LogisticRegression(C=1 / (len(x) * l2), tol=1e-10, solver="newton-cholesky", max_iter=25)
        found = model.fit(x, y.numpy())
    if len(found.classes_) == 2:
        return np.concatenate([-found.coef_, found.coef_]) / 2, np.concatenate(
            [-found.intercept_, found.intercept_]
        ) / 2
    return found.coef_, found.intercept_


def ill_conditioned(rows, dim, classes):
    f, y = clusters(rows, dim, classes, 1)
    mix = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(3)))[0]
    return f * torch.logspace(0, -4, dim) @ mix + 10, y


def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data[:400]).float(), torch.tensor(data.target[:400])


CASES = {
    "digits": digits,
    "ill-conditioned": lambda: ill_conditioned(400, 24, 5),
    "ill-conditioned float64": lambda: (ill_conditioned(400, 24, 5)[0].double(), ill_conditioned(400, 24, 5)[1]),
    "two classes": lambda: clusters(300, 8, 2, 1),
    "unbalanced": lambda: (clusters(500, 8, 3, 1)[0], (torch.arange(500) < 4).long() + 2 * (torch.arange(500) == 7)),
    "fewer rows than columns": lambda: clusters(30, 60, 4, 1),
    "constant columns": HARD["constant columns"],
    "duplicated rows": HARD["duplicated rows"],
}


@pytest.mark.parametrize("standardize", thinned([True, False]))
@pytest.mark.parametrize("case", CASES)
def test_objective_is_not_above_scikit_learns(case, standardize):
    f, y = CASES[case]()
    scale = scale_of(f, standardize)
    for l2 in (1e-1, 1e-4):
        probe = LinearProbe(l2=l2, standardize=standardize).fit(f, y)
        coef, intercept = probe.coef_.numpy() * scale, probe.intercept_ + probe.coef_ @ f.double().mean(0)
        ours = objective(f, y, coef, intercept.numpy(), l2, scale)
        theirs = objective(f, y, *peer(f, y, l2, scale), l2, scale)
        assert ours <= theirs * (1 + 1e-9)
        assert ours >= theirs * (1 - 1e-6)  # scikit-learn is there too
        assert probe.objective_ == pytest.approx(ours, rel=1e-6)  # x is rounded to float32 inside
        assert probe.converged_


def test_large_problems_begin_in_float32_and_end_at_the_same_optimum(monkeypatch):
    f, y = clusters(3000, 32, 10, 1)
    exact = LinearProbe(l2=1e-3).fit(f, y)
    monkeypatch.setattr(linear, "_SMALL", 0)
    monkeypatch.setitem(linear._BLOCK, "cpu", 2**14)  # and in many blocks
    found = LinearProbe(l2=1e-3).fit(f, y)
    assert found.objective_ == pytest.approx(exact.objective_, rel=1e-10)
    torch.testing.assert_close(found.coef_, exact.coef_, rtol=1e-4, atol=1e-5)
    # Even where matrix products are as coarse as bfloat16's.
    evaluate = linear.SoftmaxRegression._evaluate

    def coarse(self, l2, theta, dtype):
        value, gradient = evaluate(self, l2, theta, dtype)
        noise = torch.randn(gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        return (value, gradient) if dtype == torch.float64 else (value * 1.001, gradient + 1e-3 * noise)

    monkeypatch.setattr(linear.SoftmaxRegression, "_evaluate", coarse)
    assert LinearProbe(l2=1e-3).fit(f, y).objective_ == pytest.approx(exact.objective_, rel=1e-9)


def test_without_the_factor_of_wide_features_the_optimum_is_the_same(monkeypatch):
    f, y = ill_conditioned(200, 16, 3)
    exact = LinearProbe(l2=1e-2).fit(f, y).objective_
    monkeypatch.setattr(linear, "_LARGEST_FACTOR", 1)
    assert LinearProbe(l2=1e-2).fit(f, y).objective_ == pytest.approx(exact, rel=1e-10)


def test_two_opposite_points():
    """W of one column: the optimum of log(1 + exp(−w)) + λ/2 w², by bisection of its derivative."""
    l2, low, high = 0.3, 0.0, 10.0
    for _ in range(100):
        w = (low + high) / 2
        low, high = (w, high) if -1 / (1 + np.exp(w)) + l2 * w < 0 else (low, w)
    probe = LinearProbe(l2=l2).fit(torch.tensor([[-3.0], [-1.0]]), [0, 1])
    assert (probe.coef_[1] - probe.coef_[0]).item() == pytest.approx(low, rel=1e-6)
    assert probe.objective_ == pytest.approx(np.log1p(np.exp(-low)) + l2 / 2 * low**2, rel=1e-9)


def test_standardising_makes_scales_and_offsets_irrelevant():
    f, y = clusters(200, 6, 3, 1)
    f = f.double()
    probe = LinearProbe(l2=1e-2).fit(f, y)
    moved = LinearProbe(l2=1e-2).fit(f * torch.logspace(-6, 6, 6) - 7, y)
    assert moved.objective_ == pytest.approx(probe.objective_, rel=1e-10)
    shift = LinearProbe(l2=1e-2, standardize=False)
    assert shift.fit(f + 1e3, y).objective_ == pytest.approx(shift.fit(f, y).objective_, rel=1e-9)


def test_coefficients_are_for_features_as_given_and_rows_may_come_in_any_order():
    f, y = clusters(200, 6, 3, 1)
    probe = LinearProbe(l2=1e-2).fit(f, y * 10 - 7)
    logits = f.double() @ probe.coef_.T + probe.intercept_
    assert probe.classes_[logits.argmax(1)].equal(probe.predict(f))
    order = torch.randperm(200)
    again = LinearProbe(l2=1e-2).fit(f[order], y[order])
    torch.testing.assert_close(again.coef_, probe.coef_, rtol=1e-4, atol=1e-5)


def test_the_gradient_vanishes_at_the_optimum():
    f, y = clusters(150, 5, 4, 1)
    f = f.double()
    probe = LinearProbe(l2=1e-2, standardize=False).fit(f, y)
    coef, bias = probe.coef_.clone().requires_grad_(), probe.intercept_.clone().requires_grad_()
    value = torch.nn.functional.cross_entropy(f @ coef.T + bias, y) + 0.01 / 2 * coef.square().sum()
    assert value.item() == pytest.approx(probe.objective_, rel=1e-12)
    assert max(g.abs().max().item() for g in torch.autograd.grad(value, [coef, bias])) < 1e-5


def test_the_strength_is_chosen_on_held_out_rows_and_refitted_on_all():
    f, y = clusters(240, 30, 4, 1, noise=3.0)
    probe = LinearProbe().fit(f, y)
    assert probe.l2_ in L2_PATH
    fixed = LinearProbe(l2=probe.l2_).fit(f, y)
    assert probe.objective_ == pytest.approx(fixed.objective_, rel=1e-9)
    # Noise wants a strong penalty, and an exact rule of rare combinations a weak one.
    generator = torch.Generator().manual_seed(0)
    noise = LinearProbe(l2_path=[1.0, 1e-6], holdout=0.3)
    noise.fit(torch.randn(120, 60, generator=generator) + 0.3 * y[:120, None], y[:120])
    assert noise.l2_ == 1.0
    f = torch.randn(600, 2, generator=generator)
    band = LinearProbe(l2_path=[1e-6, 10.0]).fit(f, (f[:, 0] + 0.02 * f[:, 1] > 1.5).long())
    assert band.l2_ == 1e-6


def test_results_carry_the_protocol():
    f, y = clusters(100, 4, 3, 1)
    probe = LinearProbe(l2_path=(1.0, 0.1), holdout=0.2, seed=5).fit(f, y)
    value = probe.score(f[:40], y[:40])
    assert probe.results_["value"] == value == probe.correct_.double().mean().item()
    protocol = dict(probe.results_["protocol"])
    assert protocol.pop("chosen")["l2"] == probe.l2_
    expected = {"standardize": True, "max_iter": 1000, "l2_path": [1.0, 0.1], "holdout": 0.2, "probe_seed": 5}
    assert protocol == {**expected, "train_rows": 100, "classes": 3, "test_rows": 40}
    fixed = LinearProbe(l2=0.1).fit(f, y)
    fixed.score(f, y)
    assert fixed.results_["protocol"]["l2"] == 0.1
    assert "chosen" not in fixed.results_["protocol"]
    assert repr(fixed) == "LinearProbe(l2=0.1, standardize=True, max_iter=1000, seed=0)"  # no path is followed


@pytest.mark.parametrize("l2", [None, 1e-8])
@pytest.mark.parametrize("case", HARD)
def test_hard_cases(case, l2):
    fitted = check_hard(LinearProbe(l2=l2), case)
    assert fitted.converged_
    if case == "one sample a class" and l2 is None:
        assert fitted.l2_ == L2_PATH[8]
        assert fitted.results_["protocol"]["chosen"]["on_rows"] == 0
    if case == "all columns constant":
        assert fitted.coef_.abs().max() == 0
        assert fitted.objective_ == pytest.approx(np.log(2))


def test_modes():
    check_modes(LinearProbe())


def test_a_fit_that_does_not_get_there_warns():
    f, y = clusters(300, 8, 3, 1)
    with pytest.warns(UserWarning, match="did not reach its optimum in 2 steps"):
        LinearProbe(l2=1e-6, max_iter=2).fit(f, y)


def test_scaling_is_that_of_scikit_learn():
    from sklearn.preprocessing import StandardScaler

    f = (torch.randn(50, 4) * torch.tensor([1.0, 1e-8, 1e8, 0.0]) + torch.tensor([0.0, 1.0, 0.0, 0.1])).double()
    expected = torch.from_numpy(StandardScaler().fit_transform(f.numpy()))
    torch.testing.assert_close(Scaling.of(f).apply(f), expected, rtol=1e-6, atol=1e-7)


def test_refusals():
    check_refusals(LinearProbe(l2=1e-2))
    for options in (
        {"l2": 0.0}, {"l2": float("nan")}, {"l2_path": []}, {"l2_path": [1.0, -1.0]}, {"holdout": 1.0}, {"max_iter": 0}
    ):  # fmt: skip
        with pytest.raises(UsageError):
            LinearProbe(**options)
