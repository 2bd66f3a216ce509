import math

import pytest
import torch

from hfproj.diagnostics import positive_cosine, representation_std
from hfproj.errors import UsageError


def test_representation_std_is_the_formula():
    f = torch.randn(50, 9) * 3 + 1
    expected = torch.nn.functional.normalize(f.double(), dim=1).std(0).mean().item()
    assert representation_std(f) == pytest.approx(expected, rel=1e-12)
    assert representation_std(f * torch.rand(50, 1).add(0.1)) == pytest.approx(expected, rel=1e-6)


def test_representation_std_of_spread_and_of_collapsed_rows():
    f = torch.cat([torch.eye(64), -torch.eye(64)]).repeat(50, 1)
    assert representation_std(f) == pytest.approx(1 / math.sqrt(64), rel=1e-3)
    assert representation_std(torch.randn(1, 8).expand(30, 8)) == pytest.approx(0, abs=1e-15)


def test_positive_cosine_is_the_mean_over_pairs():
    z = torch.randn(4, 10, 6)
    pairs = [(a, b) for a in range(4) for b in range(a)]
    expected = sum(torch.cosine_similarity(z[a].double(), z[b].double()).mean() for a, b in pairs) / len(pairs)
    assert positive_cosine(z) == pytest.approx(expected.item(), rel=1e-12)


def test_positive_cosine_at_its_ends():
    f = torch.randn(10, 6)
    assert positive_cosine(torch.stack([f, 2 * f])) == pytest.approx(1)
    assert positive_cosine(torch.stack([f, -f])) == pytest.approx(-1)
    assert positive_cosine(torch.zeros(2, 4, 3)) == 0.0


def test_refusals():
    with pytest.raises(UsageError, match="two views"):
        positive_cosine(torch.randn(1, 5, 3))
    z = torch.randn(2, 5, 3)
    z[1, 2] = float("nan")
    with pytest.raises(UsageError, match=r"view 1 .*row 2"):
        positive_cosine(z)
    with pytest.raises(UsageError, match="row 2"):
        representation_std(z[1])
    with pytest.raises(UsageError, match="at least 2 rows"):
        representation_std(z[0, :1])
