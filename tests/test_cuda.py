"""Objectives, regularizers, heads and operations on images: on a GPU the same as on the CPU, and in mixed precision.

pytest -n 4 tests/test_cuda*.py    # on a machine with one GPU, two or three minutes
"""

import copy

import pytest
import torch
from cuda_device import DEVICE as device
from cuda_device import HALF, assert_on_device, assert_same, loss_of, on, projections, trained
from distributed.methods import IN_DIM as HEAD_WIDTH
from distributed.methods import Head
from heads.test_heads import HEADS
from heads.test_heads import IN_DIM as WIDTH
from objectives.objective_cases import CASES
from regularizers.regularizer_cases import CASES as REGULARIZERS
from regularizers.test_every_regularizer import mlp

from hfproj.data import image_ops as ops
from hfproj.functional import assignments, distributions
from hfproj.heads import create_head
from hfproj.objectives.base import Step
from hfproj.objectives.grouped import draw_groups
from hfproj.regularizers import create_regularizer

every_objective = pytest.mark.parametrize("name", CASES)
every_regularizer = pytest.mark.parametrize(("name", "options"), REGULARIZERS.values(), ids=REGULARIZERS)
every_head = pytest.mark.parametrize(("name", "options"), HEADS, ids=str)


@every_objective
def test_objectives_in_float64(name):
    """Losses, terms, gradients, weights and buffers over two steps, with what is drawn at random among it."""
    found = trained(CASES[name], device)
    assert_on_device(*(value for name, value in found.items() if "loss" in name or "objective." in name))
    assert_same(found, trained(CASES[name], "cpu"))


@every_objective
@HALF
def test_objectives_in_half_precision(name, dtype):
    """z as autocast gives it: the loss is float32, and that of the same numbers in float32 without autocast."""
    case = CASES[name]
    z = on(projections(case, dtype))
    loss, gradient = loss_of(case, z, Step.at(0, 1, 0.5), dtype)
    expected, its_gradient = loss_of(case, z, Step.at(0, 1, 0.5), full=True)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert (gradient is None) == (its_gradient is None)
    if gradient is not None:
        assert gradient.isfinite().all()
        largest = its_gradient.abs().max().item()  # both are rounded to dtype; parts that cancel are rounded before
        torch.testing.assert_close(gradient, its_gradient, rtol=0.02, atol=0.02 * largest)


@every_objective
def test_objectives_repeat_with_a_generator_of_the_device(name):
    """As the trainer makes it: drawn on the GPU, the same again for the same step."""
    case = CASES[name]
    z = on(projections(case))
    first, again = (loss_of(case, z, Step.at(3, 5, 0.5, device)) for _ in range(2))
    assert first[0].isfinite()
    torch.testing.assert_close(again, first, rtol=1e-6, atol=1e-6)


def test_draws_of_a_generator_on_the_cpu_are_the_same_on_every_device():
    x = torch.randn(40, 6, dtype=torch.float64)
    for draw in (
        lambda x, g: distributions.random_directions(x, 16, generator=g),
        lambda x, g: assignments.spherical_kmeans(x, 5, generator=g).assignments,
        lambda x, g: assignments.spherical_kmeans(x, 5, init="k-means++", generator=g).assignments,
        lambda x, g: torch.cat(draw_groups(6, 2, 3, g)),
    ):
        assert_same(*(draw(part, torch.Generator().manual_seed(4)) for part in (on(x), x)))


@every_regularizer
def test_regularizers_in_float64(name, options):
    def run(place):
        torch.manual_seed(0)
        network, x = on(Head().double(), place), torch.randn(2, 8, HEAD_WIDTH, dtype=torch.float64).to(place)
        h, z = network(x)
        value = create_regularizer(name, **options)(network.head, h, z, step=Step.at(0, 0, 0.0))
        gradients = torch.autograd.grad(value, list(network.parameters()), allow_unused=True)
        return {"value": value, **{str(i): g for i, g in enumerate(gradients) if g is not None}}

    found = run(device)
    assert_on_device(*found.values())
    assert_same(found, run("cpu"))


