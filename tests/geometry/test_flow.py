"""The integrator against closed forms, scipy and its order; what the flow conserves and SGD does not."""

import math

import pytest
import torch
from geometry_cases import double, two_layers
from torch import nn

import hfproj
from hfproj.errors import UsageError
from hfproj.geometry import gradient_flow, linear_invariant, relu_invariant
from hfproj.objectives.spectral import spectral_loss


def quadratic(n=4):
    A = double(n, n)
    return A @ A.T / n


def test_a_quadratic_has_a_closed_form():
    A, start = quadratic(), double(4, seed=1)
    times = [0.5, 1.0, 4.0]
    flow = gradient_flow(lambda x: x @ A @ x / 2, start, time=4.0, record=times)
    assert flow.times.tolist() == [0, *times]
    expected = torch.stack([torch.linalg.matrix_exp(-t * A) @ start for t in [0, *times]])
    torch.testing.assert_close(flow.trajectory, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(flow.losses, torch.einsum("ti,ij,tj->t", expected, A, expected) / 2, rtol=1e-6, atol=0)
    assert torch.equal(flow.params, flow.trajectory[-1])
    assert torch.equal(start, double(4, seed=1))


def test_tolerance_is_the_error_and_looser_ones_are_cheaper():
    start = torch.tensor([1.0], dtype=torch.float64)
    exact = 1 / math.sqrt(1 + 2 * 3.0)  # of dx/dt = −x³
    errors, steps = [], []
    for rtol in (1e-4, 1e-7, 1e-10):
        flow = gradient_flow(lambda x: x.pow(4).sum() / 4, start, time=3.0, rtol=rtol, atol=rtol)
        errors.append(abs(flow.params.item() - exact))
        steps.append(flow.steps)
        assert errors[-1] < 10 * rtol
    assert errors == sorted(errors, reverse=True)
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]


def test_order_four_of_rk4():
    start = torch.tensor([1.0], dtype=torch.float64)
    errors = []
    for step in (0.1, 0.05):
        flow = gradient_flow(lambda x: x.square().sum() / 2, start, time=2.0, method="rk4", step=step)
        assert flow.steps == round(2 / step)
        errors.append(abs(flow.params.item() - math.exp(-2)))
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.1)


def test_it_slides_along_a_jump_of_the_gradient():
    """|x| pushes x to 0 from both sides; y goes on smoothly meanwhile."""
    start = torch.tensor([1.0, 2.0], dtype=torch.float64)
    flow = gradient_flow(lambda p: p[0].abs() + p[1].square() / 2, start, time=4.0, record=8)
    x, y = flow.trajectory.T
    torch.testing.assert_close(x, (1 - flow.times).clamp_min(0), rtol=0, atol=2e-3)  # time/2000
    torch.testing.assert_close(y, 2 * (-flow.times).exp(), rtol=1e-3, atol=0)
    assert flow.steps + flow.rejected < 10_000


def test_against_scipy():
    from scipy.integrate import solve_ivp

    head, h = two_layers("silu", 3, 5, 2), double(6, 3)
    target = double(6, 2, seed=1)
    flow = gradient_flow(lambda g: (g(h) - target).square().mean(), head, time=20.0)
    theta = torch.cat([p.detach().flatten() for p in head.parameters()])
    names, shapes = zip(*((n, p.shape) for n, p in head.named_parameters()))

    def slope(_, y):
        leaf = torch.tensor(y, requires_grad=True)
        parts = leaf.split([shape.numel() for shape in shapes])
        params = {n: p.view(s) for n, s, p in zip(names, shapes, parts)}
        loss = (torch.func.functional_call(head, params, (h,)) - target).square().mean()
        return -torch.autograd.grad(loss, leaf)[0].numpy()

    found = solve_ivp(slope, (0, 20), theta.numpy(), method="DOP853", rtol=1e-10, atol=1e-12)
    ours = torch.cat([flow.params[name].flatten() for name in names])
    torch.testing.assert_close(ours, torch.tensor(found.y[:, -1]), rtol=1e-6, atol=1e-7)


def test_every_form_of_parameters_flows_alike():
    layer, h = nn.Linear(3, 2).double(), double(5, 3)
    loss = lambda z: z.cosh().sum()  # noqa: E731
    options = {"time": 1.0, "record": 3}
    flow = gradient_flow(lambda g: loss(g(h)), layer, **options)
    W, b = layer.weight.detach(), layer.bias.detach()
    as_list = gradient_flow(lambda p: loss(h @ p[0].T + p[1]), [W, b], **options)
    as_dict = gradient_flow(lambda p: loss(h @ p["w"].T + p["b"]), {"w": W, "b": b}, **options)
    torch.testing.assert_close(as_list.params[0], flow.params["weight"])
    torch.testing.assert_close(as_dict.params["w"], flow.params["weight"])
    assert as_dict.trajectory["w"].shape == (4, 2, 3)
    assert torch.equal(as_dict.trajectory["w"][0], W)
    layer.bias.requires_grad_(False)
    assert list(gradient_flow(lambda g: loss(g(h)), layer, **options).params) == ["weight"]
    with torch.no_grad():
        again = gradient_flow(lambda p: loss(h @ p[0].T + p[1]), [W, b], **options)
    assert torch.equal(again.params[0], as_list.params[0])


def trained(activation, bias, flow):
    """Return the head's parameters at the start and after some learning, by flow or by SGD of the same time."""
    head = two_layers(activation, 6, 10, 4, bias=bias)
    h, target = double(200, 6), 2 * double(200, 4, seed=1)
    start = {name: p.detach().clone() for name, p in head.named_parameters()}
    if flow:
        end = gradient_flow(lambda g: (g(h) - target).square().mean(), head, time=6.0, kink_step=0.02).params
    else:
        optimizer = torch.optim.SGD(head.parameters(), lr=0.05)
        for _ in range(120):
            optimizer.zero_grad()
            (head(h) - target).square().mean().backward()
            optimizer.step()
        end = dict(head.named_parameters())
    return [[p[name].detach() for name in NAMES if name in p] for p in (start, end)]


