"""J of every head against automatic and numerical differentiation; spectra against singular values; refusals."""

import warnings

import pytest
import torch
from geometry_cases import ACTIVATIONS, double
from torch import nn

import hfproj
from hfproj.errors import UsageError
from hfproj.geometry import (
    jacobian,
    layerwise_condition_number,
    metric_condition_number,
    metric_spectrum,
    pullback_metric,
)
from hfproj.geometry._chain import read_chain

HEADS = {
    "identity": {},
    "linear": {"out_dim": 4, "norm": "layer"},
    "mlp": {"out_dim": 4, "hidden_dim": 7, "norm": None},
    "reweight": {"kappa": 1.2},
    "symmetric_relu": {},
    "subvector": {"d0": 3},
    "constant_subvector": {"d0": 3, "constant": 0.5, "evaluate": "constant"},
    "topk": {"width": 12, "top_k": 3},
    "dino": {"out_dim": 5},
}


def mlp(calibrated=True, **options):
    head = hfproj.create_head("mlp", in_dim=9, **options).double()
    for module in head.modules():
        for name in ("weight", "bias"):
            if hasattr(module, "running_mean") and getattr(module, name) is not None:
                getattr(module, name).data.uniform_(0.5, 2)
    if calibrated:
        head(2 * double(40, 9) + 1)
    return head.eval()


def differentiated(head, h):
    return torch.func.vmap(torch.func.jacrev(lambda row: head(row[None])[0]))(h)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_heads_without_autograd_equal_torch_func(activation):
    h = double(7, 9, seed=1)
    for depth in (1, 2, 3):
        for norm in (None, "batch", "layer"):
            for out_dim, unit in ((5, False), (17, True)):
                options = {"depth": depth, "activation": activation, "norm": norm, "last_norm": norm}
                head = mlp(out_dim=out_dim, hidden_dim=13, l2_normalise=unit, **options)
                assert read_chain(head, h.dtype, h.device) is not None
                torch.testing.assert_close(jacobian(head, h), differentiated(head, h), rtol=1e-12, atol=1e-12)


