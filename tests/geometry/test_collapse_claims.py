"""The corrected statements on collapse: what holds for linear, ReLU and smooth heads, what does not, and why."""

import math

import pytest
import torch
from geometry_cases import double, two_layers
from torch import nn

from hfproj.errors import UsageError
from hfproj.functional.moments import variance_hinge
from hfproj.geometry import (
    HessianOperator,
    collapse_report,
    constructed_equilibrium,
    effective_hessian,
    gradient_flow,
)
from hfproj.objectives.nt_xent import nt_xent_loss


def unstable(activation, out_dim, residual, in_dim=16, heads=20):
    """Return for how many random heads of out_dim entries λ_min(H_eff) < 0 under MSE with a residual of this length."""
    count = 0
    for seed in range(heads):
        head, h = two_layers(activation, in_dim, 32, out_dim, seed=seed), double(1, in_dim, seed=seed)
        rho = double(1, out_dim, seed=1000 + seed)
        target = head(h).detach() - residual * rho / rho.norm()
        count += int(collapse_report(head, lambda z: (z - target).square().sum(1) / 2, h).n_neg.item() > 0)
    return count


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("residual", [0.01, 1.0, 10.0])
def test_smooth_heads_are_unstable_where_z_is_narrow(activation, residual):
    assert unstable(activation, 8, residual) == 20  # out_dim = in_dim / 2


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu"])
@pytest.mark.parametrize("out_dim", [8, 16, 64])
def test_piecewise_linear_heads_never_are(activation, out_dim):
    assert unstable(activation, out_dim, 10.0, heads=8) == 0


def test_wide_smooth_heads_need_a_residual_that_is_large_enough():
    assert 0 < unstable("silu", 16, 0.01) < 20
    assert unstable("silu", 16, 1.0) == 20
    assert unstable("silu", 64, 0.1) == 0
    assert unstable("silu", 64, 10.0) == 20


# --- The constructed equilibrium


def equilibrium(activation, alpha, seed=0):
    head, h = two_layers(activation, 4, 12, 9, seed=seed), double(1, 4, seed=seed)
    return head, constructed_equilibrium(head, h, alpha=alpha)


@pytest.mark.parametrize("activation", ["identity", "relu", "silu", "gelu", "tanh"])
def test_it_is_an_equilibrium_with_a_residual(activation):
    head, point = equilibrium(activation, 32.0)
    z = head(point.h).detach().requires_grad_()
    (rho,) = torch.autograd.grad(point.loss(z).sum(), z)
    torch.testing.assert_close(rho, point.rho, rtol=1e-12, atol=1e-13)
    assert rho.norm().item() == pytest.approx(32)
    x = point.h.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(point.loss(head(x)).sum(), x)
    assert gradient.abs().max() < 1e-12
    opposite = constructed_equilibrium(head, point.h, alpha=-1.0)
    torch.testing.assert_close(opposite.rho, -point.rho / 32)


def distances(head, point, direction, size, time):
    """Return ‖h(t) − h*‖ and t along the flow in h of the loss, from h* + size·direction."""
    start = point.h[0] + size * direction
    flow = gradient_flow(lambda h: point.loss(head(h[None])).sum(), start, time=time, record=20, rtol=1e-9, atol=1e-14)
    return (flow.trajectory - point.h[0]).norm(dim=1), flow.times


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_linear_and_relu_heads_return_at_the_rate_of_lambda_min(activation):
    for alpha in (0.5, 32.0):
        head, point = equilibrium(activation, alpha, seed=1)
        H = effective_hessian(head, point.loss, point.h)
        values, vectors = torch.linalg.eigh(H.H_eff[0])
        assert torch.linalg.matrix_rank(point.J).item() == 4  # of full column rank
        assert values[0] > 0
        torch.testing.assert_close(H.H_eff, point.J.mT @ point.J, rtol=1e-10, atol=1e-12)
        found, times = distances(head, point, vectors[:, 0], 1e-6, 2 / float(values[0]))
        rates = -(found[1:] / found[0]).log() / times[1:]
        torch.testing.assert_close(rates, values[0].expand(20), rtol=1e-4, atol=0)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_smooth_heads_leave_at_the_rate_of_minus_lambda_min(activation):
    for seed in range(3):
        lowest = {}
        for alpha in (-32.0, -0.5, 0.5, 32.0):
            head, point = equilibrium(activation, alpha, seed=seed)
            lowest[alpha] = torch.linalg.eigvalsh(effective_hessian(head, point.loss, point.h).H_eff[0])[0].item()
        sign = min((1, -1), key=lambda s: lowest[32.0 * s])
        assert lowest[32.0 * sign] < -0.1
        assert lowest[32.0 * sign] < lowest[0.5 * sign]
        head, point = equilibrium(activation, 32.0 * sign, seed=seed)
        values, vectors = torch.linalg.eigh(effective_hessian(head, point.loss, point.h).H_eff[0])
        found, times = distances(head, point, vectors[:, 0], 1e-9, 5 / -float(values[0]))
        rates = (found[1:] / found[0]).log() / times[1:]
        torch.testing.assert_close(rates, -values[0].expand(20), rtol=1e-3, atol=0)


