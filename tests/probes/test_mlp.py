import pytest
import torch
from probes.classifier_cases import HARD, check_hard, check_modes, check_refusals, clusters

from hfproj.errors import NonFiniteLossError, UsageError
from hfproj.probes.linear import LinearProbe
from hfproj.probes.mlp import MLPProbe


def rings(rows, seed):
    """Two classes that only the distance from the centre tells apart."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (rows,), generator=generator)
    f = torch.randn(rows, 2, generator=generator)
    return f / f.norm(dim=1, keepdim=True) * (1 + 2 * y[:, None]), y


def test_reads_what_a_linear_probe_cannot():
    (f, y), (test, truth) = rings(600, 1), rings(300, 2)
    assert LinearProbe(l2=1e-3).fit(f, y).score(test, truth) < 0.65
    assert MLPProbe(hidden=32, batch_size=32).fit(f, y).score(test, truth) > 0.98


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_training_is_torchs_adamw(schedule):
    f, y = clusters(70, 5, 3, 1)
    f = f.double()
    probe = MLPProbe(hidden=7, epochs=3, batch_size=32, weight_decay=0.1, schedule=schedule, standardize=False, seed=2)
    probe.fit(f, y)
    generator = torch.Generator().manual_seed(2)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3)).double()
    for parameter in net.parameters():
        fan_in = 5 if parameter.shape[0] == 7 else 7
        drawn = torch.rand(parameter.shape, dtype=torch.float64, generator=generator)
        parameter.data.copy_((2 * drawn - 1) * fan_in**-0.5)
    matrices, biases = [net[0].weight, net[2].weight], [net[0].bias, net[2].bias]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    for _ in range(3):
        for rows in torch.randperm(70, generator=generator).split(32):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(f[rows]), y[rows]).backward()
            optimizer.step()
            if schedule == "cosine":
                scheduler.step()
    for ours, theirs in zip(probe._weights, net.parameters()):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-11)


def test_the_rotation_probe():
    for layer, width in (("h", 256), ("z", 512)):
        probe = MLPProbe.rotation(layer, seed=3)
        assert (probe.hidden, probe.epochs, probe.learning_rate) == (width, 5, 1e-3)
        assert (probe.weight_decay, probe.schedule, probe.seed) == (0, "constant", 3)
    with pytest.raises(UsageError, match="h, z"):
        MLPProbe.rotation("p")


def test_results_carry_the_protocol():
    f, y = clusters(80, 4, 3, 1)
    probe = MLPProbe(hidden=8, epochs=2).fit(f, y)
    assert probe.score(f[:30], y[:30]) == probe.results_["value"]
    expected = {"hidden": 8, "epochs": 2, "batch_size": 256, "learning_rate": 1e-3, "weight_decay": 0.01}
    expected |= {"schedule": "cosine", "standardize": True, "probe_seed": 0}
    assert probe.results_["protocol"] == {**expected, "train_rows": 80, "classes": 3, "test_rows": 30}
    assert repr(probe).startswith("MLPProbe(hidden=8, epochs=2, ")


@pytest.mark.parametrize("case", HARD)
def test_hard_cases(case):
    check_hard(MLPProbe(hidden=8, epochs=2), case)


def test_modes():
    check_modes(MLPProbe(hidden=8, epochs=2))
    check_modes(MLPProbe(hidden=8, epochs=2, standardize=False))


def test_refusals():
    check_refusals(MLPProbe(hidden=4, epochs=1))
    for options in (
        {"hidden": 0},
        {"epochs": 0},
        {"learning_rate": -1.0},
        {"weight_decay": -1.0},
        {"schedule": "step"},
    ):
        with pytest.raises(UsageError):
            MLPProbe(**options)
    with pytest.raises(NonFiniteLossError, match="learning_rate"):
        MLPProbe(hidden=4, learning_rate=1e30, batch_size=10).fit(*clusters(100, 4, 3, 1))