def test_sequential_with_torchs_layers_is_a_chain_too():
    layers = [
        nn.Linear(9, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(32, 20, bias=False),
    ]
    head = nn.Sequential(*layers, nn.Sequential(nn.BatchNorm1d(20, affine=False), nn.Hardswish())).double()
    head(double(40, 9))
    head.eval()
    assert read_chain(head, torch.float64, torch.device("cpu")) is not None
    torch.testing.assert_close(jacobian(head, double(50, 9)), differentiated(head, double(50, 9)))


@pytest.mark.parametrize("name", HEADS)
def test_every_head_against_differences(name):
    head = hfproj.create_head(name, in_dim=6, **HEADS[name]).double().eval()
    h, step = double(5, 6), 1e-6
    moved = [(head(h + step * e) - head(h - step * e)) / (2 * step) for e in torch.eye(6, dtype=torch.float64)]
    torch.testing.assert_close(jacobian(head, h), torch.stack(moved, dim=2).detach(), rtol=1e-7, atol=1e-8)


def test_of_a_straight_through_head_it_is_the_surrogates():
    head = hfproj.create_head("quantized", in_dim=6, out_dim=3, head="linear", levels=3).double().eval()
    h = double(4, 6)
    u = head.inner(h)
    half = (3 - 1) * (1 - 1e-3) / 2
    slope = half * (1 - u.tanh().square())  # odd levels: no shift, and levels // 2 = 1
    expected = slope.unsqueeze(2) * head.inner.linear.weight
    torch.testing.assert_close(jacobian(head, h), expected.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(head(h + 1e-9), head(h))  # while the function itself is constant around h


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return 2 * h

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_heads_that_torch_func_cannot_trace():
    class Stubborn(nn.Module):
        def forward(self, h):
            assert h.sum().item() < 1e9
            return _Double.apply(h).square()

    h = double(4, 3)
    torch.testing.assert_close(jacobian(Stubborn(), h), torch.diag_embed(8 * h))
    assert not jacobian(lambda h: torch.ones(len(h), 2, dtype=h.dtype), h).any()


def test_a_look_alike_with_a_forward_of_its_own():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.last = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Sequential(nn.Linear(4, 4))
            self.l2_normalise = False

        def forward(self, h):
            return h + self.last(self.hidden(h))

    head, h = Residual().double(), double(3, 4)
    torch.testing.assert_close(jacobian(head, h), differentiated(head, h))


def test_linear_heads_have_one_metric_and_relu_heads_a_piecewise_constant_one():
    head = hfproj.create_head("linear", in_dim=5, out_dim=3)
    W = head.linear.weight.detach().double()
    metric = pullback_metric(head, torch.randn(4, 5))
    assert "G" not in vars(metric)
    torch.testing.assert_close(metric.G, (W.T @ W).expand(4, 5, 5), rtol=0, atol=1e-15)
    relu, h = mlp(out_dim=4, hidden_dim=20, norm=None), double(6, 9)
    assert torch.equal(jacobian(relu, h), jacobian(relu, h + 1e-9))
    assert not torch.equal(jacobian(relu, h), jacobian(relu, -h))


def test_an_invariant_head_annihilates_what_it_is_invariant_to():
    q, _ = torch.linalg.qr(double(9, 9))
    projector = q[:, :6] @ q[:, :6].T
    head = mlp(out_dim=8, norm=None)
    J = jacobian(lambda h: head(h @ projector), double(5, 9))
    assert (J @ q[:, 6:]).abs().max() < 1e-14
    assert metric_condition_number(lambda h: head(h @ projector), double(5, 9)).nullity.tolist() == [3] * 5


@pytest.mark.parametrize("out_dim", [4, 9, 30])
def test_spectrum_is_that_of_J_and_of_G(out_dim):
    head, h = mlp(out_dim=out_dim, hidden_dim=40, activation="silu"), double(8, 9)
    spectrum = metric_spectrum(head, h)
    torch.testing.assert_close(spectrum, torch.linalg.svdvals(jacobian(head, h)).square(), rtol=1e-11, atol=1e-13)
    full = torch.linalg.eigvalsh(pullback_metric(head, h).G).flip(1)
    torch.testing.assert_close(spectrum, full[:, : spectrum.shape[1]], rtol=1e-9, atol=1e-12)
    found = metric_condition_number(head, h)
    torch.testing.assert_close(found.condition_number, spectrum[:, 0] / spectrum[:, -1])
    assert found.rank.tolist() == [min(out_dim, 9)] * 8
    assert found.nullity.tolist() == [max(9 - out_dim, 0)] * 8


@pytest.mark.parametrize("decades", [2, 7, 12])
def test_condition_number_of_a_known_spectrum(decades):
    u, v = (torch.linalg.qr(double(n, n, seed=n))[0] for n in (6, 10))
    sigma = torch.logspace(0, -decades / 2, 6, dtype=torch.float64)
    head = nn.Linear(10, 6, bias=False).double()
    head.weight.data = u * sigma @ v[:6]
    found = metric_condition_number(head, double(1, 10))
    assert found.condition_number.item() == pytest.approx(10**decades, rel=1e-8)
    assert (found.rank.item(), found.nullity.item()) == (6, 4)
    coarse = metric_condition_number(head, double(1, 10), rtol=10 ** (-decades / 4))
    assert coarse.rank.item() == 3
    assert coarse.condition_number.item() == pytest.approx(10 ** (decades * 2 / 5), rel=1e-8)


def test_a_head_that_is_dead_at_a_sample():
    head = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    head[0].bias.data.copy_(torch.tensor([0.0, 0, 0, 0, 0]))
    head[0].weight.data.abs_()
    found = metric_condition_number(head, torch.tensor([[1.0, 1, 1], [-1, -1, -1]]))
    assert found.rank.tolist() == [2, 0]
    assert found.nullity.tolist() == [1, 3]
    assert found.condition_number.isnan().tolist() == [False, True]


def test_layers_are_the_metrics_of_the_heads_beginnings():
    head, h = mlp(out_dim=4, hidden_dim=12, depth=3, activation="gelu"), double(5, 9)
    found = layerwise_condition_number(head, h)
    parts = [f"hidden.{i}.{part}" for i in range(2) for part in ("linear", "norm", "act")]
    assert list(found) == [*parts, "last.linear"]
    for i, name in enumerate(found):
        modules = [head.get_submodule(part) for part in list(found)[: i + 1]]
        expected = metric_condition_number(nn.Sequential(*modules), h)
        torch.testing.assert_close(found[name].condition_number, expected.condition_number, rtol=1e-9, atol=0)
        assert torch.equal(found[name].nullity, expected.nullity)
    torch.testing.assert_close(found["last.linear"], metric_condition_number(head, h))


def test_blocks_of_rows_give_the_same(monkeypatch):
    head, other, h = mlp(out_dim=4), hfproj.create_head("topk", in_dim=9).double(), double(7, 9)
    whole = [(jacobian(f, h), metric_spectrum(f, h)) for f in (head, other)]
    monkeypatch.setattr("hfproj.geometry._chain._BLOCK_ELEMENTS", 1)
    monkeypatch.setattr("hfproj.geometry.pullback._BLOCK_ELEMENTS", 1)
    for f, (J, spectrum) in zip((head, other), whole):
        torch.testing.assert_close(jacobian(f, h), J)
        torch.testing.assert_close(metric_spectrum(f, h), spectrum)


def test_the_head_is_left_as_it_was():
    head = hfproj.create_head("topk", in_dim=4, width=8)  # counts idle units when it trains
    head.train()
    state = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    head(torch.randn(1, 4)).sum().backward()
    gradient, idle = head.decoder.weight.grad.clone(), head.idle.clone()
    assert jacobian(head, torch.randn(3, 4)).dtype == torch.float64
    assert head.training
    assert head.encoder.training
    assert torch.equal(head.idle, idle)
    assert torch.equal(head.decoder.weight.grad, gradient)
    assert all(torch.equal(state[name], tensor) for name, tensor in head.state_dict().items() if name != "idle")


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
@pytest.mark.parametrize("name", ["mlp", "topk"])
def test_it_works_inside_other_contexts(name, context):
    head = hfproj.create_head(name, in_dim=9, **({"norm": None, "activation": "gelu"} if name == "mlp" else {}))
    h = torch.randn(5, 9)
    expected = jacobian(head, h)
    with context():
        torch.testing.assert_close(jacobian(head, h.clone()), expected)


def test_dtypes():
    head, h = mlp(out_dim=4), double(5, 9)
    reference = metric_spectrum(head, h)
    assert jacobian(head, h, dtype=torch.float32).dtype == torch.float32
    torch.testing.assert_close(metric_spectrum(head, h, dtype=torch.float32), reference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metric_spectrum(head.float(), h.float()), reference, rtol=1e-5, atol=1e-6)
    half = head.bfloat16()
    exact = metric_spectrum(half.double(), h.bfloat16().double())
    torch.testing.assert_close(metric_spectrum(half.bfloat16(), h.bfloat16()), exact, rtol=1e-12, atol=1e-12)


def test_what_couples_rows_or_is_random_is_refused():
    h = double(6, 9)
    with pytest.raises(UsageError, match=r"'hidden.0.norm' \(BatchNorm\) normalises .*batch.*head.eval\(\)"):
        jacobian(mlp(out_dim=4).train(), h)
    head = nn.Sequential(nn.Linear(9, 4), nn.BatchNorm1d(4))
    with pytest.raises(UsageError, match=r"'1' \(BatchNorm1d\).*head.eval\(\)"):
        metric_spectrum(head, h)
    with pytest.raises(UsageError, match="track_running_stats=True"):
        jacobian(nn.Sequential(nn.Linear(9, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval(), h)
    with pytest.raises(UsageError, match=r"'1' \(Dropout\) drops entries at random"):
        jacobian(nn.Sequential(nn.Linear(9, 4), nn.Dropout(0.1)), h)
    assert jacobian(nn.Sequential(nn.Linear(9, 4), nn.Dropout(0.0)), h).shape == (6, 4, 9)
    for coupled in (lambda h: h - h.mean(0), lambda h: h + torch.randn_like(h)):
        with pytest.raises(UsageError, match="couples rows or is random"):
            jacobian(coupled, h)


def test_a_batch_norm_that_has_seen_no_data_is_a_warning():
    head, h = mlp(calibrated=False, out_dim=4), double(5, 9)
    with pytest.warns(UserWarning, match=r"'hidden.0.norm' \(BatchNorm\) have seen no data") as caught:
        jacobian(head, h)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jacobian(mlp(out_dim=4), h)


def test_other_refusals():
    head, h = nn.Linear(9, 4), double(6, 9)
    h[2, 3] = torch.nan
    with pytest.raises(UsageError, match="1 of 6 rows of the representations h are NaN or infinite: row 2"):
        jacobian(head, h)
    with pytest.raises(UsageError, match=r"head cannot work on h of shape \[1, 5\].*mat1 and mat2"):
        jacobian(head, double(6, 5))
    with pytest.raises(UsageError, match=r"shape \[1, out_dim\] for h \[1, 3\], got shape \[1\]"):
        jacobian(lambda h: h.sum(1), double(2, 3))
    with pytest.raises(UsageError, match="rtol"):
        metric_condition_number(head, double(2, 9), rtol=1.5)
    with pytest.raises(UsageError, match=r"chain of linear layers.*got TopKHead"):
        layerwise_condition_number(hfproj.create_head("topk", in_dim=9), double(2, 9))
    head.weight.data[0, 0] = torch.inf
    with pytest.raises(UsageError, match="Jacobian of the head has entries that are NaN or infinite"):
        metric_spectrum(head, double(2, 9))
