"""The symmetric-ReLU head: where it starts, the soft threshold, and the authors' form."""

import torch
from torch import nn
from torch.nn import functional as F

from hfproj.heads import create_head
from hfproj.heads.symmetric_relu import symmetric_relu


def test_starts_as_the_identity_and_learns_its_threshold():
    head = create_head("symmetric_relu", in_dim=6)
    h = torch.randn(8, 6)
    assert torch.equal(head(h), h)
    head(h).abs().sum().backward()
    assert head.threshold.grad == -h.numel()  # each entry moves towards 0 by b


def test_parameters():
    head = create_head("symmetric_relu", in_dim=4)
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    assert shapes == {
        "threshold": (), "first.weight": (4, 4), "first.bias": (4,), "second.weight": (4, 4), "second.bias": (4,),
    }  # fmt: skip


def test_positive_threshold_is_the_soft_one():
    a = torch.linspace(-3, 3, 61, dtype=torch.float64)
    threshold = torch.tensor(0.75, dtype=torch.float64)
    torch.testing.assert_close(symmetric_relu(a, threshold), F.softshrink(a, 0.75), rtol=0, atol=1e-15)


def test_equals_the_authors_form_anywhere():
    head = create_head("symmetric_relu", in_dim=5).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    h = torch.randn(7, 5, dtype=torch.float64)
    first, second, b = head.first, head.second, head.threshold
    inner = h @ first.weight.T + first.bias
    expected = (F.relu(inner - b) - F.relu(-inner - b)) @ second.weight.T + second.bias
    torch.testing.assert_close(head(h), expected, rtol=0, atol=1e-13)


def test_gradcheck_away_from_the_start():
    head = create_head("symmetric_relu", in_dim=3).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    h = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, *_: head(h), (h, *head.parameters()))
