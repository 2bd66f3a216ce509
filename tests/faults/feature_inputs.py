"""Heads, diagnostics and probes on features at the edges of what numbers can say."""

import inspect
import itertools
import math
import warnings
from collections.abc import Mapping

import torch
from faults.numeric_inputs import BROKEN, DTYPES, KINDS, MAY_OVERFLOW, leaf, rows_of

import hfproj
from hfproj import diagnostics

WIDTH, ROWS = 12, 24
HEADS = {  # presets are of these parts, and too wide for many tries
    "identity": {},
    "linear": {"out_dim": 8, "norm": "batch"},
    "mlp": {"out_dim": 8, "hidden_dim": 16},
    "mlp of batch norms": {"out_dim": 8, "hidden_dim": 16, "norm": "batch", "last_norm": "batch"},
    "mlp of layer norms": {"out_dim": 8, "hidden_dim": 16, "norm": "layer", "last_norm": "layer"},
    "reweight": {},
    "symmetric_relu": {},
    "subvector": {"d0": 8},
    "constant_subvector": {"d0": 8},
    "quantized": {"head": "linear", "head_options": {"out_dim": 8}},
    "topk": {"width": 24, "top_k": 6},
}
_FEATURES = {"f", "h", "z", "phi"}
MEASURES = [
    name
    for name in diagnostics.__all__
    if inspect.isfunction(getattr(diagnostics, name))
    and next(iter(inspect.signature(getattr(diagnostics, name)).parameters)) in _FEATURES
]
PROBES = {
    "few_shot": {"n": 2, "draws": 2},
    "kmeans": {"clusters": 3},
    "knn": {"k": 3},
    "linear": {"l2": 1.0},
    "many_rates": {"epochs": 1, "rates": (0.01, 0.1)},
    "mlp": {"epochs": 1, "hidden": 8},
    "retrieval": {},
}


def try_head(name, kind, setting):
    """Return what is wrong with the output of a head and its gradient, or None."""
    torch.manual_seed(0)
    head = hfproj.create_head(name.split()[0], in_dim=WIDTH, **HEADS[name])
    h = leaf(kind, setting, 2, 6, WIDTH)
    try:
        z = head.to(h.dtype)(h)
    except hfproj.HfprojError:
        return None
    if kind in MAY_OVERFLOW:
        return None
    if not z.isfinite().all():
        return "output not finite"
    if not z.requires_grad:
        return None
    # The mean: of a sum over a wide output, float16 itself is too small.
    (gradient,) = torch.autograd.grad(z.float().mean(), h, allow_unused=True)
    return None if gradient is None or gradient.isfinite().all() else "gradient not finite"


def try_diagnostic(name, kind, setting):
    """Return what is wrong with a measurement, or None: it is finite, or it is refused."""
    measure = getattr(diagnostics, name)
    parameters = [p for p in inspect.signature(measure).parameters.values() if p.default is p.empty]
    views = "views" in str(parameters[0].annotation)
    rows = rows_of(kind, *((2, ROWS) if views else (1, 2 * ROWS)), WIDTH).to(DTYPES[setting])
    rows = rows if views else rows[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = measure(*[rows] * len(parameters))
        if name == "covariance_condition_number" and found.full == math.inf:  # of a matrix that has no inverse
            found = found.clamped
        return wrong(found, kind)
    except hfproj.HfprojError:
        return None


def wrong(value, kind):
    """Return what is no finite number in a measurement of finite rows that are not huge."""
    if kind in MAY_OVERFLOW:
        return None
    if isinstance(value, tuple | Mapping):
        parts = value.values() if isinstance(value, Mapping) else value
        return next((found for part in parts if (found := wrong(part, kind))), None)
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(float(value))
    return None if tensor.isfinite().all() else f"measures {tensor.flatten()[:3].tolist()}"


def try_probe(name, kind, setting):
    """Return what is wrong with a probe's score, or None: it is finite, or it is refused."""
    train, test = (rows_of(kind, 1, ROWS, WIDTH, seed)[0].to(DTYPES[setting]) for seed in (0, 1))
    labels = torch.arange(ROWS) % 3
    probe = hfproj.create_probe(name, **PROBES[name])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            score = probe.fit(train, labels).score(test, labels)
    except hfproj.HfprojError:
        return None
    if kind in BROKEN:
        return f"score {score} of broken features"
    return None if math.isfinite(score) else f"score {score}"


def all_tries():
    """Yield (what, function, arguments) of every try."""
    for tried, names in ((try_head, HEADS), (try_diagnostic, MEASURES), (try_probe, PROBES)):
        for name, kind, setting in itertools.product(names, KINDS, DTYPES):
            yield f"{tried.__name__} {name}, {kind}, {setting}", tried, (name, kind, setting)
