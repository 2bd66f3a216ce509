"""What was recorded over training steps: diagnostics, h against z, and the extreme eigenvalues of a Hessian."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hfproj.checking import checked
from hfproj.errors import UsageError, unknown
from hfproj.heads.layers import is_layer_name
from hfproj.plots import canvas
from hfproj.plots.canvas import INK, LAYERS, TITLE, WIDTH, Figure, Target
from hfproj.plots.curves import centre, draw_curve, set_scale

Rows = Sequence[Mapping[str, Any]]  # of a history
# Base name → axis label where it is not the name as written; and those whose axis is logarithmic, or starts at 0.
_LABELS = {
    "rankme": "RankMe, in directions", "std": "representation std", "effective_rank": "effective rank, in directions",
    "stable_rank": "stable rank, in directions", "numerical_rank": "numerical rank, in directions",
    "participation_ratio": "participation ratio, in directions", "nesum": "NESum", "lidar": "LiDAR, in directions",
    "alpha_req": "α-ReQ, decay exponent ↓", "uniformity": "uniformity ↓", "alignment": "alignment ↓",
    "knn_overlap": "k-NN overlap with h before",
    "wasserstein_uniformity": "Wasserstein uniformity, at most 0", "whiteness": "whiteness, 0 is decorrelated",
    "positive_cosine": "cosine of positive pairs", "covariance_condition_number": "condition number",
    "metric_condition_number": "condition number of G", "eval_knn": "k-NN accuracy of held-out items ↑",
    "eval_rankme": "RankMe of held-out items, in directions", "eval_std": "representation std of held-out items",
    "eval_positive_cosine": "cosine of positive pairs of held-out items",
}  # fmt: skip
_CONDITIONS = ("condition_number", "covariance_condition_number", "metric_condition_number")
_LOGARITHMIC = (*_CONDITIONS, "update_ratio", "gradient_ratio", "timescale_ratio")
_NO_LAYER: dict[str, Any] = {"color": "0.25", "linestyle": "-", "marker": "."}
_FROM_ZERO = ("rankme", "std", "rank", "participation_ratio", "lidar")
_EIGENVALUES = {"lambda_max": "largest λ", "lambda_min": "smallest λ"}
_PARTS = {**LAYERS, "backbone": "backbone", "head": "head"}


@checked
def plot_history(
    rows: Rows, path: Target = None, *, metrics: Sequence[str] = ("rankme", "std"), of: str = "",
    references: Mapping[str, Mapping[str, float]] | None = None, start: bool = False, width: float = WIDTH,
) -> Figure:  # fmt: skip
    """Return a figure of metrics over training steps, one panel each, h against z.

    Rows of one step (of several seeds) are averaged, and a band shows one standard deviation; on a logarithmic axis
    (condition numbers and ratios that span a decade) both are of the logarithms.

    Args:
        rows: `Results.history`: a mapping per measured step with "step" and metrics ("rankme_h", "loss", …). A metric
            may be missing, None or NaN.
        metrics: Names without their layer ("rankme" draws "rankme_h" and "rankme_z"); see `metrics_of`. Those that no
            row has are left out.
        of: What features were measured of ("probe views"), for the titles of panels with h and z: the same measure of
            other rows is another number.
        references: Metric → text → value of a thin line to compare with, such as ``{"std": {"1/√dim": 0.09}}``.
        start: Draw a thin line at the value before training, of step 0, of each curve of h and z.
        path, width: File to write, whose suffix says the format (png, svg, pdf); width in inches, 4 to 40.

    Raises:
        HfprojError: If matplotlib is not installed.
        UsageError: If there is no row, one has no step, or none of the metrics was measured.

    Example:
        >>> rows = [{"step": s, "rankme_h": 30.0 - s, "rankme_z": 20.0 - s} for s in range(5)]
        >>> [axes.get_title(loc='left') for axes in plot_history(rows).axes]
        ['RankMe, in directions']
    """
    available = metrics_of(rows)
    chosen = [metric for metric in dict.fromkeys(metrics) if metric in available]
    if not chosen:
        raise unknown("metric", ", ".join(metrics), available)
    figure, axes = canvas.panels(len(chosen), width=width, height=2.3)
    handles: list[dict[str, Any]] = []
    for metric, panel in zip(chosen, axes):
        own: dict[str, Any] = {}
        style = canvas.styles(available[metric]) or {"": _NO_LAYER}
        names = {layer: f"{metric}_{layer}" if layer else metric for layer in style}
        log = metric in _LOGARITHMIC and _spans_a_decade(rows, names.values())
        for layer, look in style.items():
            x, y, std = over_steps(rows, names[layer], log=log)
            line = draw_curve(panel, x, y, std, style=look, log=log)
            if layer:
                own[_PARTS.get(layer, layer)] = line
            if start and layer in LAYERS and x[0] == 0 and len(x) > 1 and np.isfinite(y[0]):
                panel.hlines(y[0], x[0], x[-1], color=look["color"], linewidth=0.8, alpha=0.7, zorder=1.6)
            canvas.whole_numbers(panel, x)
        whose = of if set(style) & set(LAYERS) and not metric.startswith("eval_") else ""
        _label(panel, metric, whose, log=log, width=width)
        for text, value in (references or {}).get(metric, {}).items():
            _reference(panel, text, value)
        handles.append(own)
    _legend(figure, axes, handles)
    return canvas.finish(figure, path)


def _legend(figure: Any, axes: Sequence[Any], handles: Sequence[dict[str, Any]]) -> None:
    """Write one legend above all panels if it explains all of them, else one in the first panel of each kind."""
    largest = max(handles, key=len)
    if all(own and own.keys() <= largest.keys() for own in handles):
        return canvas.legend(figure, largest, columns=2)
    seen: list[set[str]] = []
    for panel, own in zip(axes, handles):
        if own and not any(own.keys() <= names for names in seen):
            seen.append(set(own))
            panel.legend(list(own.values()), list(own), loc="best", frameon=False, fontsize="small", handlelength=3.2)
    return None


def _reference(axes: Any, text: str, value: float) -> None:
    """Draw a dotted line with its text, within the panel."""
    low, high = axes.get_ylim()
    room = 0.12 * (high - low) if axes.get_yscale() == "linear" else 0.0
    axes.set_ylim(min(low, value), max(high, value + room))
    axes.axhline(value, color="0.35", linewidth=0.9, linestyle=(0, (1, 1.5)), zorder=1.5)
    place = {"xy": (0.99, value), "xycoords": ("axes fraction", "data"), "xytext": (0, 1.5)}
    axes.annotate(text, **place, textcoords="offset points", ha="right", va="bottom", fontsize="small", color="0.25")


def _spans_a_decade(rows: Rows, names: Iterable[str]) -> bool:
    """Return whether all values are positive, and the largest is more than ten times the smallest."""
    values = [row[name] for row in rows for name in names if _is_number(row.get(name))]
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)


def _label(axes: Any, metric: str, of: str, *, log: bool, width: float) -> None:
    label = _LABELS.get(metric, canvas.literal(metric.replace("_", " ")))
    if of:
        name, comma, unit = label.partition(",")
        label = f"{name} of {canvas.literal(of)}{comma}{unit}"
    smallest = np.nanmin(np.concatenate([line.get_ydata() for line in axes.get_lines()]))
    if log:
        canvas.log_scale(axes, "y")
        label += ", log scale"
    elif metric.endswith(_FROM_ZERO) and smallest >= 0:
        axes.set_ylim(bottom=0)
    columns = max(1, min(len(axes.figure.axes), int(width / 2.6)))
    axes.set_title(textwrap.fill(label, int(11 * width / columns)), **TITLE)  # letters an inch
    canvas.dress(axes, x="training step")


def metrics_of(rows: Rows) -> dict[str, list[str]]:
    """Return what was measured over steps: base name → its layers ("h", "head.0", "z") or parts ("backbone", "head").

    Extreme eigenvalues are left out, `plot_eigenvalues` draws them.

    Raises:
        UsageError: If there is no row, or one has no step.

    Example:
        >>> metrics_of([{"step": 0, "loss": 2.0, "std_h": 0.1, "std_z": 0.2}])
        {'loss': [], 'std': ['h', 'z']}
        >>> metrics_of([{"step": 0, "std_h": 0.1, "std_head.0": 0.2, "std_vision_model.layers.3": 0.3}])
        {'std': ['h', 'head.0', 'vision_model.layers.3']}
    """
    names = dict.fromkeys(name for row in check_rows(rows) for name, value in row.items() if _is_number(value))
    found: dict[str, list[str]] = {}
    of_layers = [name.removesuffix("h") for name in names if name.endswith("_h")]
    for name in names:
        base, _, layer = name.rpartition("_")
        stem = max((own for own in of_layers if name.startswith(own)), key=len, default=name)
        if any(letter.isdigit() for letter in name.removeprefix(stem)):  # a layer of the backbone
            base, layer = stem.rstrip("_"), name.removeprefix(stem)
            found.setdefault(base, []).append(layer)
            continue
        if name in ("step", "epoch", "seed") or name.startswith(tuple(_EIGENVALUES)):
            continue
        if base and (layer in _PARTS or is_layer_name(layer)):
            found.setdefault(base, []).append(layer)
        else:
            found.setdefault(name, [])
    return {base: sorted(layers) for base, layers in found.items()}


def over_steps(rows: Rows, name: str, *, log: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return steps, mean and standard deviation of a metric, as `centre`; none where every step was measured once."""
    by_step: dict[float, list[float]] = {}
    for row in sorted((row for row in rows if name in row), key=lambda row: row["step"]):
        by_step.setdefault(row["step"], []).append(row[name] if _is_number(row[name]) else np.nan)
    found = [centre(np.array(values, dtype=np.float64)[:, None], log=log) for values in by_step.values()]
    mean, std = np.array(found, dtype=np.float64).reshape(-1, 2).T
    several = any(len(values) > 1 for values in by_step.values())
    return np.array(list(by_step), dtype=np.float64), mean, std if several else None


