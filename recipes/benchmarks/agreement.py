r"""How close objectives and regularizers are to public implementations, in value and gradient.

    pip install --no-deps --target peers lightly lightly_utils omegaconf solo-learn sentence-transformers \
        pytorch-metric-learning open_clip_torch jepa-science
    PYTHONPATH=peers python recipes/benchmarks/agreement.py

float64, batches of 5, 16 and 33 images (W-MSE: 16 and 32), widths of 3 and 24, three draws each; temperatures of 0.01,
0.2 and 10 where there is one; then the same numbers rounded to float16 and bfloat16, the peer still in float64. Writes
recipes/benchmarks/results/agreement.json and .md: the largest differences over all of them. A "formula" is one written
here, from the paper or the authors' code, for what no package has. Two minutes on one core.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import importlib.metadata
import itertools
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peer_losses as peers
import torch
from lightly import loss as lightly
from lightly.loss.hypersphere_loss import HypersphereLoss
from peer_losses import SLICES, Given, ranking, solo
from pytorch_metric_learning.losses import SupConLoss
from torch import Tensor, nn
from torch.nn import functional as F

import hfproj
from hfproj.files import installed_versions, write_atomic, write_json
from hfproj.objectives.base import Step

OUT = Path(__file__).resolve().parent / "results" / "agreement"
LIGHTLY, SOLO, ST, PML = "lightly", "solo-learn", "sentence-transformers", "pytorch-metric-learning"
FORMULA = "formula"
PACKAGES = (LIGHTLY, SOLO, ST, PML, "open_clip_torch", "jepa-science")
TEMPERATURES = (0.01, 0.2, 10.0)
SHAPES = tuple(itertools.product((5, 16, 33), (3, 24)))
WHITENED = ((16, 3), (32, 8))  # at least twice as many images as dimensions
DRAWS = 3

Loss = Callable[[Tensor], Tensor]
Pairs = dict[tuple[str, str], tuple[Loss, Loss]]


def draw_given(batch: int, width: int, temperature: float) -> Given:
    target, hard = (torch.randn(n, batch, width, dtype=torch.float64) for n in (2, 1))
    queue = F.normalize(torch.randn(2 * batch, width, dtype=torch.float64), dim=1)
    return Given(temperature, target, hard, queue, torch.arange(batch) % 3)


def objective(name: str, **options: object) -> Loss:
    made = hfproj.create_objective(name, **options).double()
    return lambda z: made(z, step=Step.at(0, 0, 0.0)).loss


def predicting(name: str, given: Given, **options: object) -> Loss:
    """Return an objective of predictions, the other view's projections given."""
    made = hfproj.create_objective(name, **options).double()
    return lambda p: made(given.target, prediction=p, target=given.target).loss


def queued(name: str, given: Given, **options: object) -> Loss:
    """Return MoCo of projections, or NNCLR of predictions, with the queue of `given`, which stays as it is."""
    rows, dim = given.queue.shape
    made = hfproj.create_objective(name, queue_size=rows, out_dim=dim, **options).double().eval()
    if name == "moco":
        made.queues[0].rows.copy_(given.queue)
        return lambda z: made(z, target=given.target).loss
    made.queue.rows.copy_(given.queue)
    return lambda p: made(given.target, prediction=p).loss


def regularizer(name: str, **options: object) -> Loss:
    made = hfproj.create_regularizer(name, **options)
    return lambda z: made(None, z, z, step=Step.at(0, 0, 0.0))


def on_weight(name: str, **options: object) -> Loss:
    """Return a regularizer of the weight of one linear layer, which is the first view."""
    made = hfproj.create_regularizer(name, **options)

    def term(z: Tensor) -> Tensor:
        layer = nn.Linear(z.shape[2], z.shape[1])
        del layer.weight
        layer.weight = z[0]
        return made(layer)

    return term


def deepcluster(given: Given) -> Loss:
    images, width = given.target.shape[1:]
    options = {"num_images": images, "out_dim": width, "prototypes": [3, 3], "temperature": given.temperature}
    made = hfproj.create_objective("deepcluster_v2", **options).double()
    made.centroids.copy_(given.queue[:6])
    made.assignments.copy_(torch.stack([given.labels, given.labels.flip(0)]))
    return lambda z: made(z, index=torch.arange(images)).loss


