"""What an autopsy found inside a head, and what each transform of the views does to h and z."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hfproj.checking import checked
from hfproj.errors import UsageError
from hfproj.plots import canvas
from hfproj.plots.canvas import INK, TITLE, WIDTH, Figure, Target
from hfproj.results.inside import NAMES, Autopsy, Invariance, LayerFound, Moved

_FLOOR = 1e-8  # of the largest eigenvalue: below it there is no spread that a probe could use
_STILL = 1e-3  # of the distance of another image
_COLOURS = "viridis"  # along the network


@checked
def plot_autopsy(found: Autopsy | Mapping[str, Any], path: Target = None, *, width: float = 9.0) -> Figure:
    """Return a figure of a head, layer by layer: probes, ranks, spectra; with views, what is known of each transform.

    Bars of the probes are intervals of the difference to h, drawn about it. A ring marks where to cut, if it was
    confirmed.

    Args:
        found: What `hfproj.autopsy` returned, or its `to_dict`.
        path, width: File to write, whose suffix says the format (png, svg, pdf); width in inches, 4 to 40.

    Raises:
        HfprojError: If matplotlib is not installed.
        UsageError: If there are fewer than two layers, or it is something else.

    Example:
        >>> layer = {"dim": 8, "rankme": 3.0, "numerical_rank": 7, "condition": 9.0, "spectrum": [1.0, 0.1]}
        >>> layers = [{**layer, "scores": {}, "name": name} for name in ("h", "head.0", "z")]
        >>> [axes.get_title(loc="left") for axes in plot_autopsy({"layers": layers, "cuts": [], "protocol": {}}).axes]
        ['Directions in use', 'Spectrum, largest eigenvalue 1']
    """
    found = Autopsy.from_dict(found) if isinstance(found, Mapping) else found
    if len(found.layers) < 2:
        raise UsageError(f"Expected at least two layers, got {[layer.name for layer in found.layers]}.")
    drawn: list[Callable[[Any], None]] = [lambda axes: _ranks(axes, found), lambda axes: _spectra(axes, found.layers)]
    if any(layer.scores for layer in found.layers):
        drawn.insert(0, lambda axes: _probes(axes, found))
    if found.invariance is not None and found.invariance.moved:
        moved = found.invariance
        drawn.append(lambda axes: _known(axes, moved, [layer.name for layer in found.layers]))
    columns = 2 if width >= 7 else 1
    rows = -(-len(drawn) // columns)
    figure, axes = canvas.new_figure(width=width, height=3.4 * rows, rows=rows, columns=columns)
    for unused in axes[len(drawn) :]:
        unused.remove()
    for draw, panel in zip(drawn, axes):
        draw(panel)
    return canvas.finish(figure, path)


def _probes(axes: Any, found: Autopsy) -> None:
    names = [layer.name for layer in found.layers]
    probes = list(dict.fromkeys(probe for layer in found.layers for probe in layer.scores))
    style = canvas.styles(NAMES.get(probe, probe) for probe in probes)
    for number, probe in enumerate(probes):
        label = NAMES.get(probe, probe)
        of = {i: layer.scores[probe] for i, layer in enumerate(found.layers) if probe in layer.scores}
        x = np.array([*of]) + 0.08 * (number - (len(probes) - 1) / 2)
        y = np.array([score.accuracy for score in of.values()])
        over_h = np.array([score.over_h for score in of.values()])
        ends = np.abs(over_h[:, 1:] - over_h[:, :1])
        look = {**style[label], "markersize": 4.5, "linewidth": 1.6, "capsize": 2.5, "elinewidth": 1.0}
        axes.errorbar(x, y, yerr=ends.T, label=label, **look)
    kept = {}
    for cut in found.cuts:
        if cut.keep != "h" and cut.keep in names:
            number, where = probes.index(cut.probe), names.index(cut.keep)
            at = where + 0.08 * (number - (len(probes) - 1) / 2)
            kept[at] = found.layers[where].scores[cut.probe].accuracy
    if kept:
        ring = {"marker": "o", "markersize": 13, "markerfacecolor": "none", "markeredgecolor": INK, "linestyle": ""}
        axes.plot([*kept], [*kept.values()], label="keep up to here (confirmed)", **ring)
    axes.margins(y=0.25)
    canvas.name_ticks(axes, names)
    if "h" in names:  # behind it the head begins
        axes.axvline(names.index("h"), color="0.85", linewidth=6, zorder=0)
    axes.set_title("Accuracy; bars: interval of the difference to h", **TITLE)
    axes.legend(frameon=False, fontsize="small", loc="lower left")
    canvas.dress(axes, y="accuracy on held-out rows", grid="y")


def _ranks(axes: Any, found: Autopsy) -> None:
    x = np.arange(len(found.layers))
    axes.bar(x, [layer.dim for layer in found.layers], color="0.9", width=0.7, label="width", zorder=0.5)
    style = canvas.styles(["numerical rank", "RankMe"])
    for name, values in (
        ("numerical rank", [layer.numerical_rank for layer in found.layers]),
        ("RankMe", [layer.rankme for layer in found.layers]),
    ):
        axes.plot(x, values, label=name, **{**style[name], "markersize": 4.5, "linewidth": 1.6})
    canvas.log_scale(axes, "y")
    canvas.name_ticks(axes, [layer.name for layer in found.layers])
    axes.set_title("Directions in use", **TITLE)
    axes.legend(frameon=False, fontsize="small")
    canvas.dress(axes, y="number (log scale)", grid="y")


def _spectra(axes: Any, layers: list[LayerFound]) -> None:
    from matplotlib import colormaps

    colours = colormaps[_COLOURS](np.linspace(0, 0.88, len(layers)))
    for colour, layer, style in zip(colours, layers, ["-", "--", "-.", ":"] * len(layers)):
        values = np.array(layer.spectrum, dtype=np.float64)
        if not (values > 0).any():
            continue
        share = values / np.nanmax(values)
        axes.plot(np.arange(1, len(share) + 1), np.maximum(share, 1e-300), color=colour, linestyle=style,
                  linewidth=1.6, label=canvas.literal(layer.name))  # fmt: skip
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.set_ylim(_FLOOR, 2)
    axes.set_title("Spectrum, largest eigenvalue 1", **TITLE)
    axes.legend(frameon=False, fontsize="small")
    canvas.dress(axes, x="rank of the eigenvalue (log scale)", y="eigenvalue / largest (log scale)")


def _known(axes: Any, found: Invariance, names: list[str]) -> None:
    shown = [name for name in names if any(name in one.known for one in found.moved)]
    moved = _that_move(found)
    style = canvas.styles(one.transform for one in moved)
    for one in moved:
        known = [one.known[name][0] if name in one.known else np.nan for name in shown]
        look = {**style[one.transform], "markersize": 4.5, "linewidth": 1.4}
        axes.plot(np.arange(len(shown)), known, label=canvas.literal(one.transform), **look)
    axes.axhline(0.5, color=INK, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1.5)
    axes.annotate("chance", (1, 0.5), (-2, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                  ha="right", fontsize="x-small", color=INK)  # fmt: skip
    canvas.name_ticks(axes, shown)
    axes.set_title("What a linear probe reads of each transform", **TITLE)
    axes.set_ylim(0.2, 1.03)  # the legend stands below chance, where no line is
    axes.legend(frameon=False, fontsize="x-small", ncols=4, loc="lower center")
    canvas.dress(axes, y="accuracy of telling two strengths", grid="y")


def _that_move(found: Invariance) -> list[Moved]:
    """Return the transforms that move h; all of them where none does."""
    return [one for one in found.moved if one.distance.get("h", 1.0) > _STILL] or found.moved


@checked
def plot_invariance(found: Invariance | Mapping[str, Any], path: Target = None, *, width: float = WIDTH) -> Figure:
    """Return a figure of transforms of the views: how far h and z move, and what a linear probe still reads of each.

    Transforms that change nothing (a hue of grey images) are left out. Dashed lines: another image, and chance.

    Args:
        found: What `hfproj.invariance_report` returned, or its `to_dict`.
        path, width: File to write, whose suffix says the format (png, svg, pdf); width in inches, 4 to 40.

    Raises:
        HfprojError: If matplotlib is not installed.
        UsageError: If there is no transform, or it is something else.

    Example:
        >>> by_layer, known = {"h": 0.4, "z": 0.1}, {"h": [0.9, 0.8, 1.0], "z": [0.6, 0.5, 0.7]}
        >>> flip = {"transform": "flip", "ends": ["without", "with"], "distance": by_layer, "cosine": by_layer}
        >>> flip |= {"known": known, "lost": [0.3, 0.2, 0.4], "degeneracy": None}
        >>> figure = plot_invariance({"moved": [flip], "protocol": {}})
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['flip']
    """
    found = Invariance.from_dict(found) if isinstance(found, Mapping) else found
    if not found.moved:
        raise UsageError("There is no transform to draw.")
    moved = _that_move(found)
    names = [one.transform for one in moved]
    columns = 2 if width >= 6 else 1
    height = (1.3 + 0.32 * len(names)) * (3 - columns)
    figure, axes = canvas.new_figure(width=width, height=height, rows=3 - columns, columns=columns)
    y, style = np.arange(len(names))[::-1], canvas.styles(["h", "z"])
    for number, layer in enumerate(("h", "z")):
        at = y + 0.12 * (1 - 2 * number)
        look = {**style[layer], "linestyle": "", "markersize": 5}
        axes[0].plot([one.distance.get(layer, np.nan) for one in moved], at, **look)
        known = np.array([one.known.get(layer, (np.nan,) * 3) for one in moved])
        ends = np.abs(known[:, 1:].T - known[:, 0])
        line = axes[1].errorbar(known[:, 0], at, xerr=ends, elinewidth=1.2, capsize=2, **look)
        line.set_label(canvas.LAYERS[layer])
    axes[0].axvline(1, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
    axes[0].set_xlim(left=0)
    axes[1].set_xlim(left=min(0.45, axes[1].get_xlim()[0]))
    axes[1].axvline(0.5, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
    for panel in axes:
        panel.set_yticks(y, [canvas.literal(name) for name in names])
        panel.set_ylim(-0.6, len(names) - 0.4)
    canvas.dress(axes[0], x="move / distance of another image (1)", grid="x")
    canvas.dress(axes[1], x="read by a probe (chance 0.5)", grid="x")
    handles, labels = axes[1].get_legend_handles_labels()
    canvas.legend(figure, dict(zip(labels, handles)))
    return canvas.finish(figure, path)
