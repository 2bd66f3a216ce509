"""What a model saw and made of images: its views, nearest neighbours before and after training, a map of h.

Pixels are in [0, 1] (or whole numbers to 255) with the channels last; one channel is drawn in grey.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hfproj.checking import checked
from hfproj.errors import UsageError
from hfproj.plots import canvas
from hfproj.plots.canvas import TITLE, WIDTH, Figure, Target, as_array, as_mapping

RIGHT, WRONG = "#0072B2", "#D55E00"  # Okabe and Ito's blue and vermilion; a sign and the line tell them apart in print
_MARKS = {True: (RIGHT, "-", "✓"), False: (WRONG, (0, (2.5, 1.2)), "✗")}
_MOST = 32  # pictures in a row or column: more would be dots
_GROUPS = 12  # of a map: more can't be told apart


@checked
def plot_views(columns: Mapping[str, Any], path: Target = None, *, width: float = WIDTH) -> Figure:
    """Return a figure of images side by side, a row an image: the image itself and its views as the model gets them.

    Args:
        columns: Name ("image", "view 1", "view 2") → pixels `[images, height, width, channels]`, the same images in
            each; sizes may differ.
        path, width: File to write, whose suffix says the format (png, svg, pdf); width in inches, 4 to 40.

    Raises:
        HfprojError: If matplotlib is not installed.
        UsageError: If there is no column, one has another number of images, or pixels are outside of [0, 1].

    Example:
        >>> figure = plot_views({"image": np.zeros((2, 4, 4, 3)), "view": np.ones((2, 4, 4, 3))})
        >>> len(figure.axes)
        4
    """
    pixels = {name: _as_pixels(value, name) for name, value in as_mapping(columns, "columns: name → pixels").items()}
    counts = {len(images) for images in pixels.values()}
    if len(counts) != 1 or len(pixels) > _MOST or max(counts) > _MOST:
        given = ", ".join(f"{len(images)} of {name!r}" for name, images in pixels.items())
        raise UsageError(f"Expected the same images in each of at most {_MOST} columns, {_MOST} at most, got {given}.")
    rows = counts.pop()
    side = (width - 0.2) / len(pixels)
    figure, axes = canvas.new_figure(width=width, height=side * rows + 0.35, rows=rows, columns=len(pixels))
    for i, panel in enumerate(axes):
        row, column = divmod(i, len(pixels))
        name = list(pixels)[column]
        _show(panel, pixels[name][row])
        if row == 0:
            panel.set_title(canvas.literal(name), **TITLE)
    return canvas.finish(figure, path)


@checked
def plot_neighbours(
    queries: Any, neighbours: Mapping[str, Any], path: Target = None, *, right: Mapping[str, Any] | None = None,
    names: Sequence[str] = (), width: float = WIDTH,
) -> Figure:  # fmt: skip
    """Return a gallery: each query, and beside it its nearest neighbours, a row for each of several representations.

    Args:
        queries: Pixels `[queries, height, width, channels]`.
        neighbours: Name ("before", "after") → pixels `[queries, k, height, width, channels]`, nearest first.
        right: The same names → True where a neighbour has the label of its query `[queries, k]`. Right ones get a blue
            frame and ✓, wrong ones a dashed red frame and ✗; no mark where it is None. None: no marks.
        names: What the queries are called, e.g. their labels.
        path, width: File to write, whose suffix says the format (png, svg, pdf); width in inches, 4 to 40.

    Raises:
        HfprojError: If matplotlib is not installed.
        UsageError: If shapes do not fit, there is no query, or pixels are outside of [0, 1].

    Example:
        >>> found = {"before": np.zeros((1, 5, 4, 4, 3)), "after": np.ones((1, 5, 4, 4, 3))}
        >>> figure = plot_neighbours(np.zeros((1, 4, 4, 3)), found, names=["seven"])
        >>> [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
        ['before', 'after']
    """
    shown = _as_pixels(queries, "queries")
    galleries = as_mapping(neighbours, "neighbours: name → pixels")
    found = {name: _as_pixels(value, name, dims=5) for name, value in galleries.items()}
    shapes = {images.shape[:2] for images in found.values()}
    if len(shapes) != 1 or {len(shown)} != {shape[0] for shape in shapes} or len(shown) > _MOST:
        given = f"got {len(shown)} queries, and neighbours {sorted(shapes)}"
        raise UsageError(f"Expected k neighbours of each of at most {_MOST} queries under each name, {given}.")
    [(count, k)] = shapes
    marks = {name: _as_marks((right or {}).get(name), name, (count, k)) for name in found}
    side = (width - 0.55) / (k + 1)
    height = len(found) * count * side * 1.04 + 0.35
    figure, axes = canvas.new_figure(width=width, height=height, rows=len(found) * count, columns=k + 1)
    for i, panel in enumerate(axes):
        row, column = divmod(i, k + 1)
        query, which = divmod(row, len(found))
        name = list(found)[which]
        if column == 0:
            _query(panel, shown[query] if which == 0 else None, canvas.literal(names[query]) if names else "")
            panel.set_ylabel(canvas.literal(name), fontsize="small")
            continue
        mark = marks[name]
        _show(panel, found[name][query, column - 1], None if mark is None else mark[query, column - 1])
        if row == 0:
            panel.set_title("nearest" if column == 1 else str(column), fontsize="small")
    axes[0].set_title("query", fontsize="small")
    return canvas.finish(figure, path)


@checked
def plot_map(
    maps: Mapping[str, Any], path: Target = None, *, labels: Sequence[str] | None = None, width: float = WIDTH
) -> Figure:
    """Return maps of a representation in two dimensions, a panel each, points coloured and shaped by label.

    Args:
        maps: Name ("before training, PCA") → points `[rows, 2]`, the same rows in each.
        labels: What each row is; the twelve most frequent are told apart by colour and shape, others are grey. None:
            all points look alike.
        path, width: File to write, whose suffix says the format (png, svg, pdf); width in inches, 4 to 40.

    Raises:
        HfprojError: If matplotlib is not installed.
        UsageError: If there is no map, points are not finite pairs, or there is another number of labels than rows.

    Example:
        >>> figure = plot_map({"before": [[0.0, 0.0], [1.0, 1.0]]}, labels=["cat", "dog"])
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['cat', 'dog']
    """
    points = {}
    for name, value in as_mapping(maps, "maps: name → points").items():
        points[name] = as_array(value, f"the map {name!r}", shape="[rows, 2]", dims=2)
        if points[name].shape[1] != 2 or not np.isfinite(points[name]).all():
            raise UsageError(f"Expected the map {name!r} as finite points [rows, 2], got {points[name].shape}.")
    counts = {len(own) for own in points.values()}
    if len(counts) != 1 or (labels is not None and {len(labels)} != counts):
        given = f"maps of {sorted(counts)} rows and {'no' if labels is None else len(labels)} labels"
        raise UsageError(f"Expected the same rows in all maps, and a label for each, got {given}.")
    columns = min(len(points), max(2, int(width / 2.6)))  # before and after side by side, however narrow
    rows, side = -(-len(points) // columns), width / columns
    figure, axes = canvas.new_figure(width=width, height=rows * (side + 0.15) + 0.5, rows=rows, columns=columns)
    looks, handles = _looks(labels), {}
    for unused in axes[len(points) :]:
        unused.remove()
    for panel, (name, own) in zip(axes, points.items()):
        for label, (chosen, look) in looks.items():
            handles[canvas.literal(label)] = panel.scatter(
                *own[chosen].T, s=3.2 * side, linewidths=0.3, alpha=0.8, **look
            )
        panel.set_title(textwrap.fill(canvas.literal(name), int(15 * side)), loc="left", fontsize="small")
        panel.set(xticks=[], yticks=[], aspect="equal")  # what the axes are says the name, and their units mean nothing
        panel.set_adjustable("datalim")
        panel.spines[:].set(color="0.8", linewidth=0.6)
    if labels is not None:
        fitting = int(12.5 * figure.get_figwidth() / (max(map(len, handles)) + 5))  # letters an inch, those of a handle
        look = {"loc": "outside upper center", "frameon": False, "handletextpad": 0.2, "columnspacing": 1.0}
        figure.legend(list(handles.values()), list(handles), ncols=max(1, min(10, fitting, len(handles))), **look)
    return canvas.finish(figure, path)


def _looks(labels: Sequence[str] | None) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return name → rows and look of their points; the rarer labels together, and below the others."""
    if labels is None:
        return {"": (slice(None), {"color": "#0072B2", "marker": "o"})}
    given = np.asarray([str(label) for label in labels])
    names, counts = np.unique(given, return_counts=True)
    frequent = names[np.argsort(-counts, kind="stable")][:_GROUPS]
    kept = sorted(frequent, key=lambda name: (len(name), name) if name.isdigit() else (99, name))  # 2 before 10
    looks: dict[str, tuple[Any, dict[str, Any]]] = {}
    if len(kept) < len(names):
        looks["others"] = (~np.isin(given, kept), {"color": "0.75", "marker": "."})
    style = canvas.styles(f"label {name}" for name in kept)  # "h" and "z" have looks of their own
    for name in kept:
        own = style[f"label {name}"]
        looks[str(name)] = (given == name, {"color": own["color"], "marker": own["marker"]})
    return looks


def _as_pixels(values: Any, what: str, *, dims: int = 4) -> np.ndarray:
    """Return pixels in [0, 1], `[…, height, width, 1 or 3]`."""
    values = values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
    whole = values.dtype.kind in "ui"
    shape = "[images, height, width, 1 or 3]" if dims == 4 else "[queries, k, height, width, 1 or 3]"
    pixels = as_array(values, f"the pixels of {what!r}", shape=shape, dims=dims) / (255 if whole else 1)
    if pixels.shape[-1] not in (1, 3) or not ((pixels >= -1e-6) & (pixels <= 1 + 1e-6)).all():
        found = f"shape {list(pixels.shape)} from {np.nanmin(pixels):.3g} to {np.nanmax(pixels):.3g}"
        raise UsageError(f"Expected the pixels of {what!r} in [0, 1] {shape}, got {found}; undo mean and std first.")
    return np.clip(pixels, 0, 1)


def _as_marks(values: Any, name: str, shape: tuple[int, int]) -> np.ndarray | None:
    if values is None:
        return None
    marks = np.asarray(values, dtype=object)
    if marks.shape != shape or not {*marks.flat} <= {True, False, None}:
        what = f"True, False or None {list(shape)}"
        raise UsageError(f"Expected right and wrong of {name!r} as {what}, got {list(marks.shape)}.")
    return np.array([[None if mark is None else bool(mark) for mark in row] for row in marks], dtype=object)


def _query(axes: Any, image: np.ndarray | None, name: str) -> None:
    """Show a query in its first row; below it, its name."""
    if image is not None:
        return _show(axes, image)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.text(0.5, 0.96, name, ha="center", va="top", fontsize="small", transform=axes.transAxes, wrap=True)
    return None


def _show(axes: Any, image: np.ndarray, right: bool | None = None) -> None:
    grey = image.shape[-1] == 1
    axes.imshow(image[..., 0] if grey else image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    if right is None:
        axes.spines[:].set(color="0.6", linewidth=0.6)
        return
    color, line, sign = _MARKS[right]
    axes.spines[:].set(color=color, linestyle=line, linewidth=2.2)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.9}
    axes.text(
        0.96, 0.95, sign, color=color, fontsize=8, ha="right", va="top", transform=axes.transAxes, bbox=box,
        fontweight="bold", fontfamily="DejaVu Sans",
    )  # fmt: skip
