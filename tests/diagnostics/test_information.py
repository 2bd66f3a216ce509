import math

import pytest
import torch
from diagnostics.features import decaying, normal

from hfproj.diagnostics import effective_rank, information_bounds, matrix_entropy, matrix_mutual_information
from hfproj.errors import UsageError
from hfproj.functional import distributions as functional
from hfproj.objectives.nt_xent import nt_xent_loss

ORDERS = (0.5, 1.0, 2.0, 3.0)


def reference_entropy(density, alpha):
    values = torch.linalg.eigvalsh(density).clamp_min(0)
    if alpha == 1:
        return torch.special.entr(values).sum().item()
    return values[values > 1e-14].pow(alpha).sum().log().item() / (1 - alpha)


def cosines(f):
    unit = torch.nn.functional.normalize(f.double())
    return unit @ unit.T


@pytest.mark.parametrize("alpha", ORDERS)
@pytest.mark.parametrize(("rows", "dim"), [(30, 6), (8, 20)])
def test_entropy_is_the_definition(alpha, rows, dim):
    f = decaying(rows, dim, 0.5) + 0.2
    assert matrix_entropy(f, alpha=alpha) == pytest.approx(reference_entropy(cosines(f) / rows, alpha), rel=1e-10)
    if alpha >= 1:  # the differentiable one squares the features, and so rounds at the root of small eigenvalues
        assert matrix_entropy(f, alpha=alpha) == pytest.approx(
            functional.matrix_entropy(f, alpha=alpha).item(), rel=1e-9
        )


def test_order_two_needs_no_eigenvalues():
    f = decaying(40, 9) + 0.3
    assert matrix_entropy(f) == pytest.approx(-math.log((cosines(f) / 40).square().sum()), rel=1e-12)


@pytest.mark.parametrize("alpha", ORDERS)
def test_entropy_at_its_ends(alpha):
    assert matrix_entropy(torch.eye(16), alpha=alpha) == pytest.approx(math.log(16), rel=1e-12)
    assert matrix_entropy(torch.eye(16).repeat(3, 1), alpha=alpha) == pytest.approx(math.log(16), rel=1e-12)
    assert matrix_entropy(normal(1, 9).expand(20, 9), alpha=alpha) == pytest.approx(0, abs=1e-13)
    assert matrix_entropy(torch.zeros(20, 9), alpha=alpha) == pytest.approx(0, abs=1e-13)
    half = torch.cat([torch.zeros(5, 3), normal(1, 3).expand(5, 3)])  # zeros: one direction of their own
    assert matrix_entropy(half, alpha=alpha) == pytest.approx(math.log(2), rel=1e-12)


def test_entropy_of_order_one_is_an_effective_rank():
    f = decaying(30, 8)
    unit = torch.nn.functional.normalize(f)
    assert math.exp(matrix_entropy(f, alpha=1.0)) == pytest.approx(effective_rank(unit, on="eigenvalues"), rel=1e-11)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_mutual_information_is_the_definition_and_bounded(alpha):
    for seed in range(20):
        h, z = decaying(12, 8, 0.5, seed), decaying(12, 5, 1.0, seed + 1)
        k_h, k_z = cosines(h) / 12, cosines(z) / 12
        parts = [reference_entropy(k, alpha) for k in (k_h, k_z, 12 * k_h * k_z)]
        found = matrix_mutual_information(h, z, alpha=alpha)
        assert found == pytest.approx(parts[0] + parts[1] - parts[2], rel=1e-8, abs=1e-12)
        assert found <= min(matrix_entropy(h, alpha=alpha), matrix_entropy(z, alpha=alpha)) + 1e-12
        assert alpha != 1 or found >= -1e-12


def test_mutual_information_can_be_negative_but_for_order_one():
    eye = torch.eye(9)
    a = torch.tensor([0] * 8 + list(range(1, 9)))
    b = torch.tensor([*range(1, 9)] + [0] * 8)
    found = [matrix_mutual_information(eye[a], eye[b], alpha=alpha) for alpha in (1.0, 2.0, 3.0)]
    assert found == pytest.approx([0.693, -0.236, -0.709], abs=1e-3)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_mutual_information_at_its_ends(alpha):
    h = torch.linalg.qr(normal(10, 10)).Q
    assert matrix_mutual_information(h, h, alpha=alpha) == pytest.approx(math.log(10), rel=1e-12)
    constant = normal(1, 4).expand(10, 4)
    assert matrix_mutual_information(constant, constant, alpha=alpha) == pytest.approx(0, abs=1e-12)
    assert matrix_mutual_information(h, constant, alpha=alpha) == pytest.approx(0, abs=1e-12)


def test_bounds_are_made_of_their_parts():
    h, z = normal(24, 7).view(2, 12, 7) + 0.5, normal(24, 4, seed=1).view(2, 12, 4)
    found = information_bounds(h, z, alpha=1.0, temperature=0.3)
    rows = [x.flatten(0, 1) for x in (h, z)]
    assert found.mutual_information == pytest.approx(matrix_mutual_information(*rows, alpha=1.0), rel=1e-12)
    assert found.entropy == pytest.approx(matrix_entropy(rows[0], alpha=1.0), rel=1e-12)
    assert found.target_information == pytest.approx(-nt_xent_loss(h, temperature=0.3).item(), rel=1e-11)
    assert found.lower == pytest.approx(found.target_information - found.mutual_information, rel=1e-12)
    assert found.upper == pytest.approx(found.entropy - found.mutual_information, rel=1e-12)


def test_a_head_that_keeps_nothing_has_wide_bounds():
    h = normal(24, 7).view(2, 12, 7)
    keeps, drops = information_bounds(h, h), information_bounds(h, torch.ones(2, 12, 3))
    assert drops.mutual_information == pytest.approx(0, abs=1e-12)
    assert drops.upper == pytest.approx(drops.entropy)
    assert drops.lower > keeps.lower


def test_refusals():
    f = normal(6, 3)
    with pytest.raises(UsageError, match="order of the entropy"):
        matrix_entropy(f, alpha=0.0)
    with pytest.raises(UsageError, match="same rows of both"):
        matrix_mutual_information(f, f[1:])
    with pytest.raises(UsageError, match=r"features z .*row 1"):
        matrix_mutual_information(f[:2], torch.tensor([[0.0], [math.nan]]))
    with pytest.raises(UsageError, match="same views and samples"):
        information_bounds(f.view(2, 3, 3), f.view(3, 2, 3))
    with pytest.raises(UsageError, match="temperature"):
        information_bounds(f.view(2, 3, 3), f.view(2, 3, 3), temperature=0.0)
    with pytest.raises(UsageError, match="two views"):
        information_bounds(f.view(1, 6, 3), f.view(1, 6, 3))
