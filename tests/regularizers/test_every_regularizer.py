"""What every regularizer promises, from one table."""

import copy
import json

import pytest
import torch
from regularizers.models import IMAGES, head_model, lora
from regularizers.regularizer_cases import CASES
from torch import nn

from hfproj.errors import UsageError
from hfproj.heads import create_head
from hfproj.objectives.base import Step
from hfproj.regularizers import Weighted, create_regularizer, list_regularizers, weighted
from hfproj.regularizers.base import check_views
from hfproj.regularizers.base import features as chosen_features

every_case = pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)


def mlp(**options):
    return create_head("mlp", in_dim=6, out_dim=4, **{"hidden_dim": 5, **options})


def value_and_gradients(name, options, head, h):
    h = h.detach().requires_grad_()
    value = create_regularizer(name, **options)(head, h, head(h), step=Step.at(0, 0, 0.0))
    inputs = [h, *head.parameters()]
    grads = torch.autograd.grad(value, inputs, allow_unused=True)
    return value, [g for g in grads if g is not None]


def test_table_and_registry_agree():
    assert {name for name, _ in CASES.values()} == set(list_regularizers())
    assert all(list_regularizers().values())


@every_case
def test_finite_value_and_gradient(name, options):
    value, grads = value_and_gradients(name, options, mlp(), torch.randn(2, 8, 6))
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert any(g.any() for g in grads)
    assert all(g.isfinite().all() for g in grads)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_under_autocast(name, options, dtype):
    """h and z in 16 bits, as autocast gives them: the value is that of the same numbers in float64."""
    head = mlp(norm=None)
    h, z = torch.randn(2, 8, 6).to(dtype).requires_grad_(), torch.randn(2, 8, 4).to(dtype).requires_grad_()
    term = create_regularizer(name, **options)
    with torch.autocast("cpu", torch.bfloat16):
        value = term(head, h, z, step=Step.at(0, 0, 0.0))
    value.backward()
    assert value.dtype == torch.float32
    exact = term(copy.deepcopy(head).double(), h.detach().double(), z.detach().double(), step=Step.at(0, 0, 0.0))
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-4)
    grads = [t.grad for t in (h, z, *head.parameters()) if t.grad is not None]
    assert grads
    assert all(g.isfinite().all() for g in grads)


def collapsed(kind, dtype):
    rows = {
        "zero": torch.zeros(2, 6, 6),
        "constant": torch.randn(6).expand(2, 6, 6),
        "some zero": torch.randn(2, 6, 6) * (torch.arange(6) > 2)[:, None],
        "duplicates": torch.randn(2, 3, 6).repeat(1, 2, 1),
        "huge and tiny": torch.randn(2, 6, 6) * torch.logspace(-4, 4, 6)[:, None],
    }
    return rows[kind].clone().to(dtype).requires_grad_()


