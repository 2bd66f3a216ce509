"""What every head promises, from one table; then what is particular to one."""

import json

import pytest
import torch
from torch import nn

from hfproj.errors import UsageError
from hfproj.heads import create_head, list_heads
from hfproj.heads.parts import ACTIVATIONS, create_activation
from hfproj.heads.presets import PRESETS

IN_DIM = 6
SMALL = {"out_dim": 3, "hidden_dim": 8}

# (name, options): a new head adds rows; z has IN_DIM entries unless out_dim says otherwise
HEADS = [
    ("identity", {}),
    ("identity", {"out_dim": IN_DIM}),
    ("linear", {"out_dim": 3}),
    ("linear", {"out_dim": 3, "bias": True, "norm": "batch"}),
    ("linear", {"out_dim": 3, "norm": "layer"}),
    ("mlp", {"out_dim": 3, "hidden_dim": 8}),
    ("mlp", {"out_dim": 3, "depth": 1}),
    ("mlp", {"out_dim": 3, "depth": 3, "hidden_dim": [8, 5], "norm": "layer", "activation": "gelu"}),
    ("mlp", {"out_dim": 3, "hidden_dim": 8, "norm": None, "last_norm": "batch", "last_affine": False}),
    ("mlp", {"out_dim": 3, "hidden_dim": 8, "last_norm": "batch", "last_affine": "scale", "batch_statistics": "joint"}),
    ("mlp", {"out_dim": 3, "hidden_dim": 8, "last_norm": "layer", "l2_normalise": True}),
    ("mlp", {"out_dim": None, "hidden_dim": None, "last_activation": "silu", "init": "trunc_normal"}),
    ("reweight", {}),
    ("reweight", {"kappa": 1.5, "out_dim": IN_DIM}),
    ("symmetric_relu", {}),
    ("subvector", {"out_dim": 3}),
    ("subvector", {"d0": IN_DIM, "out_dim": IN_DIM}),
    ("constant_subvector", {"d0": 4}),
    ("constant_subvector", {"d0": 4, "constant": "inverse_sqrt", "evaluate": "full"}),
    ("quantized", {"head": "linear", "out_dim": 3, "levels": 100}),
    ("quantized", {"head_options": {"hidden_dim": 8}, "out_dim": 3, "levels": 101, "variant": "atanh"}),
    ("topk", {"width": 16, "top_k": 16}),
    ("topk", {"width": 16, "top_k": 5, "stem": "mlp", "stem_options": {"hidden_dim": 8}, "out_dim": 3}),
    ("topk", {"width": 8, "stem": "quantized", "stem_options": {"head": "identity"}}),
    *((name, {} if name == "simcse" else SMALL) for name in PRESETS),
]
every_head = pytest.mark.parametrize(("name", "options"), HEADS, ids=str)


def test_table_has_every_head():
    assert {name for name, _ in HEADS} == list_heads().keys()


@every_head
def test_shapes_widths_and_options(name, options):
    head = create_head(name, in_dim=IN_DIM, **json.loads(json.dumps(options)))
    assert (head.in_dim, head.out_dim) == (IN_DIM, options.get("out_dim") or IN_DIM)
    for shape in [(8,), (2, 8)]:
        assert head(torch.randn(*shape, IN_DIM)).shape == (*shape, head.out_dim)


@every_head
def test_views_together_equal_views_apart(name, options):
    head = create_head(name, in_dim=IN_DIM, **options).double()
    if any(getattr(module, "statistics", None) == "joint" for module in head.modules()):
        pytest.skip("statistics over both views are what it asks for")
    h = torch.randn(2, 8, IN_DIM, dtype=torch.float64)
    torch.testing.assert_close(head(h), torch.stack([head(view) for view in h]), rtol=0, atol=1e-12)


