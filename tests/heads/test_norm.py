"""BatchNorm on one process: torch's own, to rounding, and what it adds. For several processes see test_distributed."""

import pytest
import torch
from torch import nn

from hfproj.errors import UsageError
from hfproj.heads.norm import BatchNorm, create_norm, joint_moments


def pair(**options):
    ours, torchs = BatchNorm(5, **options).double(), nn.BatchNorm1d(5, **options).double()
    for norm in (ours, torchs):
        if norm.affine:
            torch.manual_seed(1)
            nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return ours, torchs


def assert_same(ours, torchs):
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    for key, value in torchs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": 0.3, "eps": 1e-2}])
def test_equals_torch_with_gradients_and_running_statistics(options):
    ours, torchs = pair(**options)
    x = (3 + 2 * torch.randn(2, 8, 5, dtype=torch.float64)).requires_grad_()
    cotangent = torch.randn_like(x)
    for mode in (True, False):
        ours.train(mode), torchs.train(mode)
        y, expected = ours(x), torch.stack([torchs(view) for view in x])
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        grads = [
            torch.autograd.grad(out, [x, *norm.parameters()], cotangent)
            for out, norm in ((y, ours), (expected, torchs))
        ]
        for grad, expected_grad in zip(*grads):
            torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-11)
        assert_same(ours, torchs)


def test_joint_statistics_are_those_of_all_rows():
    ours, torchs = pair()
    ours.statistics = "joint"
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x).flatten(0, 1), torchs(x.flatten(0, 1)), rtol=0, atol=1e-12)
    assert_same(ours, torchs)


def test_the_path_of_several_processes_equals_the_fused_one():
    fused, joint = BatchNorm(5).double(), BatchNorm(5).double()
    x = torch.randn(2, 8, 5, dtype=torch.float64)
    y = joint._normalise_jointly(x, joint.weight, joint.bias)
    torch.testing.assert_close(y, fused(x), rtol=0, atol=1e-12)
    joint.num_batches_tracked += 2
    assert_same(joint, fused)


def test_variance_does_not_cancel_far_from_zero():
    x = torch.randn(1, 64, 3, dtype=torch.float64)
    expected = x.var(1, correction=0)
    _, _, var = joint_moments((x + 1e4).float())
    torch.testing.assert_close(var.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_collapsed_batch_is_the_shift_and_finite(training):
    norm = BatchNorm(4).train(training)
    x = torch.zeros(2, 8, 4, requires_grad=True)
    y = norm(x)
    y.square().sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("joint", [False, True])
def test_gradcheck(joint):
    norm = BatchNorm(3).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    function = (lambda x: norm._normalise_jointly(x, norm.weight, norm.bias)) if joint else norm
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("half_module", [False, True])
def test_half_precision_inputs_are_normalised_in_float32(autocast, half_module):
    x = 100 + torch.randn(64, 4)
    x = x.bfloat16()
    norm, exact = BatchNorm(4), BatchNorm(4)
    if half_module:
        norm.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, exact(x.float()).bfloat16())
    torch.testing.assert_close(norm.running_mean, exact.running_mean.to(norm.running_mean.dtype))
    assert norm.eval()(x).dtype == torch.bfloat16


def test_affine_scale_has_no_shift():
    assert [name for name, _ in BatchNorm(4, affine="scale").named_parameters()] == ["weight"]
    assert [name for name, _ in create_norm("layer", 4, affine="scale").named_parameters()] == ["weight"]
    assert not list(create_norm("layer", 4, affine=False).parameters())
    assert create_norm(None, 4) is None


def test_state_of_torchs_batch_norm_loads():
    BatchNorm(4).load_state_dict(nn.BatchNorm1d(4).state_dict())


def test_one_row_is_refused_in_training_only():
    norm = BatchNorm(4)
    for rows in (torch.randn(1, 4), torch.randn(2, 1, 4)):
        with pytest.raises(UsageError, match=r"at least 2 rows.*larger batch.*norm=None"):
            norm(rows)
    assert norm.num_batches_tracked == 0
    assert norm.eval()(torch.randn(1, 4)).shape == (1, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim to be"),
        ({"dim": 4, "eps": 0.0}, "eps > 0"),
        ({"dim": 4, "momentum": 1.5}, "momentum <= 1"),
        ({"dim": 4, "affine": "shift"}, "affine"),
        ({"dim": 4, "statistics": "per_veiw"}, "Did you mean 'per_view'"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(UsageError, match=message):
        BatchNorm(**options)
