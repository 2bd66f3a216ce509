import pytest
import torch
from diagnostics.features import normal

from hfproj.diagnostics import alignment, positive_cosine
from hfproj.errors import UsageError


def pairs(views):
    return [(a, b) for a in range(views) for b in range(a)]


def test_positive_cosine_and_alignment_are_means_over_pairs():
    z = torch.randn(4, 10, 6)
    unit = torch.nn.functional.normalize(z.double(), dim=2)
    cosine = sum(torch.cosine_similarity(z[a].double(), z[b].double()).mean() for a, b in pairs(4)) / 6
    assert positive_cosine(z) == pytest.approx(cosine.item(), rel=1e-12)
    for alpha in (1.0, 2.0, 3.5):
        distance = sum((unit[a] - unit[b]).norm(dim=1).pow(alpha).mean() for a, b in pairs(4)) / 6
        assert alignment(z, alpha=alpha) == pytest.approx(distance.item(), rel=1e-12)
    assert alignment(z) == pytest.approx(2 - 2 * positive_cosine(z), rel=1e-12)


def test_positive_cosine_and_alignment_at_their_ends():
    f = torch.randn(10, 6)
    assert positive_cosine(torch.stack([f, 2 * f])) == pytest.approx(1)
    assert positive_cosine(torch.stack([f, -f])) == pytest.approx(-1)
    assert positive_cosine(torch.zeros(2, 4, 3)) == 0.0
    assert alignment(torch.stack([f, f])) == 0.0
    assert alignment(torch.stack([f, -f]), alpha=3.0) == pytest.approx(8)
    assert alignment(torch.zeros(2, 4, 3)) == 0.0


def test_alignment_of_nearly_equal_views_does_not_cancel():
    z = normal(10, 6)
    tangent = torch.zeros_like(z)
    tangent[:, 0], tangent[:, 1] = -z[:, 1], z[:, 0]
    near = torch.stack([z, z + 1e-9 * tangent])
    expected = (1e-9 * tangent.norm(dim=1) / z.norm(dim=1)).square().mean()
    assert alignment(near) == pytest.approx(expected.item(), rel=1e-5)  # 2 − 2 cos would be 0 or 2e-16


def test_invariances():
    z = torch.randn(3, 20, 6, dtype=torch.float64)
    q, _ = torch.linalg.qr(normal(6, 6))
    for measure in (positive_cosine, alignment):
        for other in (z @ q, z * torch.rand(3, 20, 1).add(0.1), torch.cat([z, z], 1), z.flip(0)):
            assert measure(other) == pytest.approx(measure(z), rel=1e-12)


def test_refusals():
    for measure in (positive_cosine, alignment):
        with pytest.raises(UsageError, match="two views"):
            measure(torch.randn(1, 5, 3))
        z = torch.randn(2, 5, 3)
        z[1, 2] = float("nan")
        with pytest.raises(UsageError, match=r"view 1 .*row 2"):
            measure(z)
    with pytest.raises(UsageError, match="exponent"):
        alignment(torch.randn(2, 5, 3), alpha=0.0)
