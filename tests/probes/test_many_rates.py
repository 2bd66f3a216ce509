import math

import pytest
import torch
from probes.classifier_cases import HARD, check_hard, check_modes, check_refusals, clusters

from hfproj.errors import UsageError
from hfproj.probes.many_rates import ManyRatesProbe


def one_rate(f, y, kept, rate, epochs, batch, generator):
    """A module and torch's SGD for a single rate, with the same draws."""
    layer = torch.nn.Linear(f.shape[1], int(y.max()) + 1, dtype=f.dtype)
    with torch.no_grad():
        layer.weight.copy_(0.01 * torch.randn(layer.weight.shape, dtype=torch.float64, generator=generator))
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate * batch / 256, momentum=0.9)
    steps = epochs * math.ceil(len(kept) / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in kept[torch.randperm(len(kept), generator=generator)].split(batch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(f[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return layer


@pytest.mark.parametrize("rate", [1e-3, 0.05, 1.0])
def test_each_rate_is_torchs_sgd(rate):
    f, y = clusters(150, 6, 4, 1)
    f = f.double()
    # One held-out row a class, so that the rows kept can be told from the draw.
    from hfproj.probes.base import hold_out

    generator = torch.Generator().manual_seed(3)
    kept, _ = hold_out(y, 0.1, generator)
    layer = one_rate(f, y, kept, rate, 3, 32, generator)
    probe = ManyRatesProbe(rates=(rate,), epochs=3, batch_size=32, seed=3).fit(f, y)
    torch.testing.assert_close(probe._weight, layer.weight.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(probe._bias, layer.bias.detach(), rtol=1e-10, atol=1e-12)
    # Beside others it is trained alike.
    beside = ManyRatesProbe(rates=(1e-9, rate), epochs=3, batch_size=32, seed=3).fit(f, y)
    if beside.rate_ == rate:
        torch.testing.assert_close(beside._weight, probe._weight, rtol=1e-10, atol=1e-12)


def test_the_best_rate_on_held_out_rows_is_chosen():
    f, y = clusters(400, 8, 3, 1, noise=0.8)
    probe = ManyRatesProbe(rates=(1e-9, 1e-2, 0.1)).fit(f, y)
    assert probe.held_out_[probe.rate_] == max(probe.held_out_.values()) > 0.9
    assert probe.rate_ != 1e-9
    assert probe.score(f, y) > 0.9


def test_rates_that_diverge_drop_out():
    f, y = clusters(200, 6, 3, 1)
    f = f * 1e15
    probe = ManyRatesProbe(rates=(1e-30, 1e30), epochs=2).fit(f, y)
    assert probe.rate_ == 1e-30
    assert probe.held_out_[1e30] == 0.0
    with pytest.raises(UsageError, match="diverged at every rate"):
        ManyRatesProbe(rates=(1e30,), epochs=2).fit(f, y)
    assert ManyRatesProbe(standardize=True).fit(f, y).score(f, y) > 0.7


def test_seed_decides():
    f, y = clusters(200, 6, 3, 1)
    fitted = [ManyRatesProbe(rates=(0.01,), epochs=1, seed=seed).fit(f, y)._weight for seed in (0, 0, 1)]
    assert fitted[0].equal(fitted[1])
    assert not fitted[0].equal(fitted[2])


def test_results_carry_the_protocol():
    f, y = clusters(100, 4, 3, 1)
    probe = ManyRatesProbe(rates=(0.01, 0.1), epochs=2, seed=4).fit(f, y)
    assert probe.score(f, y) == probe.results_["value"]
    protocol = dict(probe.results_["protocol"])
    assert protocol.pop("chosen")["rate"] == probe.rate_
    expected = {"rates": [0.01, 0.1], "epochs": 2, "batch_size": 128, "holdout": 0.1, "standardize": False}
    assert protocol == {**expected, "probe_seed": 4, "train_rows": 100, "classes": 3, "test_rows": 100}


@pytest.mark.parametrize("case", HARD)
def test_hard_cases(case):
    check_hard(ManyRatesProbe(epochs=2, standardize=case == "large offset and scale"), case)


def test_modes():
    check_modes(ManyRatesProbe(epochs=2))
    check_modes(ManyRatesProbe(epochs=2, standardize=True))


def test_refusals():
    check_refusals(ManyRatesProbe(epochs=1))
    for options in ({"rates": []}, {"rates": [0.0]}, {"epochs": 0}, {"batch_size": 0}, {"holdout": 0.0}):
        with pytest.raises(UsageError):
            ManyRatesProbe(**options)
