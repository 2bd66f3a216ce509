"""H_eff = G_L + M against the Hessian of the composition and the closed form of two layers; row and joint losses."""

import pytest
import torch
from geometry_cases import ACTIVATIONS, double, two_layers, weights
from torch import nn

import hfproj
from hfproj.errors import UsageError
from hfproj.geometry import collapse_report, count_negative, effective_hessian

SMOOTH = {
    "gelu": lambda a: torch.exp(-a.square() / 2) / (2 * torch.pi) ** 0.5 * (2 - a.square()),
    "silu": lambda a: a.sigmoid() * (1 - a.sigmoid()) * (2 + a * (1 - 2 * a.sigmoid())),
    "tanh": lambda a: -2 * a.tanh() * (1 - a.tanh().square()),
    "softplus": lambda a: a.sigmoid() * (1 - a.sigmoid()),
}
TARGET = double(3, 4, seed=5)
LOSSES = {
    "quadratic": lambda z: (z - TARGET).square().sum(1) / 2,
    "cosine": lambda z: -torch.cosine_similarity(z, TARGET),
    "log-cosh": lambda z: (z - TARGET).cosh().log().sum(1),
    "quartic": lambda z: (z - TARGET).pow(4).sum(1) + (z[:, 0] * z[:, 1]) ** 2,
}