NAMES = ("hidden.0.linear.weight", "last.linear.weight", "hidden.0.linear.bias")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("activation", "invariant"), [("identity", linear_invariant), ("relu", relu_invariant)])
def test_invariants_hold_in_continuous_time_only(activation, invariant, bias):
    drift = {}
    for flow in (True, False):
        start, end = trained(activation, bias, flow)
        assert (end[0] - start[0]).norm() > 0.1 * start[0].norm()
        drift[flow] = float((invariant(*end) - invariant(*start)).abs().max())
    assert drift[True] < (1e-8 if activation == "identity" else 2e-5)  # steps over kinks of ReLU cost accuracy
    assert drift[False] > 1e-3


def test_silu_has_no_such_invariant_and_the_bias_belongs_to_it():
    start, end = trained("silu", True, True)
    assert float((relu_invariant(*end) - relu_invariant(*start)).abs().max()) > 1e-2
    start, end = trained("identity", True, True)
    without = linear_invariant(*end[:2]) - linear_invariant(*start[:2])
    assert float(without.abs().max()) > 1e-3


def test_leaky_relu_conserves_too():
    start, end = trained("leaky_relu", True, True)
    assert float((relu_invariant(*end) - relu_invariant(*start)).abs().max()) < 2e-5


def test_two_linear_layers_weigh_features_by_roots():
    """Spectral loss, balanced small start: the weight of a feature in h is the root of its weight in z."""
    variance = torch.tensor([1.0, 0.8, 0.6, 0.5], dtype=torch.float64)  # of each feature of x
    shared = variance * torch.tensor([0.9, 0.7, 0.8, 0.5], dtype=torch.float64)  # of it, what both views have
    U, s, _ = torch.linalg.svd(0.1 * double(4, 4, seed=2))
    q, _ = torch.linalg.qr(double(4, 4, seed=3))
    start = [s.sqrt().diag() @ U.T, q @ s.sqrt().diag()]  # W1 W1ᵀ = W2ᵀ W2

    def loss(weights):
        """−2 E⟨z, z⁺⟩ + E⟨z, z'⟩² of z = W2 W1 x, from the moments of x."""
        W = weights[1] @ weights[0]
        K = W.T @ W
        return -2 * (K.diagonal() * shared).sum() + (K.square() * variance[:, None] * variance).sum()

    n, some = 4000, [double(4, 4), double(4, 4, seed=1)]
    x = shared.sqrt() * double(n, 4) + (variance - shared).sqrt() * double(2, n, 4, seed=1)
    assert loss(some).item() == pytest.approx(spectral_loss(x @ (some[1] @ some[0]).T).item(), rel=0.1)

    W1, W2 = gradient_flow(loss, start, time=100.0).params
    torch.testing.assert_close(W1 @ W1.T, W2.T @ W2, rtol=0, atol=1e-7)
    in_h, in_z = (torch.linalg.vector_norm(W, dim=0) for W in (W1, W2 @ W1))
    torch.testing.assert_close(in_h, in_z.sqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(in_z, shared.sqrt() / variance, rtol=1e-4, atol=0)
    assert in_z.std() / in_z.mean() > 1.5 * in_h.std() / in_h.mean()


def test_refusals():
    head = hfproj.create_head("mlp", in_dim=4)
    with pytest.raises(UsageError, match=r"head.eval\(\)"):
        gradient_flow(lambda g: g(double(4, 4)).sum(), head, time=1.0)
    x = torch.tensor([1.0], dtype=torch.float64)
    with pytest.raises(UsageError, match="one number, got shape"):
        gradient_flow(lambda x: torch.stack([x, x]), x, time=1.0)
    with pytest.raises(UsageError, match="was it detached"):
        gradient_flow(lambda x: x.detach().sum(), x, time=1.0)
    with pytest.raises(UsageError, match="NaN or infinite at the start"):
        gradient_flow(lambda x: x.sum() / 0, x, time=1.0)
    with pytest.raises(UsageError, match=r"does not go on beyond t = 0\.(5|49)"):
        gradient_flow(lambda x: -x.pow(3).sum() / 3, 2 * x, time=1.0)  # dx/dt = x² is infinite at t = ½
    with pytest.raises(UsageError, match=r"t = .* of 1 in max_steps=50 steps"):
        gradient_flow(lambda x: 1e6 * x.square().sum(), x, time=1.0, max_steps=50)
    with pytest.raises(UsageError, match=r"steps of 0\.1 are too long"):
        gradient_flow(lambda x: -x.pow(4).sum(), 10 * x, time=5.0, method="rk4", step=0.1)
    with pytest.raises(UsageError, match=r"step=0\.01"):
        gradient_flow(lambda x: x.sum(), x, time=1.0, method="rk4")
    for options in ({"time": 0.0}, {"time": 1.0, "rtol": 0.0, "atol": 0.0}, {"time": 1.0, "step": -1.0}):
        with pytest.raises(UsageError, match="positive time"):
            gradient_flow(lambda x: x.sum(), x, **options)
    with pytest.raises(UsageError, match="Did you mean 'rk4'"):
        gradient_flow(lambda x: x.sum(), x, time=1.0, method="rk")
    for record in (0, [2.0]):
        with pytest.raises(UsageError, match="record"):
            gradient_flow(lambda x: x.sum(), x, time=1.0, record=record)
    with pytest.raises(UsageError, match="floating-point tensors"):
        gradient_flow(lambda x: 0, [], time=1.0)
