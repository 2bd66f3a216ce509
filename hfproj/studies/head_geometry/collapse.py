"""Collapse, and the curvature by which a head leaves it: the experiments on dynamics.

A miniature of the paper's SimSiam runs (learning rate 0.05, momentum 0.9, the projector's weights times 0.1 at the
start): cached representations of two views by vit_nano go through a linear map in place of the backbone, which starts
as the identity and is trained, then through projector and predictor of the paper at a quarter of their width.

`collapse` follows the spread of z for linear, ReLU, GELU and SiLU heads under SGD and, on a smaller system, in
continuous time; and it compares the rate at which the flow in h leaves a constructed equilibrium with the smallest
eigenvalue of the Hessian there. `hessian` follows the extreme eigenvalues of the Hessian in h and in the parameters of
the heads.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.func import functional_call

from hfproj import geometry
from hfproj.backbones import load_backbone
from hfproj.data import ImageViews, split_off
from hfproj.diagnostics import covariance_condition_number, representation_std
from hfproj.errors import UsageError
from hfproj.features import cache_features
from hfproj.heads import create_head
from hfproj.objectives import create_objective
from hfproj.studies.head_geometry import figures
from hfproj.studies.head_geometry.study import Study, tensor_once
from hfproj.tuner import ProjectionHeadConfig

HEADS = {"linear": "identity", "ReLU": "relu", "GELU": "gelu", "SiLU": "silu"}  # as written → activation
SCALE = 0.1  # of the projector's weights at a pseudo-collapsed start
SGD: dict[str, Any] = {"images": 512, "batch": 64, "width": 512, "steps": 3000, "learning_rate": 0.05, "momentum": 0.9}
FLOW: dict[str, Any] = {
    "images": 16,
    "width": 64,
    "time": 8.0,
    "records": 16,
    "rtol": 1e-5,
    "learning_rate": 0.05,
    "kink_step": 2e-3,
}
EQUILIBRIUM: dict[str, Any] = {"width": 512, "alphas": [0.5, 2.0, 8.0, 32.0], "distance": 1e-5, "lifetimes": 2.0}
HESSIAN: dict[str, Any] = {**SGD, "steps": 1500, "every": 100, "probe_images": 16, "lanczos_steps": 64}


class Miniature(nn.Module):
    """SimSiam on cached representations: a linear map for a backbone, projector and predictor."""

    def __init__(self, head: str, *, in_dim: int, width: int, norm: str | None, scale: float, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        options = {"activation": HEADS[head], "norm": norm, "last_norm": norm}
        self.backbone = nn.Linear(in_dim, in_dim)
        nn.init.eye_(self.backbone.weight)
        nn.init.zeros_(self.backbone.bias)
        self.projector = create_head("geometry_mlp", in_dim=in_dim, hidden_dim=width, out_dim=width, **options)
        self.predictor = create_head("geometry_mlp", in_dim=width, hidden_dim=width // 4, out_dim=width, **options)
        self.objective = create_objective("simsiam")
        with torch.no_grad():
            for module in self.projector.modules():
                if isinstance(module, nn.Linear):
                    module.weight *= scale

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, h and z of `views` ``[2, images, in_dim]``."""
        h = self.backbone(views)
        z = self.projector(h)
        return self.objective(z, prediction=self.predictor(z)).loss, h, z


def collapse(study: Study) -> dict[str, Any]:
    """Follow the spread of z under SGD and gradient flow, and leave constructed equilibria."""
    f = representations(study)
    sgd, flow, equilibria = [], [], []
    for seed in study.seeds:
        for head in HEADS:
            for norm in (None, "batch"):
                sgd.append(_kept(study, "sgd", by_sgd, f, head=head, norm=norm, seed=seed))
            if head != "GELU":
                flow.append(_kept(study, "flow", by_flow, f, head=head, seed=seed))
            equilibria.append(_kept(study, "equilibrium", at_equilibria, f, head=head, seed=seed))
    figures.collapse(sgd, flow, equilibria, study.out)
    settings = {"sgd": SGD, "flow": FLOW, "equilibrium": EQUILIBRIUM, "scale": SCALE}
    return {"settings": settings, "sgd": sgd, "flow": flow, "equilibrium": equilibria}