def composed(head, loss_fn, h):
    """Return the Hessian of each row's loss in h, by torch.func."""

    def loss_of(i):
        return lambda row: loss_fn(torch.cat([head(h[:i]), head(row[None]), head(h[i + 1 :])]))[i]

    return torch.stack([torch.func.jacrev(torch.func.jacrev(loss_of(i)))(h[i]) for i in range(len(h))])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_the_hessian_of_the_composition_and_its_parts_fit(activation, loss):
    head, h = two_layers(activation, 5, 9, 4), double(3, 5)
    found = effective_hessian(head, LOSSES[loss], h)
    scale = float(found.H_eff.abs().max())
    torch.testing.assert_close(found.H_eff, composed(head, LOSSES[loss], h), rtol=1e-11, atol=1e-13 * scale)
    z = head(h).detach().requires_grad_()
    (rho,) = torch.autograd.grad(LOSSES[loss](z).sum(), z)
    torch.testing.assert_close(found.rho, rho)
    torch.testing.assert_close(found.G_L, found.J.mT @ found.H_L @ found.J, rtol=1e-12, atol=1e-14 * scale)
    x = h.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(LOSSES[loss](head(x)).sum(), x)
    torch.testing.assert_close((found.J.mT @ found.rho[:, :, None])[:, :, 0], gradient, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("activation", SMOOTH)
def test_closed_form_of_M(activation):
    head, h = two_layers(activation, 5, 9, 4), 3 * double(3, 5)
    found = effective_hessian(head, LOSSES["quartic"], h)
    W1, W2 = weights(head)
    curvature = (found.rho @ W2) * SMOOTH[activation](head.hidden[0].linear(h).detach())
    expected = W1.T @ torch.diag_embed(curvature) @ W1
    torch.testing.assert_close(found.M, expected, rtol=1e-10, atol=1e-12 * float(expected.abs().max()))


def test_second_derivatives_of_activations():
    assert SMOOTH["silu"](torch.tensor(0.0)).item() == pytest.approx(0.5)
    assert SMOOTH["silu"](torch.tensor(2.3994)).item() == pytest.approx(0, abs=1e-5)
    assert SMOOTH["gelu"](torch.tensor(0.0)).item() == pytest.approx(0.798, abs=1e-3)
    assert SMOOTH["gelu"](torch.tensor(2.0).sqrt()).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu"])
def test_M_vanishes_for_piecewise_linear_heads(activation):
    report = collapse_report(two_layers(activation, 8, 16, 4), lambda z: (z - 5).square().sum(1), double(6, 8))
    assert report.norm_M.max() < 1e-14 * report.norm_H_eff.min()
    assert report.norm_rho.min() > 1
    assert not report.n_neg.any()
    assert (report.lambda_min > -1e-13).all()


def test_tanh_at_zero_has_no_M():
    head = two_layers("tanh", 8, 16, 4, bias=False)
    report = collapse_report(head, lambda z: (z - 5).square().sum(1), torch.zeros(1, 8))
    assert report.norm_M.item() == 0
    assert report.n_neg.item() == 0
    assert collapse_report(head, lambda z: (z - 5).square().sum(1), 0.1 * double(1, 8)).n_neg.item() > 0


def test_heads_with_batch_norm_in_eval_mode_and_deeper_ones():
    head = hfproj.create_head("mlp", in_dim=5, out_dim=4, hidden_dim=9, depth=3, activation="silu").double()
    head(2 * double(40, 5) + 1)
    head.eval()
    h = double(3, 5)
    found = effective_hessian(head, LOSSES["log-cosh"], h)
    torch.testing.assert_close(found.H_eff, composed(head, LOSSES["log-cosh"], h), rtol=1e-10, atol=1e-11)
    assert head.last.linear.weight.grad is None
    with pytest.raises(UsageError, match=r"head.eval\(\)"):
        effective_hessian(head.train(), LOSSES["log-cosh"], h)


def test_a_joint_loss():
    head, h = two_layers("silu", 3, 7, 4), double(3, 3)
    loss_fn = lambda z: (z @ z.T).logsumexp(1).sum() + z.cosh().sum()  # noqa: E731
    found = effective_hessian(head, loss_fn, h)
    expected = torch.autograd.functional.hessian(lambda x: loss_fn(head(x)), h).reshape(9, 9)
    torch.testing.assert_close(found.H_eff[0], expected, rtol=1e-11, atol=1e-12)
    H_L = torch.autograd.functional.hessian(loss_fn, head(h).detach()).reshape(12, 12)
    torch.testing.assert_close(found.H_L[0], H_L, rtol=1e-11, atol=1e-12)
    assert (found.J.shape, found.rho.shape) == ((1, 12, 9), (1, 12))
    one = effective_hessian(head, lambda z: LOSSES["cosine"](z).sum(), h)
    apart = effective_hessian(head, LOSSES["cosine"], h)
    torch.testing.assert_close(one.H_eff[0], torch.block_diag(*apart.H_eff))


def test_losses_and_heads_without_curvature():
    h = double(3, 4)
    flat = effective_hessian(two_layers("silu", 4, 6, 4), lambda z: z.sum(1), h)
    assert not flat.G_L.any()
    assert flat.M.any()
    nothing = effective_hessian(nn.Linear(4, 2), lambda z: torch.zeros(3).double(), h)
    assert not nothing.H_eff.any()
    identity = effective_hessian(hfproj.create_head("identity", in_dim=4), LOSSES["quadratic"], h)
    assert torch.equal(identity.H_eff, torch.eye(4).double().expand(3, 4, 4))


def test_the_report_counts_and_attributes():
    head = nn.Linear(4, 4, bias=False).double()
    head.weight.data = torch.eye(4, dtype=torch.float64)
    diagonal = torch.tensor([-2.0, 0, 1, 3], dtype=torch.float64)
    report = collapse_report(head, lambda z: (diagonal * z.square()).sum(1) / 2, torch.ones(2, 4))
    assert report.n_neg.tolist() == report.n_neg_loss.tolist() == [1, 1]  # from the loss, not from the head
    assert report.lambda_min.tolist() == [-2, -2]
    assert report.lambda_max.tolist() == [3, 3]
    norm = 14**0.5
    for value in (report.norm_H_eff, report.norm_G_L, report.norm_rho, report.norm_gradient):
        torch.testing.assert_close(value, torch.tensor([norm, norm], dtype=torch.float64))
    smooth = collapse_report(two_layers("gelu", 8, 16, 4), lambda z: (z - 5).square().sum(1), double(6, 8))
    assert (smooth.n_neg > 0).all()
    assert not smooth.n_neg_loss.any()


def test_round_off_is_not_counted():
    assert count_negative(torch.tensor([[-1e-9, 0, 1], [-1e-11, 0, 1], [-3, -2, -1.0], [0, 0, 0]])).tolist() == [
        1,
        0,
        3,
        0,
    ]


def test_refusals():
    head, h = two_layers("silu", 4, 6, 2), double(3, 4)
    with pytest.raises(UsageError, match=r"one for each of the 3 rows, got shape \[3, 2\]"):
        effective_hessian(head, lambda z: z, h)
    with pytest.raises(UsageError, match="depends on other rows"):
        effective_hessian(head, lambda z: (z - z.mean(0)).square().sum(1), h)
    with pytest.raises(UsageError, match="NaN or infinite"):
        effective_hessian(head, lambda z: z.sum(1) / 0, h)
    objective = hfproj.create_objective("nt_xent")
    with pytest.raises(UsageError, match="tile_rows=None"):
        effective_hessian(head, lambda z: objective(z.view(2, 2, 2)).loss, double(4, 4))
    with pytest.raises(UsageError, match="couples rows"):
        effective_hessian(lambda h: h - h.mean(0), lambda z: z.square().sum(1), h)
