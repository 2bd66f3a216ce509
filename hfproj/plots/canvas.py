"""What all figures share: the canvas, colours, line styles and markers, and writing that gives the same bytes."""

import io
import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfproj.checking import checked
from hfproj.errors import HfprojError, SaveError, UsageError
from hfproj.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # matplotlib is imported when a figure is drawn
    Figure = Any

Target = str | os.PathLike | None  # where to write
WIDTH = 6.4  # inches
INK = "0.15"
TITLE: dict[str, Any] = {"loc": "left", "fontsize": "medium"}  # of a panel
_LONGEST = 40  # letters of a name
LAYERS = {"h": "representation h", "z": "projection z"}

# Okabe & Ito's colours, told apart by colour-blind readers; line styles and markers tell the curves apart in print.
_STYLES: list[dict[str, Any]] = [
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": (0, (6, 1.6)), "marker": "s"},
    {"color": "#009E73", "linestyle": (0, (1, 1.4)), "marker": "^"},
    {"color": "#CC79A7", "linestyle": (0, (6, 1.6, 1.2, 1.6)), "marker": "D"},
    {"color": "#E69F00", "linestyle": (0, (3, 1.2)), "marker": "v"},
    {"color": "#56B4E9", "linestyle": (0, (9, 2)), "marker": "P"},
    {"color": "#000000", "linestyle": (0, (1, 3)), "marker": "X"},
]
_FIXED = dict(zip(("h", "z", "backbone", "head"), _STYLES))


def new_figure(*, width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    """Return a figure of `rows` × `columns` panels, sizes in inches, and its axes row by row."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        from hfproj.plots.shown import Figure
    except ImportError as error:
        raise HfprojError("Drawing needs matplotlib: pip install hfproj[plots]") from error
    if not 4 <= width <= 40:
        raise UsageError(f"Expected a width between 4 and 40 inches, got {width}.")
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def panels(count: int, *, width: float, height: float) -> tuple[Any, list[Any]]:
    """Return a figure of `count` panels, as many side by side as stay readable; `height` inches each."""
    if not 4 <= width <= 40:
        raise UsageError(f"Expected a width between 4 and 40 inches, got {width}.")
    columns = max(1, min(count, int(width / 2.6)))
    rows = -(-count // columns)
    figure, axes = new_figure(width=width, height=height * rows + 0.3, rows=rows, columns=columns)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def dress(axes: Any, *, x: str = "", y: str = "", grid: str = "both", zero_line: bool = False) -> None:
    """Name the axes, draw a light grid behind the data, leave out the frame's upper and right side."""
    axes.set(**{name: text for name, text in (("xlabel", x), ("ylabel", y)) if text})
    axes.grid(True, which="major", axis=grid, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if zero_line:
        axes.axhline(0, color=INK, linewidth=0.9, zorder=1.5)


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return colour, line style and marker of each name; h, z, backbone and head look the same in every figure."""
    names = list(names)
    fixed = {name: _FIXED[name] for name in names if name in _FIXED}
    free = [style for style in _STYLES if style not in fixed.values()]
    count = len(free)  # colours and markers go round at different speeds, so that a pair returns late only
    others = ({**free[i % count], "marker": free[(i + i // count) % count]["marker"]} for i in range(len(names)))
    return {name: fixed[name] if name in fixed else next(others) for name in names}


def name_ticks(axes: Any, names: Sequence[str], *, first: int = 0, wrap: int = 16) -> None:
    """Write names below the axis, tilted where they would run into each other: upright where they are many."""
    axes.set_xticks(range(first, first + len(names)), [literal(name, wrap=wrap) for name in names])
    if sum(map(len, map(str, names))) <= 9 * axes.figure.get_figwidth():
        return
    labels = axes.get_xticklabels()
    thickness = 1.2 * labels[0].get_fontsize() * max(label.get_text().count("\n") + 1 for label in labels)
    points_apart = 72 * axes.figure.get_figwidth() * 0.85 / len(labels)
    tilted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    if points_apart < thickness / math.sin(math.radians(30)):
        tilted = {"rotation": 90, "ha": "center", "va": "top", "fontsize": "small"}
    for label in labels:
        label.set(**tilted)


def literal(text: object, *, wrap: int = 0) -> str:
    """Return a user's text as it is drawn: `$` starts no formula, at most 40 characters, `wrap` of them in a line."""
    shown = str(text)
    shown = shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"
    return (textwrap.fill(shown, wrap) if wrap else shown).replace("$", r"\$")


def layer_name(name: str) -> str:
    """Return what a layer is called in a figure."""
    return LAYERS.get(name, literal(name))


def legend(figure: Any, names: Mapping[str, Any], *, columns: int = 0) -> None:
    """Write one legend above all panels: text → handle, in as many columns as fit the width, `columns` at most."""
    labels = list(names)
    fitting = int(12.5 * figure.get_figwidth() / (max(map(len, labels)) + 6))  # letters an inch, letters of a handle
    columns = max(1, min(columns or max(2, int(figure.get_figwidth() / 1.6)), len(labels), fitting))
    look = {"loc": "outside upper center", "frameon": False, "handlelength": 3.2}
    figure.legend(list(names.values()), labels, ncols=columns, **look)


def whole_numbers(axes: Any, x: np.ndarray) -> None:
    """Put the ticks of x at whole numbers, where x is whole; at every one of them if there are few."""
    from matplotlib.ticker import MaxNLocator

    x = np.unique(x[np.isfinite(x)])
    whole = (x == np.round(x)).all()
    if whole and len(x) <= 8:  # as many ticks fit in any width
        axes.set_xticks(x, [f"{value:.0f}" for value in x])
    elif whole:
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))


