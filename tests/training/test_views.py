"""`forward_views`: all views in as few passes as their sizes allow, in their order."""

import pytest
import torch
from peft import get_peft_model
from small import head_model
from torch import nn

import hfproj
from hfproj.tuner.views import forward_views


@pytest.fixture
def model():
    return head_model(head_options={"hidden_dim": 12, "norm": None}).eval()


def calls(model):
    sizes = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape)) if args else None)
    return sizes


def test_views_of_one_size_share_a_pass_and_equal_single_passes(model):
    views = list(torch.randn(3, 4, 3, 16, 16))
    alone = [model(pixel_values=view) for view in views]
    sizes = calls(model)
    out = forward_views(model, views)
    assert sizes == [(12, 3, 16, 16)]
    assert out.h.shape == (3, 4, 16)
    assert out.z.shape == (3, 4, 6)
    for i, single in enumerate(alone):
        torch.testing.assert_close(out.h[i], single.representation)
        torch.testing.assert_close(out.z[i], single.projection)
    assert out.prediction is None
    assert out.scores is None


def test_sizes_in_turn_and_batches_of_two_sizes(model):
    a, b, c = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 16, 16)
    sizes = calls(model)
    out = forward_views(model, [a, b, c])
    assert [s[-1] for s in sizes] == [16, 8, 16]
    torch.testing.assert_close(out.z[1], model(pixel_values=b).projection)
    uneven = forward_views(model, [a, torch.randn(5, 3, 8, 8)])
    assert [len(z) for z in uneven.z] == [2, 5]


def test_batch_statistics_are_those_of_each_view():
    model = head_model()
    views = list(torch.randn(2, 5, 3, 16, 16))
    joint = forward_views(model, views).z
    for i, view in enumerate(views):
        torch.testing.assert_close(joint[i], model(pixel_values=view).projection)


def test_views_that_are_dicts():
    class Encoder(nn.Module):
        out_dim = 4

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x, scale):
            return self.linear(x) * scale

    model = get_peft_model(Encoder(), hfproj.ProjectionHeadConfig(head="linear", out_dim=2))
    views = [{"scale": torch.ones(5, 1) * i, "x": torch.randn(5, 3)} for i in (1, 2)]
    out = forward_views(model, views)
    for i, view in enumerate(views):
        torch.testing.assert_close(out.h[i], model.get_base_model().linear(view["x"]) * (i + 1))


def test_predictions_and_scores():
    model = head_model(predictor={"head": "linear"}, prototypes=5)
    out = forward_views(model, list(torch.randn(2, 4, 3, 16, 16)))
    assert out.prediction.shape == (2, 4, 6)
    assert out.scores.shape == (2, 4, 5)


def test_a_model_without_a_head(model):
    views = list(torch.randn(2, 4, 3, 16, 16))
    with (
        model.disable_adapter(),
        pytest.raises(hfproj.UsageError, match="no projection head, or its adapter is disabled"),
    ):
        forward_views(model, views)
