"""How close objectives and regularizers are to lightly's, in value and gradient.

    pip install --no-deps lightly lightly_utils omegaconf
    python recipes/benchmarks/agreement.py

float64, batches of 5, 16 and 33 images (W-MSE: 16 and 32), widths of 3 and 24, three draws each; temperatures of 0.01,
0.2 and 10 where there is one. Writes recipes/benchmarks/results/agreement.json and .md: the largest absolute difference
over all of them, with the largest value and gradient beside it. What lightly does not have is compared with formulas
written anew in the tests.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import lightly
import torch
from lightly import loss as peer
from lightly.loss.hypersphere_loss import HypersphereLoss
from torch import Tensor

import hfproj
from hfproj.results import installed_versions, write_atomic

OUT = Path(__file__).resolve().parent / "results" / "agreement"
TEMPERATURES = (0.01, 0.2, 10.0)
SHAPES = tuple(itertools.product((5, 16, 33), (3, 24)))
DRAWS = 3
COUNT = 12  # prototypes

Loss = Callable[[Tensor], Tensor]


def ours(name: str, **options: object) -> Loss:
    objective = hfproj.create_objective(name, **options).double()
    return lambda z: objective(z).loss


def against(target: Tensor, name: str) -> Loss:
    """Return an objective of predictions, the other view's projections given."""
    objective = hfproj.create_objective(name)
    return lambda p: objective(target, prediction=p, target=target).loss


def unit_scores(z: Tensor) -> Tensor:
    """Return cosines of z with fixed prototypes."""
    prototypes = torch.randn(COUNT, z.shape[-1], generator=torch.Generator().manual_seed(1), dtype=z.dtype)
    return torch.nn.functional.normalize(z, dim=-1) @ torch.nn.functional.normalize(prototypes, dim=-1).T


def swav(z: Tensor, t: float) -> Tensor:
    objective = hfproj.create_objective("swav", temperature=t)
    return objective(z, scores=unit_scores(z)).loss


def dino(z: Tensor) -> Tensor:
    objective = hfproj.create_objective("dino", prototypes=COUNT, warmup_epochs=0).double()
    scores = unit_scores(z)
    return objective(z, scores=scores, target=scores[:2].detach()).loss


def their_dino(z: Tensor) -> Tensor:
    loss = peer.DINOLoss(output_dim=COUNT, teacher_temp=0.07, warmup_teacher_temp_epochs=0).double()
    scores = unit_scores(z)
    return loss(list(scores[:2].detach()), list(scores), epoch=1)


def their_swav(z: Tensor, t: float) -> Tensor:
    return peer.SwaVLoss(temperature=t)(list(unit_scores(z)), [])


def whitened(z: Tensor) -> Tensor:
    """Return lightly's W-MSE with the images in their order, as ours has them with w_size=None."""
    loss = peer.WMSELoss(embedding_dim=z.shape[-1], w_size=z.shape[1]).double()
    order = torch.arange(z.shape[1])
    with mock.patch("torch.randperm", return_value=order):
        return loss(z.flatten(0, 1))


def negative_cosine(target: Tensor, p: Tensor) -> Tensor:
    loss = peer.NegativeCosineSimilarity()
    return (loss(p[0], target[1]) + loss(p[1], target[0])) / 2


def koleo(z: Tensor) -> Tensor:
    regularizer = hfproj.create_regularizer("koleo", on="z")
    return regularizer(None, z, z)


def pairs(target: Tensor, t: float) -> dict[str, tuple[Loss, Loss]]:
    """Return name → (ours, theirs)."""
    return {
        "nt_xent": (ours("nt_xent", temperature=t), lambda z: peer.NTXentLoss(temperature=t)(*z)),
        "dcl": (ours("dcl", temperature=t), lambda z: peer.DCLLoss(temperature=t)(*z)),
        "dclw": (ours("dclw", temperature=t), lambda z: peer.DCLWLoss(temperature=t)(*z)),
        "align_uniform": (ours("align_uniform", kernel_scale=1.0), lambda z: HypersphereLoss()(*z)),
        "byol": (against(target, "byol"), lambda p: 4 + 4 * negative_cosine(target, p)),
        "simsiam": (against(target, "simsiam"), lambda p: negative_cosine(target, p)),
        "barlow_twins": (
            ours("barlow_twins", off_diagonal_weight=5e-3),
            lambda z: peer.BarlowTwinsLoss(lambda_param=5e-3)(*z),
        ),
        "vicreg": (ours("vicreg"), lambda z: peer.VICRegLoss()(*z)),
        "w_mse": (ours("w_mse", w_size=None), whitened),
        "swav": (lambda z: swav(z, t), lambda z: their_swav(z, t)),
        "dino": (dino, their_dino),
        "regularizer koleo": (koleo, lambda z: peer.KoLeoLoss()(z[0]) + peer.KoLeoLoss()(z[1])),
    }


def compare(name: str, shapes: tuple[tuple[int, int], ...]) -> dict:
    found = {"name": name, "value": 0.0, "gradient": 0.0, "largest_value": 0.0, "largest_gradient": 0.0}
    for (batch, width), draw, t in itertools.product(shapes, range(DRAWS), TEMPERATURES):
        torch.manual_seed(draw)
        z = torch.randn(2, batch, width, dtype=torch.float64, requires_grad=True)
        target = torch.randn(2, batch, width, dtype=torch.float64)
        a, b = (function(z) for function in pairs(target, t)[name])
        da, db = (torch.autograd.grad(loss, z)[0] for loss in (a, b))
        for key, value in (
            ("value", (a - b).abs()),
            ("gradient", (da - db).abs().max()),
            ("largest_value", b.abs()),
            ("largest_gradient", db.abs().max()),
        ):
            found[key] = max(found[key], value.item())
    return found


def main() -> None:
    rows = []
    for name in pairs(torch.zeros(2, 2, 2), 0.2):
        shapes = ((16, 3), (32, 8)) if name == "w_mse" else SHAPES
        rows.append(compare(name, shapes))
    content = {"lightly": lightly.__version__, "rows": rows, "temperatures": TEMPERATURES, "shapes": SHAPES}
    content["versions"] = installed_versions()
    lines = [f"# Agreement with lightly {lightly.__version__}", "", "Written by `recipes/benchmarks/agreement.py`.", ""]
    lines += ["Largest absolute differences in float64, and the largest value and gradient there were.", ""]
    lines += ["| method | value | gradient | largest value | largest gradient |", "|---|---:|---:|---:|---:|"]
    for r in rows:
        lines.append(
            f"| {r['name']} | {r['value']:.1e} | {r['gradient']:.1e} | {r['largest_value']:.3g} "
            f"| {r['largest_gradient']:.3g} |"
        )
    write_atomic(OUT.with_suffix(".json"), (json.dumps(content, indent=1) + "\n").encode())
    write_atomic(OUT.with_suffix(".md"), ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
