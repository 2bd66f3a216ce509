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
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch
from jepa_science.sigreg import sigreg_loss
from lightly import loss as lightly
from lightly.loss.hypersphere_loss import HypersphereLoss
from lightly.loss.lejepa_loss import SIGReg
from pytorch_metric_learning.losses import SupConLoss
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.nn import functional as F

import hfproj
from hfproj.files import installed_versions, write_atomic, write_json
from hfproj.functional.distributions import random_directions
from hfproj.objectives.base import Step
from hfproj.objectives.grouped import draw_groups

OUT = Path(__file__).resolve().parent / "results" / "agreement"
LIGHTLY, SOLO, ST, PML = "lightly", "solo-learn", "sentence-transformers", "pytorch-metric-learning"
FORMULA = "formula"
PACKAGES = (LIGHTLY, SOLO, ST, PML, "open_clip_torch", "jepa-science")
TEMPERATURES = (0.01, 0.2, 10.0)
SHAPES = tuple(itertools.product((5, 16, 33), (3, 24)))
WHITENED = ((16, 3), (32, 8))  # at least twice as many images as dimensions
DRAWS = 3
SLICES = 32

Loss = Callable[[Tensor], Tensor]


class Given(NamedTuple):
    """What beside z a loss is given: a temperature, and other tensors of the same batch."""

    temperature: float
    target: Tensor
    hard: Tensor
    queue: Tensor
    labels: Tensor


def draw_given(batch: int, width: int, temperature: float) -> Given:
    target, hard = (torch.randn(n, batch, width, dtype=torch.float64) for n in (2, 1))
    queue = F.normalize(torch.randn(2 * batch, width, dtype=torch.float64), dim=1)
    return Given(temperature, target, hard, queue, torch.arange(batch) % 3)


