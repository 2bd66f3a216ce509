"""What paper 1 measures of a head: probes for rotations, orbits, curvature, its metric, whitening of the loss."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hfproj import geometry
from hfproj.errors import NotMeasurableError
from hfproj.features.views import FixedViews
from hfproj.objectives import create_objective
from hfproj.probes.registry import make_probe
from hfproj.reproduction import Column
from hfproj.reproduction.measures import Trained, register_measure
from hfproj.reproduction.setting import active_head
from hfproj.studies.head_geometry.models import features, turned

QUARTERS = (0.0, 90.0, 180.0, 270.0)
IMAGES = {"bank": 1_000, "test": 1_000, "sweep": 100, "metric": 64, "orbits": 150}
SWEEP = torch.linspace(0, 45, 10).tolist()
ANCHORS, BATCH = 16, 64  # of the effective Hessian: rows whose h moves, rows of the batch
EPSILON = 1.0  # degrees, of a tangent


def _kept(trained: Trained, key: str, compute: Callable[[], Any]) -> Any:
    """Return what was computed for another column of the same run."""
    kept = trained.__dict__.setdefault("_kept", {})
    if key not in kept:
        kept[key] = compute()
    return kept[key]


def turned_features(trained: Trained, split: str, images: int, degrees: tuple[float, ...] | list[float]) -> Tensor:
    """Return h of images under rotations, ``[images, rotations, dim]``."""

    def compute() -> Tensor:
        data = getattr(trained.splits, split)
        rows = data.select(range(min(images, len(data))))
        size = trained.setting.scale.views.get("size")
        collator = trained.setting.source.pixels(trained.model, size)
        x = torch.cat([_unnormalised(collator, rows, start) for start in range(0, len(rows), 500)])
        return features(trained.model, turned(x, degrees))

    return _kept(trained, f"{split} {images} {degrees}", compute)


def _unnormalised(collator: Any, rows: Any, start: int) -> Tensor:
    batch = collator([rows[i] for i in range(start, min(start + 500, len(rows)))])["pixel_values"]
    return batch * collator.std.view(-1, 1, 1) + collator.mean.view(-1, 1, 1)


def _layer(trained: Trained, h: Tensor, layer: str) -> Tensor:
    return h.double() if layer == "h" else geometry.head_orbits(_head(trained), h)


def _head(trained: Trained) -> Any:
    return active_head(trained.model).eval()


@register_measure("rotation", needs=("probe",))
def rotation(trained: Trained, column: Column) -> float:
    """Accuracy of a linear or an MLP probe for four rotations, of 1,000 test images, fitted on 1,000 others."""
    parts = []
    for split, images in (("train", IMAGES["bank"]), ("test", IMAGES["test"])):
        f = _layer(trained, turned_features(trained, split, images, QUARTERS), column.layer).float()
        parts += [f.flatten(0, 1), torch.arange(4).repeat(len(f))]
    options = {"l2": 1e-2} if column.options["probe"] == "linear" else {}
    return make_probe({"name": column.options["probe"], **options}).fit(*parts[:2]).score(*parts[2:])


@register_measure("rotation_gap")
def rotation_gap(trained: Trained, column: Column) -> float:
    """What a linear probe for four rotations reads from h more than from z."""
    both = [
        rotation(trained, Column(name="", measure="", layer=layer, options={"probe": "linear"})) for layer in ("h", "z")
    ]
    return both[0] - both[1]


@register_measure("curvature")
def curvature(trained: Trained, column: Column) -> float:
    """Local curvature of a sweep of rotations, 0 to 45° in ten steps."""
    return geometry.local_curvature(
        _layer(trained, turned_features(trained, "test", IMAGES["sweep"], SWEEP), column.layer)
    )


@register_measure("orbits", needs=("of",), may=("unit_input",))
def orbits(trained: Trained, column: Column) -> float:
    """Spread of orbits, their compression by the head, or D_inter / D_intra: ``options={"of": …}``."""
    labels = trained.labels("label", "test")
    count = IMAGES["orbits"] // 5
    rows = torch.cat([(labels == label).nonzero().flatten()[:count] for label in labels.unique()[:5]])
    if len(rows) < 5 * count:
        count = min((labels == label).sum().item() for label in labels.unique()[:5])
        rows = torch.cat([(labels == label).nonzero().flatten()[:count] for label in labels.unique()[:5]])
    degrees = [360 * i / 12 for i in range(12)]

    def compute() -> Tensor:
        data = trained.splits.test.select(rows.tolist())
        collator = trained.setting.source.pixels(trained.model, trained.setting.scale.views.get("size"))
        return features(trained.model, turned(_unnormalised(collator, data, 0), degrees))

    h = _kept(trained, "orbits", compute).unflatten(0, (5, count)).double()
    if column.options["of"] == "compression":
        z = geometry.head_orbits(_head(trained), h, normalize_input=column.options.get("unit_input", False))
        return geometry.compression(h, z)
    f = h if column.layer == "h" else geometry.head_orbits(_head(trained), h)
    draws = [geometry.orbit_metrics(part) for part in f.split(3, dim=1)]
    return statistics.mean(getattr(draw, column.options["of"]) for draw in draws)


@register_measure("metric", needs=("of",))
def metric(trained: Trained, column: Column) -> float:
    """Of the head's pullback metric at 64 test images: "variation", "condition" on its support, or "nullity"."""
    h = trained.of("test")[: IMAGES["metric"]]
    if column.options["of"] == "variation":
        return geometry.metric_variation(_head(trained), h)
    found = geometry.metric_condition_number(_head(trained), h)
    return float(
        {"condition": found.condition_number, "nullity": found.nullity.double()}[column.options["of"]].median()
    )


