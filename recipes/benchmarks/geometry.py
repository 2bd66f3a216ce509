"""What the geometry of a head costs: Hessian-vector products, extreme eigenvalues, condition of the pullback metric.

    pip install --no-deps --target peers curvlinops-for-pytorch pyhessian einops einconv backpack-for-pytorch \
        unfoldNd linear_operator
    python recipes/benchmarks/geometry.py --peers peers

The head has 384-2048-128 units and random weights; one thread. Contestants take turns for some rounds; times are CPU
(user + system) and wall, medians over rounds; ratios are medians of each round's ratio to the first contestant. Without
--peers, or where one cannot be imported, its rows are left out. Writes recipes/benchmarks/results/geometry.json and
.md; seven minutes of one core.
"""

import argparse
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib
import itertools
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hfproj
from hfproj.files import installed_versions, write_atomic, write_json
from hfproj.geometry import HessianOperator, extreme_eigenvalues, metric_condition_number
from hfproj.objectives.nt_xent import nt_xent_loss

OUT = Path(__file__).resolve().parent / "results" / "geometry"
IN_DIM, HIDDEN, OUT_DIM = 384, 2048, 128
ROWS, METRIC_ROWS, IMAGES = 512, 128, 32
ACCURACY = 1e-3  # of eigenvalues, relative
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


def take_turns(contestants: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, dict], dict[str, Any]]:
    """Return name → medians of CPU and wall seconds and of the ratio to the first, and each one's last result."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    results: dict[str, Any] = {name: run() for name, run in contestants.items()}  # and warm up
    for _ in range(rounds):
        for name, run in contestants.items():
            cpu, wall = time.process_time(), time.perf_counter()
            results[name] = run()
            times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    first = times[next(iter(times))]
    found = {}
    for name, measured in times.items():
        ratios = [[b[i] / a[i] for a, b in zip(first, measured)] for i in (0, 1)]
        found[name] = {
            "cpu_seconds": statistics.median(m[0] for m in measured),
            "wall_seconds": statistics.median(m[1] for m in measured),
            "cpu_ratio": statistics.median(ratios[0]),
            "wall_ratio": statistics.median(ratios[1]),
        }
    return found, results


def peer(name: str) -> Any:
    """Return a module, or None where it cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        print(f"left out: {name} ({error})", file=sys.stderr)
        return None


def head_and_data(activation: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(IN_DIM, HIDDEN), ACTIVATIONS[activation](), nn.Linear(HIDDEN, OUT_DIM)).eval()
    return head, torch.randn(ROWS, IN_DIM), torch.randn(ROWS, OUT_DIM)


