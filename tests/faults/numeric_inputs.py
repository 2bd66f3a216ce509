"""Projections at the edges of what numbers can say, and one call of every objective and regularizer on them."""

import contextlib
import itertools

import torch
from distributed.methods import IN_DIM
from objectives.objective_cases import CASES as OBJECTIVES
from objectives.objective_cases import OUT_DIM
from regularizers.regularizer_cases import CASES as REGULARIZERS
from torch import nn

import hfproj
from hfproj.objectives import create_objective
from hfproj.objectives.base import Step
from hfproj.regularizers import create_regularizer
from hfproj.tuner.layer import HeadModules

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
SETTINGS = [*DTYPES, "autocast bfloat16", "autocast float16"]
SCALES = ["1e-30", "1e-8", "1e-6", "1e-5", "1e-4", "1e-3", "1e2", "1e3", "1e4", "1e8", "1e30"]
BROKEN = ["one NaN", "one inf", "a row of NaN"]  # no finite loss may come of these
KINDS = [
    "normal", "zeros", "one zero row", "equal rows", "equal images", "duplicated views", "opposite views",
    "one dimension", "constant dimension", "one huge row", "one huge number", "one tiny row", "half the rows zero",
    "views of two sizes", "rank one", "next to equal", "subnormal", *SCALES, *BROKEN,
]  # fmt: skip
MAY_OVERFLOW = {
    "1e8",
    "1e30",
    "one huge row",
    "one huge number",
    *BROKEN,
}  # their loss need not be finite; then it is refused
# Losses of the lengths of rows, and whitening, are that steep.
STEEP = {*MAY_OVERFLOW, "views of two sizes", "1e3", "1e4", "1e-30", "subnormal"}