def contrastive(g: Given) -> Pairs:
    """Objectives with negatives."""
    t, labels = g.temperature, g.labels.repeat(2)
    tau = {"temperature": t}
    scales = {"log_inverse_temperature": torch.tensor(10.0).double().log(), "bias": torch.tensor(-10.0).double()}
    sigmoid = hfproj.create_objective("sigmoid")
    supcon = hfproj.create_objective("supcon", reduction="valid", **tau)
    simcse = hfproj.create_objective("simcse", hard_negatives=True, **tau)
    return {
        ("nt_xent", LIGHTLY): (objective("nt_xent", **tau), lambda z: lightly.NTXentLoss(temperature=t)(*z)),
        ("nt_xent", SOLO): (objective("nt_xent", **tau), lambda z: solo("simclr").simclr_loss_func(*z, temperature=t)),
        ("info_nce", ST): (objective("info_nce", **tau), lambda z: ranking(*z, symmetric=True, **tau)),
        ("info_nce, one direction", ST): (objective("info_nce", symmetric=False, **tau), lambda z: ranking(*z, **tau)),
        ("dcl", LIGHTLY): (objective("dcl", **tau), lambda z: lightly.DCLLoss(temperature=t)(*z)),
        ("dclw", LIGHTLY): (objective("dclw", **tau), lambda z: lightly.DCLWLoss(temperature=t)(*z)),
        ("supcon", PML): (
            lambda z: supcon(z, labels=g.labels).loss, lambda z: SupConLoss(temperature=t)(z.flatten(0, 1), labels),
        ),
        ("sigmoid", "open_clip_torch"): (lambda z: sigmoid(z, scales=scales).loss, peers.siglip),
        ("align_uniform", LIGHTLY): (objective("align_uniform", kernel_scale=1.0), lambda z: HypersphereLoss()(*z)),
        ("spectral", FORMULA): (objective("spectral"), peers.spectral),
        ("simcse", ST): (objective("simcse", **tau), lambda z: ranking(*z, **tau)),
        ("simcse, hard negatives", ST): (
            lambda z: simcse(torch.cat([z, g.hard.to(z.dtype)])).loss, lambda z: ranking(*z, g.hard[0], **tau),
        ),
        ("moco", SOLO): (queued("moco", g, **tau), lambda z: peers.solo_moco(z, g)),
        ("moco_v3", FORMULA): (predicting("moco_v3", g, **tau), lambda p: peers.moco_v3(p, g)),
        ("nnclr", SOLO): (queued("nnclr", g, **tau), lambda p: peers.solo_nnclr(p, g)),
    }  # fmt: skip


def without_negatives(g: Given) -> Pairs:
    """The other objectives, and groups of dimensions."""
    t, tau = g.temperature, {"temperature": g.temperature}
    swav = hfproj.create_objective("swav", **tau)
    dino = hfproj.create_objective("dino", prototypes=g.target.shape[2], warmup_epochs=0).double().eval()
    our_dino: Loss = lambda z: dino(z, scores=z, target=z.detach()).loss  # noqa: E731
    return {
        ("byol", LIGHTLY): (predicting("byol", g), lambda p: 4 + 4 * peers.negative_cosine(p, g.target)),
        ("simsiam", LIGHTLY): (predicting("simsiam", g), lambda p: peers.negative_cosine(p, g.target)),
        ("barlow_twins", LIGHTLY): (
            objective("barlow_twins", off_diagonal_weight=5e-3), lambda z: lightly.BarlowTwinsLoss(5e-3)(*z),
        ),
        ("vicreg", LIGHTLY): (objective("vicreg"), lambda z: lightly.VICRegLoss()(*z)),
        ("w_mse", LIGHTLY): (objective("w_mse", w_size=None), peers.whitened),
        ("zero_cl", FORMULA): (objective("zero_cl"), lambda z: peers.zero_cl(z, "imagenet")),
        ("zero_cl, cifar", FORMULA): (objective("zero_cl", variant="cifar"), lambda z: peers.zero_cl(z, "cifar")),
        ("lejepa, a local view", LIGHTLY): (
            lambda z: objective("lejepa", slices=SLICES, global_views=2)(torch.cat([z, g.hard.to(z.dtype)])),
            lambda z: peers.their_lejepa(z, g),
        ),
        ("swav", LIGHTLY): (
            lambda z: swav(z, scores=z).loss, lambda z: lightly.SwaVLoss(temperature=t)(list(z), []),
        ),
        ("deepcluster_v2", SOLO): (deepcluster(g), lambda z: peers.solo_deepcluster(z, g)),
        ("dino", LIGHTLY): (our_dino, peers.their_dino),
        ("dino", SOLO): (our_dino, peers.solo_dino),
        ("grouped", ST): (objective("grouped", groups=3, objective_options=tau), lambda z: peers.in_groups(z, t)),
    }  # fmt: skip


