"""DirectCLR's subvector and the constant subvector: closed forms of both, and what relates them."""

import math

import pytest
import torch
from torch.nn import functional as F

from hfproj.heads import create_head

WIDTH, D0 = 12, 5


def info_nce(z_a, z_b, temperature=0.1):
    cosines = F.cosine_similarity(z_a[:, None], z_b[None], dim=-1)
    return F.cross_entropy(cosines / temperature, torch.arange(len(z_a)))


def representations():
    return torch.randn(2, 8, WIDTH, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("options", [{"d0": D0}, {"out_dim": D0}, {"d0": D0, "out_dim": D0}])
def test_subvector_is_the_first_entries(options):
    head = create_head("subvector", in_dim=WIDTH, **options)
    h = torch.randn(8, WIDTH)
    assert torch.equal(head(h), h[:, :D0])
    assert not head.state_dict()


@pytest.mark.parametrize(("name", "constant"), [("subvector", None), *[("constant_subvector", c) for c in (0.0, 0.3)]])
def test_the_tail_gets_no_gradient(name, constant):
    head = create_head(name, in_dim=WIDTH, d0=D0, **({} if constant is None else {"constant": constant}))
    h = representations()
    info_nce(*head(h)).backward()
    assert not h.grad[..., D0:].any()
    assert h.grad[..., :D0].abs().min() > 0


def test_constant_zero_equals_the_subvector():
    results = []
    for name in ("subvector", "constant_subvector"):
        torch.manual_seed(0)
        h = representations()
        loss = info_nce(*create_head(name, in_dim=WIDTH, d0=D0)(h))
        results.append((loss.detach(), *torch.autograd.grad(loss, h)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("constant", [0.0, "inverse_sqrt", 1.0])
def test_rank_of_the_covariance(constant):
    z = create_head("constant_subvector", in_dim=WIDTH, d0=D0, constant=constant)(representations()).flatten(0, 1)
    singular = torch.linalg.svdvals(z - z.mean(0))
    assert singular[D0:].max() < 1e-12 < singular[D0 - 1]


@pytest.mark.parametrize("constant", ["inverse_sqrt", 1.0, -0.4])
def test_cosine_of_two_rows(constant):
    h = representations().detach()
    z = create_head("constant_subvector", in_dim=WIDTH, d0=D0, constant=constant)(h)
    c = 1 / math.sqrt(WIDTH) if constant == "inverse_sqrt" else constant
    u, w, more = h[0, :, :D0], h[1, :, :D0], c**2 * (WIDTH - D0)
    expected = ((u * w).sum(1) + more) / ((u.square().sum(1) + more) * (w.square().sum(1) + more)).sqrt()
    torch.testing.assert_close(F.cosine_similarity(z[0], z[1], dim=-1), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("evaluate", ["constant", "full"])
def test_what_is_evaluated(evaluate):
    head = create_head("constant_subvector", in_dim=WIDTH, d0=D0, constant=2.0, evaluate=evaluate)
    h = torch.randn(3, WIDTH)
    replaced = torch.cat([h[:, :D0], torch.full((3, WIDTH - D0), 2.0)], dim=1)
    assert torch.equal(head(h), replaced)
    assert torch.equal(head.eval()(h), h if evaluate == "full" else replaced)


def test_half_precision_stays():
    h = torch.randn(3, WIDTH, dtype=torch.bfloat16)
    assert create_head("constant_subvector", in_dim=WIDTH, d0=D0, constant=1.0)(h).dtype == torch.bfloat16
