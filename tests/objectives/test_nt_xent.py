"""NT-Xent by an independent formula, closed forms, invariances and gradcheck; the tiles against the whole matrix."""

import math

import pytest
import torch
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.functional.rows import unit_rows
from hfproj.objectives import create_objective, list_objectives
from hfproj.objectives.base import Step
from hfproj.objectives.nt_xent import NTXent, nt_xent_loss

VARIANTS = [None, 3, 64, "auto"]  # the whole matrix; ragged tiles; one tile larger than it
every_variant = pytest.mark.parametrize("tile_rows", VARIANTS)


def projections(views=2, batch=5, dim=4):
    return torch.randn(views, batch, dim, dtype=torch.float64)


def by_loops(z, temperature):
    """Equation 1 of the paper, anchor by anchor, with the negatives spelled out."""
    views, batch, _ = z.shape

    def similarity(a, b):
        return (F.cosine_similarity(z[a], z[b], dim=0) / temperature).exp()

    keys = [(v, i) for v in range(views) for i in range(batch)]
    losses = []
    for anchor in keys:
        total = sum(similarity(anchor, other) for other in keys if other != anchor)
        positives = [(v, anchor[1]) for v in range(views) if v != anchor[0]]
        losses.append(sum(-(similarity(anchor, p) / total).log() for p in positives) / len(positives))
    return sum(losses) / len(losses)


@every_variant
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_equals_the_papers_formula(tile_rows, views, temperature):
    z = projections(views)
    loss = NTXent(temperature=temperature, tile_rows=tile_rows)(z).loss
    torch.testing.assert_close(loss, by_loops(z, temperature), rtol=1e-12, atol=0)


def test_mask_form_of_two_views_is_the_same():
    """METHODS fact: -log(pos / (pos + neg)) with an unshifted exp, as solo-learn writes it."""
    z, temperature = projections(), 0.2
    rows = F.normalize(z, dim=-1).flatten(0, 1)
    similarity = (rows @ rows.T / temperature).exp().fill_diagonal_(0)
    positive = similarity.diagonal(5).repeat(2)
    expected = -(positive / similarity.sum(1)).log().mean()
    torch.testing.assert_close(nt_xent_loss(z, temperature=temperature), expected, rtol=3e-15, atol=0)


@pytest.mark.parametrize("tile_rows", [1, 3, 4, 64])
@pytest.mark.parametrize(("views", "batch"), [(2, 2), (2, 7), (3, 5), (4, 2)])
@pytest.mark.parametrize("temperature", [0.01, 0.2, 10.0])
def test_tiles_equal_the_whole_matrix(tile_rows, views, batch, temperature):
    results = []
    for tile in (None, tile_rows):
        z = projections(views, batch) if not results else z.detach()
        z.requires_grad_()
        output = NTXent(temperature=temperature, tile_rows=tile)(z)
        (3 * output.loss).backward()
        results.append((output.loss.detach(), output.terms["positive_cosine"], z.grad))
        z.grad = None
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@every_variant
@pytest.mark.parametrize("temperature", [0.01, 0.2])
def test_collapsed_projections(tile_rows, temperature):
    z = torch.ones(3, 4, 8, dtype=torch.float64, requires_grad=True)
    loss, terms = NTXent(temperature=temperature, tile_rows=tile_rows)(z)
    loss.backward()
    torch.testing.assert_close(loss.item(), math.log(11), rtol=0, atol=1e-12)
    torch.testing.assert_close(terms["positive_cosine"].item(), 1.0, rtol=0, atol=1e-12)
    assert z.grad.abs().max() < 1e-12


@every_variant
def test_orthogonal_images_with_equal_views(tile_rows):
    z = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    loss = NTXent(temperature=0.5, tile_rows=tile_rows)(z).loss
    torch.testing.assert_close(loss.item(), math.log1p(10 * math.exp(-2)), rtol=1e-14, atol=0)


@every_variant
def test_invariances(tile_rows):
    objective, z = NTXent(tile_rows=tile_rows), projections(3, 7)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    scale = torch.logspace(-3, 3, 21, dtype=torch.float64).view(3, 7, 1)
    for same in (z * scale, z @ rotation, z[:, torch.randperm(7)], z.flip(0)):
        torch.testing.assert_close(objective(same).loss, objective(z).loss, rtol=1e-12, atol=0)


@every_variant
@pytest.mark.parametrize("temperature", [0.02, 0.5])
def test_gradcheck(tile_rows, temperature):
    objective = NTXent(temperature=temperature, tile_rows=tile_rows)
    assert torch.autograd.gradcheck(lambda z: objective(z).loss, projections(3, 3).requires_grad_())