def log_scale(axes: Any, which: str) -> None:
    """Make the x or y axis logarithmic, with ticks that read as numbers where it spans less than two decades."""
    from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, NullFormatter

    getattr(axes, f"set_{which}scale")("log")
    low, high = sorted(getattr(axes, f"get_{which}lim")())
    axis = getattr(axes, f"{which}axis")
    axis.set_minor_formatter(NullFormatter())
    if high < 100 * low:
        axis.set_major_locator(AutoLocator() if high < 5 * low else LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def as_array(values: Any, what: str, *, shape: str, dims: int) -> np.ndarray:
    """Return nested lists, an array or a tensor of `dims` dimensions in float64; None becomes NaN."""
    values = values.detach().cpu().numpy() if hasattr(values, "detach") else values
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"Expected {what} as numbers {shape}: {error}.") from error
    if array.ndim != dims or array.size == 0:
        raise UsageError(f"Expected {what} as numbers {shape}, got shape {list(array.shape)}.")
    return array


def as_mapping(value: Any, what: str) -> dict[str, Any]:
    """Return a mapping with an entry at least, its keys as text."""
    if not isinstance(value, Mapping) or not value:
        raise UsageError(f"Expected {what}, got {'an empty one' if value == {} else repr(value)[:80]}.")
    return {str(key): entry for key, entry in value.items()}


def finish(figure: Figure, path: Target) -> Figure:
    """Write the figure if a path is given, and return it."""
    if path is not None:
        path = Path(path)
        kind = path.suffix.lstrip(".").lower() or "png"
        if kind not in _DATES:
            raise UsageError(f"Expected a name that ends in .png, .svg or .pdf, got {path.name!r}.")
        try:
            write_atomic(path, picture(figure, kind))
        except OSError as error:
            what = f"The picture can't be written to {str(path)!r}"
            raise SaveError(f"{what}: {error.strerror}; name another place.") from error
    return figure


_DATES: dict[str, dict[str, None]] = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


@checked
def picture(figure: Figure, kind: str = "svg") -> bytes:
    """Return the figure as a png, svg or pdf; the same figure gives the same bytes."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "hfproj"}):
        figure.savefig(buffer, format=kind, metadata=_DATES[kind])
    return buffer.getvalue()
