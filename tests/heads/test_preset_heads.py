"""Each preset against the authors' head, written down as they have it: tensors in order, and values in float64."""

import pytest
import torch
from torch import nn
from torch.nn import GELU, Linear, ReLU, Sequential, SiLU, Tanh
from torch.nn import BatchNorm1d as BN

from hfproj.heads import create_head, list_heads
from hfproj.heads.presets import PRESETS


def without_shift(norm):
    norm.bias = None
    return norm


def barlow(sizes):
    """The loop of barlowtwins, Zero-CL and DirectCLR."""
    layers = []
    for i in range(len(sizes) - 2):
        layers += [Linear(sizes[i], sizes[i + 1], bias=False), BN(sizes[i + 1]), ReLU()]
    return [*layers, Linear(sizes[-2], sizes[-1], bias=False)]


def expander(f):
    """VICReg's."""
    layers = []
    for i in range(len(f) - 2):
        layers += [Linear(f[i], f[i + 1]), BN(f[i + 1]), ReLU()]
    return [*layers, Linear(f[-2], f[-1], bias=False)]


def build_mlp(layers, d, m, k, last_bn=True):
    """MoCo v3's."""
    mlp = []
    for i in range(layers):
        dim1, dim2 = d if i == 0 else m, k if i == layers - 1 else m
        mlp.append(Linear(dim1, dim2, bias=False))
        if i < layers - 1:
            mlp += [BN(dim2), ReLU()]
        elif last_bn:
            mlp.append(BN(dim2, affine=False))
    return mlp


def solo(d, m, k):
    return [Linear(d, m), BN(m), ReLU(), Linear(m, k)]


def plain(d, m, k):
    return [Linear(d, m), ReLU(), Linear(m, k)]


def simclr(d, m, k):
    return [Linear(d, m, bias=False), BN(m), ReLU(), Linear(m, k, bias=False), without_shift(BN(k))]


def simclr_v2(d, m, k):
    return [Linear(d, m, bias=False), BN(m), ReLU(), *simclr(m, m, k)]


def simsiam(d, m, k):
    first = [Linear(d, m, bias=False), BN(m), ReLU(), Linear(m, m, bias=False), BN(m), ReLU()]
    return [*first, Linear(m, k, bias=False), BN(k, affine=False)]


def nnclr(d, m, k):
    return [Linear(d, m), BN(m), ReLU(), Linear(m, m), BN(m), ReLU(), Linear(m, k), BN(k)]


def dino(d, m, k):
    return [Linear(d, m), GELU(), Linear(m, m), GELU(), Linear(m, k)]


def lejepa(d, m, k):
    return [Linear(d, m), BN(m), ReLU(), Linear(m, m), BN(m), ReLU(), Linear(m, k)]


def geometry(activation, layers=2, bn=True):
    """The heads of projection-head-geometry: as it ran them, without biases."""

    def build(d, m, k):
        sizes, made = [d, *[m] * (layers - 1), k], []
        for i in range(layers):
            made.append(Linear(sizes[i], sizes[i + 1], bias=False))
            made += [BN(sizes[i + 1])] if bn else []
            made += [activation()] if i < layers - 1 else []
        return made

    return build