def solo(name: str, package: str = "solo", folder: str = "losses/") -> ModuleType:
    """Return a file of solo-learn's losses (or of another package) without the package, which asks for more of them."""
    places = importlib.util.find_spec(package).submodule_search_locations
    spec = importlib.util.spec_from_file_location(f"{package}_{name}", Path(places[0]) / f"{folder}{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


class Embeddings(nn.Module):
    """What sentence-transformers takes for a model: here sentences are their embeddings already."""

    forward = staticmethod(lambda features: features)


def ranking(*views: Tensor, temperature: float, symmetric: bool = False) -> Tensor:
    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"} if symmetric else {}
    loss = MultipleNegativesRankingLoss(Embeddings(), scale=1 / temperature, **both)
    return loss([{"sentence_embedding": view} for view in views], None)


def whitened(z: Tensor) -> Tensor:
    """Return lightly's W-MSE with the images in their order, as ours has them with w_size=None."""
    loss = lightly.WMSELoss(embedding_dim=z.shape[-1], w_size=z.shape[1]).double()
    with mock.patch("torch.randperm", return_value=torch.arange(z.shape[1])):
        return loss(z.flatten(0, 1))


def directions(z: Tensor) -> Tensor:
    return random_directions(z[0], SLICES, generator=Step.at(0, 0, 0.0).generator)


def their_lejepa(z: Tensor, given: Given) -> Tensor:
    with mock.patch.object(SIGReg, "_generate_unit_vectors", return_value=directions(z)):
        return lightly.LeJEPALoss().double()(global_proj=z, local_proj=given.hard)


def their_sigreg(z: Tensor) -> Tensor:
    with mock.patch("jepa_science.sigreg._sample_directions", return_value=directions(z)):
        return sigreg_loss(z, SLICES).mean()


def their_dino(z: Tensor) -> Tensor:
    loss = lightly.DINOLoss(output_dim=z.shape[-1], teacher_temp=0.07, warmup_teacher_temp_epochs=0).double()
    return loss(list(z.detach()), list(z), epoch=1)


def solo_dino(z: Tensor) -> Tensor:
    loss = solo("dino").DINOLoss(z.shape[-1], 0.07, 0.07, 0, 2).double()
    return loss(z.flatten(0, 1), z.detach().flatten(0, 1))


def negative_cosine(p: Tensor, target: Tensor) -> Tensor:
    loss = lightly.NegativeCosineSimilarity()
    return (loss(p[0], target[1]) + loss(p[1], target[0])) / 2


def solo_moco(z: Tensor, given: Given) -> Tensor:
    query, key = F.normalize(z[0], dim=1), F.normalize(given.target[1], dim=1)
    return solo("moco").moco_loss_func(query, key, given.queue.T, given.temperature)


def solo_nnclr(p: Tensor, given: Given) -> Tensor:
    """Neighbours by Euclidean distance of unit rows."""
    unit = F.normalize(given.target, dim=-1)
    near = [given.queue[torch.cdist(view, given.queue).argmin(1)] for view in unit]
    loss = solo("nnclr").nnclr_loss_func
    return (loss(near[0], p[1], given.temperature) + loss(near[1], p[0], given.temperature)) / 2


def solo_deepcluster(z: Tensor, given: Given) -> Tensor:
    scores = torch.stack([F.normalize(z, dim=-1) @ part.T for part in given.queue[:6].split(3)])
    assignments = torch.stack([given.labels, given.labels.flip(0)])
    return solo("deepclusterv2").deepclusterv2_loss_func(scores, assignments, given.temperature)


def solo_vicreg_terms(z: Tensor) -> Tensor:
    vicreg = solo("vicreg")
    return 25 * vicreg.variance_loss(*z) + vicreg.covariance_loss(*z)


def siglip(z: Tensor) -> Tensor:
    loss = solo("loss", "open_clip", "").SigLipLoss()
    return loss(*F.normalize(z, dim=-1), logit_scale=10.0, logit_bias=-10.0)


def in_groups(z: Tensor, temperature: float) -> Tensor:
    groups = draw_groups(z.shape[2], 3, z.shape[2] // 3, Step.at(0, 0, 0.0).generator)
    return sum(ranking(*z[..., group], temperature=temperature, symmetric=True) for group in groups)


def spectral(z: Tensor) -> Tensor:
    """HaoChen et al., eq. 6: pairs of other images one by one."""
    a, b = z
    n = len(a)
    others = [(a[i] @ b[j]) ** 2 for i in range(n) for j in range(n) if i != j]
    return -2 * sum(a[i] @ b[i] for i in range(n)) / n + sum(others) / len(others)


def moco_v3(p: Tensor, given: Given) -> Tensor:
    """moco-v3's ``contrastive_loss`` of both directions: cross-entropy times 2τ."""
    p, k = F.normalize(p, dim=-1), F.normalize(given.target, dim=-1)
    t, own = given.temperature, torch.arange(p.shape[1])
    return sum(2 * t * F.cross_entropy(q @ key.T / t, own) for q, key in ((p[0], k[1]), (p[1], k[0])))


def zero_cl(z: Tensor, variant: str) -> Tensor:
    """Zero-CL's scripts by features: standardise, whiten by a root of the inverse covariance held still, correlate."""
    views = []
    for x in z:
        x = x - x.mean(0)
        if variant == "imagenet":
            x = x / (x.std(0) + 1e-4)
            covariance, eps = x.T @ x / len(x), 0.01
        else:
            x = F.batch_norm(x, None, None, training=True)
            covariance, eps = 0.9 * x.T @ x / (len(x) - 1) + 0.1 * torch.eye(x.shape[1], dtype=x.dtype), 1e-5
        u, s, _ = torch.linalg.svd(covariance.detach())
        views.append(x @ (u * (s + eps).rsqrt()) @ u.T)
    return ((views[0] * views[1]).mean(0) - 1).square().sum()


def bottleneck(h: Tensor, alpha: int) -> Tensor:
    """Matrix mutual information of h with itself by matrix powers; α = 1 by eigenvalues."""
    u = F.normalize(h.flatten(0, 1), dim=1)
    k = u @ u.T / len(u)

    def entropy(matrix: Tensor) -> Tensor:
        if alpha == 1:
            values = torch.linalg.eigvalsh(matrix).clamp_min(1e-300)
            return -(values * values.log()).sum()
        return torch.linalg.matrix_power(matrix, alpha).trace().log() / (1 - alpha)

    return 2 * entropy(k) - entropy(len(u) * k * k)


def wasserstein(z: Tensor) -> Tensor:
    """Fang et al. ``metric.py``, by singular values of centred unit rows instead of ``eig``."""
    u = F.normalize(z.flatten(0, 1), dim=1)
    mean, dim = u.mean(0), u.shape[1]
    roots = torch.linalg.svdvals(u - mean) / len(u) ** 0.5
    return (mean @ mean + 1 + roots.square().sum() - 2 / dim**0.5 * roots.sum()).sqrt()


def gram_gap(w: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(w.T @ w - torch.eye(w.shape[1], dtype=w.dtype))


def pairs(g: Given) -> dict[tuple[str, str], tuple[Loss, Loss]]:
    """Return (method, whom it is compared with) → (ours, theirs)."""
    t, width = g.temperature, g.target.shape[2]
    tau = {"temperature": t}
    scales = {"log_inverse_temperature": torch.tensor(10.0).double().log(), "bias": torch.tensor(-10.0).double()}
    made = {
        "sigmoid": hfproj.create_objective("sigmoid"),
        "swav": hfproj.create_objective("swav", **tau),
        "dino": hfproj.create_objective("dino", prototypes=width, warmup_epochs=0).double().eval(),
        "supcon": hfproj.create_objective("supcon", reduction="valid", **tau),
        "simcse": hfproj.create_objective("simcse", hard_negatives=True, **tau),
    }

    def our_dino(z: Tensor) -> Tensor:
        return made["dino"](z, scores=z, target=z.detach()).loss

    return {
        ("nt_xent", LIGHTLY): (objective("nt_xent", **tau), lambda z: lightly.NTXentLoss(temperature=t)(*z)),
        ("nt_xent", SOLO): (objective("nt_xent", **tau), lambda z: solo("simclr").simclr_loss_func(*z, temperature=t)),
        ("info_nce", ST): (objective("info_nce", **tau), lambda z: ranking(*z, symmetric=True, **tau)),
        ("info_nce, one direction", ST): (objective("info_nce", symmetric=False, **tau), lambda z: ranking(*z, **tau)),
        ("dcl", LIGHTLY): (objective("dcl", **tau), lambda z: lightly.DCLLoss(temperature=t)(*z)),
        ("dclw", LIGHTLY): (objective("dclw", **tau), lambda z: lightly.DCLWLoss(temperature=t)(*z)),
        ("supcon", PML): (
            lambda z: made["supcon"](z, labels=g.labels).loss,
            lambda z: SupConLoss(temperature=t)(z.flatten(0, 1), g.labels.repeat(2)),
        ),
        ("sigmoid", "open_clip_torch"): (lambda z: made["sigmoid"](z, scales=scales).loss, siglip),
        ("align_uniform", LIGHTLY): (objective("align_uniform", kernel_scale=1.0), lambda z: HypersphereLoss()(*z)),
        ("spectral", FORMULA): (objective("spectral"), spectral),
        ("simcse", ST): (objective("simcse", **tau), lambda z: ranking(*z, **tau)),
        ("simcse, hard negatives", ST): (
            lambda z: made["simcse"](torch.cat([z, g.hard.to(z.dtype)])).loss, lambda z: ranking(*z, g.hard[0], **tau),
        ),
        ("moco", SOLO): (queued("moco", g, **tau), lambda z: solo_moco(z, g)),
        ("moco_v3", FORMULA): (predicting("moco_v3", g, **tau), lambda p: moco_v3(p, g)),
        ("nnclr", SOLO): (queued("nnclr", g, **tau), lambda p: solo_nnclr(p, g)),
        ("byol", LIGHTLY): (predicting("byol", g), lambda p: 4 + 4 * negative_cosine(p, g.target)),
        ("simsiam", LIGHTLY): (predicting("simsiam", g), lambda p: negative_cosine(p, g.target)),
        ("barlow_twins", LIGHTLY): (
            objective("barlow_twins", off_diagonal_weight=5e-3),
            lambda z: lightly.BarlowTwinsLoss(lambda_param=5e-3)(*z),
        ),
        ("vicreg", LIGHTLY): (objective("vicreg"), lambda z: lightly.VICRegLoss()(*z)),
        ("w_mse", LIGHTLY): (objective("w_mse", w_size=None), whitened),
        ("zero_cl", FORMULA): (objective("zero_cl"), lambda z: zero_cl(z, "imagenet")),
        ("zero_cl, cifar", FORMULA): (objective("zero_cl", variant="cifar"), lambda z: zero_cl(z, "cifar")),
        ("lejepa, a local view", LIGHTLY): (
            lambda z: objective("lejepa", slices=SLICES, global_views=2)(torch.cat([z, g.hard.to(z.dtype)])),
            lambda z: their_lejepa(z, g),
        ),
        ("swav", LIGHTLY): (
            lambda z: made["swav"](z, scores=z).loss, lambda z: lightly.SwaVLoss(temperature=t)(list(z), []),
        ),
        ("deepcluster_v2", SOLO): (deepcluster(g), lambda z: solo_deepcluster(z, g)),
        ("dino", LIGHTLY): (our_dino, their_dino),
        ("dino", SOLO): (our_dino, solo_dino),
        ("grouped", ST): (objective("grouped", groups=3, objective_options=tau), lambda z: in_groups(z, t)),
        **{
            (f"regularizer bottleneck, α = {alpha:.0f}", FORMULA): (
                regularizer("bottleneck", alpha=alpha), lambda z, alpha=alpha: bottleneck(z, int(alpha)),
            )
            for alpha in (1.0, 2.0, 3.0)
        },
        ("regularizer koleo", LIGHTLY): (regularizer("koleo"), lambda z: sum(lightly.KoLeoLoss()(view) for view in z)),
        ("regularizer orthogonality", FORMULA): (
            on_weight("orthogonality", side="WWt"), lambda z: gram_gap(z[0].T) ** 2,
        ),
        ("regularizer sigreg", "jepa-science"): (regularizer("sigreg", slices=SLICES), their_sigreg),
        ("regularizer sparse_head", FORMULA): (on_weight("sparse_head"), lambda z: sum(c.norm() for c in z[0].T)),
        ("regularizer vicreg_terms, sum", SOLO): (
            regularizer("vicreg_terms", variance_reduction="sum"), solo_vicreg_terms,
        ),
        ("regularizer wasserstein", FORMULA): (regularizer("wasserstein"), wasserstein),
        ("regularizer werank", FORMULA): (on_weight("werank"), lambda z: gram_gap(z[0])),
    }  # fmt: skip


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
    torch.set_num_threads(1)
    rows = [compare(key) for key in pairs(draw_given(6, 3, 0.2))]
    peers = {name: importlib.metadata.version(name) for name in PACKAGES}
    content = {"peers": peers, "rows": rows, "temperatures": TEMPERATURES, "shapes": SHAPES}
    content["versions"] = installed_versions()
    lines = ["# Agreement with public implementations", "", "Written by `recipes/benchmarks/agreement.py`.", ""]
    lines += [f"{', '.join(f'{name} {version}' for name, version in peers.items())}; a formula where none has it.", ""]
    lines += [
        "Largest absolute differences in float64 (value, gradient), the largest relative difference of the value on"
    ]
    lines += [
        "float16 and bfloat16 inputs from theirs in float64 (half), the largest value and gradient there were.",
        "",
    ]
    lines += ["| method | compared with | value | gradient | half | largest value | largest gradient | |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|---|"]
    for r in rows:
        numbers = [f"{r[name]:.1e}" for name in ("value", "gradient", "half")]
        numbers += [f"{r[name]:.3g}" for name in ("largest_value", "largest_gradient")]
        lines.append("| " + " | ".join([r["name"], r["peer"], *numbers, r["note"]]) + " |")
    write_json(OUT.with_suffix(".json"), content)
    write_atomic(OUT.with_suffix(".md"), ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