def test_dense_is_twice_differentiable():
    assert torch.autograd.gradgradcheck(nt_xent_loss, projections(batch=3).requires_grad_())


def test_second_derivative_of_tiles_fails_loudly():
    z = projections().requires_grad_()
    (grad,) = torch.autograd.grad(NTXent(tile_rows=3)(z).loss, z, create_graph=True)
    with pytest.raises(UsageError, match="tile_rows=None"):
        grad.square().sum().backward()


@every_variant
@pytest.mark.parametrize("temperature", [0.01, 0.1, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_are_finite(tile_rows, temperature, dtype):
    z = torch.randn(2, 6, 4)
    z[:, 0] = 0  # no direction
    z[:, 1] = z[:, 2]  # two images alike
    z[1, 3] = -z[0, 3]  # a positive pair at the far end
    z[:, 4] *= 1e4
    z = z.to(dtype).requires_grad_()
    loss, terms = NTXent(temperature=temperature, tile_rows=tile_rows)(z)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert terms["positive_cosine"].isfinite()
    assert z.grad.isfinite().all()
    assert not z.grad[:, 0].any()
    exact = nt_xent_loss(z.detach().double(), temperature=temperature)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


@every_variant
def test_coldest_rows_far_from_everything(tile_rows):
    """An anchor opposite to all others: exp(S - 1/τ) would underflow, the row's own maximum does not."""
    z = torch.ones(2, 4, 8)
    z[0, 0] = -1
    z.requires_grad_()
    loss = NTXent(temperature=0.01, tile_rows=tile_rows)(z).loss
    loss.backward()
    assert z.grad.isfinite().all()
    torch.testing.assert_close(loss.item(), (math.log(7) + 6 * math.log(6) + 200 + math.log(6)) / 8, rtol=1e-6, atol=0)


@every_variant
def test_autocast_does_not_lower_the_precision(tile_rows):
    z = torch.randn(2, 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = NTXent(tile_rows=tile_rows)(z).loss
    torch.testing.assert_close(loss, nt_xent_loss(z), rtol=1e-6, atol=0)


@every_variant
def test_no_gradient_is_made_when_none_is_needed(tile_rows):
    z = projections()
    loss, terms = NTXent(tile_rows=tile_rows)(z)
    assert not loss.requires_grad
    loss, terms = NTXent(tile_rows=tile_rows)(z.requires_grad_())
    assert loss.requires_grad
    assert not terms["positive_cosine"].requires_grad


@every_variant
def test_positive_cosine(tile_rows):
    z = projections()
    expected = F.cosine_similarity(z[0], z[1], dim=-1).mean()
    torch.testing.assert_close(
        NTXent(tile_rows=tile_rows)(z).terms["positive_cosine"], expected, rtol=1e-12, atol=1e-14
    )


@every_variant
def test_refused(tile_rows):
    with pytest.raises(UsageError, match=r"at least 2 views.*got 1.*num_views=2"):
        NTXent(tile_rows=tile_rows)(torch.randn(1, 8, 4))
    with pytest.raises(UsageError, match="at least 2 of them, got 1"):
        NTXent(tile_rows=tile_rows)(torch.randn(2, 1, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature to be a positive number"),
        ({"temperature": -0.1}, "got -0.1"),
        ({"temperature": math.nan}, "temperature"),
        ({"tile_rows": 0}, "tile_rows"),
        ({"temprature": 0.1}, "Did you mean 'temperature'"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(UsageError, match=message):
        create_objective("nt_xent", **options)


def test_anatomy():
    objective = create_objective("nt_xent")
    assert "nt_xent" in list_objectives()
    assert (objective.views, objective.needs) == ((2, None), frozenset())
    assert not list(objective.parameters())


def test_unit_rows_of_zero_rows():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(unit_rows(x).square().sum() + unit_rows(x).sum(), x, create_graph=True)
    assert grad[0].tolist() == [0.0, 0.0]
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert second.isfinite().all()
    torch.testing.assert_close(unit_rows(x).norm(dim=1), torch.tensor([0.0, 1.0]))


def test_step_generator_depends_on_seed_and_step_only():
    def draw(*where):
        return torch.rand(4, generator=Step.at(*where).generator).tolist()

    assert draw(0, 5, 0.1) == draw(0, 5, 0.9)
    assert len({tuple(draw(seed, step, 0.0)) for seed in range(5) for step in range(5)}) == 25