@register_measure("degeneracy")
def degeneracy(trained: Trained, column: Column) -> float:
    """r(v) of the head's metric along the rotation of an image by 1°: 0 annihilated, 1 an average direction."""
    h = turned_features(trained, "test", IMAGES["metric"], (0.0, EPSILON)).double()
    v = geometry.augmentation_tangents(h[:, 0], h[:, 1], EPSILON)
    return float(geometry.metric_degeneracy(_head(trained), h[:, 0], v).nanmean())


@register_measure("whitening")
def whitening(trained: Trained, column: Column) -> float:
    """Isotropy of the effective Hessian Jᵀ ∇²_z L J of single rows of a batch of test views: 1/r to 1."""

    def compute() -> list[Tensor]:
        views = trained.setting.source.views(trained.model, **{**trained.setting.preset.views, "seed": 0})
        h = (
            FixedViews(trained.splits.test, views, images=BATCH, batch_size=BATCH)
            .features(trained.model, None)[0]
            .double()
        )
        head = _head(trained)
        options = {name: value for name, value in trained.setting.preset.objective.items() if name != "name"}
        dense = {"tile_rows": None} if trained.setting.preset.objective["name"] == "nt_xent" else {}
        objective = create_objective(trained.setting.preset.objective["name"], **options, **dense)
        z = geometry.head_orbits(head, h)
        J = geometry.jacobian(head, h[0, :ANCHORS])
        return [J[i].T @ _row_hessian(objective, z, i) @ J[i] for i in range(min(ANCHORS, h.shape[1]))]

    scores = [_score(matrix) for matrix in _kept(trained, "whitening", compute)]
    return statistics.mean(scores)


def _row_hessian(objective: Any, z: Tensor, row: int) -> Tensor:
    """Return ∇² of the batch's loss, times the rows, in z of one row of the first view, ``[dim, dim]``."""

    def loss(one: Tensor) -> Tensor:
        moved = z.clone()
        moved[0, row] = one
        return objective(moved).loss * z.shape[1]

    return torch.autograd.functional.hessian(loss, z[0, row])


def _score(matrix: Tensor) -> float:
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2).clamp_min(0)
    values = values[values > 1e-6 * values.max()]
    if not len(values):
        raise NotMeasurableError("the Hessian of the loss vanishes")
    return (values.sum() ** 2 / (len(values) * values.square().sum())).item()