@every_regularizer
@HALF
def test_regularizers_in_half_precision(name, options, dtype):
    head = on(mlp(norm=None))
    h, z = (on(torch.randn(2, 8, dim).to(dtype)).requires_grad_() for dim in (6, 4))
    term = create_regularizer(name, **options)
    with torch.autocast(device.type, dtype):
        value = term(head, h, z, step=Step.at(0, 0, 0.0))
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    exact = term(copy.deepcopy(head).double(), h.detach().double(), z.detach().double(), step=Step.at(0, 0, 0.0))
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-4)
    grads = [t.grad for t in (h, z, *head.parameters()) if t.grad is not None]
    assert grads
    assert all(g.isfinite().all() for g in grads)


@every_head
def test_heads_in_float64(name, options):
    """z, gradients and statistics in training, then z in evaluation."""
    made = create_head(name, in_dim=WIDTH, **options).double()
    h = torch.randn(2, 8, WIDTH, dtype=torch.float64, requires_grad=True)

    def run(place):
        head, own = on(made, place), on(h, place)
        z = head(own)
        weights = torch.linspace(1, 2, z.numel(), dtype=torch.float64).view(z.shape).to(place)
        gradients = torch.autograd.grad((z * weights).sum(), [own, *head.parameters()], allow_unused=True)
        after = head.eval()(own)
        return {"z": z, "eval": after, "gradients": [g for g in gradients if g is not None], **head.state_dict()}

    found = run(device)
    assert_on_device(found["z"], found["eval"])
    assert_same(found, run("cpu"))


@every_head
@HALF
def test_heads_under_autocast(name, options, dtype):
    head = on(create_head(name, in_dim=WIDTH, **options))
    h = on(torch.randn(2, 16, WIDTH))
    expected = head(h)
    with torch.autocast(device.type, dtype):
        z = head(h)
    difference = (z.float() - expected).norm() / expected.norm()
    assert difference < 0.05, difference  # a unit of a top-k head, or a level, may be another
    if z.requires_grad:
        z.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.requires_grad)


OPERATIONS = {
    "luminance": ops.luminance,
    "grayscale": ops.grayscale,
    "brightness": lambda x: ops.adjust_brightness(x, on(torch.linspace(0.5, 1.5, len(x)), x.device)),
    "contrast": lambda x: ops.adjust_contrast(x, on(torch.linspace(0.5, 1.5, len(x)), x.device)),
    "saturation": lambda x: ops.adjust_saturation(x, on(torch.linspace(0.5, 1.5, len(x)), x.device)),
    "hue": lambda x: ops.adjust_hue(x, on(torch.linspace(-0.4, 0.4, len(x)), x.device)),
    "solarize": lambda x: ops.solarize(x, 0.5),
    "blur": lambda x: ops.gaussian_blur(x, on(torch.linspace(0.1, 2.0, len(x)), x.device), 3),
    "magnified crop": lambda x: ops.resized_crop(x, *boxes(x), 24),
    "reduced crop": lambda x: ops.resized_crop(x, *boxes(x), 8),
    "rotation": lambda x: ops.rotate_translate(
        x, *(on(torch.linspace(-3, 3, len(x)), x.device) * scale for scale in (10, 1, 0.5))
    ),
}


def boxes(x):
    rows = torch.arange(len(x), device=x.device)
    return rows, rows + 1, 10 - rows, 11 - rows


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_on_images(name):
    """With the same parameters: float32, within the rounding of one grey level's hundredth."""
    x = torch.rand(5, 3, 16, 16)
    found = OPERATIONS[name](on(x))
    assert_on_device(found)
    assert_same(found, OPERATIONS[name](x), rtol=0, atol=2e-5)


def test_objectives_of_collapsed_projections_stay_finite():
    """cuSOLVER's and cuBLAS' routines meet matrices without a rank, too."""
    for name, case in CASES.items():
        if case.name == "w_mse":  # refused: there is no whitening
            continue
        for z in (torch.ones(case.views, case.rows or 9, 4), torch.zeros(case.views, case.rows or 9, 4)):
            loss, gradient = loss_of(case, on(z), Step.at(0, 1, 0.5))
            assert loss.isfinite(), name
            assert gradient is None or gradient.isfinite().all(), name
