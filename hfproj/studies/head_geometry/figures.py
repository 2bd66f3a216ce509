"""The figures of the study, drawn from what results.json holds, so that they can be drawn again without a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hfproj import plots
from hfproj.plots.curves import centre
from hfproj.studies.head_geometry import models
from hfproj.studies.head_geometry.study import mean_std, values_of

Rows = Sequence[Mapping[str, Any]]
HEADS = ("linear", "ReLU", "GELU", "SiLU")
CONDITIONS = {"lora": "depth_condition", "head": "depth_condition_head_only"}  # what was trained → file


def draw(found: Mapping[str, Any], out: Path) -> None:
    """Draw every figure whose numbers are there.

    Args:
        found: What results.json holds of one data set.
        out: Folder of the figures.
    """
    for name, drawn in {"guillotine": guillotine, "curvature": curvature, "orbits": orbits}.items():
        if name in found:
            drawn(found[name]["rows"], out)
    if "depth" in found and "guillotine" in found:
        depth(found["depth"]["rows"], found["guillotine"]["rows"], out)
    if "collapse" in found:
        parts = found["collapse"]
        collapse(parts["sgd"], parts["flow"], parts["equilibrium"], out)
    if "hessian" in found:
        hessian(found["hessian"]["runs"], out)


def guillotine(rows: Rows, out: Path) -> None:
    """Draw what probes read of rotations from h and from z."""
    for probe in ("linear", "mlp"):
        groups = {name: _pair(rows, name, f"rotation_{probe}") for name in models.COMPARED}
        plots.plot_groups(groups, f"accuracy on four rotations, {probe} probe", out / f"guillotine_{probe}.png")


def curvature(rows: Rows, out: Path) -> None:
    """Draw the curvature of a sweep in h and in z."""
    groups = {name: _pair(rows, name, "curvature") for name in models.COMPARED}
    plots.plot_groups(groups, "local curvature of a rotation sweep", out / "curvature.png")


def orbits(rows: Rows, out: Path) -> None:
    """Draw the orbits of a few images, and how far they are contracted."""
    drawn = next(row for row in rows if row["model"] == "rotated views")
    names = [f"class {label}" for label in drawn["classes"][::2]]
    plots.plot_orbits(drawn["planes"], out / "orbits.png", names=names)
    inputs = {"h as it is": "compression", "h of unit length": "compression_unit_input"}
    groups = {
        name: {shown: _geometric(values_of(rows, measure, model=name)) for shown, measure in inputs.items()}
        for name in models.COMPARED
    }
    plots.plot_groups(groups, "spread of h / spread of z", out / "compression.png", y_scale="log")


def depth(rows: Rows, probes: Rows, out: Path) -> None:
    """Draw what a probe reads behind heads of one to three layers, and the conditioning of their metric."""
    names = sorted(models.DEPTHS, key=lambda name: models.MODELS[name].depth)
    shown = {f"depth {models.MODELS[name].depth}, {models.MODELS[name].trained}": name for name in names}
    groups = {key: _pair(probes, shown[key], "rotation_linear") for key in sorted(shown, key=lambda key: key[::-1])}
    plots.plot_groups(groups, "accuracy on four rotations, linear probe", out / "depth.png")
    first = {row["model"]: row["layers"] for row in reversed(rows)}  # of the first seed
    for trained, file in CONDITIONS.items():
        values = {
            f"depth {models.MODELS[name].depth}: {layer}": sample
            for name in names
            if models.MODELS[name].trained == trained
            for layer, sample in first[name].items()
            if not layer.endswith("act")
        }
        if values:
            plots.plot_metric_condition(values, out / f"{file}.png")


def collapse(sgd: Rows, flow: Rows, equilibria: Rows, out: Path) -> None:
    """Draw the spread of z under SGD and in the flow, and the smallest eigenvalue at constructed equilibria."""
    for norm, name in ((None, "without"), ("batch", "with")):
        curves = {head: over(sgd, "steps", "std_z", log=True, head=head, norm=norm) for head in HEADS}
        path = out / f"collapse_sgd_{name}_batchnorm.png"
        plots.plot_curves(curves, "step of SGD", "std of unit rows of z", path, y_scale="log")
    curves = {head: over(flow, "times", "std_z", log=True, head=head) for head in HEADS if head != "GELU"}
    path = out / "collapse_flow.png"
    plots.plot_curves(curves, "time, in 1/learning rate", "std of unit rows of z", path, y_scale="log")
    curves = {head: over(equilibria, "alpha", "lambda_min", head=head) for head in HEADS}
    plots.plot_curves(
        curves, "residual α", "smallest eigenvalue of the Hessian in h", out / "collapse_equilibrium.png",
        x_scale="log", y_scale="symlog", zero_line=True,
    )  # fmt: skip


def hessian(rows: Rows, out: Path) -> None:
    """Draw the extreme eigenvalues of the Hessian in h along training."""
    drawn = [
        {"step": step, "lambda_min": low, "lambda_max": high}
        for row in rows
        if (row["head"], row["start"]) == ("SiLU", "collapsed")
        for step, low, high in zip(row["step"], row["lambda_min_h"], row["lambda_max_h"])
    ]
    plots.plot_eigenvalues(drawn, out / "hessian.png", of="h")
    kinds = dict.fromkeys((row["head"], row["start"]) for row in rows)
    curves = {
        f"{head}, {start} start": over(rows, "step", "lambda_min_h", head=head, start=start) for head, start in kinds
    }
    plots.plot_curves(
        curves, "step of SGD", "smallest eigenvalue of the Hessian in h", out / "hessian_smallest.png",
        y_scale="symlog", zero_line=True,
    )  # fmt: skip


def over(rows: Rows, x: str, y: str, *, log: bool = False, **which: Any) -> tuple[list, list, list]:
    """Return x, mean and standard deviation over seeds of y of the rows that have the values in `which`.

    With `log` both are of logarithms, as a logarithmic axis shows them.

    Example:
        >>> rows = [{"seed": seed, "step": [0], "std": [value]} for seed, value in enumerate((1.0, 100.0))]
        >>> [round(part[0], 3) for part in over(rows, "step", "std", log=True)[:2]]  # the geometric mean
        [0, 10.0]
    """
    mean, std = centre(np.array(values_of(rows, y, **which), dtype=np.float64), log=log)
    return values_of(rows, x, **which)[0], mean.tolist(), std.tolist()


def _geometric(values: Sequence[float]) -> tuple[float, float]:
    mean, std = centre(np.array(values, dtype=np.float64)[:, None], log=True)
    return mean.item(), std.item()


def _pair(rows: Rows, name: str, measure: str) -> dict[str, tuple[float, float]]:
    """Return mean and standard deviation over seeds of a measure of h and of z."""
    return {layer: mean_std(values_of(rows, f"{measure}_{layer}", model=name)) for layer in ("h", "z")}
