"""Collapse, and the curvature by which a head leaves it: "The Geometry of Projection Heads" (arXiv 2605.17180), its
experiments on dynamics, at the size of two CPU cores.

    python recipes/collapse_geometry.py collapse    # SGD, gradient flow, constructed equilibria; 45 minutes
    python recipes/collapse_geometry.py hessian     # extreme eigenvalues along training; 8 minutes

A miniature of the paper's SimSiam runs (learning rate 0.05, momentum 0.9, the projector's weights times 0.1 at the
start): cached representations of two views by vit_nano go through a linear map in place of the backbone, which starts
as the identity and is trained, then through projector and predictor of the paper at a quarter of their width.

``collapse`` follows the spread of z for linear, ReLU, GELU and SiLU heads under SGD and, on a smaller system, in
continuous time; and it compares the rate at which the flow in h leaves a constructed equilibrium with the smallest
eigenvalue of the Hessian there. ``hessian`` follows the extreme eigenvalues of the Hessian in h and in the parameters
of the heads. Finished runs are kept below runs/geometry and not run again; results go to
recipes/results/geometry/results.json and into figures beside it (``recipes/geometry_table.py`` makes the text).
"""

import argparse
import copy
import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a shared CPU spinning threads cost more than they save

import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import get_peft_model
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call

import hfproj
from hfproj import cli, geometry, plots
from hfproj.data import split_off
from hfproj.diagnostics import covariance_condition_number, representation_std
from hfproj.files import installed_versions, measured_once, write_json

RUNS = Path("runs/geometry")
OUT = Path(__file__).resolve().parent / "results" / "geometry"
SEEDS = (0, 1, 2)
HEADS = {"linear": "identity", "ReLU": "relu", "GELU": "gelu", "SiLU": "silu"}  # as written → activation
SCALE = 0.1  # of the projector's weights at a pseudo-collapsed start
SGD = {"images": 512, "batch": 64, "width": 512, "steps": 3000, "learning_rate": 0.05, "momentum": 0.9}
FLOW = {"images": 16, "width": 64, "time": 8.0, "records": 16, "rtol": 1e-5, "learning_rate": 0.05, "kink_step": 2e-3}
EQUILIBRIUM = {"width": 512, "alphas": [0.5, 2.0, 8.0, 32.0], "distance": 1e-5, "lifetimes": 2.0}
HESSIAN = {**SGD, "steps": 1500, "every": 100, "probe_images": 16, "lanczos_steps": 64}