D = 2048
LINEAR = {"norm": None, "last_norm": None}
# preset, options, the authors' layers of (in, hidden, out), hidden and out of a backbone of width 2048
TABLE = [
    ("simclr", {}, simclr, D, 128),
    ("simclr_v2", {}, simclr_v2, D, 128),
    ("simclr_solo", {}, plain, 2048, 256),
    ("directclr_simclr", {}, lambda d, m, k: [*barlow([d, m, k]), BN(k)], 2048, 128),
    ("supcon", {}, plain, D, 128),
    ("moco", {}, plain, D, 128),
    ("moco_v3", {}, lambda d, m, k: build_mlp(3, d, m, k), 4096, 256),
    ("moco_v3", {"depth": 2}, lambda d, m, k: build_mlp(2, d, m, k), 4096, 256),
    ("moco_v3_predictor", {}, lambda d, m, k: build_mlp(2, d, m, k), 4096, D),
    ("moco_v3_predictor", {"last_norm": None}, lambda d, m, k: build_mlp(2, d, m, k, False), 4096, D),
    ("byol", {}, solo, 4096, 256),
    ("byol_predictor", {}, solo, 4096, D),
    ("simsiam", {}, simsiam, D, 2048),
    ("simsiam_predictor", {}, lambda d, m, k: [Linear(d, m, bias=False), BN(m), ReLU(), Linear(m, k)], 512, D),
    ("nnclr", {}, nnclr, 2048, 256),
    ("nnclr_predictor", {}, solo, 4096, D),
    ("barlow_twins", {}, lambda d, m, k: barlow([d, m, m, k]), 8192, 8192),
    ("vicreg", {}, lambda d, m, k: expander([d, m, m, k]), 8192, 8192),
    ("zero_cl", {}, lambda d, m, k: barlow([d, m, m, k]), 2048, 2048),
    ("wmse", {}, solo, 1024, 64),
    ("swav", {}, solo, 2048, 128),
    ("dino", {}, dino, 2048, 256),
    ("lejepa", {}, lejepa, 2048, 16),
    ("simcse", {}, lambda d, m, k: [Linear(d, k), Tanh()], None, D),
    ("geometry_mlp", {}, geometry(ReLU), 2048, 2048),
    ("geometry_mlp", {"activation": "gelu", **LINEAR}, geometry(GELU, bn=False), 2048, 2048),
    ("geometry_mlp", {"activation": "identity", **LINEAR}, geometry(nn.Identity, bn=False), 2048, 2048),
    ("geometry_mlp", {"activation": "silu", "depth": 3}, geometry(SiLU, 3), 2048, 2048),
    ("geometry_mlp", {"depth": 1}, geometry(ReLU, 1), 2048, 2048),
]
every_preset = pytest.mark.parametrize(
    ("name", "options", "layers", "hidden", "out"), TABLE, ids=[f"{n}-{o}" if o else n for n, o, *_ in TABLE]
)


def tensors(module):
    return [(name.rpartition(".")[2], tuple(t.shape)) for name, t in module.state_dict().items()]


def test_every_preset_has_a_row_and_a_line():
    assert {name for name, *_ in TABLE} == PRESETS.keys()
    assert all(list_heads()[name] == line for name, (_, line, _) in PRESETS.items())


@every_preset
def test_has_the_tensors_of_the_authors(name, options, layers, hidden, out):
    with torch.device("meta"):
        ours, theirs = create_head(name, in_dim=D, **options), Sequential(*layers(D, hidden, out))
    assert ours.out_dim == out
    assert tensors(ours) == tensors(theirs)


@every_preset
def test_equals_the_authors_head(name, options, layers, hidden, out):
    d, k = 6, 6 if name == "simcse" else 4
    m = d if PRESETS[name][2].get("hidden_dim") is None else 7
    small = {} if name == "simcse" else {"out_dim": k} | ({} if m == d else {"hidden_dim": m})
    ours, theirs = create_head(name, in_dim=d, **options, **small).double(), Sequential(*layers(d, m, k)).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    h = torch.randn(2, 8, d, dtype=torch.float64)
    for mode in (True, False):
        ours.train(mode), theirs.train(mode)
        together = name in ("simclr", "simclr_v2")  # Google's BatchNorm sees both views at once
        expected = theirs(h.flatten(0, 1)).view(2, 8, k) if together else torch.stack([theirs(view) for view in h])
        torch.testing.assert_close(ours(h), expected, rtol=0, atol=1e-12)


def test_simsiams_frozen_bias_changes_nothing():
    theirs = Sequential(*simsiam(6, 6, 4)).double()
    ours = create_head("simsiam", in_dim=6, out_dim=4).double()
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    theirs[6].register_parameter("bias", nn.Parameter(torch.randn(4, dtype=torch.float64), requires_grad=False))
    h = torch.randn(8, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(h), theirs(h), rtol=0, atol=1e-12)


def test_dino_starts_from_a_narrow_normal_distribution():
    head = create_head("dino", in_dim=256, hidden_dim=256)
    linears = [module for module in head.modules() if isinstance(module, Linear)]
    assert len(linears) == 3
    for linear in linears:
        assert not linear.bias.any()
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_options_given_win_over_those_of_the_preset():
    head = create_head("vicreg", in_dim=4, hidden_dim=5, out_dim=3, last_bias=True)
    assert head.last.linear.bias is not None
    assert head.created == {"name": "vicreg", "in_dim": 4, "hidden_dim": 5, "out_dim": 3, "last_bias": True}