@every_case
@pytest.mark.parametrize("kind", ["zero", "constant", "some zero", "duplicates", "huge and tiny"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collapsed_batches_are_finite(name, options, kind, dtype):
    head = mlp(norm=None)
    h, z = collapsed(kind, dtype), collapsed(kind, dtype)
    value = create_regularizer(name, **options)(head, h, z, step=Step.at(0, 0, 0.0))
    value.backward()
    assert value.isfinite()
    for tensor in (h, z, *head.parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all()


@every_case
def test_a_head_of_zeros_is_finite(name, options):
    head = mlp(norm=None)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    value, grads = value_and_gradients(name, options, head, torch.randn(2, 8, 6))
    assert value.isfinite()
    assert all(g.isfinite().all() for g in grads)


@every_case
def test_on_a_peft_model_and_not_on_its_copy(name, options):
    model = head_model(backbone_adapter=lora(), head_options={"hidden_dim": 6}, predictor={"head": "linear"})
    teacher = copy.deepcopy(model)
    out = model(pixel_values=IMAGES, num_views=2)
    h, z = (x.view(2, 2, -1) for x in (out.representation, out.projection))
    value = create_regularizer(name, **options)(model, h, z, step=Step.at(0, 0, 0.0))
    value.backward()
    assert value.isfinite()
    reached = [n for n, p in model.named_parameters() if p.grad is not None]
    assert reached
    assert not any("predictor" in n for n in reached)
    assert all(p.grad is None for p in teacher.parameters())


@every_case
def test_order_of_images_does_not_matter(name, options):
    head, order = mlp(norm=None).double(), torch.randperm(8)
    h, z = torch.randn(2, 8, 6, dtype=torch.float64), torch.randn(2, 8, 4, dtype=torch.float64)
    term = create_regularizer(name, **options)
    values = [term(head, h[:, o], z[:, o], step=Step.at(0, 0, 0.0)) for o in (torch.arange(8), order)]
    torch.testing.assert_close(*values, rtol=1e-11, atol=1e-12)


@every_case
def test_anatomy(name, options):
    term = create_regularizer(name, **json.loads(json.dumps(options)))
    assert not list(term.parameters())
    assert not list(term.buffers())
    assert term.created == {"name": name, **options}
    for option in options:
        assert f"{option}=" in repr(term)


@pytest.mark.parametrize("name", list_regularizers())
def test_unknown_options_are_refused(name):
    with pytest.raises(UsageError, match=f"Unknown option of regularizer '{name}'"):
        create_regularizer(name, no_such_option=1)


@every_case
def test_weighted_describes_what_makes_it_again(name, options):
    made = weighted(name, {"weight": 2, "schedule": "linear", "end_weight": 0, **options})
    assert isinstance(made, Weighted)
    assert (made.at(0.0), made.at(1.0)) == (2.0, 0.0)
    description = json.loads(json.dumps(made.describe()))
    assert weighted(name, description).describe() == description


def test_features_of_another_shape_or_without_a_gradient():
    h, z = torch.randn(2, 4, 6), torch.randn(2, 4, 3, requires_grad=True)
    assert chosen_features("z", h, z) is z
    with pytest.raises(UsageError, match=r"h, which carries no gradient: the backbone is frozen. Use on='z'"):
        chosen_features("h", h, z)
    with torch.no_grad():
        assert chosen_features("h", h, z) is h
    with pytest.raises(
        UsageError, match=r"h of shape \[views, batch, dim\], got torch.float32 of shape \[4, 6\]. Stack"
    ):
        chosen_features("h", h[0], z)


@pytest.mark.parametrize("value", ["a", None, [1.0], {"weight": "a"}, {"weight": 1.0, "end_weight": None}])
def test_weights_that_are_no_numbers(value):
    with pytest.raises(UsageError, match=r"weight of the regularizer 'koleo' to be a number, got .*go into a dict"):
        weighted("koleo", value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bottleneck", {"alpha": "2"}, "alpha of regularizer 'bottleneck' to be a number"),
        ("bottleneck", {"gather": "no"}, "to be True or False"),
        ("sigreg", {"slices": 2.5}, "to be a whole number"),
        ("vicreg_terms", {"variance_weight": -1.0}, "weights of 0 or more"),
        ("werank", {"alpha": {"head": "a"}}, "alpha of regularizer 'werank' to be a number or a dict"),
    ],
)
def test_options_of_another_type(name, options, message):
    with pytest.raises(UsageError, match=message):
        create_regularizer(name, **options)


@pytest.mark.parametrize("name", ["orthogonality", "sparse_head", "werank"])
def test_models_without_weights(name):
    with pytest.raises(UsageError, match=r"ReLU, has no linear layer|ReLU is a bare head"):
        create_regularizer(name)(nn.ReLU())


def test_features_that_are_no_floating_point_numbers():
    with pytest.raises(UsageError, match=r"takes floating-point h of shape .*, got torch.int64 of shape"):
        check_views("h", torch.ones(2, 4, 6, dtype=torch.int64))
