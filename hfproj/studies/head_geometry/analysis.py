"""The geometry of the head of a saved adapter, written into its results.json and shown on its page."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn

from hfproj import geometry, plots
from hfproj.data import image_ops as ops
from hfproj.data import load_image_dataset
from hfproj.errors import UsageError
from hfproj.export import detach
from hfproj.files import command_line, rounded
from hfproj.functional.rows import unit_rows
from hfproj.hub import from_pretrained
from hfproj.probes import evaluate
from hfproj.reporting import report
from hfproj.results import Results
from hfproj.studies.head_geometry.models import features, pixels, turned

ANALYSIS = {
    "images": 64, "orbits": 6, "rotations": 12, "hessian_images": 16, "covariance_dims": 64, "head_images": 16,
}  # fmt: skip
# what an image is changed by → its strength ε, small, in degrees, pixels or fractions
TANGENTS: dict[str, tuple[float, Callable[[Tensor, Tensor], Tensor]]] = {
    "rotation": (2.0, lambda x, eps: ops.rotate_translate(x, eps, 0 * eps, 0 * eps)),
    "shift": (0.5, lambda x, eps: ops.rotate_translate(x, 0 * eps, eps, 0 * eps)),
    "brightness": (0.05, lambda x, eps: ops.adjust_brightness(x, 1 - eps)),
    "contrast": (0.05, lambda x, eps: ops.adjust_contrast(x, 1 - eps)),
}


def analyse(path: str, dataset: str, output_dir: str | None = None, *, head_only: bool = False) -> None:
    """Write the geometry of a saved adapter into its results.json, or a new one, and render the report.

    Args:
        path: The adapter, a folder or a Hub id.
        dataset: What `hfproj.load_image_dataset` takes.
        output_dir: Where to write; None takes the adapter's folder, or out/geometry for one on the Hub.
        head_only: Ask of the images nothing but their h, which is cheaper for large backbones.
    """
    folder = Path(output_dir or (path if Path(path).is_dir() else "out/geometry"))
    model = from_pretrained(path)
    images = load_image_dataset(dataset, split="test", limit=ANALYSIS["images"])
    there = [place for place in (folder, Path(path)) if (place / "results.json").is_file()]
    if there:
        results = Results.load(there[0])
    else:
        results = evaluate(model, probes=[], test=images, dataset=dataset)
        results.command = command_line()
    measure = of_the_head if head_only else under_changes
    results.geometry.update(rounded(measure(model, detach(model).eval(), images)))
    folder.mkdir(parents=True, exist_ok=True)
    results.save(folder)
    print("\n".join(f"{name}: {value:.4g}" for name, value in results.geometry["scalars"].items()))
    print(f"Saved to {report(folder)}, and into results.json beside it.")


def under_changes(model: nn.Module, head: nn.Module, images: datasets.Dataset) -> dict[str, Any]:
    """Return the geometry of a head on images and small changes of them, as `hfproj.Results.geometry` names it."""
    x, _ = pixels(model, images)
    h = features(model, x)
    z = geometry.head_orbits(head, h)
    conditions, scalars = _conditioning(head, h)
    moved = [
        geometry.augmentation_tangents(h, features(model, change(x, torch.full((len(x),), eps))), eps)
        for eps, change in TANGENTS.values()
    ]
    v = torch.stack(moved, 1)
    for name, ratios in zip(TANGENTS, geometry.metric_degeneracy(head, h, v).unbind(1)):
        scalars[f"degeneracy along {name} (0: forgotten, 1: average)"] = float(ratios.nanmedian())
    overlap = geometry.bottom_overlap(head, h, v)
    scalars["tangents in the bottom eigenspace, share"] = float(overlap.overlap.nanmedian())
    scalars["the same of random directions"] = float(overlap.chance.median())

    degrees = [360 * i / ANALYSIS["rotations"] for i in range(ANALYSIS["rotations"])]
    turning = features(model, turned(x[: ANALYSIS["orbits"]], degrees))
    both = {"h": turning.double(), "z": geometry.head_orbits(head, turning)}
    scalars["compression of rotation orbits"] = geometry.compression(both["h"], both["z"])
    scalars |= _hessian_ends(head, h, features(model, turned(x, [15.0])).squeeze(1))
    covariances = {layer: torch.cov(f[:, : ANALYSIS["covariance_dims"]].T) for layer, f in (("h", h), ("z", z))}
    return {
        "metric_condition_number": conditions,
        "orbits": {layer: plots.orbit_coordinates(unit_rows(f)) for layer, f in both.items()},
        "covariance": {layer: covariance.tolist() for layer, covariance in covariances.items()},
        "scalars": scalars,
    }


def of_the_head(model: nn.Module, head: nn.Module, images: datasets.Dataset) -> dict[str, Any]:
    """Return the spectrum of J, the conditioning of the metric and the curvature of a head at the h of some images."""
    x, _ = pixels(model, images.select(range(min(len(images), ANALYSIS["head_images"]))))
    h = features(model, x)
    singular = geometry.metric_spectrum(head, h).sqrt()
    fractions = singular / singular.sum(1, keepdim=True)
    conditions, scalars = _conditioning(head, h)
    return {
        "metric_condition_number": conditions,
        "jacobian": {"singular_values": singular.median(0).values.tolist()},
        "scalars": {
            "largest singular value of J (median)": float(singular[:, 0].median()),
            "effective rank of J (median)": float(torch.special.entr(fractions).sum(1).exp().median()),
            **scalars,
            **_hessian_ends(head, h, h.roll(1, 0)),  # towards another image
        },
    }


def _conditioning(head: nn.Module, h: Tensor) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return condition numbers of the metric after each layer, and scalars of the metric."""
    try:
        conditions = geometry.layerwise_condition_number(head, h)
    except UsageError:  # the head is no chain of layers
        conditions = {"z": geometry.metric_condition_number(head, h)}
    last = list(conditions.values())[-1]
    return {name: found.condition_number.tolist() for name, found in conditions.items()}, {
        "rank of the metric (median)": float(last.rank.double().median()),
        "nullity of the metric (median)": float(last.nullity.double().median()),
        "condition number of the metric (median)": float(last.condition_number.nanmedian()),
        "variation of the metric over samples": geometry.metric_variation(head, h),
    }


def _hessian_ends(head: nn.Module, h: Tensor, h_other: Tensor) -> dict[str, float]:
    """Return extreme eigenvalues of H_eff = G_L + M for L = ½‖z − t‖², t the projection of `h_other`.

    H_L is the identity there: what is negative comes from the head's own curvature, M.
    """
    rows = slice(0, ANALYSIS["hessian_images"])
    target = geometry.head_orbits(head, h_other[rows])
    hessian = geometry.EffectiveHessianOperator(head, lambda z: (z - target).square().sum(1) / 2, h[rows])
    found: dict[str, float] = {}
    for name, matvec in (("the effective Hessian", hessian.matvec), ("its part M", hessian.M)):
        ends = geometry.extreme_eigenvalues(matvec, hessian.dim, tol=1e-4)
        found |= {f"smallest eigenvalue of {name}": ends.min, f"largest eigenvalue of {name}": ends.max}
    return found
