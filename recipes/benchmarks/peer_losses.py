"""The losses of public implementations, called on views as ours are; formulas for what no package has.

Not a recipe: `agreement.py` beside it compares them with ours.
"""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch
from jepa_science.sigreg import sigreg_loss
from lightly import loss as lightly
from lightly.loss.lejepa_loss import SIGReg
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.nn import functional as F

from hfproj.functional.distributions import random_directions
from hfproj.objectives.base import Step
from hfproj.objectives.grouped import draw_groups

SLICES = 32


class Given(NamedTuple):
    """What beside z a loss is given: a temperature, and other tensors of the same batch."""

    temperature: float
    target: Tensor
    hard: Tensor
    queue: Tensor
    labels: Tensor


def solo(name: str, package: str = "solo", folder: str = "losses/") -> ModuleType:
    """Return a file of solo-learn's losses (or of another package) without the package, which asks for more of them."""
    places = importlib.util.find_spec(package).submodule_search_locations
    spec = importlib.util.spec_from_file_location(f"{package}_{name}", Path(places[0]) / f"{folder}{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