@every_head
def test_gradcheck_in_training_and_evaluation(name, options):
    if "quantized" in (name, options.get("stem")):
        pytest.skip("its gradient is not that of its value, on purpose: see test_quantized")
    head = create_head(name, in_dim=IN_DIM, **options).double()
    h = torch.randn(2, 4, IN_DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(head, h, fast_mode=True)
    assert torch.autograd.gradcheck(head.eval(), h, fast_mode=True)


@every_head
def test_bfloat16_autocast(name, options):
    head = create_head(name, in_dim=IN_DIM, **options)
    h = torch.randn(2, 16, IN_DIM)
    expected = head(h)
    with torch.autocast("cpu", torch.bfloat16):
        z = head(h)
    torch.testing.assert_close(z.float(), expected, rtol=0.05, atol=0.05)
    z.float().square().sum().backward() if z.requires_grad else None
    assert all(p.grad.isfinite().all() for p in head.parameters())


@every_head
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_module_in_half_precision(name, options, dtype):
    head = create_head(name, in_dim=IN_DIM, **options).to(dtype)
    for mode in (True, False):
        z = head.train(mode)(torch.randn(2, 8, IN_DIM).to(dtype))
        assert z.isfinite().all()
        assert z.dtype in (dtype, torch.float32)


@every_head
def test_edges_in_evaluation(name, options):
    """One row and none, zeros, large entries, entries that lie apart in memory."""
    head = create_head(name, in_dim=IN_DIM, **options)
    head(torch.randn(2, 8, IN_DIM))
    head.eval()
    for shape in [(1,), (2, 1), (0,), (2, 0)]:
        assert head(torch.randn(*shape, IN_DIM)).shape == (*shape, head.out_dim)
    for scale in (0.0, 1e-20, 1e18):
        h = (scale * torch.randn(8, IN_DIM)).requires_grad_()
        z = head(h)
        z.sum().backward()
        assert z.isfinite().all()
        assert h.grad.isfinite().all()
    apart = torch.randn(IN_DIM, 8, 2).permute(2, 1, 0)
    if "quantized" not in (name, options.get("stem")):  # rounding may differ, and then a level does
        torch.testing.assert_close(head(apart), head(apart.contiguous()))


@every_head
@pytest.mark.parametrize("shape", [(8, IN_DIM + 1), (IN_DIM,), (1, 2, 8, IN_DIM)])
def test_other_inputs_are_refused(name, options, shape):
    head = create_head(name, in_dim=IN_DIM, **options)
    with pytest.raises(UsageError, match=rf"Expected h of shape \[batch, {IN_DIM}\].*got \[.*\]; (make|pool)"):
        head(torch.randn(shape))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("identity", {"out_dim": 5}, "Expected out_dim=6, which is in_dim, got out_dim=5"),
        ("linear", {"out_dim": 0}, "out_dim to be a whole number of at least 1, got 0"),
        ("linear", {"norm": "bacth"}, "Did you mean 'batch'"),
        ("mlp", {"depth": 0}, "depth to be"),
        ("mlp", {"hidden_dim": 0}, "hidden_dim to be"),
        ("mlp", {"hidden_dim": [8, 8]}, "lists 2 hidden widths.*Use depth=3"),
        ("mlp", {"hidden_dim": [0], "depth": 2}, "hidden_dim to be"),
        ("mlp", {"activation": "rellu", "depth": 1}, "Did you mean 'relu'"),
        ("mlp", {"norm": "group", "depth": 1}, "Available: None, batch, layer"),
        ("mlp", {"last_affine": "shift"}, "affine"),
        ("mlp", {"batch_statistics": "all"}, "Available: joint, per_view"),
        ("mlp", {"width": 8}, "Unknown option of head 'mlp'"),
        ("mlp", {"last_activation": "rellu"}, "Did you mean 'relu'"),
        ("mlp", {"init": "normal"}, "Did you mean 'trunc_normal'"),
        ("mlp", {"hidden_dim": None, "out_dim": 0}, "out_dim to be"),
        ("reweight", {"kappa": 0.9}, "at least 1 .*got 0.9.*take 1/kappa"),
        ("reweight", {"kappa": float("nan")}, "kappa"),
        ("reweight", {"kappa": float("inf")}, "kappa"),
        ("reweight", {"out_dim": 5}, "Expected out_dim=6, which is in_dim, got out_dim=5: .* keeps the width"),
        ("symmetric_relu", {"out_dim": 5}, "keeps the width"),
        ("subvector", {}, "d0 or as out_dim; got d0=None"),
        ("subvector", {"d0": 3, "out_dim": 4}, "d0=3, out_dim=4"),
        ("subvector", {"d0": 7}, "d0=7 entries .* representation of 6: choose d0 from 1 to 6"),
        ("subvector", {"d0": 0}, "d0 to be a whole number of at least 1"),
        ("constant_subvector", {"d0": 7}, "choose d0 from 1 to 6"),
        ("constant_subvector", {"d0": 3, "out_dim": 3}, "keeps the width"),
        ("constant_subvector", {"d0": 3, "constant": float("inf")}, "finite number or 'inverse_sqrt'"),
        ("constant_subvector", {"d0": 3, "constant": "invers_sqrt"}, "Did you mean 'inverse_sqrt'"),
        ("constant_subvector", {"d0": 3, "evaluate": "ful"}, "Did you mean 'full'"),
        ("quantized", {"levels": 1}, "levels to be 2 to 1000 .*got 1; .*the inner head itself"),
        ("quantized", {"levels": 1001}, "levels to be 2 to 1000"),
        ("quantized", {"levels": 0}, "levels to be a whole number of at least 1"),
        ("quantized", {"variant": "tanh"}, "Did you mean 'atanh'"),
        ("quantized", {"head": "mpl"}, "Did you mean 'mlp'"),
        ("quantized", {"head": "mlp", "head_options": {"width": 3}}, "Unknown option of head 'mlp'"),
        ("quantized", {"head_options": {"out_dim": 4}, "out_dim": 3}, "give the width once"),
        ("topk", {"top_k": 17, "width": 16}, "top_k=17 of width=16 .*from 1 to 16"),
        ("topk", {"top_k": 0}, "top_k to be"),
        ("topk", {"width": 0}, "width to be"),
        ("topk", {"out_dim": 3}, "without a stem keeps the width"),
        ("topk", {"stem_options": {"depth": 1}}, "name it: stem='mlp'"),
        ("mpl", {}, "Did you mean 'mlp'"),
    ],
)
def test_options_that_cannot_work(name, options, message):
    with pytest.raises(UsageError, match=message):
        create_head(name, in_dim=IN_DIM, **options)


