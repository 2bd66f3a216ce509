"""The sigmoid loss as big_vision writes it, its start value, invariances and gradcheck, also in the scales."""

import math

import pytest
import torch
from inputs import extreme_projections, projections, same_directions
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.objectives.sigmoid import SigmoidContrastive, sigmoid_loss


def scales(t=math.log(10), b=-10.0, dtype=torch.float64):
    return {"log_inverse_temperature": torch.tensor(t, dtype=dtype), "bias": torch.tensor(b, dtype=dtype)}


def as_big_vision_writes_it(z_a, z_b, t, b):
    logits = F.normalize(z_a, dim=-1) @ F.normalize(z_b, dim=-1).T * math.exp(t) + b
    signs = -torch.ones_like(logits) + 2 * torch.eye(len(logits))
    return -F.logsigmoid(signs * logits).sum(-1).mean()


@pytest.mark.parametrize(("t", "b"), [(math.log(10), -10.0), (math.log(100), -2.71), (-2.0, 3.0)])
def test_equals_big_vision(t, b):
    z = projections()
    loss = SigmoidContrastive()(z, scales=scales(t, b)).loss
    torch.testing.assert_close(loss, as_big_vision_writes_it(*z, t, b), rtol=1e-12, atol=0)


def test_more_views_are_averaged_over_pairs():
    z, given = projections(3), scales()
    pairs = [sigmoid_loss(z[[a, b]], **given) for a, b in [(0, 1), (0, 2), (1, 2)]]
    torch.testing.assert_close(SigmoidContrastive()(z, scales=given).loss, sum(pairs) / 3, rtol=1e-13, atol=0)


def softplus(x):
    return math.log1p(math.exp(x))


def test_value_at_the_start_when_all_cosines_are_zero():
    z = torch.zeros(2, 6, 12, dtype=torch.float64)
    z[0, :, :6], z[1, :, 6:] = torch.eye(6), torch.eye(6)
    start = {name: torch.tensor(value, dtype=torch.float64) for name, value in SigmoidContrastive.scales.items()}
    loss = SigmoidContrastive()(z, scales=start).loss
    torch.testing.assert_close(loss.item(), softplus(10) + 5 * softplus(-10), rtol=1e-13, atol=0)


def test_collapsed_projections():
    z = torch.ones(2, 4, 8, dtype=torch.float64, requires_grad=True)
    loss = SigmoidContrastive()(z, scales=scales(math.log(10), -10.0)).loss
    loss.backward()
    torch.testing.assert_close(loss.item(), 4 * math.log(2), rtol=1e-12, atol=0)  # all logits 10 - 10
    assert z.grad.abs().max() < 1e-12


def test_terms_are_the_cosine_and_the_scales():
    z, given = projections(), {name: value.requires_grad_() for name, value in scales().items()}
    terms = SigmoidContrastive()(z, scales=given).terms
    assert not any(value.requires_grad for value in terms.values())
    torch.testing.assert_close(terms["positive_cosine"], F.cosine_similarity(*z, dim=-1).mean(), rtol=1e-12, atol=1e-14)
    assert terms["bias"].item() == -10
    assert terms["log_inverse_temperature"].exp().item() == pytest.approx(10)


def test_invariances():
    z, given = projections(3, 7), scales()
    for same in [*same_directions(z), z.flip(0)]:
        torch.testing.assert_close(
            SigmoidContrastive()(same, scales=given).loss,
            SigmoidContrastive()(z, scales=given).loss,
            rtol=1e-12,
            atol=0,
        )


def test_gradcheck():
    given = [value.requires_grad_() for value in scales(1.0, -1.0).values()]
    assert torch.autograd.gradcheck(sigmoid_loss, (projections(3, 3).requires_grad_(), *given))


@pytest.mark.parametrize("inverse_temperature", [100.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes(inverse_temperature, dtype):
    z, given = extreme_projections(dtype), scales(math.log(inverse_temperature), -10.0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = SigmoidContrastive()(z, scales=given).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert z.grad.isfinite().all()
    assert not z.grad[:, 0].any()
    exact = SigmoidContrastive()(z.detach().double(), scales=given).loss
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


def test_refused():
    with pytest.raises(UsageError, match=r"needs 'scales'.*ProjectionHeadConfig\(scales="):
        SigmoidContrastive()(torch.randn(2, 5, 4))
    with pytest.raises(UsageError, match=r"and \['bias'\] are missing: .*scales=\{'log_inverse_temperature'"):
        SigmoidContrastive()(torch.randn(2, 5, 4), scales={"log_inverse_temperature": torch.tensor(0.0)})
    with pytest.raises(UsageError, match=r"at least 2 views.*got 1"):
        SigmoidContrastive()(torch.randn(1, 5, 4), scales=scales())
    with pytest.raises(UsageError, match="SigmoidContrastive tells images"):
        SigmoidContrastive()(torch.randn(2, 1, 4), scales=scales())