def products(closure: Callable[[], Tensor], parameters: list[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Return a gradient, our product and the plain double backward with one vector."""
    operator = HessianOperator(closure, parameters)
    v = torch.randn(operator.dim, generator=torch.Generator().manual_seed(1))
    parts = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in parameters]), parameters)]

    def gradient() -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(closure(), parameters)])

    def anew() -> Tensor:
        gradients = torch.autograd.grad(closure(), parameters, create_graph=True)
        return torch.cat([g.flatten() for g in torch.autograd.grad(gradients, parameters, parts)])

    return {"gradient": gradient, "hfproj": lambda: operator.matvec(v), "double backward anew": anew}


def head_products(activation: str) -> dict[str, Callable[[], Tensor]]:
    """Return the contestants for the Hessian of the MSE in the parameters of the head."""
    head, h, target = head_and_data(activation)
    parameters = list(head.parameters())
    contestants = products(lambda: nn.functional.mse_loss(head(h), target), parameters)
    v = torch.randn(sum(p.numel() for p in parameters), generator=torch.Generator().manual_seed(1))
    if pyhessian := peer("pyhessian.utils"):
        loss = nn.functional.mse_loss(head(h), target)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        parts = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in parameters]), parameters)]
        contestants["pyhessian"] = lambda: torch.cat(
            [g.flatten() for g in pyhessian.hessian_vector_product(gradients, parameters, parts)]
        )
    if curvlinops := peer("curvlinops"):
        operator = curvlinops.HessianLinearOperator(head, nn.MSELoss(), parameters, [(h, target)])
        contestants["curvlinops"] = lambda: operator @ v
    return contestants


def backbone_products() -> dict[str, Callable[[], Tensor]]:
    """Return the contestants for the Hessian of NT-Xent in the parameters of the small ViT that h depends on."""
    backbone = hfproj.load_backbone("vit_nano").eval()
    x = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def closure() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            z = backbone(pixel_values=x).last_hidden_state[:, 0]
        return nt_xent_loss(z.view(2, -1, z.shape[1]), temperature=0.5)

    trained = [p for p in backbone.parameters() if p.requires_grad]
    used = torch.autograd.grad(closure(), trained, allow_unused=True)
    return products(closure, [p for p, g in zip(trained, used) if g is not None])


def measure_products(rounds: int) -> list[dict]:
    rows = []
    for activation in ACTIVATIONS:
        rows += rows_of(f"head, {activation}", head_products(activation), rounds)
    return rows + rows_of("vit_nano, all parameters", backbone_products(), rounds)


def rows_of(case: str, contestants: dict[str, Callable[[], Tensor]], rounds: int) -> list[dict]:
    found, results = take_turns(contestants, rounds)
    reference = results["hfproj"]
    rows = []
    for name, measured in found.items():
        difference = None if name == "gradient" else float((results[name] - reference).norm() / reference.norm())
        rows.append({"case": case, "name": name, **measured, "difference": difference})
    return rows


def measure_eigenvalues(activation: str, rounds: int) -> list[dict]:
    """Compare both ends of the Hessian of the MSE in the parameters of the head.

    A tolerance means one thing here and another in ARPACK: each gets the loosest that is right to ACCURACY.
    """
    head, h, target = head_and_data(activation)
    parameters = list(head.parameters())
    operator = HessianOperator(lambda: nn.functional.mse_loss(head(h), target), parameters)
    exact = extreme_eigenvalues(operator.matvec, operator.dim, tol=1e-5, steps=400)
    start = torch.randn(operator.dim, generator=torch.Generator().manual_seed(0)).numpy()
    counted: list[Tensor] = []

    def product(v: np.ndarray) -> np.ndarray:
        counted.append(operator.matvec(torch.from_numpy(v.ravel())))
        return counted[-1].numpy()

    def ours(tol: float) -> tuple[float, float, int]:
        found = extreme_eigenvalues(operator.matvec, operator.dim, tol=tol, dtype=torch.float32)
        return found.min, found.max, found.steps

    def arpack(linear: Any, tol: float) -> tuple[float, float, int]:
        counted.clear()
        values = eigsh(linear, k=2, which="BE", tol=tol, v0=start, return_eigenvectors=False)
        return float(values.min()), float(values.max()), len(counted)

    def error(found: tuple[float, float, int]) -> float:
        return max(abs(found[0] / exact.min - 1), abs(found[1] / exact.max - 1))

    def loosest(run: Callable[[float], tuple[float, float, int]]) -> float:
        return next(tol for tol in TOLERANCES if error(run(tol)) <= ACCURACY)

    linear = LinearOperator((operator.dim, operator.dim), matvec=product, dtype=np.float32)
    of_ours, of_arpack = loosest(ours), loosest(lambda tol: arpack(linear, tol))
    contestants: dict[str, Callable[[], tuple[float, float, int]]] = {
        "hfproj": lambda: ours(of_ours),
        "scipy eigsh on hfproj's products": lambda: arpack(linear, of_arpack),
    }
    if curvlinops := peer("curvlinops"):
        theirs = curvlinops.HessianLinearOperator(head, nn.MSELoss(), parameters, [(h, target)])
        contestants["scipy eigsh on curvlinops"] = lambda: arpack(theirs.to_scipy(), of_arpack)
    found, results = take_turns(contestants, rounds)
    rows = []
    for name, measured in found.items():
        low, high, count = results[name]
        row = {"case": f"head, {activation}", "name": name, **measured, "min": low, "max": high}
        row["tolerance"] = of_ours if name == "hfproj" else of_arpack
        rows.append({**row, "products": count or None, "error": error(results[name])})
    return rows


def measure_metric(activation: str, dtype: torch.dtype, rounds: int) -> list[dict]:
    head, h, _ = head_and_data(activation)
    h = h[:METRIC_ROWS]
    exact = metric_condition_number(head, h).condition_number
    head, h = head.to(dtype), h.to(dtype)
    per_row = torch.func.vmap(torch.func.jacrev(lambda row: head(row[None])[0]))

    def plain() -> Tensor:
        sigma = torch.linalg.svdvals(per_row(h).detach())
        return (sigma[:, 0] / sigma[:, -1]).square()

    def ours() -> Tensor:
        return metric_condition_number(head, h, dtype=dtype).condition_number

    found, results = take_turns({"hfproj": ours, "vmap(jacrev) and svdvals": plain}, rounds)
    rows = []
    for name, measured in found.items():
        error = float(((results[name].double() - exact) / exact).abs().max())
        case = f"head, {activation}, {str(dtype).removeprefix('torch.')}"
        rows.append({"case": case, "name": name, **measured, "error": error})
    return rows


def table(title: str, rows: list[dict], columns: dict[str, str]) -> list[str]:
    """Return a table in Markdown; a column is its heading, key and format."""
    styles = [style.split("|") for style in columns.values()]
    lines = [f"## {title}", "", f"| {' | '.join(['case', 'by', *columns])} |", f"|---|---|{'---:|' * len(columns)}"]
    for row in rows:
        cells = ["–" if row[key] is None else format(row[key], style) for key, style in styles]
        lines.append(f"| {row['case']} | {row['name']} | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="a folder with the peers' packages")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.peers is not None:
        sys.path.append(str(args.peers.resolve()))
    torch.set_num_threads(1)
    content = {
        "products": measure_products(args.rounds),
        "eigenvalues": [row for name in ACTIVATIONS for row in measure_eigenvalues(name, max(2, args.rounds // 3))],
        "metric": [
            row
            for name, dtype in itertools.product(ACTIVATIONS, (torch.float32, torch.float64))
            for row in measure_metric(name, dtype, args.rounds)
        ],
        "settings": {
            "head": [IN_DIM, HIDDEN, OUT_DIM], "rows": ROWS, "metric_rows": METRIC_ROWS, "images": IMAGES,
            "accuracy": ACCURACY, "rounds": args.rounds, "threads": 1,
        },
        "versions": installed_versions(),
    }  # fmt: skip
    times = {
        "CPU s": "cpu_seconds|.3g",
        "wall s": "wall_seconds|.3g",
        "CPU ratio": "cpu_ratio|.2f",
        "wall ratio": "wall_ratio|.2f",
    }  # fmt: skip
    ends = {"tol": "tolerance|g", "products": "products|d", "min": "min|.5g", "max": "max|.5g", "error": "error|.1e"}
    lines = ["# Cost of the geometry of a head", "", "Written by `recipes/benchmarks/geometry.py`.", ""]
    lines += [
        f"Head {IN_DIM}-{HIDDEN}-{OUT_DIM}, {ROWS} rows ({METRIC_ROWS} for the metric), MSE, float32, one thread."
    ]
    lines += ["Ratios are to the first row of each case.", ""]
    lines += table("Hessian-vector product", content["products"], {**times, "difference": "difference|.1e"})
    lines += ["Difference: from the first product, relative. The graph of ours and of pyhessian's is built before.", ""]
    lines += table(f"Both extreme eigenvalues to {ACCURACY:g}", content["eigenvalues"], {**times, **ends})
    lines += [
        "In the parameters of the head. Each has its loosest tolerance of a list with which both are right to that.",
        "",
    ]
    lines += table(
        "Condition number of the pullback metric", content["metric"], {**times, "largest error": "error|.1e"}
    )
    write_json(OUT.with_suffix(".json"), content)
    write_atomic(OUT.with_suffix(".md"), ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
