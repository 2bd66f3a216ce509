"""Named curves and points with a spread: over a quantity, over layers, in groups; and the spectrum of a covariance."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hfproj.checking import checked
from hfproj.errors import UsageError, unknown
from hfproj.plots import canvas
from hfproj.plots.canvas import LAYERS, WIDTH, Figure, Target, as_array, as_mapping
from hfproj.typing import OneOf

SCALES = ("linear", "log", "symlog")
Scale = OneOf["linear", "log", "symlog"]


@checked
def plot_curves(
    curves: Mapping[str, Any], x_label: str, y_label: str, path: Target = None, *, x_scale: Scale = "linear",
    y_scale: Scale = "linear", x_ticks: Mapping[float | int, str] | None = None, zero_line: bool = False,
    width: float = WIDTH,
) -> Figure:  # fmt: skip
    """Return a figure of named curves.

    Args:
        curves: Name → `(x, y)` or `(x, mean of y, standard deviation of y)`; the deviation is drawn as a band, on a
            logarithmic axis from y/e^(std/y) to y·e^(std/y). None and NaN leave a gap. Curves named "h" and "z" look
            as in every other figure.
        x_label: What x is, with its unit; `y_label` the same for y.
        x_scale: "linear", "log" or "symlog". A logarithmic axis leaves out what is not positive.
        y_scale: The same for y; the threshold of "symlog" is chosen from the numbers.
        x_ticks: Place on x → what stands there, in place of round numbers: the points of a sweep, say.
        zero_line: Draw a line at y = 0.
        path, width: File to write, whose suffix says the format (png, svg, pdf); width in inches, 4 to 40.

    Raises:
        HfprojError: If matplotlib is not installed.
        UsageError: If there is no curve, the parts of one differ in length or hold no number that can be drawn, a scale
            is unknown, or a tick is not on it.

    Example:
        >>> figure = plot_curves({"SiLU": ([1, 2, 3], [0.5, 0.2, 0.1], [0.1, 0.1, 0.0])}, "step", "loss")
        >>> figure.axes[0].get_xlabel()
        'step'
    """
    for scale in (x_scale, y_scale):
        if scale not in SCALES:
            raise unknown("scale", scale, SCALES)
    for place in x_ticks or ():
        if not np.isfinite(place) or (x_scale == "log" and place <= 0):
            raise UsageError(f"Expected x_ticks at places on the {x_scale} axis, got {place}; leave it out.")
    figure, [axes] = canvas.new_figure(width=width, height=3.8)
    drawn = {name: _as_curve(name, parts) for name, parts in as_mapping(curves, "curves: name → (x, y)").items()}
    style, handles = canvas.styles(drawn), {}
    for name, (x, y, std) in drawn.items():
        x, y = (np.where(v > 0, v, np.nan) if s == "log" else v for v, s in ((x, x_scale), (y, y_scale)))
        if not (np.isfinite(x) & np.isfinite(y)).any():
            raise UsageError(f"The curve {name!r} has no point to draw on a {y_scale} scale of y and {x_scale} of x.")
        label = canvas.layer_name(name)
        look = {**style[name], "label": label}
        handles[label] = draw_curve(axes, x, y, std, style=look, log=y_scale == "log")
    every_x, every_y = (np.concatenate([parts[i] for parts in drawn.values()]) for i in (0, 1))
    set_scale(axes, "x", x_scale, every_x)
    set_scale(axes, "y", y_scale, every_y)
    if x_ticks:
        axes.set_xticks(list(x_ticks), [canvas.literal(text) for text in x_ticks.values()])
        axes.set_xticks([], minor=True)
    elif x_scale == "linear":
        canvas.whole_numbers(axes, every_x)
    canvas.dress(axes, x=canvas.literal(x_label), y=canvas.literal(y_label), zero_line=zero_line)
    if len(drawn) > 1 or not {"h", "z", y_label.split(" (")[0]} >= set(drawn):
        canvas.legend(figure, handles)
    return canvas.finish(figure, path)


def draw_curve(
    axes: Any, x: np.ndarray, y: np.ndarray, std: np.ndarray | None, *, style: Mapping[str, Any], log: bool = False
) -> Any:
    """Draw a line with its band and markers, which would hide it where they are many; return the line."""
    look = {**style, "marker": style["marker"] if len(x) <= 30 else None, "markersize": 4.5, "linewidth": 1.7}
    [line] = axes.plot(x, y, **look)
    if std is not None:
        axes.fill_between(x, *ends(y, std, log=log), color=style["color"], alpha=0.18, linewidth=0)
    return line


def centre(values: np.ndarray, *, log: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation over the first of two axes, such as seeds; of one row 0.

    With `log`, of logarithms: the geometric mean m, and m·s of their deviation s, so that `ends` are m/e^s and m·e^s.
    NaN, and with `log` what is not positive, leave a gap.
    """
    values = np.log(np.where(values > 0, values, np.nan)) if log else values
    mean, std = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros_like(values[0])
    return (np.exp(mean), np.exp(mean) * std) if log else (mean, std)