@pytest.mark.parametrize(
    ("options", "biases"),
    [
        ({}, {"last.linear.bias", "hidden.0.norm.bias"}),
        ({"norm": None}, {"last.linear.bias", "hidden.0.linear.bias"}),
        ({"norm": None, "bias": False, "last_bias": False}, set()),
        ({"last_norm": "batch"}, {"hidden.0.norm.bias", "last.norm.bias"}),
        ({"last_norm": "batch", "last_affine": "scale"}, {"hidden.0.norm.bias"}),
        ({"last_norm": "batch", "last_bias": True}, {"hidden.0.norm.bias", "last.linear.bias", "last.norm.bias"}),
    ],
)
def test_mlp_has_the_biases_of_its_options(options, biases):
    head = create_head("mlp", in_dim=IN_DIM, hidden_dim=8, **options)
    assert {name for name, _ in head.named_parameters() if name.endswith("bias")} == biases


def test_mlp_is_its_formula():
    head = create_head("mlp", in_dim=IN_DIM, out_dim=3, hidden_dim=8, norm=None, activation="tanh").double()
    h = torch.randn(4, IN_DIM, dtype=torch.float64)
    w1, b1, w2, b2 = head.parameters()
    torch.testing.assert_close(head(h), (h @ w1.T + b1).tanh() @ w2.T + b2, rtol=0, atol=1e-13)


def test_mlp_starts_as_torch_does():
    torch.manual_seed(0)
    head = create_head("mlp", in_dim=IN_DIM, out_dim=3, hidden_dim=8, norm=None)
    torch.manual_seed(0)
    layers = [nn.Linear(IN_DIM, 8), nn.Linear(8, 3)]
    expected = [p for layer in layers for p in layer.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(head.parameters(), expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_l2_normalised_rows_are_unit_in_float32(dtype):
    head = create_head("mlp", in_dim=IN_DIM, hidden_dim=8, l2_normalise=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        z = head(torch.randn(8, IN_DIM))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(8), rtol=0, atol=1e-6)


def test_activations():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    formulas = {
        "identity": x,
        "relu": x.clamp_min(0),
        "leaky_relu": torch.where(x > 0, x, 0.01 * x),
        "gelu": x * (1 + torch.erf(x / 2**0.5)) / 2,
        "silu": x / (1 + (-x).exp()),
        "tanh": x.tanh(),
        "softplus": x.exp().log1p(),
        "elu": torch.where(x > 0, x, x.expm1()),
    }
    assert formulas.keys() == ACTIVATIONS.keys()
    for name, expected in formulas.items():
        torch.testing.assert_close(create_activation(name)(x), expected, rtol=0, atol=1e-14)
