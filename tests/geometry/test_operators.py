"""Products with Hessians against dense ones, against differences of gradients, and on a PEFT model."""

import pytest
import torch
from cases import BACKBONES, QUERY, VALUE
from geometry_cases import ACTIVATIONS, double, two_layers
from peft import LoraConfig, get_peft_model
from torch import nn

import hfproj
from hfproj.errors import UsageError
from hfproj.geometry import EffectiveHessianOperator, HessianOperator, effective_hessian, extreme_eigenvalues
from hfproj.objectives.nt_xent import nt_xent_loss


def nt_xent(z):
    return nt_xent_loss(z.view(2, -1, z.shape[1]), temperature=0.5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_operator_is_the_exact_matrix_and_so_are_its_parts(activation):
    head, h = two_layers(activation, 5, 7, 3), double(6, 5)
    exact = effective_hessian(head, nt_xent, h)
    operator = EffectiveHessianOperator(head, nt_xent, h)
    V = double(30, 4, seed=3)
    for product, matrix in ((operator.matvec, exact.H_eff), (operator.G_L, exact.G_L), (operator.M, exact.M)):
        found = torch.stack([product(v) for v in V.T], dim=1)
        torch.testing.assert_close(found, matrix[0] @ V, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(operator.dense(), exact.H_eff[0], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(operator.gradient, exact.J[0].T @ exact.rho[0], rtol=1e-10, atol=1e-13)
    assert operator.loss == pytest.approx(nt_xent(head(h)).item())
    if activation in ("identity", "relu", "leaky_relu"):
        assert not operator.M(V[:, 0]).any()


def test_losses_of_rows_are_summed():
    head, h = two_layers("gelu", 5, 7, 3), double(4, 5)
    loss_fn = lambda z: z.cosh().sum(1)  # noqa: E731
    exact = effective_hessian(head, loss_fn, h)
    operator = EffectiveHessianOperator(head, loss_fn, h)
    torch.testing.assert_close(operator.dense(), torch.block_diag(*exact.H_eff))
    single = EffectiveHessianOperator(head, loss_fn, h, dtype=torch.float32)
    torch.testing.assert_close(single.matvec(double(20)), operator.matvec(double(20)), rtol=1e-4, atol=1e-4)
    identity = EffectiveHessianOperator(lambda h: h, lambda z: z.sum(1), h)
    assert not identity.matvec(double(20)).any()


def test_parameters_of_a_head():
    head, h = two_layers("silu", 4, 5, 3), double(6, 4)
    operator = HessianOperator(lambda: nt_xent(head(h)), head)
    names = [name for name, _ in head.named_parameters()]
    shapes = [p.shape for p in head.parameters()]

    def loss(theta):
        parts = theta.split([shape.numel() for shape in shapes])
        params = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes)}
        return nt_xent(torch.func.functional_call(head, params, (h,)))

    theta = torch.cat([p.detach().flatten() for p in head.parameters()])
    torch.testing.assert_close(operator.dense(), torch.autograd.functional.hessian(loss, theta), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(operator.gradient, torch.func.grad(loss)(theta))
    v = double(operator.dim).float()
    assert operator.matvec(v).dtype == torch.float32
    head.hidden.requires_grad_(False)
    assert HessianOperator(lambda: nt_xent(head(h)), head).dim == 5 * 3 + 3
    assert HessianOperator(lambda: nt_xent(head(h)), [head.last.linear.weight]).dim == 15


def test_all_parameters_of_a_peft_model():
    backbone = BACKBONES["vit"]()  # with fused attention, which has no second derivative
    config = hfproj.ProjectionHeadConfig(
        head="mlp", head_options={"hidden_dim": 12, "norm": None, "activation": "gelu"}, out_dim=6,
        backbone_adapter=LoraConfig(r=2, target_modules=[QUERY, VALUE], init_lora_weights=False),
    )  # fmt: skip
    model = get_peft_model(backbone, config).double().eval()
    x = double(4, 3, 32, 32)
    closure = lambda: nt_xent(model(pixel_values=x).projection)  # noqa: E731
    operator = HessianOperator(closure, model)
    product = operator.matvec(double(operator.dim))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert operator.dim == sum(p.numel() for p in trained) > 500
    assert any("lora" in name for name, p in model.named_parameters() if p.requires_grad)
    v, step = double(operator.dim), 1e-6
    parts = v.split([p.numel() for p in trained])

    def gradient(scale):
        with torch.no_grad():
            for p, part in zip(trained, parts):
                p.add_(part.view_as(p), alpha=scale)
        found = torch.autograd.grad(closure(), trained)
        with torch.no_grad():
            for p, part in zip(trained, parts):
                p.sub_(part.view_as(p), alpha=scale)
        return torch.cat([g.flatten() for g in found])

    differences = (gradient(step) - gradient(-step)) / (2 * step)
    torch.testing.assert_close(product, differences, rtol=1e-5, atol=1e-6 * float(differences.abs().max()))


def test_several_batches_are_a_sum():
    head = two_layers("tanh", 4, 5, 3)
    h = double(8, 4)
    loss = lambda h: head(h).square().sum()  # noqa: E731
    parts = [HessianOperator(lambda h=half: loss(h), head) for half in (h[:4], h[4:])]
    v = double(parts[0].dim)
    whole = HessianOperator(lambda: loss(h), head)
    torch.testing.assert_close(sum(part.matvec(v) for part in parts), whole.matvec(v))
    assert extreme_eigenvalues(lambda v: sum(p.matvec(v) for p in parts), whole.dim).max == pytest.approx(
        torch.linalg.eigvalsh(whole.dense())[-1].item(), rel=1e-6
    )


def test_a_linear_loss_has_no_hessian():
    layer = nn.Linear(3, 1)
    assert not HessianOperator(lambda: layer(torch.ones(2, 3)).sum(), layer).matvec(torch.ones(4)).any()
    unused = HessianOperator(lambda: layer.weight.square().sum(), layer)  # the bias takes no part
    assert unused.matvec(torch.ones(4)).tolist() == [2, 2, 2, 0]


def test_it_works_without_a_gradient_around_it():
    layer = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        operator = HessianOperator(lambda: layer(torch.eye(3)).square().sum(), layer)
        assert operator.matvec(torch.ones(3)).tolist() == [2, 2, 2]
    assert layer.weight.grad is None


def test_refusals():
    head, h = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.randn(6, 4)
    operator = HessianOperator(lambda: head(h).square().sum(), head)
    with torch.no_grad():
        head[0].weight.add_(1)
    with pytest.raises(UsageError, match="changed after this operator was made"):
        operator.matvec(torch.ones(operator.dim))
    seen_from_h = EffectiveHessianOperator(head, nt_xent, h)
    with torch.no_grad():
        head[0].bias.zero_()
    with pytest.raises(UsageError, match="changed after this operator was made"):
        seen_from_h.M(torch.ones(24))
    operator = HessianOperator(lambda: head(h).square().sum(), head)
    with pytest.raises(UsageError, match=r"shape \[15\], got \[14\]"):
        operator.matvec(torch.ones(14))
    with pytest.raises(UsageError, match="everything frozen"):
        HessianOperator(lambda: head(h).sum(), nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(UsageError, match=r"one number, got shape \[6, 3\]"):
        HessianOperator(lambda: head(h), head)
    with pytest.raises(UsageError, match="The loss is nan"):
        HessianOperator(lambda: head(h).sum() * torch.nan, head)
    with pytest.raises(UsageError, match="was it detached"):
        HessianOperator(lambda: head(h).sum().detach(), head)
    with pytest.raises(UsageError, match=r"head.eval\(\)"):
        HessianOperator(lambda: torch.tensor(0.0), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    with pytest.raises(UsageError, match="at most 4096 columns for a matrix, got 4097"):
        HessianOperator(lambda: head[0].weight.sum(), [torch.zeros(4097, requires_grad=True)]).dense()
    objective = hfproj.create_objective("nt_xent")
    tiled = EffectiveHessianOperator(head, lambda z: objective(z.view(2, 3, 3)).loss, h)
    with pytest.raises(UsageError, match="tile_rows=None"):
        tiled.matvec(torch.ones(24))
    with pytest.raises(UsageError, match="rows of the representations h are NaN"):
        EffectiveHessianOperator(head, nt_xent, h / 0)


def test_a_head_that_ignores_h_has_no_curvature():
    operator = EffectiveHessianOperator(
        lambda h: torch.ones(len(h), 2, dtype=h.dtype), lambda z: z.square().sum(), double(3, 4)
    )
    assert operator.dense().count_nonzero() == 0
    assert operator.gradient.count_nonzero() == 0