def ends(y: np.ndarray, std: np.ndarray, *, log: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return where a band about y ends: y ± std; on a logarithmic axis y/e^s and y·e^s with s = std/y.

    s is to first order the deviation of the logarithm. Both ends are then equally far from y on the axis and positive,
    where y − std could lie below 0, and the band would have no lower end.
    """
    if not log:
        return y - std, y + std
    y = np.where(y > 0, y, np.nan)
    factor = np.exp(std / y)
    return y / factor, y * factor


def set_scale(axes: Any, which: str, scale: str, values: np.ndarray) -> None:
    """Scale the x or y axis; "symlog" is linear below the smallest size among `values`, at most four decades down."""
    if scale == "log":
        canvas.log_scale(axes, which)
    elif scale == "symlog":
        sizes = np.abs(values[np.isfinite(values) & (values != 0)])
        smallest = max(sizes.min(), sizes.max() * 1e-4) if sizes.size else 1.0
        getattr(axes, f"set_{which}scale")("symlog", linthresh=10.0 ** np.floor(np.log10(smallest)))


def _as_curve(name: str, parts: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    if isinstance(parts, str | Mapping) or not hasattr(parts, "__len__") or len(parts) not in (2, 3):
        raise UsageError(f"Expected the curve {name!r} as (x, y) or (x, mean, standard deviation), got {parts!r:.80}.")
    what = f"x, y and deviation of the curve {name!r}"
    x, y, *std = (as_array(part, what, shape="[points]", dims=1) for part in parts if part is not None)
    if any(part.shape != x.shape for part in (y, *std)):
        raise UsageError(f"Expected {what} in one length, got {[len(part) for part in (x, y, *std)]}.")
    return x, y, std[0] if std else None


@checked
def plot_layers(curves: Mapping[str, Any], y_label: str, path: Target = None, *, width: float = WIDTH) -> Figure:
    """Return a figure of what was measured of each layer, a curve a name.

    Args:
        curves: Name → layer → number or `(mean, standard deviation)`; deviations are drawn as bands. Layers stand in
            the order of the first curve that has them; a curve may lack some.
        y_label: What the numbers are, with their unit.
        path, width: File to write, whose suffix says the format (png, svg, pdf); width in inches, 4 to 40.

    Raises:
        HfprojError: If matplotlib is not installed.
        UsageError: If there is no curve or an empty one, fewer than two layers, or a value that is not a number.

    Example:
        >>> figure = plot_layers({"20-NN": {"block_1": 0.4, "h": 0.8, "z": (0.7, 0.02)}}, "accuracy")
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['block_1', 'h', 'z']
    """
    figure, [axes] = canvas.new_figure(width=width, height=3.8)
    table = _as_pairs(curves, "curves: name → layer → number", "layers")
    layers = list(dict.fromkeys(layer for of in table.values() for layer in of))
    if len(layers) < 2:
        raise UsageError(f"Expected at least two layers, got {layers}.")
    style, handles = canvas.styles(table), {}
    for name, of in table.items():
        mean, std = np.array([of.get(layer, (np.nan, 0.0)) for layer in layers]).T
        line = draw_curve(axes, np.arange(len(layers)), mean, std if std.any() else None, style=style[name])
        handles[canvas.literal(name)] = line
    canvas.name_ticks(axes, layers)
    canvas.dress(axes, x="layer", y=canvas.literal(y_label))
    canvas.legend(figure, handles)
    return canvas.finish(figure, path)


@checked
def plot_groups(
    groups: Mapping[str, Any], y_label: str, path: Target = None, *, y_scale: Scale = "linear", zero_line: bool = False,
    width: float = WIDTH,
) -> Figure:  # fmt: skip
    """Return a figure of points with error bars, grouped along x.

    Args:
        groups: Group → series → `(mean, standard deviation)`, or a number without a deviation. A group may lack a
            series; series named "h" and "z" look as in every other figure. Bars reach as far as bands of `plot_curves`.
        y_label: What the numbers are, with their unit.
        y_scale: "linear", "log" or "symlog".
        zero_line: Draw a line at y = 0.
        path, width: File to write, whose suffix says the format (png, svg, pdf); width in inches, 4 to 40.

    Raises:
        HfprojError: If matplotlib is not installed.
        UsageError: If there is no group or an empty one, a value is not a number, or the scale is unknown.

    Example:
        >>> groups = {"linear": {"h": (0.92, 0.01), "z": (0.90, 0.02)}, "mlp": {"h": 0.94, "z": 0.85}}
        >>> [label.get_text() for label in plot_groups(groups, "accuracy").axes[0].get_xticklabels()]
        ['linear', 'mlp']
    """
    if y_scale not in SCALES:
        raise unknown("scale", y_scale, SCALES)
    figure, [axes] = canvas.new_figure(width=width, height=3.8)
    table = _as_pairs(groups, "groups: name → series", "series")
    names = list(dict.fromkeys(name for series in table.values() for name in series))
    style, handles = canvas.styles(names), {}
    step = 0.7 / max(len(names), 3)
    for i, name in enumerate(names):
        places = [p + (i - (len(names) - 1) / 2) * step for p, series in enumerate(table.values()) if name in series]
        mean, std = np.array([series[name] for series in table.values() if name in series]).T
        look = {**style[name], "linestyle": "", "markersize": 7, "elinewidth": 1.4, "capsize": 3.5}
        bars = np.abs(np.array(ends(mean, std, log=y_scale == "log")) - mean) if std.any() else None
        handles[canvas.layer_name(name)] = axes.errorbar(places, mean, bars, **look)
    set_scale(axes, "y", y_scale, np.array([mean for series in table.values() for mean, _ in series.values()]))
    canvas.name_ticks(axes, list(table))
    axes.set_xlim(-0.55, len(table) - 0.45)
    for between in range(1, len(table)):
        axes.axvline(between - 0.5, color="0.85", linewidth=0.8, zorder=0)
    canvas.dress(axes, y=canvas.literal(y_label), grid="y", zero_line=zero_line)
    if len(names) > 1 or names[0] not in LAYERS:
        canvas.legend(figure, handles)
    return canvas.finish(figure, path)


def _as_pairs(values: Any, outer: str, inner: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Return name → name → mean and standard deviation; a number alone has none."""
    table: dict[str, dict[str, tuple[float, float]]] = {}
    for group, own in as_mapping(values, outer).items():
        for name, value in as_mapping(own, f"{inner} of {group!r}").items():
            given = value if np.ndim(value) else [value]
            pair = as_array(given, f"{name!r} of {group!r}", shape="(mean, std)", dims=1)
            if pair.size > 2 or not np.isfinite(pair).all() or pair[1:].min(initial=0) < 0:
                raise UsageError(f"Expected {name!r} of {group!r} as (mean, deviation ≥ 0), got {value!r:.80}.")
            table.setdefault(group, {})[name] = (float(pair[0]), float(pair[1]) if pair.size > 1 else 0.0)
    return table


_SPECTRA: dict[str, dict[str, Any]] = {
    "h before": {"color": "#56B4E9", "linestyle": (0, (5, 2))},
    "h after": {"color": "#0072B2", "linestyle": "-"},
    "z before": {"color": "#E69F00", "linestyle": (0, (1, 1.4))},
    "z after": {"color": "#D55E00", "linestyle": (0, (7, 1.6, 1.2, 1.6))},
}


@checked
def plot_spectrum(spectra: Mapping[str, Any], path: Target = None, *, width: float = WIDTH) -> Figure:
    """Return a figure of covariance eigenvalues (logarithmic) against their rank.

    A curve that falls off the lower edge has no variance in the remaining dimensions (dimensional collapse).

    Args:
        spectra: Curve name → eigenvalues sorted descending, as `Results.spectra` ("h before", "h after", "z before",
            "z after"; other names work too).
        path, width: File to write, whose suffix says the format (png, svg, pdf); width in inches, 4 to 40.

    Raises:
        HfprojError: If matplotlib is not installed.
        UsageError: If there is no spectrum, or one without a positive number.

    Example:
        >>> plot_spectrum({"h after": [1.0, 0.5, 0.1]}).axes[0].get_yscale()
        'log'
    """
    figure, [axes] = canvas.new_figure(width=width, height=4.0)
    curves = {name: _as_spectrum(name, values) for name, values in spectra.items()}
    if not curves:
        raise UsageError("There is no spectrum to draw.")
    looks = _SPECTRA | canvas.styles(name for name in curves if name not in _SPECTRA)
    for name in sorted(curves, key=lambda n: list(_SPECTRA).index(n) if n in _SPECTRA else len(_SPECTRA)):
        style = {**looks[name], "markersize": 4.5, "markevery": max(1, len(curves[name]) // 8)}
        layer, _, when = name.partition(" ")
        label = f"{LAYERS[layer]}, {when} training" if name in _SPECTRA else canvas.literal(name)
        axes.plot(np.arange(1, len(curves[name]) + 1), curves[name], label=label, linewidth=1.8, **style)
    axes.set_yscale("log")
    # What lies eight decades below the largest eigenvalue is no spread that a probe could use.
    top = max(np.nanmax(curve) for curve in curves.values())
    bottom = min(curve[curve > top * 1e-8].min(initial=top) for curve in curves.values())
    axes.set(ylim=(bottom / 2, top * 2), xlim=(1, max(2, *map(len, curves.values()))))
    axes.locator_params(axis="x", integer=True)
    canvas.dress(axes, x="rank of the eigenvalue", y="eigenvalue of the covariance (log scale)")
    axes.legend(frameon=False, handlelength=3.6)
    return canvas.finish(figure, path)


def _as_spectrum(name: str, values: Any) -> np.ndarray:
    curve = as_array(values, f"the spectrum {name!r}", shape="[dim]", dims=1)
    if not (curve > 0).any():
        wanted = f"the spectrum {name!r} to have a positive number at least"
        raise UsageError(f"Expected {wanted}, got {curve.tolist()!r:.80}.")
    return np.maximum(curve, np.nanmax(curve) * 1e-300)  # a zero would break the line on a log axis; NaN stays