def regularizers(g: Given) -> Pairs:
    return {
        **{
            (f"regularizer bottleneck, α = {alpha}", FORMULA): (
                regularizer("bottleneck", alpha=float(alpha)), partial(peers.bottleneck, alpha=alpha),
            )
            for alpha in (1, 2, 3)
        },
        ("regularizer koleo", LIGHTLY): (regularizer("koleo"), lambda z: sum(lightly.KoLeoLoss()(view) for view in z)),
        ("regularizer orthogonality", FORMULA): (
            on_weight("orthogonality", side="WWt"), lambda z: peers.gram_gap(z[0].T) ** 2,
        ),
        ("regularizer sigreg", "jepa-science"): (regularizer("sigreg", slices=SLICES), peers.their_sigreg),
        ("regularizer sparse_head", FORMULA): (on_weight("sparse_head"), lambda z: sum(c.norm() for c in z[0].T)),
        ("regularizer vicreg_terms, sum", SOLO): (
            regularizer("vicreg_terms", variance_reduction="sum"), peers.solo_vicreg_terms,
        ),
        ("regularizer wasserstein", FORMULA): (regularizer("wasserstein"), peers.wasserstein),
        ("regularizer werank", FORMULA): (on_weight("werank"), lambda z: peers.gram_gap(z[0])),
    }  # fmt: skip


def pairs(g: Given) -> Pairs:
    """Return (method, whom it is compared with) → (ours, theirs)."""
    return contrastive(g) | without_negatives(g) | regularizers(g)


# What explains a difference above rounding, or what the two have to be given alike.
NOTES = {
    ("dino", LIGHTLY): "their schedule of temperatures is float32",
    ("lejepa, a local view", LIGHTLY): "the same directions; their Gaussian and weights are float32",
    ("regularizer sigreg", "jepa-science"): "the same directions",
    ("grouped", ST): "the same groups, each by their symmetric ranking loss",
    ("w_mse", LIGHTLY): "the same order of images",
    ("supcon", PML): "reduction='valid': theirs leaves out rows without a positive",
    ("nnclr", SOLO): "neighbours by distance there, by cosine here",
    ("regularizer wasserstein", FORMULA): "ours counts eigenvalues below 1e-12 as 1e-12, as many as there are missing",
}


def compare(key: tuple[str, str]) -> dict:
    """Return the largest differences over batches, widths, draws and temperatures."""
    found = dict.fromkeys(("value", "gradient", "half", "largest_value", "largest_gradient"), 0.0)
    for (batch, width), draw, t in itertools.product(
        WHITENED if key[0] == "w_mse" else SHAPES, range(DRAWS), TEMPERATURES
    ):
        torch.manual_seed(draw)
        z = torch.randn(2, batch, width, dtype=torch.float64, requires_grad=True)
        given = draw_given(batch, width, t)
        ours, theirs = pairs(given)[key]
        a, b = ours(z), theirs(z)
        da, db = (torch.autograd.grad(loss, z)[0] for loss in (a, b))
        numbers = {"value": (a - b).abs(), "gradient": (da - db).abs().max()}
        numbers |= {"largest_value": b.abs(), "largest_gradient": db.abs().max()}
        for dtype in (torch.float16, torch.bfloat16) if draw == 0 else ():
            rounded = z.detach().to(dtype)
            ours, theirs = pairs(given._replace(hard=given.hard.to(dtype).double()))[key]
            exact = theirs(rounded.double())
            numbers[f"half {dtype}"] = (ours(rounded).double() - exact).abs() / exact.abs().clamp_min(1)
        for name, value in numbers.items():
            name = name.partition(" ")[0]
            found[name] = max(found[name], value.item())
    return {"name": key[0], "peer": key[1], **found, "note": NOTES.get(key, "")}


def main() -> None:
    ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    rows = [compare(key) for key in pairs(draw_given(6, 3, 0.2))]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    content = {"peers": versions, "rows": rows, "temperatures": TEMPERATURES, "shapes": SHAPES}
    content["versions"] = installed_versions()
    lines = f"""# Agreement with public implementations

Written by `recipes/benchmarks/agreement.py`.

{", ".join(f"{name} {version}" for name, version in versions.items())}; a formula where none has it.

Largest absolute differences in float64 (value, gradient), the largest relative difference of the value on
float16 and bfloat16 inputs from theirs in float64 (half), the largest value and gradient there were.

| method | compared with | value | gradient | half | largest value | largest gradient | |
|---|---|---:|---:|---:|---:|---:|---|""".splitlines()
    for r in rows:
        numbers = [f"{r[name]:.1e}" for name in ("value", "gradient", "half")]
        numbers += [f"{r[name]:.3g}" for name in ("largest_value", "largest_gradient")]
        lines.append("| " + " | ".join([r["name"], r["peer"], *numbers, r["note"]]) + " |")
    write_json(OUT.with_suffix(".json"), content)
    write_atomic(OUT.with_suffix(".md"), ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