def rows_of(kind, views, batch, dim, seed=0):
    """Return float64 projections of a kind."""
    z = torch.randn(views, batch, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind in SCALES:
        return z * float(kind)
    changes = {
        "zeros": lambda: z.zero_(),
        "one zero row": lambda: z[0, 0].zero_(),
        "equal rows": lambda: z.copy_(z[:1, :1].clone().expand_as(z)),
        "equal images": lambda: z[:, 1].copy_(z[:, 0]),
        "duplicated views": lambda: z.copy_(z[:1].clone().expand_as(z)),
        "opposite views": lambda: z[1:].copy_(-z[:1].expand_as(z[1:])),
        "one dimension": lambda: z[..., 1:].zero_(),
        "constant dimension": lambda: z[..., 0].fill_(3.0),
        "one huge row": lambda: z[0, 0].mul_(1e30),
        "one huge number": lambda: z[0, 0, 0].fill_(3e38),
        "one tiny row": lambda: z[0, 0].mul_(1e-30),
        "subnormal": lambda: z.mul_(1e-40),
        "half the rows zero": lambda: z[:, ::2].zero_(),
        "views of two sizes": lambda: (z[0].mul_(1e-6), z[1:].mul_(1e3)),
        "rank one": lambda: z.copy_(z[..., :1].clone().expand_as(z)),
        "next to equal": lambda: z.mul_(1e-3).add_(1),
        "one NaN": lambda: z[0, 0, 0].fill_(torch.nan),
        "one inf": lambda: z[0, 0, 0].fill_(torch.inf),
        "a row of NaN": lambda: z[-1, -1].fill_(torch.nan),
    }
    changes.get(kind, lambda: None)()
    return z


def leaf(kind, setting, views, batch, dim, seed=0):
    """Return projections as a head gives them in this setting: under autocast those of a linear layer are 16 bits."""
    name = setting.removeprefix("autocast ")
    return rows_of(kind, views, batch, dim, seed).to(DTYPES[name]).requires_grad_()


def context(setting):
    kind = setting.removeprefix("autocast ")
    return torch.autocast("cpu", DTYPES[kind]) if kind != setting else contextlib.nullcontext()


def parts_of(case, objective):
    """Return predictor-less modules: prototypes and scales, as the adapter holds them."""
    config = hfproj.ProjectionHeadConfig(
        head="identity", prototypes=case.prototypes, scales=getattr(objective, "scales", None) or None
    )
    return HeadModules(config, OUT_DIM)


def call_objective(case, objective, modules, z):
    """Return the output on z, from which prediction, scores and targets are made."""
    scores = None if modules.prototypes is None else modules.prototypes(z)
    target = scores if getattr(objective, "target_of", "") == "scores" else z
    batch = z.shape[1]
    given = {
        "labels": torch.arange(batch) % 3,
        "index": torch.arange(batch),
        "prediction": z + 0,
        "scores": scores,
        "prototypes": None if modules.prototypes is None else modules.prototypes.vectors().detach(),
        "scales": dict(modules.scales),
        "target": None if target is None else target.detach()[: getattr(objective, "target_views", None)],
        "step": Step.at(0, 1, 0.5),
    }
    return objective(z, **given)


def try_objective(name, kind, setting, batch=None, seed=0):
    """Return what is wrong with a loss on such projections, or None: (finite loss, finite gradient) or a refusal."""
    torch.manual_seed(seed)
    case = OBJECTIVES[name]
    objective = create_objective(case.name, **case.options)
    modules = parts_of(case, objective)
    z = leaf(kind, setting, case.views, batch or case.rows or 9, OUT_DIM, seed)
    try:
        if hasattr(objective, "on_epoch_start"):
            call_objective(case, objective, modules, leaf("normal", "float32", case.views, case.rows or 9, OUT_DIM))
            objective.on_epoch_start(Step.at(0, 1, 1.0))
        with context(setting):
            loss, terms = call_objective(case, objective, modules, z)
    except hfproj.HfprojError:
        return None
    drawn = "group_dim" in case.options  # of some dimensions
    return verdict(kind, z, loss, terms, reads_all=not drawn) or unsound(objective)


def try_first_epoch(name, kind, setting):
    """The same for an objective that has clustered nothing yet."""
    case = OBJECTIVES[name]
    objective = create_objective(case.name, **case.options)
    z = leaf(kind, setting, case.views, case.rows or 9, OUT_DIM)
    with context(setting):
        loss, terms = call_objective(case, objective, parts_of(case, objective), z)
    return verdict(kind, z, loss, terms) or unsound(objective)


def try_regularizer(name, kind, setting, batch=9, seed=0):
    """The same for a regularizer, of h and z that are both of this kind, with a head that gives them."""
    torch.manual_seed(seed)
    registered, options = REGULARIZERS[name]
    regularizer = create_regularizer(registered, **options)
    head = hfproj.create_head("mlp", in_dim=IN_DIM, hidden_dim=6, out_dim=OUT_DIM)
    head.to(DTYPES.get(setting, torch.float32))
    h, z = leaf(kind, setting, 2, batch, IN_DIM, seed), leaf(kind, setting, 2, batch, OUT_DIM, seed)
    weights = [p for p in head.parameters() if p.ndim > 1]
    with torch.no_grad():
        for weight in weights:
            weight.copy_(rows_of(kind, 1, *weight.shape, seed)[0])
    try:
        with context(setting):
            loss = regularizer(head, h, z, step=Step.at(0, 1, 0.5))
    except hfproj.HfprojError:
        return None
    return verdict(kind, [h, z, *weights], loss, {}, reads_all=False)


def verdict(kind, leaves, loss, terms, *, reads_all=True):
    leaves = [leaves] if isinstance(leaves, torch.Tensor) else leaves
    finite_input = all(leaf.isfinite().all() for leaf in leaves)
    if not torch.isfinite(loss):
        return None if kind in MAY_OVERFLOW or not finite_input else f"loss {loss.item()}"
    if reads_all and not finite_input:
        return f"loss {loss.item()} of broken input"
    if not loss.requires_grad:
        return None
    try:
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    except hfproj.NonFiniteLossError as error:  # of losses of the length of rows, cubed, it may be beyond float16
        allowed = kind in MAY_OVERFLOW or any(leaf.dtype == torch.float16 for leaf in leaves)
        return None if allowed and "\n" not in str(error) else f"refused, {error}"
    if not all(g is None or g.isfinite().all() for g in gradients):
        return f"loss {loss.item():.3g}, gradient not finite"
    largest = max((g.abs().max().item() for g in gradients if g is not None), default=0)
    if largest > 1e10 and kind not in STEEP:
        return f"gradient of {largest:.3g}"
    wrong = [name for name, value in terms.items() if not torch.isfinite(value)]
    return f"terms {wrong}" if wrong else None


def unsound(module: nn.Module):
    """Return the buffers that are not finite."""
    wrong = [n for n, b in module.named_buffers() if b.is_floating_point() and not b.isfinite().all()]
    return f"buffers {wrong}" if wrong else None


def all_tries(objectives=OBJECTIVES, regularizers=REGULARIZERS, settings=SETTINGS, seeds=(0,)):
    """Yield (what, function, arguments) of every try."""
    for name, kind, setting, seed in itertools.product(objectives, KINDS, settings, seeds):
        yield f"{name}, {kind}, {setting}, seed {seed}", try_objective, (name, kind, setting, None, seed)
        if not OBJECTIVES[name].rows:
            yield f"{name}, {kind}, {setting}, two images", try_objective, (name, kind, setting, 2, seed)
    for name, kind, setting, seed in itertools.product(regularizers, KINDS, settings, seeds):
        yield f"{name}, {kind}, {setting}, seed {seed}", try_regularizer, (name, kind, setting, 9, seed)
        yield f"{name}, {kind}, {setting}, two images", try_regularizer, (name, kind, setting, 2, seed)
