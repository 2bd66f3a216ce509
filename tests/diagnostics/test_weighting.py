import math

import pytest
import torch
from diagnostics.features import decaying, normal

from hfproj.diagnostics import feature_weights, layer_inequality, singular_values, weight_inequality
from hfproj.errors import UsageError


def uncorrelated(rows, features):
    """Columns of mean 0, variance 1 and no correlation."""
    phi = normal(rows, features)
    return torch.linalg.qr(phi - phi.mean(0)).Q * math.sqrt(rows)


def test_weights_of_a_linear_layer_are_the_norms_of_its_columns():
    phi, weight = uncorrelated(50, 4), normal(6, 4, seed=1)
    expected = weight.norm(dim=0)
    torch.testing.assert_close(feature_weights(phi @ weight.T + 9, phi), expected, rtol=1e-12, atol=0)
    scaled = phi * torch.tensor([1.0, 1e-6, 1e6, 5.0], dtype=torch.float64) - 3  # φ is standardised
    torch.testing.assert_close(feature_weights(phi @ weight.T, scaled), expected, rtol=1e-8, atol=0)


def test_weights_are_the_formula():
    f, phi = normal(40, 5) + 2, normal(40, 3, seed=1) * 7 + 4
    standard = (phi - phi.mean(0)) / phi.std(0, correction=0)
    expected = (f[:, :, None] * standard[:, None]).mean(0).norm(dim=0)
    torch.testing.assert_close(feature_weights(f, phi), expected, rtol=1e-12, atol=0)
    q, _ = torch.linalg.qr(normal(5, 5, seed=2))
    torch.testing.assert_close(feature_weights(f @ q, phi), expected, rtol=1e-12, atol=0)


def test_inequality_is_its_three_numbers():
    w = torch.tensor([4.0, 2.0, 1.0, 1.0])
    found = weight_inequality(w)
    p = w / 8
    assert found.max_over_min == 4
    assert found.variation == pytest.approx((w.std(correction=0) / w.mean()).item(), rel=1e-6)
    assert found.effective_count == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-6)
    assert weight_inequality(1e200 * w.double()) == pytest.approx(weight_inequality(w.double()), rel=1e-12)


def test_inequality_at_its_ends():
    assert weight_inequality(torch.ones(5)) == pytest.approx((1, 0, 5), rel=1e-12)
    alone = weight_inequality(torch.tensor([3.0, 0.0, 0.0, 0.0]))
    assert alone == pytest.approx((math.inf, math.sqrt(3), 1))
    assert weight_inequality(torch.zeros(4)) == (1.0, 0.0, 0.0)


def test_without_known_features_it_is_that_of_the_singular_values():
    layers = {"h": decaying(60, 8, 0.5) + 3, "z": decaying(60, 8, 1.5) - 1}
    found = layer_inequality(layers)
    for name, f in layers.items():
        assert found[name] == weight_inequality(singular_values(f, center=True))
    assert found["z"].variation > found["h"].variation  # progressive
    assert layer_inequality({"h": 10 * layers["h"] + 5})["h"] == pytest.approx(found["h"], rel=1e-10)
    assert layer_inequality({"h": normal(1, 4).expand(9, 4)})["h"] == (1.0, 0.0, 0.0)


def train_two_layers(sigma, positive, *, steps, rate=0.02, start=0.1):
    """A linear network h = W1 x, z = W2 h under the spectral loss −2 tr(A Σ⁺ Aᵀ) + tr((A Σ Aᵀ)²), A = W2 W1.

    It starts balanced, W1W1ᵀ = W2ᵀW2, which small steps conserve.
    """
    dim = len(sigma)
    left, middle, right = (torch.linalg.qr(normal(dim, dim, seed)).Q for seed in range(3))
    scales = start * torch.linspace(1, 2, dim, dtype=torch.float64)
    w1, w2 = ((a * scales @ b.T).requires_grad_() for a, b in ((middle, right), (left, middle)))
    for _ in range(steps):
        a = w2 @ w1
        loss = -2 * ((a * positive) @ a.T).trace() + ((a * sigma) @ a.T).square().sum()
        gradients = torch.autograd.grad(loss, (w1, w2))
        with torch.no_grad():
            for w, gradient in zip((w1, w2), gradients):
                w -= rate * gradient
    return w1.detach(), w2.detach()


def test_a_head_squares_the_weights_of_a_trained_linear_network():
    """Diagonal covariances σ, σ⁺: the weight of feature i in z is √σ⁺_i/σ_i, in h the root of it."""
    sigma = torch.tensor([1.0, 0.8, 1.5, 2.0], dtype=torch.float64)
    positive = torch.tensor([0.9, 0.6, 0.9, 0.55], dtype=torch.float64)
    w1, w2 = train_two_layers(sigma, positive, steps=2000)
    expected = positive.sqrt() / sigma
    steps = 5e-3  # what finite steps leave of the balance; they do not move the minimum
    torch.testing.assert_close((w2 @ w1).norm(dim=0), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(w1.norm(dim=0), expected.sqrt(), rtol=steps, atol=0)
    torch.testing.assert_close(w1 @ w1.T, w2.T @ w2, rtol=0, atol=steps)

    phi = uncorrelated(64, 4)  # the features as data, standardised
    h = phi @ w1.T
    z = h @ w2.T
    torch.testing.assert_close(feature_weights(z, phi), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(feature_weights(h, phi), expected.sqrt(), rtol=steps, atol=0)
    found = layer_inequality({"h": h, "z": z}, phi)
    assert found["z"].max_over_min == pytest.approx(found["h"].max_over_min ** 2, rel=2 * steps)
    assert found["z"].variation > found["h"].variation


def test_refusals():
    f = normal(9, 3)
    with pytest.raises(UsageError, match="same rows"):
        feature_weights(f, f[1:])
    with pytest.raises(UsageError, match="constant: columns 1"):
        feature_weights(f, torch.cat([f[:, :1], torch.full((9, 1), 0.1, dtype=torch.float64)], 1))
    with pytest.raises(UsageError, match="finite numbers of at least 0"):
        weight_inequality(torch.tensor([1.0, -1.0]))
    with pytest.raises(UsageError, match="finite numbers of at least 0"):
        weight_inequality(torch.empty(0))
    f[4, 0] = math.nan
    with pytest.raises(UsageError, match=r"features of z .*row 4"):
        layer_inequality({"h": normal(9, 3), "z": f})