def by_sgd(f: Tensor, head: str, norm: str | None, seed: int) -> dict[str, Any]:
    """Return the spread of h and z, and how fast the heads move against the backbone, along a training."""
    system = Miniature(head, in_dim=f.shape[-1], width=SGD["width"], norm=norm, scale=SCALE, seed=seed)
    found: dict[str, Any] = {"steps": [], "loss": [], "std_h": [], "std_z": [], "timescale_ratio": []}
    steps = SGD["steps"]
    wanted = {0, 5, 10, 20, 40, 70, *range(0, steps, max(1, steps // 30)), steps - 1}
    for step, (loss, h, z) in enumerate(_steps_of_sgd(system, f, steps, seed)):
        if step in wanted:
            found["steps"].append(step)
            found["loss"].append(float(loss))
            found["std_h"].append(representation_std(h.flatten(0, 1)))
            found["std_z"].append(representation_std(z.flatten(0, 1)))
            found["timescale_ratio"].append(
                geometry.timescale_ratio(system.projector, system.backbone, SGD["learning_rate"])
            )
    return found


def _steps_of_sgd(system: Miniature, f: Tensor, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield loss, h and z of each step between its backward pass and its update."""
    optimizer = torch.optim.SGD(system.parameters(), lr=SGD["learning_rate"], momentum=SGD["momentum"])
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        images = torch.randperm(len(f), generator=generator)[: SGD["batch"]]
        loss, h, z = system(f[images].transpose(0, 1))
        optimizer.zero_grad()
        loss.backward()
        yield loss.detach(), h.detach(), z.detach()
        optimizer.step()


def by_flow(f: Tensor, head: str, seed: int) -> dict[str, Any]:
    """Return the same in continuous time, with all parameters of a small system, and what the flow conserves."""
    x = f[: FLOW["images"]].transpose(0, 1).double()
    make = partial(Miniature, head, in_dim=f.shape[-1], width=FLOW["width"], norm=None, scale=SCALE, seed=seed)
    system = make().double()
    flow = geometry.gradient_flow(
        lambda moved: moved(x)[0], system, time=FLOW["time"], record=FLOW["records"], rtol=FLOW["rtol"], atol=1e-8,
        kink_step=FLOW["kink_step"] if head == "ReLU" else 0.0,  # the others have no jumps in the gradient
    )  # fmt: skip
    found: dict[str, Any] = {"times": flow.times.tolist(), "loss": flow.losses.tolist(), "std_h": [], "std_z": []}
    for i in range(len(flow.times)):
        _, h, z = functional_call(system, {name: at[i] for name, at in flow.trajectory.items()}, (x,))
        found["std_h"].append(representation_std(h.flatten(0, 1).detach()))
        found["std_z"].append(representation_std(z.flatten(0, 1).detach()))
    found["function_calls"] = 6 * (flow.steps + flow.rejected) + 1
    if head in ("linear", "ReLU"):
        start = _invariant(head, dict(system.named_parameters()))
        stepped = make().double()
        optimizer = torch.optim.SGD(stepped.parameters(), lr=FLOW["learning_rate"])
        for _ in range(round(FLOW["time"] / FLOW["learning_rate"])):
            optimizer.zero_grad()
            stepped(x)[0].backward()
            optimizer.step()
        for name, end in (("flow", flow.params), ("sgd", dict(stepped.named_parameters()))):
            found[f"drift_{name}"] = float((_invariant(head, end) - start).norm() / start.norm())
    return found


def _invariant(head: str, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return what gradient flow conserves of the projector."""
    conserved = geometry.linear_invariant if head == "linear" else geometry.relu_invariant
    W1, W2 = (parameters[f"projector.{layer}.linear.weight"].detach() for layer in ("hidden.0", "last"))
    return conserved(W1, W2)


def at_equilibria(f: Tensor, head: str, seed: int) -> dict[str, Any]:
    """Return λ_min at constructed equilibria with growing residuals, and the rate at which the flow in h leaves them.

    Of both signs of the residual that one is taken whose λ_min is smaller.
    """
    torch.manual_seed(seed)
    width = EQUILIBRIUM["width"]
    options = {"activation": HEADS[head], "norm": None, "last_norm": None}
    g = create_head("geometry_mlp", in_dim=f.shape[-1], hidden_dim=width, out_dim=width, **options).double()
    h = f.flatten(0, 1).double().mean(0, keepdim=True)
    found: dict[str, Any] = {"alpha": [], "lambda_min": [], "n_neg": [], "norm_M": [], "rate": []}
    for alpha in EQUILIBRIUM["alphas"]:
        both = [geometry.constructed_equilibrium(g, h, alpha=sign * alpha) for sign in (1, -1)]
        reports = [geometry.collapse_report(g, point.loss, point.h) for point in both]
        worse = min((0, 1), key=lambda i: float(reports[i].lambda_min))
        point, report = both[worse], reports[worse]
        found["alpha"].append(alpha)
        found["lambda_min"].append(float(report.lambda_min))
        found["n_neg"].append(int(report.n_neg))
        found["norm_M"].append(float(report.norm_M / report.norm_H_eff))
        found["rate"].append(_leaving_rate(g, point))
    return found


def _leaving_rate(g: nn.Module, point: geometry.Equilibrium) -> float:
    """Return d/dt log ‖h − h*‖ of the gradient flow in h, started along the eigenvector of λ_min."""
    H = geometry.effective_hessian(g, point.loss, point.h).H_eff[0]
    values, vectors = torch.linalg.eigh(H)
    start = point.h + EQUILIBRIUM["distance"] * vectors[:, 0]
    # a flat direction would take forever, and the growth that can be seen needs no lifetime
    time = min(EQUILIBRIUM["lifetimes"] / float(values[0].abs()), 1000 / float(values[-1]))
    flow = geometry.gradient_flow(lambda h: point.loss(g(h)).sum(), start, time=time, rtol=1e-9, atol=1e-13)
    ends = [(h - point.h).norm() for h in (start, flow.params)]
    return float((ends[1] / ends[0]).log()) / time


def hessian(study: Study) -> dict[str, Any]:
    """Follow the extreme eigenvalues of the Hessian along training, from usual and from small weights."""
    f = representations(study)
    kinds = [(head, start) for head in ("SiLU", "ReLU") for start in ("usual", "collapsed")]
    rows = [
        _kept(study, "hessian", tracked, f, head=head, start=start, seed=seed)
        for seed in study.seeds
        for head, start in kinds
    ]
    figures.hessian(rows, study.out)
    return {"settings": {**HESSIAN, "scale": SCALE}, "runs": rows}


def tracked(f: Tensor, head: str, start: str, seed: int, *, curvature: bool = True) -> dict[str, Any]:
    """Return extreme eigenvalues, spread and condition number along a training, and their rank correlation.

    Without `curvature` the extreme eigenvalues, which take nearly all of the time, are left out.
    """
    scale = SCALE if start == "collapsed" else 1.0
    system = Miniature(head, in_dim=f.shape[-1], width=HESSIAN["width"], norm=None, scale=scale, seed=seed)
    probe = f[: HESSIAN["probe_images"]].transpose(0, 1)
    rows = []
    for step, _ in enumerate(_steps_of_sgd(system, f, HESSIAN["steps"] + 1, seed)):
        if step % HESSIAN["every"] == 0:
            with torch.no_grad():
                _, h, z = system(f.transpose(0, 1))
            h, z = h.flatten(0, 1), z.flatten(0, 1)
            found = covariance_condition_number(h)
            spread = {"std_h": representation_std(h), "std_z": representation_std(z), "rank": found.rank}
            conditions = {"condition_number": found.on_support, "condition_number_clamped": found.clamped}
            rows.append({"step": step, **spread, **conditions, **(_curvature(system, probe) if curvature else {})})
    return {name: [row[name] for row in rows] for name in rows[0]}


def conditioning(study: Study, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of `hessian` with the condition number on the support measured again, by the same trainings.

    Seconds a row, where `hessian` takes a minute.

    Raises:
        UsageError: If a training is not the recorded one: its spread of h differs by more than a thousandth.
    """
    f = representations(study)
    found = []
    for row in rows:
        which = {name: row[name] for name in ("head", "start", "seed")}
        again = _kept(study, "conditioning", partial(tracked, curvature=False), f, **which)
        if any(abs(new - old) > 1e-3 * old for new, old in zip(again["std_h"], row["std_h"], strict=True)):
            name = ", ".join(str(value) for value in which.values())
            wanted = f"the training of {name} to be the recorded one"
            raise UsageError(f"Expected {wanted}, got another spread of h; run `hessian` again.")
        found.append({**row, **{name: again[name] for name in ("rank", "condition_number")}})
    return found


def _curvature(system: Miniature, views: Tensor) -> dict[str, float]:
    """Return both ends of the spectrum of the Hessian of the loss, in h and in the parameters of the heads.

    In h the targets are held still, and projector and predictor are one head: H_eff = G_L + M.
    """
    system = copy.deepcopy(system).double().eval()
    views = views.double()
    with torch.no_grad():
        _, h, z = system(views)
    targets = z.flip(0).flatten(0, 1)

    def loss(p: Tensor) -> Tensor:
        return -torch.nn.functional.cosine_similarity(p, targets, dim=-1).mean()

    both = nn.Sequential(system.projector, system.predictor)
    in_h = geometry.EffectiveHessianOperator(both, loss, h.flatten(0, 1))
    in_head = geometry.HessianOperator(lambda: system(views)[0], both)
    found: dict[str, float] = {}
    for name, matvec, dim in (
        ("h", in_h.matvec, in_h.dim), ("G_L", in_h.G_L, in_h.dim), ("M", in_h.M, in_h.dim),
        ("head", in_head.matvec, in_head.dim),
    ):  # fmt: skip
        ends = geometry.extreme_eigenvalues(matvec, dim, steps=HESSIAN["lanczos_steps"], tol=1e-4)
        found |= {f"lambda_min_{name}": ends.min, f"lambda_max_{name}": ends.max}
        found[f"lambda_min_error_{name}"] = ends.residuals[0]
    return found


def representations(study: Study) -> Tensor:
    """Return h of two augmented views of some training images by vit_nano, ``[images, 2, dim]``."""

    def compute() -> Tensor:
        model = get_peft_model(load_backbone("vit_nano"), ProjectionHeadConfig(trainable="head"))
        images = split_off(study.images("train"), SGD["images"], seed=0)[1]
        options: dict[str, Any] = {"scale": (0.4, 1.0), "color_jitter_strength": 0.5}
        views = ImageViews.for_model(model, flip_probability=study.flip_probability, **options)
        return cache_features(model, images, views).features

    return tensor_once(study.folder / f"views-{SGD['images']}.pt", compute)


def _kept(study: Study, what: str, measure: Callable[..., dict[str, Any]], f: Tensor, **which: Any) -> dict[str, Any]:
    return study.kept(what, which, partial(measure, f, **which))