class Miniature(nn.Module):
    """SimSiam on cached representations: a linear map for a backbone, projector and predictor."""

    def __init__(self, head: str, *, in_dim: int, width: int, norm: str | None, scale: float, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        options = {"activation": HEADS[head], "norm": norm, "last_norm": norm}
        self.backbone = nn.Linear(in_dim, in_dim)
        nn.init.eye_(self.backbone.weight)
        nn.init.zeros_(self.backbone.bias)
        self.projector = hfproj.create_head("geometry_mlp", in_dim=in_dim, hidden_dim=width, out_dim=width, **options)
        self.predictor = hfproj.create_head(
            "geometry_mlp", in_dim=width, hidden_dim=width // 4, out_dim=width, **options
        )
        self.objective = hfproj.create_objective("simsiam")
        with torch.no_grad():
            for module in self.projector.modules():
                if isinstance(module, nn.Linear):
                    module.weight *= scale

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, h and z of `views` ``[2, images, in_dim]``."""
        h = self.backbone(views)
        z = self.projector(h)
        return self.objective(z, prediction=self.predictor(z)).loss, h, z


def collapse(dataset: str, seeds: list[int]) -> dict:
    f = representations(dataset)
    sgd, flow, equilibria = [], [], []
    for seed in seeds:
        for head in HEADS:
            for norm in (None, "batch"):
                sgd.append(kept(dataset, "sgd", by_sgd, f, head=head, norm=norm, seed=seed))
            if head != "GELU":
                flow.append(kept(dataset, "flow", by_flow, f, head=head, seed=seed))
            equilibria.append(kept(dataset, "equilibrium", at_equilibria, f, head=head, seed=seed))
    for norm, name in ((None, "without"), ("batch", "with")):
        curves = {head: over(sgd, "steps", "std_z", head=head, norm=norm) for head in HEADS}
        plots.plot_curves(
            curves, "step of SGD", "std of unit rows of z", OUT / f"collapse_sgd_{name}_batchnorm.png", y_scale="log"
        )
    curves = {head: over(flow, "times", "std_z", head=head) for head in HEADS if head != "GELU"}
    plots.plot_curves(
        curves, "time, in 1/learning rate", "std of unit rows of z", OUT / "collapse_flow.png", y_scale="log"
    )
    curves = {head: over(equilibria, "alpha", "lambda_min", head=head) for head in HEADS}
    plots.plot_curves(
        curves, "residual α", "smallest eigenvalue of the Hessian in h", OUT / "collapse_equilibrium.png",
        x_scale="log", y_scale="symlog", zero_line=True,
    )  # fmt: skip
    return {
        "settings": {"sgd": SGD, "flow": FLOW, "equilibrium": EQUILIBRIUM, "scale": SCALE},
        "sgd": sgd, "flow": flow, "equilibrium": equilibria,
    }  # fmt: skip


def by_sgd(f: Tensor, head: str, norm: str | None, seed: int) -> dict:
    """Return the spread of h and z, and how fast the heads move against the backbone, along a training."""
    system = Miniature(head, in_dim=f.shape[-1], width=SGD["width"], norm=norm, scale=SCALE, seed=seed)
    found: dict = {"steps": [], "loss": [], "std_h": [], "std_z": [], "timescale_ratio": []}
    steps = SGD["steps"]
    wanted = {0, 5, 10, 20, 40, 70, *range(0, steps, max(1, steps // 30)), steps - 1}
    for step, (loss, h, z) in enumerate(steps_of_sgd(system, f, steps, seed)):
        if step in wanted:
            found["steps"].append(step)
            found["loss"].append(float(loss))
            found["std_h"].append(representation_std(h.flatten(0, 1)))
            found["std_z"].append(representation_std(z.flatten(0, 1)))
            found["timescale_ratio"].append(
                geometry.timescale_ratio(system.projector, system.backbone, SGD["learning_rate"])
            )
    return found


def steps_of_sgd(system: Miniature, f: Tensor, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
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


def by_flow(f: Tensor, head: str, seed: int) -> dict:
    """Return the same in continuous time, with all parameters of a small system, and what the flow conserves."""
    x = f[: FLOW["images"]].transpose(0, 1).double()
    options = {"in_dim": f.shape[-1], "width": FLOW["width"], "norm": None, "scale": SCALE, "seed": seed}
    system = Miniature(head, **options).double()
    flow = geometry.gradient_flow(
        lambda moved: moved(x)[0], system, time=FLOW["time"], record=FLOW["records"], rtol=FLOW["rtol"], atol=1e-8,
        kink_step=FLOW["kink_step"] if head == "ReLU" else 0.0,  # the others have no jumps in the gradient
    )  # fmt: skip
    found: dict = {"times": flow.times.tolist(), "loss": flow.losses.tolist(), "std_h": [], "std_z": []}
    for i in range(len(flow.times)):
        _, h, z = functional_call(system, {name: at[i] for name, at in flow.trajectory.items()}, (x,))
        found["std_h"].append(representation_std(h.flatten(0, 1).detach()))
        found["std_z"].append(representation_std(z.flatten(0, 1).detach()))
    found["function_calls"] = 6 * (flow.steps + flow.rejected) + 1
    if head in ("linear", "ReLU"):
        start = invariant(head, dict(system.named_parameters()))
        stepped = Miniature(head, **options).double()
        optimizer = torch.optim.SGD(stepped.parameters(), lr=FLOW["learning_rate"])
        for _ in range(round(FLOW["time"] / FLOW["learning_rate"])):
            optimizer.zero_grad()
            stepped(x)[0].backward()
            optimizer.step()
        for name, end in (("flow", flow.params), ("sgd", dict(stepped.named_parameters()))):
            found[f"drift_{name}"] = float((invariant(head, end) - start).norm() / start.norm())
    return found


def invariant(head: str, parameters: dict[str, Tensor]) -> Tensor:
    """Return what gradient flow conserves of the projector."""
    conserved = geometry.linear_invariant if head == "linear" else geometry.relu_invariant
    W1, W2 = (parameters[f"projector.{layer}.linear.weight"].detach() for layer in ("hidden.0", "last"))
    return conserved(W1, W2)


def at_equilibria(f: Tensor, head: str, seed: int) -> dict:
    """Return λ_min at constructed equilibria with growing residuals, and the rate at which the flow in h leaves them.

    Of both signs of the residual that one is taken whose λ_min is smaller.
    """
    torch.manual_seed(seed)
    width = EQUILIBRIUM["width"]
    options = {"activation": HEADS[head], "norm": None, "last_norm": None}
    g = hfproj.create_head("geometry_mlp", in_dim=f.shape[-1], hidden_dim=width, out_dim=width, **options).double()
    h = f.flatten(0, 1).double().mean(0, keepdim=True)
    found: dict = {"alpha": [], "lambda_min": [], "n_neg": [], "norm_M": [], "rate": []}
    for alpha in EQUILIBRIUM["alphas"]:
        both = [geometry.constructed_equilibrium(g, h, alpha=sign * alpha) for sign in (1, -1)]
        reports = [geometry.collapse_report(g, point.loss, point.h) for point in both]
        worse = min((0, 1), key=lambda i: float(reports[i].lambda_min))
        point, report = both[worse], reports[worse]
        found["alpha"].append(alpha)
        found["lambda_min"].append(float(report.lambda_min))
        found["n_neg"].append(int(report.n_neg))
        found["norm_M"].append(float(report.norm_M / report.norm_H_eff))
        found["rate"].append(leaving_rate(g, point))
    return found


def leaving_rate(g: nn.Module, point: geometry.Equilibrium) -> float:
    """Return d/dt log ‖h − h*‖ of the gradient flow in h, started along the eigenvector of λ_min."""
    H = geometry.effective_hessian(g, point.loss, point.h).H_eff[0]
    values, vectors = torch.linalg.eigh(H)
    start = point.h + EQUILIBRIUM["distance"] * vectors[:, 0]
    # a flat direction would take forever, and the growth that can be seen needs no lifetime
    time = min(EQUILIBRIUM["lifetimes"] / float(values[0].abs()), 1000 / float(values[-1]))
    flow = geometry.gradient_flow(lambda h: point.loss(g(h)).sum(), start, time=time, rtol=1e-9, atol=1e-13)
    ends = [(h - point.h).norm() for h in (start, flow.params)]
    return float((ends[1] / ends[0]).log()) / time


def hessian(dataset: str, seeds: list[int]) -> dict:
    f = representations(dataset)
    rows = []
    for seed in seeds:
        for head in ("SiLU", "ReLU"):
            for start in ("usual", "collapsed"):
                rows.append(kept(dataset, "hessian", tracked, f, head=head, start=start, seed=seed))
    drawn = [
        {"step": step, "lambda_min": low, "lambda_max": high}
        for row in rows
        if (row["head"], row["start"]) == ("SiLU", "collapsed")
        for step, low, high in zip(row["step"], row["lambda_min_h"], row["lambda_max_h"])
    ]
    plots.plot_eigenvalues(drawn, OUT / "hessian.png", of="h")
    curves = {
        f"{head}, {start} start": over(rows, "step", "lambda_min_h", head=head, start=start)
        for head in ("SiLU", "ReLU") for start in ("usual", "collapsed")
    }  # fmt: skip
    plots.plot_curves(
        curves, "step of SGD", "smallest eigenvalue of the Hessian in h", OUT / "hessian_smallest.png",
        y_scale="symlog", zero_line=True,
    )  # fmt: skip
    return {"settings": {**HESSIAN, "scale": SCALE}, "runs": rows}


def tracked(f: Tensor, head: str, start: str, seed: int) -> dict:
    """Return extreme eigenvalues, spread and condition number along a training, and their rank correlation."""
    scale = SCALE if start == "collapsed" else 1.0
    system = Miniature(head, in_dim=f.shape[-1], width=HESSIAN["width"], norm=None, scale=scale, seed=seed)
    probe = f[: HESSIAN["probe_images"]].transpose(0, 1)
    rows = []
    for step, _ in enumerate(steps_of_sgd(system, f, HESSIAN["steps"] + 1, seed)):
        if step % HESSIAN["every"] == 0:
            with torch.no_grad():
                _, h, z = system(f.transpose(0, 1))
            h, z = h.flatten(0, 1), z.flatten(0, 1)
            condition = covariance_condition_number(h)
            spread = {"std_h": representation_std(h), "std_z": representation_std(z)}
            conditions = {"condition_number": condition.on_support, "condition_number_clamped": condition.clamped}
            rows.append({"step": step, **spread, **conditions, **curvature(system, probe)})
    found: dict = {name: [row[name] for row in rows] for name in rows[0]}
    for name in ("condition_number", "condition_number_clamped"):
        found[f"spearman_{name}"] = float(spearmanr(found["std_h"], found[name]).statistic)
    return found


def curvature(system: Miniature, views: Tensor) -> dict[str, float]:
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
    found = {}
    for name, matvec, dim in (
        ("h", in_h.matvec, in_h.dim), ("G_L", in_h.G_L, in_h.dim), ("M", in_h.M, in_h.dim),
        ("head", in_head.matvec, in_head.dim),
    ):  # fmt: skip
        ends = geometry.extreme_eigenvalues(matvec, dim, steps=HESSIAN["lanczos_steps"], tol=1e-4)
        found |= {f"lambda_min_{name}": ends.min, f"lambda_max_{name}": ends.max}
        found[f"lambda_min_error_{name}"] = ends.residuals[0]
    return found


def representations(dataset: str) -> Tensor:
    """Return h of two augmented views of some training images by vit_nano, ``[images, 2, dim]``."""
    file = RUNS / Path(dataset).name / f"views-{SGD['images']}.pt"
    if not file.is_file():
        model = get_peft_model(hfproj.load_backbone("vit_nano"), hfproj.ProjectionHeadConfig(trainable="head"))
        images = split_off(hfproj.load_image_dataset(dataset, split="train"), SGD["images"], seed=0)[1]
        flip = 0.0 if dataset == "digits" else 0.5  # a mirrored digit is no digit
        views = hfproj.ImageViews.for_model(model, scale=(0.4, 1.0), flip_probability=flip, color_jitter_strength=0.5)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(hfproj.cache_features(model, images, views).features, file)
    return torch.load(file)


def kept(dataset: str, what: str, measure: Callable[..., dict], f: Tensor, **which: object) -> dict:
    """Return what was measured for `which`, now or in an earlier run."""
    file = RUNS / Path(dataset).name / what / f"{'-'.join(str(value) for value in which.values())}.json"
    if not file.is_file():
        print(what, which, flush=True)
    return measured_once(file, lambda: {**which, **measure(f, **which)})


def over(rows: list[dict], x: str, y: str, **which: object) -> tuple[list, list, list]:
    """Return x, mean and standard deviation over seeds of y of the rows that have the values in `which`."""
    found = [row for row in rows if all(row[name] == value for name, value in which.items())]
    columns = list(zip(*(row[y] for row in found)))
    std = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in columns]
    return found[0][x], [statistics.mean(values) for values in columns], std


def save(dataset: str, what: str, content: dict) -> None:
    """Put what was measured into results.json, beside what is there."""
    file = OUT / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    results.setdefault(Path(dataset).name, {})[what] = {**content, "versions": installed_versions()}
    write_json(file, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("collapse", "hessian"))
    parser.add_argument("--dataset", default="digits", help="What hfproj.load_image_dataset takes.")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")
    measure = {"collapse": collapse, "hessian": hessian}[options.what]
    save(options.dataset, options.what, measure(options.dataset, options.seeds))


if __name__ == "__main__":
    cli.run(main)