def check_rows(rows: Rows) -> Rows:
    """Return the rows, each with a step."""
    if not rows:
        raise UsageError("There is no history to draw: no step was measured.")
    for row in rows:
        if not isinstance(row, Mapping) or not _is_number(row.get("step")):
            raise UsageError(f"Expected each row of the history with a number 'step', got {row!r:.80}.")
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@checked
def plot_eigenvalues(rows: Rows, path: Target = None, *, of: str = "", width: float = WIDTH) -> Figure:
    """Return a figure of λ_min and λ_max of the loss's Hessian over steps.

    The axis is symmetric logarithmic, so that a small negative eigenvalue is seen beside a large positive one. Below
    the zero line the loss has a direction of negative curvature: the point is no minimum.

    Args:
        rows: `Results.history`: mappings with "step" and "lambda_min" or "lambda_max", and their bounds of error
            "lambda_min_error", "lambda_max_error" where they are known (drawn as bars).
        of: In what the Hessian was taken ("the head's parameters", "h"), for the axis.
        path, width: File to write, whose suffix says the format (png, svg, pdf); width in inches, 4 to 40.

    Raises:
        HfprojError: If matplotlib is not installed.
        UsageError: If there is no row, one has no step, or none has an eigenvalue.

    Example:
        >>> rows = [{"step": s, "lambda_min": -0.1, "lambda_max": 4.0} for s in range(3)]
        >>> plot_eigenvalues(rows).axes[0].get_yscale()
        'symlog'
    """
    check_rows(rows)
    figure, [axes] = canvas.new_figure(width=width, height=3.8)
    style = dict(zip(_EIGENVALUES, canvas.styles(["h", "z"]).values()))
    drawn, handles = [], {}
    for name, label in _EIGENVALUES.items():
        x, y, std = over_steps(rows, name)
        if not np.isfinite(y).any():
            continue
        handles[label] = draw_curve(axes, x, y, std, style=style[name])
        bounds = dict(zip(*over_steps(rows, f"{name}_error")[:2]))
        error = np.nan_to_num([bounds.get(step, 0.0) for step in x])
        if error.any():
            axes.errorbar(x, y, error, fmt="none", ecolor=style[name]["color"], elinewidth=1, capsize=2.5)
        drawn.append(y)
        canvas.whole_numbers(axes, x)
    if not drawn:
        raise UsageError("No row of the history has 'lambda_min' or 'lambda_max'.")
    values = np.concatenate(drawn)
    set_scale(axes, "y", "symlog", values)
    low, high = axes.dataLim.intervaly  # bars of error included
    axes.axhline(0, color=INK, linewidth=1)
    axes.set_ylim(min(2.5 * low, -np.nanmax(np.abs(values)) * 1e-5), max(2.5 * high, 0))
    if np.nanmin(values) < 0:
        handles["negative curvature"] = axes.axhspan(axes.get_ylim()[0], 0, color="0.93", linewidth=0, zorder=0)
    axes.set_title(f"Hessian of the loss{f' in {canvas.literal(of)}' if of else ''}", **TITLE)
    canvas.dress(axes, x="training step", y="eigenvalue (symmetric log scale)")
    canvas.legend(figure, handles, columns=3)
    return canvas.finish(figure, path)
