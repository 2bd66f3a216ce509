"""The quantizer: its values, the gradient that stands in for that of rounding, and the authors' form."""

import pytest
import torch

from hfproj.heads import create_head
from hfproj.heads.quantized import quantize

LEVELS = [2, 3, 4, 5, 8, 30, 999, 1000]
both_variants = pytest.mark.parametrize("variant", ["tan", "atanh"])


def bound(u, levels, variant):
    """FSQ's `bound`, with level counts as tensors as in the authors' code."""
    count = torch.tensor(float(levels), dtype=u.dtype)
    half = (count - 1) * (1 - 1e-3 if variant == "tan" else 1 + 1e-3) / 2
    off = torch.where(count % 2 == 1, 0.0, 0.5)
    shift = (off / half).tan() if variant == "tan" else (off / half).atanh()
    return (u + shift).tanh() * half - off


@both_variants
@pytest.mark.parametrize("levels", LEVELS)
def test_takes_exactly_so_many_values(levels, variant):
    u = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    z = quantize(u, levels=levels, variant=variant)
    lowest = -(levels // 2)
    expected = torch.arange(lowest, lowest + levels, dtype=torch.float64) / (levels // 2)
    assert torch.equal(z.unique(), expected)  # [-1, 1] for an odd count, [-1, 1 - 2/L] for an even one
    assert torch.equal(z, bound(u, levels, variant).round() / (levels // 2))
    assert (z.diff() >= 0).all()
    assert quantize(torch.zeros(3), levels=levels, variant=variant).tolist() == [0, 0, 0]


@both_variants
@pytest.mark.parametrize("levels", LEVELS)
def test_gradient_is_that_of_the_bounded_value(levels, variant):
    u = torch.randn(64, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(u)
    (grad,) = torch.autograd.grad(quantize(u, levels=levels, variant=variant), u, cotangent)
    (expected,) = torch.autograd.grad(bound(u, levels, variant) / (levels // 2), u, cotangent)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-15)


def test_the_variant_is_centred_exactly():
    off_centre = {v: bound(torch.zeros((), dtype=torch.float64), 4, v).abs().item() for v in ("tan", "atanh")}
    assert off_centre["atanh"] < 1e-15 < off_centre["tan"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("levels", [2, 30, 1000])
def test_extremes(dtype, levels):
    u = torch.tensor([-6e4, -1.0, 0.0, 1.0, 6e4], dtype=dtype, requires_grad=True)
    z = quantize(u, levels=levels)
    z.sum().backward()
    assert z.dtype == torch.float32
    assert z[0] == -1
    assert z[-1] == (levels - 1 - levels // 2) / (levels // 2)
    assert u.grad.isfinite().all()


def test_head_quantizes_its_inner_head():
    head = create_head("quantized", in_dim=6, head="mlp", head_options={"hidden_dim": 8, "out_dim": 3}, levels=5)
    h = torch.randn(16, 6)
    assert torch.equal(head(h), quantize(head.inner(h), levels=5))
    assert head.out_dim == 3
    with torch.autocast("cpu", torch.bfloat16):
        assert head(h).dtype == torch.float32


def test_default_is_the_papers():
    with torch.device("meta"):
        head = create_head("quantized", in_dim=512)
    assert (head.levels, head.variant) == (30, "tan")
    assert [tuple(p.shape) for p in head.parameters()] == [(2048, 512), (2048,), (256, 2048), (256,)]