def test_M_grows_with_alpha_and_changes_its_sign_with_rho():
    parts = {
        alpha: effective_hessian(h, p.loss, p.h) for alpha in (1.0, 2.0, -1.0) for h, p in [equilibrium("silu", alpha)]
    }
    torch.testing.assert_close(parts[2.0].M, 2 * parts[1.0].M)
    torch.testing.assert_close(parts[-1.0].M, -parts[1.0].M)
    torch.testing.assert_close(parts[2.0].G_L, parts[1.0].G_L)


def test_no_such_equilibrium_where_h_reaches_all_of_z():
    with pytest.raises(UsageError, match=r"At row 0 the Jacobian \[3, 6\] reaches every direction"):
        constructed_equilibrium(two_layers("silu", 6, 12, 3), double(2, 6))
    with pytest.raises(UsageError, match="alpha"):
        constructed_equilibrium(two_layers("silu", 3, 12, 6), double(2, 3), alpha=0.0)
    assert constructed_equilibrium(nn.Linear(3, 6), double(4, 3)).rho.norm(dim=1).sum().item() == pytest.approx(4)


# --- What is false, and where instability has other causes


@pytest.mark.parametrize("activation", ["identity", "relu", "silu", "gelu"])
def test_the_false_reading_of_the_claim(activation):
    """In the *parameters* every two-layer head has a negative eigenvalue at collapse, linear and ReLU ones included:
    from the product of its layers, not from the activation. So this shows nothing about smooth heads."""
    head, h = two_layers(activation, 6, 8, 3), double(1, 6).expand(4, 6)
    target = head(h).detach() - 3
    hessian = HessianOperator(lambda: (head(h) - target).square().sum(1).mean() / 2, head)
    assert torch.linalg.eigvalsh(hessian.dense())[0] < -0.5
    single = nn.Linear(6, 3).double()
    loss = lambda: (single(h) - target).square().sum(1).mean() / 2  # noqa: E731
    assert torch.linalg.eigvalsh(HessianOperator(loss, single).dense())[0] > -1e-12


@pytest.mark.parametrize("s", [-1.0, -0.3, 0.0, 0.6, 1.0])
def test_negative_cosine_is_indefinite_in_z(s):
    """So that even a linear head is unstable under it, except at perfect alignment, where ρ = 0."""
    k, r = 5, 1.7
    u, w = torch.linalg.qr(double(k, 2))[0].T
    t = s * u + math.sqrt(1 - s**2) * w
    found = effective_hessian(lambda h: h, lambda z: -torch.cosine_similarity(z, 3 * t[None]), r * u[None])
    identity = torch.eye(k, dtype=torch.float64)
    expected = (torch.outer(u, t) + torch.outer(t, u) + s * identity - 3 * s * torch.outer(u, u)) / r**2
    torch.testing.assert_close(found.H_L[0], expected, rtol=1e-12, atol=1e-14)
    root = math.sqrt(s**2 + 4 * (1 - s**2))
    values = sorted([(s - root) / 2, (s + root) / 2, *[s] * (k - 2)])
    torch.testing.assert_close(
        torch.linalg.eigvalsh(found.H_L[0]), torch.tensor(values, dtype=torch.float64) / r**2, rtol=1e-10, atol=1e-14
    )
    W = nn.Linear(4, k, bias=False).double()
    W.weight.data = torch.linalg.qr(double(k, k, seed=1))[0][:, :4]
    h = torch.linalg.lstsq(W.weight.detach(), r * u[:, None]).solution.T
    report = collapse_report(W, lambda z: -torch.cosine_similarity(z, 3 * t[None]), h)
    if abs(s) < 1:
        assert torch.linalg.eigvalsh(found.H_L[0])[0] < 0 < torch.linalg.eigvalsh(found.H_L[0])[-1]
    elif s == 1:
        assert found.rho.norm() < 1e-15
        assert torch.linalg.eigvalsh(found.H_L[0])[0] > -1e-15
    else:
        assert torch.linalg.eigvalsh(found.H_L[0])[-1] < 1e-15
    assert report.norm_M.item() == 0


@pytest.mark.parametrize("loss", ["nt_xent", "variance"])
def test_joint_losses_repel_at_collapse_with_a_linear_head(loss):
    """Zero gradient and a negative eigenvalue in the global batch: an instability of the loss, not of the head."""
    n, k = 6, 3
    head, h = nn.Linear(4, k, bias=False).double(), double(1, 4).expand(n, 4).contiguous()
    loss_fn = {
        "nt_xent": lambda z: nt_xent_loss(z.view(2, n // 2, k), temperature=0.2),
        "variance": lambda z: variance_hinge(z),
    }[loss]
    report = collapse_report(head, loss_fn, h)
    assert report.norm_rho.item() < 1e-14
    assert report.norm_M.item() < 1e-12
    assert report.n_neg.item() > 0
    assert report.n_neg_loss.item() == report.n_neg.item()


def test_vicregs_variance_term_at_collapse():
    n, k, eps = 7, 3, 1e-4

    def variance(z):
        return torch.relu(1 - (z.var(0) + eps).sqrt()).mean()

    z = double(1, k).expand(n, k).contiguous()
    for term in (variance, variance_hinge):
        found = effective_hessian(lambda h: h, term, z)
        assert found.rho.abs().max() < 1e-14
        smallest = torch.linalg.eigvalsh(found.H_eff[0])[0].item()
        assert smallest == pytest.approx(-1 / (k * (n - 1) * math.sqrt(eps)), rel=1e-9)
