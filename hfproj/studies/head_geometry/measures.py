"""What the head does to representations under rotation: probes, curvature, orbits, and the depth of the head.

Images are scikit-learn's handwritten digits, which have an upright position, so that rotation is a nuisance with a
meaning. Each experiment returns its settings and rows, one for each model and seed, and draws its figures.
"""

import statistics
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from sklearn.base import ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from hfproj import geometry, plots
from hfproj.functional.rows import unit_rows
from hfproj.studies.head_geometry import figures, models
from hfproj.studies.head_geometry.models import kept_features, load, pixels, turned
from hfproj.studies.head_geometry.study import Study

PROBES: dict[str, Any] = {"train": 500, "test": 300, "C": 0.1, "mlp_width": 256, "mlp_epochs": 30}
SWEEP: dict[str, Any] = {"images": 100, "degrees": 45.0, "points": 10}
ORBITS = {"classes": 5, "images": 3, "rotations": 12, "draws": 10}
CONDITIONED_IMAGES = 64


def guillotine(study: Study) -> dict[str, Any]:
    """Compare what probes read from h and from z: which of four rotations, and the class of upright images."""
    rows = _rows(study, "guillotine", probed, models.MODELS)
    figures.guillotine(rows, study.out)
    return {"settings": PROBES, "rows": rows}


def probed(study: Study, name: str, seed: int) -> dict[str, float]:
    """Return how well probes tell four rotations, and the class of upright images, from h and from z."""
    model, head = load(study, name, seed)
    parts: dict[str, dict[str, Any]] = {}
    for split in ("train", "test"):
        x, labels = pixels(model, study.images(split, PROBES[split]))
        h = kept_features(study, model, turned(x, (0.0, 90.0, 180.0, 270.0)), name, seed, f"quarters-{split}")
        parts[split] = {"h": h.double(), "z": geometry.head_orbits(head, h), "labels": labels}
    found = {}
    for layer in ("h", "z"):
        quarters, upright = [], []
        for part in parts.values():
            f = part[layer]
            quarters += [f.flatten(0, 1), torch.arange(4).repeat(len(f))]
            upright += [f[:, 0], part["labels"]]
        linear = LogisticRegression(C=PROBES["C"], max_iter=1000)
        mlp = MLPClassifier((PROBES["mlp_width"],), max_iter=PROBES["mlp_epochs"], random_state=seed)
        found[f"rotation_linear_{layer}"] = _accuracy(linear, *quarters)
        found[f"rotation_mlp_{layer}"] = _accuracy(mlp, *quarters)
        found[f"label_linear_{layer}"] = _accuracy(linear, *upright)
    return found


def _accuracy(probe: ClassifierMixin, f: Tensor, y: Tensor, f_test: Tensor, y_test: Tensor) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the MLP trains for a set number of epochs
        return make_pipeline(StandardScaler(), probe).fit(f.numpy(), y.numpy()).score(f_test.numpy(), y_test.numpy())


def curvature(study: Study) -> dict[str, Any]:
    """Compare the local curvature of a sweep of rotations in h and in z."""
    rows = _rows(study, "curvature", bent, models.COMPARED)
    figures.curvature(rows, study.out)
    return {"settings": SWEEP, "rows": rows}


def bent(study: Study, name: str, seed: int) -> dict[str, float]:
    """Return the local curvature of a sweep of rotations in h and in z, and their ratio."""
    model, head = load(study, name, seed)
    x, _ = pixels(model, study.images("test", SWEEP["images"]))
    degrees = torch.linspace(0, SWEEP["degrees"], SWEEP["points"]).tolist()
    h = kept_features(study, model, turned(x, degrees), name, seed, "sweep")
    found = {"h": geometry.local_curvature(h), "z": geometry.local_curvature(geometry.head_orbits(head, h))}
    return {**{f"curvature_{layer}": value for layer, value in found.items()}, "ratio": found["z"] / found["h"]}


def orbits(study: Study) -> dict[str, Any]:
    """Compare how far h and z move while an image turns by 360°."""
    rows = _rows(study, "orbits", orbited, models.MODELS)
    figures.orbits(rows, study.out)
    return {"settings": ORBITS, "rows": rows}


def orbited(study: Study, name: str, seed: int) -> dict[str, Any]:
    """Return the sizes of orbits of rotation in h and in z, and in z of h of unit length, as in the paper's script."""
    model, head = load(study, name, seed)
    test = study.images("test")
    labels = torch.tensor(test["label"])
    known = labels.unique()
    classes = known[torch.linspace(0, len(known) - 1, ORBITS["classes"]).long()].tolist()
    count = ORBITS["images"] * ORBITS["draws"]
    chosen = [(labels == label).nonzero().flatten()[:count].tolist() for label in classes]
    x, _ = pixels(model, test.select([i for rows in chosen for i in rows]))
    degrees = [360 * i / ORBITS["rotations"] for i in range(ORBITS["rotations"])]
    h = kept_features(study, model, turned(x, degrees), name, seed, "orbits")
    h = h.unflatten(0, (len(classes), count)).double()
    z, z_unit = (geometry.head_orbits(head, h, normalize_input=unit) for unit in (False, True))
    found: dict[str, Any] = {"classes": classes}
    for layer, f in (("h", h), ("z", z), ("z_unit_input", z_unit)):
        draws = [geometry.orbit_metrics(part) for part in f.split(ORBITS["images"], dim=1)]
        for measure in draws[0]._fields:
            found[f"{measure}_{layer}"] = statistics.mean(getattr(draw, measure) for draw in draws)
    found["compression"] = geometry.compression(h, z)
    found["compression_unit_input"] = geometry.compression(h, z_unit)
    found["alignment_gain"] = geometry.alignment_gain(h, z)
    if seed == 0:  # one image of every other class, for the picture
        found["planes"] = {layer: plots.orbit_coordinates(unit_rows(f[::2, 0])) for layer, f in (("h", h), ("z", z))}
    return found


def depth(study: Study) -> dict[str, Any]:
    """Compare heads of one to three layers: the conditioning of their metric, and what a probe reads behind them."""
    names = models.DEPTHS
    rows = _rows(study, "depth", conditioned, names)
    probes = _rows(study, "guillotine", probed, names)
    figures.depth(rows, probes, study.out)
    return {"rows": rows}


def conditioned(study: Study, name: str, seed: int) -> dict[str, Any]:
    """Return the conditioning of the pullback metric after each layer of the head, at some test images."""
    model, head = load(study, name, seed)
    x, _ = pixels(model, study.images("test", CONDITIONED_IMAGES))
    h = kept_features(study, model, x, name, seed, "upright")
    layers = geometry.layerwise_condition_number(head, h)
    last = list(layers.values())[-1]
    return {
        "condition_number": float(last.condition_number.median()),
        "nullity": int(last.nullity.max()),
        "variation": geometry.metric_variation(head, h),
        "layers": {layer: found.condition_number.tolist() for layer, found in layers.items()},
    }


def _rows(
    study: Study, what: str, measure: Callable[[Study, str, int], dict[str, Any]], names: Iterable[str]
) -> list[dict[str, Any]]:
    """Return a measurement of each model and seed."""
    return [
        study.kept(what, {"model": name, "seed": seed}, partial(measure, study, name, seed))
        for seed in study.seeds
        for name in names
    ]
