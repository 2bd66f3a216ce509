"""WERank by its formula over all layers, α by layer, and its gradient at the minimum."""

import math

import pytest
import torch
from regularizers.models import head_model, lora
from torch import nn

from hfproj.errors import UsageError
from hfproj.regularizers import create_regularizer
from hfproj.regularizers.weights import weights_of
from hfproj.regularizers.werank import werank_penalty


def by_definition(weights, side="WtW", power=1):
    total = 0
    for w in weights:
        gram = w.T @ w if side == "WtW" else w @ w.T
        total = total + (gram - torch.eye(len(gram), dtype=w.dtype)).square().sum().sqrt() ** power
    return total


@pytest.mark.parametrize("side", ["WtW", "WWt"])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("layers", ["all", "encoder", "head", "last"])
def test_equals_the_formula(side, squared, layers):
    model = head_model(backbone_adapter=lora()).double()
    expected = by_definition(weights_of(model, layers).values(), side, 2 if squared else 1)
    value = create_regularizer("werank", layers=layers, side=side, squared=squared)(model)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    pairs = zip(*(torch.autograd.grad(v, parameters, allow_unused=True) for v in (value, expected)))
    for ours, theirs in pairs:
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_whole_encoder_plus_head_is_all():
    model = head_model(backbone_adapter=lora()).double()
    parts = [create_regularizer("werank", layers=part)(model) for part in ("encoder", "head", "all")]
    torch.testing.assert_close(parts[0] + parts[1], parts[2], rtol=1e-14, atol=0)


def test_alpha_by_layer():
    model = head_model(backbone_adapter=lora()).double()
    weights = weights_of(model, "all")

    def value(alpha):
        return create_regularizer("werank", alpha=alpha)(model)

    each = {name: by_definition([w]) for name, w in weights.items()}
    torch.testing.assert_close(value(0.25), sum(each.values()) / 4, rtol=1e-12, atol=0)
    torch.testing.assert_close(value({"head.last.linear": 2.0}), 2 * each["head.last.linear"], rtol=1e-12, atol=0)
    expected = 0.5 * each["head.hidden.0.linear"] + 3 * each["head.last.linear"]
    expected = expected + 0.1 * sum(v for n, v in each.items() if n.startswith("encoder."))
    torch.testing.assert_close(value({"encoder": 0.1, "head": 0.5, "head.last": 3.0}), expected, rtol=1e-12, atol=0)


def test_gradient_is_finite_where_the_norm_has_none():
    head = nn.Linear(4, 4).double()
    with torch.no_grad():
        head.weight.copy_(torch.eye(4))
    value = create_regularizer("werank")(head)
    value.backward()
    assert value.item() == 0
    assert not head.weight.grad.any()
    nn.init.zeros_(head.weight)
    head.weight.grad = None
    value = create_regularizer("werank")(head)
    value.backward()
    assert value.item() == 2
    assert head.weight.grad.isfinite().all()


def test_wide_layers_stay_above_what_their_shape_allows():
    """WᵀW of a 3 × 5 matrix has rank 3: the norm can't fall below √2."""
    w = nn.init.orthogonal_(torch.empty(3, 5, dtype=torch.float64))
    torch.testing.assert_close(werank_penalty([w]).item(), math.sqrt(2), rtol=1e-12, atol=0)
    assert werank_penalty([w], side="auto").item() < 1e-14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "first"}, "Unknown layers 'first'"),
        ({"side": "wtw"}, "Unknown side 'wtw'"),
        ({"alpha": math.nan}, "alpha to be a finite number"),
        ({"alpha": {"head": math.inf}}, "or a dict of finite numbers"),
        ({"squred": True}, "Did you mean 'squared'"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(UsageError, match=message):
        create_regularizer("werank", **options)


def test_alpha_of_a_layer_that_is_not_there():
    with pytest.raises(UsageError, match=r"layer in alpha: 'head.lst.linear'. Did you mean 'head.last.linear'"):
        create_regularizer("werank", layers="head", alpha={"head.lst.linear": 1.0})(head_model())
    with pytest.raises(UsageError, match=r"layer in alpha: 'head\.la'"):  # part of a name is no beginning
        create_regularizer("werank", layers="head", alpha={"head.la": 1.0})(head_model())


def test_frozen_encoder_is_refused():
    with pytest.raises(UsageError, match=r"No linear layer of the encoder is trained.*layers='head'"):
        create_regularizer("werank")(head_model())
